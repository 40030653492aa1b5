"""Every architecture of the suite is either traced rightly or refused by name.

The permutations here are applied by code of its own, from the documented axes only, so that a
mistake of the library's own verification would show.
"""

import copy
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clafusion.errors import GraphVerificationError, UnsupportedOpError
from clafusion.tracing.model import ChannelGroup
from clafusion.tracing.trace import trace
from tests.support import architectures
from tests.support.architectures import ARCHITECTURES, Inputs, call

GRAPHS = "torch_geometric"
"""The library whose networks are in the suite where it is installed."""
if find_spec(GRAPHS) is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        from tests.support import graph_architectures

    assert graph_architectures.SOURCE == GRAPHS

PINNED = {
    "An operation that nobody knows",
    "Bilinear pooling (outer product)",
    "Channel attention (scores between channels)",
    "Channels chosen by the input",
    "Channels sorted",
    "Features sampled on a grid",
    "Soft mixture of experts",
    "Weight read as a layer and as a table",
    "Weights made by a network (hypernetwork)",
    "Maxout over neighbouring channels",
}
"""What has channels that keep their places although others would do as well."""

REFUSALS = (UnsupportedOpError, GraphVerificationError)

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep these tiny networks on one thread: on a busy machine waking others costs far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that is one single cycle: it leaves no channel in place."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty(size, dtype=torch.int64)
    permutation[order] = order.roll(1)
    return permutation


def transposition(size: int, generator: torch.Generator) -> Tensor:
    """Return a permutation that swaps two random channels."""
    first, second = torch.randperm(size, generator=generator)[:2]
    permutation = torch.arange(size)
    permutation[first], permutation[second] = second, first
    return permutation


def permute(
    model: nn.Module, group: ChannelGroup, permutation: Tensor, omit: int | None = None
) -> None:
    """Permute a group in place, flat element by flat element, from the documented axes."""
    entries = dict(model.named_parameters(remove_duplicate=False))
    entries.update(model.named_buffers(remove_duplicate=False))
    for i, group_axis in enumerate(group.axes):
        if i == omit:
            continue
        use = group_axis.use
        tensor = entries[use.parameter]
        elements = torch.arange(tensor.numel())
        view = elements.as_strided(use.size, use.stride, use.offset).movedim(group_axis.axis, 0)
        source = elements.clone()
        for channel in range(group.size):
            moved = int(permutation[channel])
            for target_place, source_place in zip(
                group_axis.positions[channel].tolist(),
                group_axis.positions[moved].tolist(),
                strict=True,
            ):
                source[view[target_place].reshape(-1)] = view[source_place].reshape(-1)
        with torch.no_grad():
            tensor.copy_(tensor.reshape(-1)[source].view(tensor.shape))


def widen(inputs: Inputs) -> Inputs:
    """Return the inputs in float64."""

    def wide(value: Any) -> Any:
        return value.double() if torch.is_floating_point(value) else value

    if isinstance(inputs, Tensor):
        return wide(inputs)
    if isinstance(inputs, tuple):
        return tuple(wide(value) for value in inputs)
    return {name: wide(value) for name, value in inputs.items()}


def difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest change of an output, relative to its largest magnitude."""
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        scale = max(float(reference.double().abs().max()), 1e-30)
        worst = max(worst, float((output.double() - reference.double()).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verified_or_refused(name: str) -> None:
    entry = ARCHITECTURES[name]
    model, inputs = entry.build()
    if entry.outcome == "refused":
        with pytest.raises(REFUSALS) as refusal:
            trace(model, inputs)
        assert len(str(refusal.value)) > 40  # it says what and where
        assert f"| {name} | refused ({type(refusal.value).__name__}) | | |" in PAGE
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = trace(model, inputs)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    if entry.channels is not None:
        assert tuple(sorted(one.size for one in graph.groups)) == entry.channels
    assert bool(graph.pinned) == (name in PINNED)
    assert architectures.row(name, graph.groups) in PAGE

    if not entry.is_single:
        model, inputs = model.double(), widen(inputs)
    expected = call(model, inputs)
    assert all(output.isfinite().all() for output in expected)
    generator = torch.Generator().manual_seed(20260)
    together = copy.deepcopy(model)
    for group in graph.groups:
        if group.size == 1:
            continue
        cycled = cycle(group.size, generator)
        permute(together, group, cycled)
        for permutation in (cycled, transposition(group.size, generator)):
            alone = copy.deepcopy(model)
            permute(alone, group, permutation)
            assert difference(call(alone, inputs), expected) <= entry.tolerance, group.name
    assert difference(call(together, inputs), expected) <= entry.tolerance


def test_the_documentation_has_the_suite_and_nothing_else() -> None:
    table = PAGE.partition("| Architecture | Outcome |")[2].partition("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    if find_spec(GRAPHS) is None:  # then its networks are not in the suite, but on the page
        assert len(rows) > len(ARCHITECTURES)
        outcomes = ["refused" if one[1].startswith("refused") else "verified" for one in rows]
        rows = [one for one in rows if GRAPHS not in one[0]]
    else:
        outcomes = [one.outcome for one in ARCHITECTURES.values()]
    assert [one[0][2:] for one in rows] == list(ARCHITECTURES)
    verified, refused = outcomes.count("verified"), outcomes.count("refused")
    assert f"{verified} architectures are verified, {refused} are refused" in PAGE
    numbers = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"verified, refused, silently wrong | {verified}, {refused}, 0 |" in numbers


# The class that wins does not change with every small error.
BLIND = {"Only the predicted class is returned"}
MOVING = [
    name
    for name, entry in ARCHITECTURES.items()
    if entry.outcome == "verified" and entry.channels != () and name not in BLIND
]


@pytest.mark.parametrize("name", MOVING)
def test_permuting_less_shows(name: str) -> None:
    """The permutations would reveal a axis that was left out: the suite is not blind."""
    entry = ARCHITECTURES[name]
    model, inputs = entry.build()
    graph = trace(model, inputs, verify=False)
    if not entry.is_single:
        model, inputs = model.double(), widen(inputs)
    expected = call(model, inputs)
    generator = torch.Generator().manual_seed(31)
    for group in graph.groups:
        if group.size == 1:  # moves with its whole head only
            continue
        cycled = cycle(group.size, generator)
        # Some axes cannot show (a bias before a norm, of a key); one of them must.
        changes = []
        for omit in range(len(group.axes)):
            changed = copy.deepcopy(model)
            permute(changed, group, cycled, omit=omit)
            changes.append(difference(call(changed, inputs), expected))
            if changes[-1] > 1e3 * entry.tolerance:
                break
        assert max(changes) > 1e3 * entry.tolerance, group.name


def test_zero_weights_hide_nothing() -> None:
    """A group inside a branch that a zero gate closes must hold when the gate opens, too."""
    model, inputs = architectures.zero_gate()
    try:
        graph = trace(model, inputs)
    except REFUSALS:
        return
    model, inputs = model.double(), widen(inputs)
    model.gate.data.fill_(1.0)
    expected = call(model, inputs)
    generator = torch.Generator().manual_seed(5)
    for group in graph.groups:
        changed = copy.deepcopy(model)
        permute(changed, group, cycle(group.size, generator))
        assert difference(call(changed, inputs), expected) <= 1e-9, group.name


def test_the_suite_is_large_and_covers_other_peoples_models() -> None:
    sources = [entry.source for entry in ARCHITECTURES.values()]
    assert sources.count("suite") >= 100
    assert sources.count("transformers") >= 20


class Mirrored(nn.Module):
    """Features and the same mirrored, joined by an operation whose first operand is fixed."""

    def __init__(self, join):
        super().__init__()
        self.join, self.enter, self.head = join, nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = self.enter(x)
        return self.head(self.join(x[:, :1], h, h.flip(1)))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, h, mirrored: torch.where(x < 0.5, h, mirrored),
        lambda x, h, mirrored: torch.addcmul(x, h, mirrored),
    ],
    ids=["where", "addcmul"],
)
def test_operands_behind_a_fixed_one_move_together(join):
    # The first examples all take one way.
    inputs = torch.cat([torch.zeros(3, 12), torch.randn(20, 12)])
    (found,) = trace(Mirrored(join), inputs).groups
    assert (found.size, found.axes[0].positions.size(1)) == (4, 2)


def test_layers_of_different_types_are_proved():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(12, 8).bfloat16(), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.enter(x.bfloat16()).relu().float())

    (found,) = trace(Mixed(), torch.randn(4, 12)).groups
    assert found.size == 8
