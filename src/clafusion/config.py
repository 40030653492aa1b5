"""Every option of clafusion, once: its name, type, default, choices and one line of help.

Python keywords, ``config=``, the command line's options, manifests, cache keys and the reference
page are all made from here. This module imports no stage. To add an option, add one field.

Options that only make sense together are one value: a solver carries its own regularisation, a
calibration its own settings, a target its own widths. Where a value has variants (a *family*), each
variant is a class; its name is what a string, a manifest or the command line calls it. Subclassing
a family adds a variant, also from outside of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

from torch import nn

from clafusion.errors import InputError

__all__ = [
    "ALIGNMENT_MODES",
    "CHANNEL_COSTS",
    "IMPORTANCES",
    "LAYER_COSTS",
    "LAYER_VALUES",
    "LAYER_WEIGHTS",
    "MERGES",
    "NORMALISATIONS",
    "Alignment",
    "Assignment",
    "Auto",
    "Barycentre",
    "BatchNorm",
    "Calibration",
    "Choices",
    "Deeper",
    "Exact",
    "FusionConfig",
    "Iterative",
    "LeastSquares",
    "Like",
    "ManyToOne",
    "Matching",
    "Merging",
    "NoCalibration",
    "Option",
    "Profiling",
    "Repair",
    "Settings",
    "Shallower",
    "Sinkhorn",
    "Solver",
    "Strategy",
    "Target",
    "Zip",
    "choice",
    "config_from",
    "count",
    "flag",
    "nested",
    "number",
    "options_of",
    "text",
]

S = TypeVar("S", bound="Settings")


class Choices(Mapping[str, str]):
    """The values that an option can have, each with one line of help.

    A stage that is extended from outside adds its value: see :meth:`add`.
    """

    def __init__(self, **values: str) -> None:
        self._values = dict(values)

    def add(self, name: str, help: str) -> None:  # noqa: A002
        """Admit another value."""
        self._values[name] = help

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


LAYER_COSTS = Choices(
    cka="one minus linear CKA of the layers' outputs",
    cka_unbiased="the same with an estimate whose expectation is 0 for independent layers",
    cca="one minus the mean squared canonical correlation",
    wasserstein="the optimal transport between the layers' channels, exact",
    wasserstein_entropic="the same by Sinkhorn's iteration",
    neurons="the relative difference of the numbers of channels",
    index="the distance on the way through the network",
)
ALIGNMENT_MODES = Choices(
    layer="the cheapest alignment, exact",
    chain="a baseline: the earliest alignment that the structures admit",
    random="a baseline: a random alignment that the structures admit",
)
CHANNEL_COSTS = Choices(
    correlation="one minus the correlation of the channels' pre-activations",
    euclidean="the Euclidean distance of the channels' pre-activations",
    weights="the distance of the channels' weights, as the other channels are matched",
    both="the mean of the costs by correlation and by weights",
)
IMPORTANCES = Choices(
    uniform="all channels have the same mass",
    norm="by the norm of the weights that make the channel",
    activation="by the channel's mean absolute activation",
    sensitivity="by how sensitive the outputs are to the channel's weights",
)
LAYER_WEIGHTS = Choices(
    uniform="every layer has the parents' weights",
    sensitivity="each layer has its own, by how sensitive each parent's outputs are to it",
)
LAYER_VALUES = Choices(
    output="the layers' outputs",
    preactivation="their values before the nonlinearity",
)
NORMALISATIONS = Choices(
    two="one for what leaves a layer and one for what enters it",
    single="the published one, which shrinks where widths differ",
)
MERGES = Choices(
    least_squares="they are left out, and least squares makes up for them",
    sum="multiplied into the next: channels count whose sum is positive",
    majority="multiplied into the next: channels count that are mostly positive",
    average="multiplied into the next: channels count by how often they are positive",
)


# --- fields -------------------------------------------------------------------------------------


def choice(default: str, choices: Choices, help: str) -> Any:  # noqa: A002
    """Return a field whose value is one of ``choices``."""
    return field(default=default, metadata={"kind": "choice", "choices": choices, "help": help})


def number(
    default: float | str,
    help: str,  # noqa: A002
    *,
    low: float = 0.0,
    high: float = math.inf,
    above_low: bool = False,
    word: str | None = None,
) -> Any:
    """Return a field whose value is a finite number from ``low`` to ``high``, or ``word``."""
    metadata = {"kind": "number", "low": low, "high": high, "above_low": above_low, "word": word}
    return field(default=default, metadata={**metadata, "help": help})


def count(default: int | None, help: str, *, least: int = 1, most: int | None = None) -> Any:  # noqa: A002
    """Return a field whose value is a whole number, or None where that is the default."""
    metadata = {"kind": "count", "least": least, "most": most, "none": default is None}
    return field(default=default, metadata={**metadata, "help": help})


def flag(default: bool, help: str) -> Any:  # noqa: A002
    """Return a field whose value is True or False."""
    return field(default=default, metadata={"kind": "flag", "help": help})


def text(default: str, help: str, *, also: type = str) -> Any:  # noqa: A002
    """Return a field whose value is any text (or an object of the type ``also``)."""
    return field(default=default, metadata={"kind": "text", "also": also, "help": help})


def nested(kind: type[Settings], default: Settings, help: str) -> Any:  # noqa: A002
    """Return a field that holds other settings; a string stands for them with their defaults."""
    return field(default=default, metadata={"kind": "nested", "settings": kind, "help": help})


# --- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Options that belong together; every field is checked when the value is made.

    Raises
    ------
    InputError
        A field is out of its range; the message names it.
    """

    name: ClassVar[str] = ""
    _variants: ClassVar[dict[str, type[Settings]]] = {}
    _is_family: ClassVar[bool] = False

    def __init_subclass__(cls, *, name: str = "", family: bool = False) -> None:
        cls.name = name
        if family:
            cls._is_family = True
            cls._variants = {}
        elif name:
            cls._is_family = False
            cls._variants[name] = cls

    @classmethod
    def variants(cls) -> Mapping[str, type[Settings]]:
        """Return a family's variants by name."""
        return MappingProxyType(cls._variants if cls._is_family else {})

    @classmethod
    def parse(cls: type[S], value: Any, where: str) -> S:
        """Return settings from what a user may give for them.

        That is the settings themselves, a name (of a variant; else the first field's value), or a
        mapping of the fields, with the variant's name as ``name``. Errors call it ``where``.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if not cls._is_family:
                return _made(cls, {fields(cls)[0].name: value}, where)
            return _made(cast("type[S]", cls._variant(value, where)), {}, where)
        if isinstance(value, Mapping):
            given = {str(key): one for key, one in value.items()}
            kind: type[Settings] = cls
            if cls._is_family:
                if "name" not in given:
                    raise InputError(
                        f"{where} must say which by its name: {_listed(cls._variants)}"
                    )
                kind = cls._variant(given.pop("name"), where)
            return _made(cast("type[S]", kind), given, where)
        raise InputError(
            f"{where} must be one of {_listed(cls._variants)}, or settings of that kind; got "
            f"{value!r}"
            if cls._is_family
            else f"{where} must be {cls.__name__}(...) or a mapping of its fields; got {value!r}"
        )

    @classmethod
    def _variant(cls, name: Any, where: str) -> type[Settings]:
        found = cls._variants.get(name) if isinstance(name, str) else None
        if found is None:
            raise InputError(f"{where} must be one of {_listed(cls._variants)}; got {name!r}")
        return found

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata.get("kind") == "nested":
                parsed = one.metadata["settings"].parse(value, one.name)
                object.__setattr__(self, one.name, parsed)
            elif "kind" in one.metadata:
                _check(one.name, value, one.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, which :meth:`parse` reads again."""
        found: dict[str, Any] = {"name": self.name} if self.name else {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Settings):
                value = value.to_dict()
            elif isinstance(value, nn.Module):
                value = type(value).__qualname__
            found[one.name] = value
        return found


def _made(kind: type[S], given: Mapping[str, Any], where: str) -> S:
    """Make settings from fields by name; errors name them with their path."""
    known = [one.name for one in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        what = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"{where} has no option {unknown[0]!r}{hint} ({what})")
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}.{error}" if where else str(error)) from None


def _check(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    kind = rule["kind"]
    if kind == "choice":
        if not isinstance(value, str) or value not in rule["choices"]:
            raise InputError(f"{name} must be one of {_listed(rule['choices'])}; got {value!r}")
    elif kind == "flag":
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False; got {value!r}")
    elif kind == "count":
        _check_count(name, value, rule)
    elif kind == "number":
        _check_number(name, value, rule)
    elif not isinstance(value, (str, rule["also"])) or isinstance(value, bool):
        raise InputError(f"{name} must be text; got {value!r}")


def _check_count(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if value is None and rule["none"]:
        return
    least, most = rule["least"], rule["most"]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {limits}; got {value!r}")


def _check_number(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if rule["word"] is not None and value == rule["word"]:
        return
    low, high = rule["low"], rule["high"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and math.isfinite(value) and low <= value <= high
    if inside and not (rule["above_low"] and value == low):
        return
    word = "" if rule["word"] is None else f"{rule['word']!r} or "
    if high < math.inf:
        limits = f"in [{low:g}, {high:g}]"
    elif low == 0.0:
        limits = "a positive number" if rule["above_low"] else "a number of at least 0"
    else:
        limits = f"a number of at least {low:g}"
    raise InputError(f"{name} must be {word}{limits}; got {value!r}")


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))


# --- solvers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver(Settings, family=True):
    """How channels are matched, given the cost of every two. If you are not sure, take "auto"."""


@dataclass(frozen=True)
class Auto(Solver, name="auto"):
    """An assignment where both sides have equal masses and sizes, else exact transport."""


@dataclass(frozen=True)
class Assignment(Solver, name="assignment"):
    """The best permutation, exact; it needs as many channels on both sides."""


@dataclass(frozen=True)
class Exact(Solver, name="exact"):
    """Exact optimal transport (network simplex)."""


@dataclass(frozen=True)
class Sinkhorn(Solver, name="sinkhorn"):
    """Entropic optimal transport by Sinkhorn's iteration."""

    epsilon: float = number(
        0.05, "entropic regularisation, relative to the largest cost", above_low=True
    )


@dataclass(frozen=True)
class Zip(Solver, name="zip"):
    """Unite similar channels across networks and within each (ZipIt, arXiv 2305.03053).

    For networks that learnt different things.
    """

    budget: float = number(
        0.1, "share of a layer's channels that may be merged within one network", high=1.0
    )


# --- strategies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strategy(Settings, family=True):
    """In which order more than two parents are averaged. Of two, all are the same but barycentre.

    If you are not sure, take "many_to_one".
    """


@dataclass(frozen=True)
class ManyToOne(Strategy, name="many_to_one"):
    """Bring all parents into the target's channels and average them at once."""


@dataclass(frozen=True)
class Iterative(Strategy, name="iterative"):
    """Fuse one after another, each with what the ones before it became."""


@dataclass(frozen=True)
class Barycentre(Strategy, name="barycentre"):
    """Match all parents with their mean, again and again, until no plan changes.

    The plans then agree with each other (Agueh and Carlier, SIAM J. Math. Anal. 2011; for networks
    C2M3, arXiv 2405.17897).
    """

    max_rounds: int = count(10, "after how many rounds the mean is taken as it is")


# --- calibrations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration(Settings, family=True):
    """How what averaging destroys is restored. If you are not sure, take "least_squares"."""


@dataclass(frozen=True)
class NoCalibration(Calibration, name="none"):
    """Leave the mean as it is."""


@dataclass(frozen=True)
class BatchNorm(Calibration, name="batchnorm"):
    """Estimate the running statistics of every BatchNorm again."""


@dataclass(frozen=True)
class Repair(Calibration, name="repair"):
    """Give every layer's outputs the parents' mean statistics (REPAIR, arXiv 2211.08403)."""


@dataclass(frozen=True)
class LeastSquares(Calibration, name="least_squares"):
    """Regress every layer onto what the parents put out; slower and more accurate."""

    anchor: float | str = number(
        "auto",
        "how far the interior leans from the weights towards the parent with the largest one",
        high=1.0,
        word="auto",
    )
    ridge: float = number(
        1e-3, "penalty on changes, relative to the mean square of a layer's inputs", above_low=True
    )
    samples: int = count(2000, "how many inputs are used")


# --- targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target(Settings, family=True):
    """Which structure the result gets. If you are not sure, take "deeper"."""


_WIDTH = (
    "whose widths: own (of the parent that gives the depth), narrow, wide, or a parent's name or "
    "position"
)


@dataclass(frozen=True)
class Deeper(Target, name="deeper"):
    """As deep as the deepest parent; where several are the deeper one somewhere, as their union."""

    width: str | int = text("own", _WIDTH, also=int)


@dataclass(frozen=True)
class Shallower(Target, name="shallower"):
    """As deep as the shallowest parent; the others' layers that it lacks go."""

    width: str | int = text("own", _WIDTH, also=int)
    merge: str = choice("least_squares", MERGES, "how the layers go that the result lacks")


@dataclass(frozen=True)
class Like(Target, name="like"):
    """Like a module of yours that can hold the parents' layers; its weights do not matter."""

    template: nn.Module | str = text(
        "", "the module (on the command line and in manifests what makes it)", also=nn.Module
    )


# --- stages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profiling(Settings):
    """What is recorded of every parent on the data."""

    alignment_samples: int = count(
        400, "inputs over which layers are compared; held in memory at once", least=2
    )
    matching_rows: int = count(
        8192, "pairs of input and position over which channels are compared", least=2
    )
    layer_values: str = choice("output", LAYER_VALUES, "by what layers are compared")
    inputs: int | None = count(None, "profile on this many inputs only; default all", least=2)


@dataclass(frozen=True)
class Alignment(Settings):
    """Which layers of two networks belong together."""

    cost: str = choice("cka", LAYER_COSTS, "the cost of matching two layers")
    mode: str = choice("layer", ALIGNMENT_MODES, "how the alignment is chosen")
    pin_ends: bool = flag(False, "match the first layers with each other, and the last ones")


@dataclass(frozen=True)
class Matching(Settings):
    """Which channels belong together."""

    cost: str = choice("correlation", CHANNEL_COSTS, "the cost of matching two channels")
    solver: Solver = nested(Solver, Auto(), "how channels are matched")
    importance: str = choice("uniform", IMPORTANCES, "the mass that each channel has")
    outputs: bool = flag(False, "match the outputs, too, as if they were not labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance != "uniform" and isinstance(self.solver, Assignment):
            raise InputError(
                "importance must be 'uniform' with solver 'assignment', which moves equal masses; "
                f"got {self.importance!r}: use solver='auto' or 'exact'"
            )
        if isinstance(self.solver, Zip):
            _check_needed(
                "solver 'zip'",
                self,
                ("cost", "correlation", "groups are made by correlation"),
                ("importance", "uniform", "it moves no masses"),
                ("outputs", False, "outputs are not merged"),
            )


@dataclass(frozen=True)
class Merging(Settings):
    """How the parents are averaged."""

    strategy: Strategy = nested(Strategy, ManyToOne(), "in which order several are averaged")
    layer_weights: str = choice(
        "uniform", LAYER_WEIGHTS, "whether layers have weights of their own"
    )
    normalisation: str = choice("two", NORMALISATIONS, "how plans are normalised")


@dataclass(frozen=True)
class FusionConfig(Settings):
    """How to fuse: every option that there is.

    Each field is also a keyword of :func:`clafusion.fuse`. A string stands for a value with its
    defaults: ``calibration="repair"`` is ``calibration=Repair()``.

    Raises
    ------
    InputError
        An option is out of its range, or two do not go together; the message names it.
    """

    profiling: Profiling = nested(Profiling, Profiling(), "what is recorded of the parents")
    alignment: Alignment = nested(Alignment, Alignment(), "which layers belong together")
    target: Target = nested(Target, Deeper(), "which structure the result gets")
    matching: Matching = nested(Matching, Matching(), "which channels belong together")
    merging: Merging = nested(Merging, Merging(), "how the parents are averaged")
    calibration: Calibration = nested(Calibration, Repair(), "how what is lost is restored")
    verify: bool = flag(True, "prove the analysis of each parent by permuting a copy")
    seed: int = count(0, "seed of every random choice", least=0, most=2**63 - 1)

    @classmethod
    def paper(cls, *, match_outputs: bool = True) -> FusionConfig:
        """Return the settings of CLAFusion as published (arXiv 2110.15538), step by step.

        Profiles are pre-activations of the first 200 inputs; layers are aligned by linear CKA with
        the first and last pinned; channels are matched exactly by the Euclidean distance of their
        pre-activations; plans are normalised once (OTFusion, arXiv 1910.05653, algorithm 1);
        nothing is calibrated. The published code matches the classifier's outputs too, unless it
        is told to skip the last layer.
        """
        return cls(
            profiling=Profiling(
                alignment_samples=200,
                matching_rows=1 << 18,  # all positions of 200 images of 32 by 32
                layer_values="preactivation",
                inputs=200,
            ),
            alignment=Alignment(pin_ends=True),
            matching=Matching(cost="euclidean", solver=Exact(), outputs=match_outputs),
            merging=Merging(normalisation="single"),
            calibration=NoCalibration(),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.matching.solver, Zip):
            _check_needed(
                "solver 'zip'",
                self.merging,
                ("layer_weights", "uniform", "each channel has its own weights already"),
                ("normalisation", "two", "what leaves and what enters a group differ"),
            )
            if isinstance(self.calibration, LeastSquares):
                raise InputError(
                    "solver 'zip' goes with the calibrations 'repair', 'batchnorm' and 'none'; "
                    "'least_squares' chooses from all parents' channels itself: use solver='auto'"
                )
        if self.matching.outputs and self.profiling.layer_values != "preactivation":
            raise InputError(
                "matching.outputs needs profiling.layer_values='preactivation'; got "
                f"{self.profiling.layer_values!r}"
            )


def _check_needed(who: str, settings: Settings, *needs: tuple[str, Any, str]) -> None:
    for name, needed, reason in needs:
        if getattr(settings, name) != needed:
            raise InputError(f"{who} needs {name}={needed!r}, for {reason}")


def config_from(config: FusionConfig | None, overrides: Mapping[str, Any]) -> FusionConfig:
    """Return a configuration with some of its fields given anew, as :func:`clafusion.fuse` does.

    Raises
    ------
    InputError
        A field is unknown or out of its range.
    """
    if config is not None and not isinstance(config, FusionConfig):
        raise InputError(f"config must be a FusionConfig; got {type(config).__name__}")
    base = config or FusionConfig()
    given = {one.name: getattr(base, one.name) for one in fields(FusionConfig)}
    unknown = [name for name in overrides if name not in given]
    if unknown:
        places = [one.path for one in options_of(FusionConfig) if one.field == unknown[0]]
        close = get_close_matches(unknown[0], given, 1)
        hint = f": it is part of {places[0]}" if places else ""
        hint = hint or (f"; did you mean {close[0]!r}?" if close else "")
        raise InputError(f"{unknown[0]!r} is no option{hint}. The options are {', '.join(given)}")
    return _made(FusionConfig, {**given, **overrides}, "")


# --- all options, flat --------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option, as the command line and the reference page show it.

    Attributes
    ----------
    path
        Where it is: field names joined by dots.
    kind
        ``"choice"``, ``"number"``, ``"count"``, ``"flag"`` or ``"text"``.
    default
        Its default; None for none.
    choices
        Its values with a line of help each; empty where any will do.
    help
        One line.
    needs
        Path of the option that must have one of the values ``of`` for this one to count, or "".
    of
        Those values.
    rule
        What the field itself says: limits and the like.
    """

    path: str
    kind: str
    default: Any
    choices: Mapping[str, str]
    help: str
    needs: str
    of: tuple[str, ...]
    rule: Mapping[str, Any]

    @property
    def field(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]

    @property
    def flag(self) -> str:
        """The option as the command line calls it."""
        return "--" + self.path.replace(".", "-").replace("_", "-")


def options_of(
    kind: type[Settings], prefix: str = "", needs: str = "", of: tuple[str, ...] = ()
) -> list[Option]:
    """Return all options of some settings, and of those in them, in order."""
    found: list[Option] = []
    for one in fields(kind):
        rule = one.metadata
        path = f"{prefix}{one.name}"
        if rule["kind"] != "nested":
            default = None if one.default is MISSING else one.default
            choices = rule.get("choices", {})
            found.append(
                Option(path, rule["kind"], default, choices, rule["help"], needs, of, rule)
            )
            continue
        inner: type[Settings] = rule["settings"]
        if not inner.variants():
            found += options_of(inner, f"{path}.", needs, of)
            continue
        default = cast(Settings, one.default).name
        lines = {name: _summary(variant) for name, variant in inner.variants().items()}
        found.append(Option(path, "choice", default, lines, rule["help"], needs, of, rule))
        by_path: dict[str, list[Option]] = {}
        for name, variant in inner.variants().items():
            for option in options_of(variant, f"{path}.", path, (name,)):
                by_path.setdefault(option.path, []).append(option)
        for same in by_path.values():
            names = tuple(name for option in same for name in option.of)
            first = same[0]
            found.append(
                Option(
                    first.path,
                    first.kind,
                    first.default,
                    first.choices,
                    first.help,
                    first.needs,
                    names if first.needs == path else first.of,
                    first.rule,
                )
            )
    return found


def _summary(kind: type[Settings]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].removesuffix(".")
