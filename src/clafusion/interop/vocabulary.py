"""Networks with unlike vocabularies: refused, or brought to the entries of the first one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.models import label
from clafusion.errors import InputError
from clafusion.interop.huggingface import (
    ModelDirectory,
    config_as_stored,
    is_of_transformers,
    stored_config,
    tokens_directory,
)
from clafusion.interop.tokenizers import check_same_labels, check_same_vocabulary, tokenizer_of
from clafusion.merging.problem import FusionProblem
from clafusion.tracing.copies import copied
from clafusion.weights.factories import Model, ModelFile
from clafusion.weights.messages import listed

__all__ = [
    "VOCABULARIES",
    "check_alike",
    "check_vocabulary",
    "keep_own_entries",
    "with_one_vocabulary",
]

VOCABULARIES = ("same", "intersection")
"""What is done about networks whose tokenizers give the same text other tokens."""


def check_vocabulary(vocabulary: object) -> None:
    """Refuse what is none of :data:`VOCABULARIES`.

    Raises
    ------
    InputError
        The message shows what is.
    """
    if not isinstance(vocabulary, str) or vocabulary not in VOCABULARIES:
        raise InputError(f"vocabulary must be 'same' or 'intersection'; got {vocabulary!r}")


def check_alike(models: Mapping[str, Model], vocabulary: str = "same") -> None:
    """Refuse networks of transformers whose outputs, or whose tokens, mean other things.

    Of what was not read from a directory that is still there nobody knows the tokens.

    Raises
    ------
    InputError
        Labels differ, or with ``vocabulary="same"`` an entry of the vocabularies; the message shows
        the difference.
    """
    check_vocabulary(vocabulary)
    check_same_labels(dict(_configs(models)))
    known = {name: _directory(one) for name, one in models.items()}
    if vocabulary == "same":
        check_same_vocabulary({name: one for name, one in known.items() if one is not None})
        _check_same_rows(dict(_configs(models)))


def _check_same_rows(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse tables of tokens with other numbers of rows, of which some are there to fill up."""
    sizes = {name: one["vocab_size"] for name, one in configs.items() if one.get("vocab_size")}
    if len(set(sizes.values())) > 1:
        shown = listed([f"{label(name)} {size}" for name, size in sizes.items()])
        raise InputError(
            f"the tables of tokens have unlike numbers of rows (vocab_size): {shown}. Give all as "
            f"many by model.resize_token_embeddings({max(sizes.values())}), or fuse them by "
            "clafusion.fuse with vocabulary='intersection'"
        )


def _configs(models: Mapping[str, Model]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, model in models.items():
        if isinstance(model, ModelDirectory):
            yield name, stored_config(model.path)
        elif isinstance(model, nn.Module) and is_of_transformers(model):
            yield name, config_as_stored(model)


def _directory(model: Model) -> Path | None:
    """Return where the tokenizer of a network lies; None where nobody knows."""
    if isinstance(model, ModelFile):
        return Path(model.path) if isinstance(model, ModelDirectory) else None
    return tokens_directory(model) if is_of_transformers(model) else None


def with_one_vocabulary(
    models: Mapping[str, Model], vocabulary: str = "same"
) -> tuple[dict[str, Model], Tensor | None]:
    """Return networks that read tokens alike, and which entries the first one alone has.

    With ``"intersection"`` all but the first become copies in whose tables the rows of common
    entries stand where the first one has them; the other rows are the mean of these. Data are then
    tokens of the first one's tokenizer.

    Raises
    ------
    InputError
        As for :func:`check_alike`; or a network's tokenizer is unknown, nothing is common, or a
        network's positions depend on which token is padding.
    """
    check_alike(models, vocabulary)
    if vocabulary == "same":
        return dict(models), None
    known = {name: _vocabulary(name, one) for name, one in models.items()}
    first = next(iter(known))
    loaded = {
        name: one.load() if isinstance(one, ModelFile) else one for name, one in models.items()
    }
    wanted, leading = known[first], loaded[first]
    of_first = _table(first, leading).size(0)
    common = set(wanted).intersection(*known.values())
    if not common:
        raise InputError(f"{label(first)} and the other models have no entry in common")
    moved: dict[str, Model] = {first: leading}
    for name, model in loaded.items():
        if name != first and (known[name] != wanted or len(_table(name, model)) != of_first):
            entries = {wanted[one]: known[name][one] for one in wanted if one in known[name]}
            moved[name] = _in_vocabulary(name, model, entries, leading, of_first)
        elif name != first:
            moved[name] = model
    is_own = torch.ones(of_first, dtype=torch.bool)
    is_own[[wanted[one] for one in common if wanted[one] < of_first]] = False
    return moved, is_own.nonzero().squeeze(1)


def _vocabulary(name: str, model: Model) -> dict[str, int]:
    directory = _directory(model)
    tokenizer = None if directory is None else tokenizer_of(directory)
    if tokenizer is None:
        raise InputError(
            f"vocabulary='intersection' needs every model's tokenizer, and {label(name)} was not "
            "read from a Hugging Face directory that has one: load it by clafusion.load"
        )
    return dict(tokenizer.get_vocab())


def _table(name: str, model: nn.Module) -> Tensor:
    made: Any = model
    try:
        table = made.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise InputError(
            f"{label(name)} ({type(model).__name__}) has no table of tokens"
        ) from error
    assert isinstance(table, Tensor)
    return table


def _parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers with a row for each entry of the vocabulary."""
    made: Any = model
    given, out = made.get_input_embeddings().weight, made.get_output_embeddings()
    found = [given]
    if out is not None:
        found.append(out.weight)
        size = out.weight.size(0)
        found += [
            one
            for name, one in (*model.named_parameters(), *model.named_buffers())
            if "bias" in name and tuple(one.shape) in ((size,), (1, size))
            if size != given.size(1)
        ]
    return list({id(one): one for one in found}.values())


def _in_vocabulary(
    name: str, model: nn.Module, entries: Mapping[int, int], first: nn.Module, size: int
) -> nn.Module:
    """Return a copy of a network in whose tables rows stand by other numbers.

    ``entries`` says for each new number the old one; ``first`` is the network that has ``size`` of
    the new ones.
    """
    made = copied(model)
    into = torch.tensor([one for one in entries if one < size])
    taken = torch.tensor([old for new, old in entries.items() if new < size])
    replaced = {id(one): _moved(one, into, taken, size) for one in _parameters(made)}
    for module in made.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for group in groups:
            for key, one in group.items():
                if one is not None and id(one) in replaced:
                    group[key] = replaced[id(one)]
                    _resize(module, size)
    _take_special_tokens(name, made, first)
    made._clafusion_tokens_of = str(tokens_directory(first))  # type: ignore[assignment]
    return made


def _moved(one: Tensor, into: Tensor, taken: Tensor, size: int) -> Tensor:
    """Return rows by their new numbers, where there is none the mean of all."""
    rows = one.detach().movedim(-1, 0) if one.dim() == 2 and one.size(0) == 1 else one.detach()
    known = rows[taken.to(rows.device)]
    made = known.mean(0).expand(size, *rows.shape[1:]).clone()
    made[into.to(rows.device)] = known
    made = made if rows.dim() == one.dim() and one.size(0) != 1 else made.T.contiguous()
    return nn.Parameter(made, one.requires_grad) if isinstance(one, nn.Parameter) else made


def _resize(module: nn.Module, size: int) -> None:
    for called in ("num_embeddings", "out_features"):
        if isinstance(getattr(module, called, None), int):
            setattr(module, called, size)


def _take_special_tokens(name: str, model: nn.Module, first: nn.Module) -> None:
    """Let a network call its padding, beginning and end as the first one does."""
    config, others = (getattr(one, "config", None) for one in (model, first))
    before, after = (getattr(one, "pad_token_id", None) for one in (config, others))
    for module in model.modules():
        if before != after and getattr(module, "padding_idx", None) == before is not None:
            if not isinstance(module, nn.Embedding):
                raise InputError(
                    f"{label(name)}: its positions are counted from the token for padding, which "
                    f"is {before} and in the first model {after}; such vocabularies cannot be "
                    "brought together"
                )
            module.padding_idx = after
    for key in (*(one for one in vars(config) if one.endswith("_token_id")), "vocab_size"):
        if hasattr(others, key):
            setattr(config, key, getattr(others, key))


@torch.no_grad()
def keep_own_entries(model: nn.Module, problem: FusionProblem, first: str, entries: Tensor) -> None:
    """Give a fused network the first parent's rows of entries that no other parent has.

    They are in the fused network's channels; of a tied table they count once.
    """
    parent = next(one for one in problem.parents if one.name == first)
    own = parent.state()
    names = {id(one): name for name, one in (*model.named_parameters(), *model.named_buffers())}
    for one in _parameters(model):
        name = problem.target.aliases.get(names[id(one)], names[id(one)])
        if name not in own:
            raise InputError(
                f"{listed([name])} has a row for each entry of the vocabulary, and no part in the "
                "fusion: vocabulary='intersection' cannot keep the first model's"
            )
        axis = 1 if one.dim() == 2 and one.size(0) == 1 else 0
        rows = entries.to(one.device)
        one.data.index_copy_(axis, rows, own[name].to(one).index_select(axis, rows))
