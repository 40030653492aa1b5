"""The source in the target's structure, as a module, and the check that its function stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.duplicated_channels import copying_plans, with_copied_channels
from clafusion.correspondence.moving import move_state
from clafusion.correspondence.structure import structured_state
from clafusion.errors import FusionWarning, StructureError, check_type, warn
from clafusion.execution.call import call_model, flatten_tensors, rounding_of
from clafusion.execution.lazy import overlaid
from clafusion.execution.walk import run_widened
from clafusion.tracing.copies import copied
from clafusion.tracing.model import TracedModel
from clafusion.weights.build import with_state

__all__ = [
    "check_inserted",
    "differences_between_layers",
    "inserted_model",
    "warn_of_other_operations",
]


def inserted_model(target: nn.Module, correspondence: Correspondence) -> nn.Module:
    """Build the source with the target's structure: it computes the same as the source.

    Its widths are the source's; ``in_channels`` and the like are set accordingly.

    Raises
    ------
    InputError
        An argument is of another kind.
    StructureError
        A width is fixed in the target module's code, so that what is built does not run or
        computes something else.
    """
    check_type(target, nn.Module, "target", "the target's module")
    check_type(correspondence, Correspondence, "correspondence", "that of a parent")
    aliases = correspondence.target.aliases
    built = with_state(target, structured_state(correspondence), aliases)
    try:
        found = _outputs_of(built, correspondence)
    except Exception as error:  # the module's own code may raise anything
        raise StructureError(
            "the source with the target's layers does not run: a width is fixed in the target "
            f"module's code ({error})"
        ) from error
    _compare(found, _wanted(correspondence), correspondence)
    return built


def check_inserted(correspondence: Correspondence) -> None:
    """Check that the source keeps its function in the target's structure.

    Where the target's module takes the source's widths, it runs with the source's weights. Where
    its code fixes a width, or has another number of heads, a copy of the source with fewer
    different channels and heads is brought to the target's widths, which leaves that copy's
    function as it is: see :mod:`clafusion.correspondence.duplicated_channels`. Both check all that
    no comparison of operations sees, such as what a block reads from another one.

    It cannot run where copies of a channel add up (a head of another size: the function is not
    kept, and :class:`WidthWarning` says so), or where widths have no common divisor. Then what lies
    between the layers is compared.

    Raises
    ------
    StructureError
        The function changes.
    """
    target = correspondence.target
    if (
        target.united_heads
        or correspondence.shares_otherwise
        or _has_heads_of_another_size(correspondence)
    ):
        _compare_operations(correspondence)
        _check_by_copies(correspondence)
        return
    state = structured_state(correspondence)
    if all(state[name].shape == one.shape for name, one in target.state().items()):
        with torch.no_grad():
            found = _tensors(target.run(target.example_inputs, state=state))
        _compare(found, _wanted(correspondence), correspondence)
    else:
        built = with_state(target.model, state, target.aliases)
        try:
            found = _outputs_of(built, correspondence)
        except Exception:  # the module's own code may raise anything about a width
            _check_by_copies(correspondence)
            return
        _compare(found, _wanted(correspondence), correspondence)


def warn_of_other_operations(correspondence: Correspondence, name: str) -> None:
    """Warn where what lies between the layers is another operation in the result.

    On the example inputs it computes the same (:func:`check_inserted`), but not for every size.

    Warns
    -----
    FusionWarning
        The message names the operations.
    """
    found = differences_between_layers(correspondence)
    if found:
        warn(
            f"{name} computes what the result's module does on inputs of the examples' shape, but "
            f"perhaps not on others: {found}. Where there are inputs of other shapes, give both "
            "networks the same operations",
            FusionWarning,
        )


def _check_by_copies(correspondence: Correspondence) -> None:
    plans = copying_plans(correspondence)
    if plans is None:
        _compare_operations(correspondence)
        return
    copies = with_copied_channels(correspondence, plans.within_source)
    target, source = copies.target, copies.source
    state = overlaid(target.state(), move_state(copies, plans.into_target))
    with torch.no_grad():  # in float64, for copies are divided and added up
        wanted, of_source = run_widened(source, target.example_inputs, source.state())
        found, of_target = run_widened(target, target.example_inputs, state)
        if of_source != of_target:
            wanted = source.run(target.example_inputs)
            found = target.run(target.example_inputs, state=state)
    if all(bool(one.isfinite().all()) for one in _tensors(wanted)):
        _compare(_tensors(found), _tensors(wanted), copies)


def _compare_operations(correspondence: Correspondence) -> None:
    if set(_between(correspondence.source)) != set(_between(correspondence.target)):
        raise StructureError(_reason(correspondence))


def _has_heads_of_another_size(correspondence: Correspondence) -> bool:
    """Say whether the target counts other numbers of channels than the source, as of a head."""
    source, target = correspondence.source, correspondence.target
    return any(
        one.is_counted and other >= 0 and source.groups[other].size != one.size
        for one, other in zip(target.groups, correspondence.groups, strict=True)
    )


def _tensors(outputs: Sequence[Any]) -> list[Tensor]:
    return list(flatten_tensors(list(outputs)))


def _outputs_of(built: nn.Module, correspondence: Correspondence) -> list[Tensor]:
    target = correspondence.target
    mode = built.training
    inputs = target.example_inputs
    if target.types:  # half precision would round by as much as is to be found
        built = copied(built).float()
        inputs = tuple(one.to(target.types.get(one.dtype, one.dtype)) for one in inputs)
    try:
        with torch.no_grad():
            return call_model(built.eval(), inputs, target.keywords)
    finally:
        built.train(mode)


def _wanted(correspondence: Correspondence) -> list[Tensor]:
    """Return what the source puts out, on the target's example inputs."""
    with torch.no_grad():
        return correspondence.source.output_tensors(correspondence.target.example_inputs)


def _compare(
    found: Sequence[Tensor], wanted: Sequence[Tensor], correspondence: Correspondence
) -> None:
    bound = rounding_of(correspondence.source.state().values())
    for one, other in zip(found, wanted, strict=True):
        if other.numel() == 0:
            continue
        one, other = one.double(), other.double()
        gap = float((one - other).abs().max())
        if not gap <= bound * max(float(other.abs().max()), 1e-30):
            raise StructureError(
                f"in the result's structure the network's outputs change by {gap:.1e}: "
                f"{_reason(correspondence)}"
            )


def _between(model: TracedModel) -> list[tuple[str, Any]]:
    """Return what lies between a network's layers, in order."""
    return [entry for layer in model.layers for entry in layer.between]


def differences_between_layers(correspondence: Correspondence) -> str:
    """Say in which operations between their layers the source and the target differ; or ""."""
    between = [_between(one) for one in (correspondence.source, correspondence.target)]
    if len(between[0]) != len(between[1]):  # an inserted layer may bring a glue of its own
        between = [list(dict.fromkeys(one)) for one in between]
    only = [
        [one for one in dict.fromkeys(mine) if mine.count(one) != rest.count(one)]
        for mine, rest in (between, between[::-1])
    ]
    if between[0] != between[1] and len(between[0]) == len(between[1]) and not any(only):
        only = [list(one) for one in between]  # the same in another order
    own, other = (", ".join(_shown(one, rest) for one in mine) for mine, rest in (only, only[::-1]))
    if not (own or other):
        return ""
    return f"between its layers lies {own or 'nothing'}, and in the result {other or 'nothing'}"


def _reason(correspondence: Correspondence) -> str:
    """Say what may change a network's outputs in the target's structure."""
    found = differences_between_layers(correspondence)
    if found:
        return found
    if -1 in correspondence.layer_map:
        return "the inserted layers change them, or layers share parameters"
    return "its module's code fixes a number, such as a size, that the result's code has otherwise"


def _shown(
    entry: tuple[str, tuple[tuple[str, Any], ...]], others: Sequence[tuple[str, Any]]
) -> str:
    """Name an operation, with the settings in which it differs from another of that name."""
    name, settings = entry
    twin = next((dict(of) for other, of in others if other == name), dict(settings))
    text = ", ".join(f"{key} {value}" for key, value in settings if twin.get(key) != value)
    return f"{name} ({text})" if text else name
