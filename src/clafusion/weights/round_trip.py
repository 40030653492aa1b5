"""Check that written weights, loaded into a new model, compute what the model itself computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.execution.call import call_model, device_of, in_eval_mode
from clafusion.tracing.ties import aliases_of
from clafusion.weights.checkpoints import StoredState
from clafusion.weights.fitting import put_state
from clafusion.weights.messages import listed, one_line

__all__ = ["check_round_trip", "compare_models"]

_ROUNDING = 1000  # units in the last place, of the largest output
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)


def check_round_trip(
    model: nn.Module,
    state: Mapping[str, Any],
    build: Callable[[], nn.Module],
    inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
    *,
    called: str,
    assign: bool = False,
) -> None:
    """Load a state dict into a new model and compare its outputs with those of ``model``.

    Both run in eval mode, with the same random numbers.

    Parameters
    ----------
    model
        The model whose weights were written. It stays as it is.
    state
        What the file holds.
    build
        Makes a new model of the same architecture.
    inputs
        Inputs of the model, of shape (batch, ...) each.
    keywords
        Their names, where the model takes them by keyword; else empty.
    called
        What errors call the architecture.
    assign
        Whether the new model gets the state's own tensors; ``build`` may leave its parameters on
        the meta device then.

    Raises
    ------
    InputError
        The new model does not take the state dict, or computes something else; the message says
        what differs and what to do.
    """
    try:
        fresh = build()
    except Exception as error:
        raise InputError(
            f"{called} cannot be built again to check what was written: {one_line(error)}"
        ) from error
    problems = put_state(fresh, StoredState("", state), assign=assign)
    if problems:
        raise InputError(f"the fused weights do not load into {called}: {'; '.join(problems)}")
    compare_models(model, fresh, inputs, keywords, called=f"a new model of {called}", state=state)


def compare_models(
    model: nn.Module,
    fresh: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...] = (),
    *,
    called: str,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Compare all outputs of what was read from a file with those of the result.

    Parameters
    ----------
    model, inputs, keywords
        As for :func:`check_round_trip`.
    fresh
        What was read.
    called
        What errors call it.
    state
        What the file holds; default the state dict of ``fresh``.

    Raises
    ------
    InputError
        It computes something else; the message says what differs and what to do.
    """
    state = fresh.state_dict() if state is None else state
    device = device_of(model)
    fresh = fresh.to(device)
    given = tuple(one.to(device) for one in inputs)
    try:
        wanted, found = (_outputs(one, given, keywords) for one in (model, fresh))
    except Exception as error:
        raise InputError(
            f"{called} with the fused weights does not run: {one_line(error)}"
        ) from error
    gap = _gap(wanted, found)
    if gap is None:
        return
    differs = list(_differences(model, fresh, state))
    raise InputError(
        f"the fused weights, loaded into {called}, compute something else than the "
        f"result ({gap}): "
        + (
            f"{listed(differs)}; make it a parameter or a persistent buffer, or let the factory "
            "set it to the same value each time"
            if differs
            else "something that the state dict does not hold differs; keep what the network "
            "computes with in parameters and persistent buffers"
        )
    )


# --- outputs ------------------------------------------------------------------------------------


def _outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], keywords: tuple[str, ...]
) -> list[Tensor]:
    devices = [one.device for one in inputs if one.device.type == "cuda"]
    with in_eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return call_model(model, tuple(one.clone() for one in inputs), keywords)


def _gap(wanted: list[Tensor], found: list[Tensor]) -> str | None:
    """Say how far outputs are apart; None if they are equal within rounding."""
    if [one.shape for one in wanted] != [one.shape for one in found]:
        return "the outputs have other shapes"
    for one, other in zip(wanted, found, strict=True):
        if not (one.is_floating_point() or one.is_complex()):
            if not torch.equal(one, other):
                return "the outputs differ"
            continue
        apart = _distance(one, other)
        largest = float(torch.nan_to_num(one.abs().double(), 0.0, 0.0).max()) if one.numel() else 0
        if not apart <= _ROUNDING * torch.finfo(one.dtype).eps * largest:
            return f"outputs differ by up to {apart:.2g}"
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; equal infinities and two NaN differ by nothing."""
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs().double())
    return float(torch.nan_to_num(apart, nan=torch.inf).max()) if apart.numel() else 0.0


# --- what differs -------------------------------------------------------------------------------


def _differences(model: nn.Module, fresh: nn.Module, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a new model with a state dict has otherwise than the model itself, in words."""
    own, other = _tensors(model), _tensors(fresh)
    ties = aliases_of(fresh)
    for name, value in own.items():
        if name in other and not _is_equal(value, other[name]):
            if name not in state:
                yield f"non-persistent buffer {name!r} differs from a fresh model's"
            elif name in ties or name in ties.values():
                yield f"{name!r} is tied in a fresh model"
            else:
                yield f"{name!r} differs after loading"
    modules = dict(fresh.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in modules:
            yield f"a fresh model has no module {path!r}"
            continue
        new = vars(modules[path])
        for name, value in vars(module).items():
            is_plain = isinstance(value, (Tensor, *_PLAIN)) and name != "training"
            if is_plain and name in new and not _is_equal(value, new[name]):
                where = f"{path}.{name}" if path else name
                yield f"attribute {where!r} differs from a fresh model's"
    kept = fresh.state_dict()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) and repr(value) != repr(kept.get(name)):
            yield f"the extra state {name!r} differs after loading"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.is_meta or one.layout is not torch.strided:
            return True
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and bool(one == other)
