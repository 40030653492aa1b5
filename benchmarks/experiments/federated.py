"""Federated reassembly, simulated: clients with networks of four kinds on unequal shares.

``python -m benchmarks.experiments.reassembly --federated [--quick]`` runs it.

In the manner of pFedHR (arXiv 2308.08643): each client trains a network of its own on a share of
the training images that a Dirichlet distribution draws, class by class. In each round the server
parts the clients at random into groups of all kinds, and reassembles the networks of each group by
public images without labels; each client gets the reassembled network whose outputs on them are the
most similar to its own, distils it into its network, and trains further. The server sees no labels
and no client's images. Beside it stand the same clients without a server, trained as long, and the
clients' networks of one kind fused by ``fuse`` at the end.

What differs from the paper: stitches are fitted in closed form and never trained, the whole network
of a group is searched by :func:`clafusion.reassemble`, and clients keep their architecture, into
which they distil.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.datasets import accuracy, logits
from benchmarks.experiments.experiment import trained
from clafusion import ClafusionError, distill, fuse, reassemble

QUICK: dict[str, Any] = {
    "clients": 8,
    "rounds": 3,
    "epochs": 2,
    "first_epochs": 4,
    "distilled_epochs": 1,
    "concentration": 0.5,
    "public": 600,
    "blocks": 3,
    "candidates": 8,
}
FULL: dict[str, Any] = {
    "clients": 20,
    "rounds": 10,
    "epochs": 5,
    "first_epochs": 10,
    "distilled_epochs": 3,
    "concentration": 0.5,
    "public": 2000,
    "blocks": 3,
    "candidates": 24,
}
LEAST = 20  # images of a client's share

Images = tuple[Tensor, Tensor]


def shares(labels: Tensor, clients: int, concentration: float, seed: int) -> list[Tensor]:
    """Return which images each client has: of each class a share, from a Dirichlet distribution.

    Shares are drawn anew until each client has a few images.
    """
    torch.manual_seed(seed)
    weights = torch.full((clients,), concentration)
    while True:
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in labels.unique():
            places = torch.nonzero(labels == label).squeeze(1).cpu()
            places = places[torch.randperm(len(places))]
            ends = torch.distributions.Dirichlet(weights).sample().cumsum(0) * len(places)
            cuts = [round(float(one)) for one in ends[:-1]]
            for own, part in zip(parts, places.tensor_split(cuts), strict=True):
                own.append(part)
        found = [torch.cat(one).sort().values for one in parts]
        if min(map(len, found)) >= LEAST:
            return found


def own_accuracy(model: nn.Module, test: Images, seen: Tensor) -> float:
    """Return the accuracy where classes come as often as among the labels a client has seen."""
    right = (logits(model, test[0]).argmax(1) == test[1]).double()
    often = torch.bincount(seen, minlength=10).double()
    of_class = torch.bincount(test[1], weights=right, minlength=10)
    of_class = of_class / torch.bincount(test[1], minlength=10).clamp(min=1)
    return float((of_class * often).sum() / often.sum())


def matched(client: nn.Module, candidates: Sequence[nn.Module], public: Tensor) -> nn.Module:
    """Return the candidate whose outputs have the largest cosine with a client's, on average."""
    own = logits(client, public)
    alike = [float(F.cosine_similarity(own, logits(one, public)).mean()) for one in candidates]
    return candidates[alike.index(max(alike))]


def a_round(
    clients: Sequence[nn.Module],
    shown: Sequence[Images],
    public: Tensor,
    settings: Mapping[str, Any],
    kinds: int,
    adam: Callable[..., Any],
    seed: int,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the clients after a round, and what the server has given back to each."""
    order = torch.randperm(len(clients) // kinds, generator=torch.Generator().manual_seed(seed))
    candidates = []
    for i in range(len(order)):
        # Client j is of kind j % kinds; of each kind another one joins.
        group = [kind + kinds * int(order[(i + kind) % len(order)]) for kind in range(kinds)]
        found = reassemble(
            {f"client {j}": clients[j] for j in group},
            public,
            blocks=settings["blocks"],
            candidates=settings["candidates"],
            seed=seed,
        )
        print(f"reassembled {found.tried[0].text}", flush=True)
        candidates.append(found.model)
    given = [matched(one, candidates, public) for one in clients]
    after = []
    for client, teacher, own in zip(clients, given, shown, strict=True):
        taught = distill(
            client,
            teacher,
            own,
            alpha=0.5,
            temperature=2.0,
            held_out=0,
            norms="batch",
            epochs=settings["distilled_epochs"],
            optimizer=adam,
            batch_size=128,
            seed=seed,
        ).model
        after.append(trained(taught, *own, settings["epochs"], seed, optimizer=adam))
    return after, given


def fused(
    clients: Sequence[nn.Module], public: Tensor, kinds: int, seed: int
) -> dict[int, nn.Module]:
    """Return for each kind its clients' networks fused, where they can be."""
    found = {}
    for kind in range(kinds):
        try:
            found[kind] = fuse(list(clients[kind::kinds]), public, seed=seed).model.eval()
        except ClafusionError as error:
            print(f"kind {kind} cannot be fused: {error}", flush=True)
    return found


def federated(
    name: str,
    families: Mapping[str, Callable[[], nn.Module]],
    train: Images,
    test: Images,
    settings: Mapping[str, Any],
    adam: Callable[..., Any],
    seed: int,
) -> dict[str, float]:
    """Return the clients' mean accuracies: on all test images, and where classes are their own."""
    makers = list(families.values())
    public = train[0][-settings["public"] :]
    images, labels = (one[: -settings["public"]] for one in train)
    places = shares(labels, settings["clients"], settings["concentration"], seed)
    shown = [(images[one.to(images.device)], labels[one.to(labels.device)]) for one in places]
    clients = []
    for i, own in enumerate(shown):
        torch.manual_seed(seed + 1000 * i)
        start = makers[i % len(makers)]().to(images.device)
        epochs = settings["first_epochs"]
        clients.append(trained(start, *own, epochs, seed + 1000 * i, optimizer=adam))
    found: dict[str, float] = {}

    def note(row: str, models: Sequence[nn.Module]) -> None:
        overall = [accuracy(one, *test) for one in models]
        own = [own_accuracy(one, test, of) for one, (_, of) in zip(models, shown, strict=True)]
        found[f"{name}: {row}, all classes"] = sum(overall) / len(overall)
        found[f"{name}: {row}, own classes"] = sum(own) / len(own)
        figures = [100 * found[f"{name}: {row}, {which} classes"] for which in ("all", "own")]
        print(f"{name}: {row:40s} {figures[0]:6.2f} % {figures[1]:6.2f} %", flush=True)

    note("clients before the first round", clients)
    alone = list(clients)
    for i in range(settings["rounds"]):
        clients, given = a_round(clients, shown, public, settings, len(makers), adam, seed + i)
        epochs = settings["epochs"] + settings["distilled_epochs"]
        alone = [
            trained(one, *own, epochs, seed + i, optimizer=adam)
            for one, own in zip(alone, shown, strict=True)
        ]
        last = i == settings["rounds"] - 1
        if i == 0 or last:
            note(f"reassembled in round {i + 1}", given)
            note(f"clients after round {i + 1}", clients)
    note("clients without a server", alone)
    together = torch.stack([logits(one, test[0]).softmax(1) for one in clients]).mean(0)
    found[f"{name}: clients side by side"] = float((together.argmax(1) == test[1]).double().mean())
    for kind, model in fused(clients, public, len(makers), seed).items():
        found[f"{name}: clients of kind {list(families)[kind]}, fused"] = accuracy(model, *test)
    return found
