"""How options are declared: fields with a rule each, values that belong together, variants.

:mod:`clafusion.config` declares all options of clafusion by what is here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

from clafusion.errors import InputError

__all__ = [
    "Choices",
    "Module",
    "Option",
    "Settings",
    "choice",
    "count",
    "described",
    "flag",
    "made",
    "nested",
    "number",
    "options_of",
    "overridden",
    "text",
]

S = TypeVar("S", bound="Settings")


class _OfTorch(type):
    def __instancecheck__(cls, value: object) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(value, torch.nn.Module)


class Module(metaclass=_OfTorch):
    """Stands for ``torch.nn.Module``, so that options can be listed before torch is imported."""


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
        if not isinstance(name, str):  # what cannot be a key at all is no value either
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


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


def text(default: float | str, help: str, *, also: type = str) -> Any:  # noqa: A002
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
            if name in cls._variants:
                raise ValueError(f"two classes have the name {name!r}: give yours another")
            cls._variants[name] = cls

    @classmethod
    def variants(cls) -> Mapping[str, type[Settings]]:
        """Return a family's variants by name."""
        return MappingProxyType(cls._variants if cls._is_family else {})

    @classmethod
    def parse(cls: type[S], value: Any, where: str) -> S:
        """Return settings from what a user may give for them.

        That is the settings themselves, a name (of a variant; else the first field's value), a
        value of one nested field, or a mapping of the fields, with the variant's name as ``name``.
        Errors call it ``where``.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if not cls._is_family:
                return cls._by_first_field(value, where)
            return made(cast("type[S]", cls._variant(value, where)), {}, where)
        if isinstance(value, Mapping):
            given = {str(key): one for key, one in value.items()}
            kind: type[Settings] = cls
            if cls._is_family:
                if "name" not in given:
                    fitting = {
                        name: kind
                        for name, kind in cls._variants.items()
                        if given.keys() <= {one.name for one in fields(kind)}
                    }
                    raise InputError(
                        f"{where} must say which by its name: {_listed(fitting or cls._variants)}"
                    )
                kind = cls._variant(given.pop("name"), where)
            return made(cast("type[S]", kind), given, where)
        if isinstance(value, Settings) and not cls._is_family:
            for one in fields(cls):
                if isinstance(value, one.metadata.get("settings", ())):
                    return made(cls, {one.name: value}, where)
        if isinstance(value, Module):
            holders = [
                one.__name__
                for one in cls.variants().values()
                if any(field.metadata.get("also") is Module for field in fields(one))
            ]
            hint = f": write {where}={holders[0]}(module)" if holders else ""
            raise InputError(f"{where} must not be a module; got {type(value).__name__}{hint}")
        raise InputError(
            f"{where} must be one of {_listed(cls._variants)}, or settings of that kind; got "
            f"{value!r}"
            if cls._is_family
            else f"{where} must be {cls.__name__}(...), a mapping of its fields or a string; got "
            f"{value!r}"
        )

    @classmethod
    def _by_first_field(cls: type[S], value: str, where: str) -> S:
        """Return settings from a string, which stands for their first field."""
        try:
            return made(cls, {fields(cls)[0].name: value}, where)
        except InputError as error:
            for one in fields(cls):
                family = one.metadata.get("settings")
                known = family.variants() if family else one.metadata.get("choices", ())
                if value in known:
                    raise InputError(
                        f"{error}, which is a {where}.{one.name}: write "
                        f"{where}={{{one.name!r}: {value!r}}}"
                    ) from None
            raise

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
        """Return the settings as plain data, which :meth:`parse` reads again.

        A module (a target's template) is given by its class only, which cannot be read again.
        """
        found: dict[str, Any] = {"name": self.name} if self.name else {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Settings):
                value = value.to_dict()
            elif isinstance(value, Real) and not isinstance(value, (bool, int)):
                value = int(value) if isinstance(value, Integral) else float(value)
            elif isinstance(value, Module):
                value = type(value).__qualname__
            found[one.name] = value
        return found


def made(kind: type[S], given: Mapping[str, Any], where: str) -> S:
    """Make settings from fields by name; errors name them with their path."""
    known = [one.name for one in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        what = f"it has {', '.join(known)}" if known else "it has none"
        name = repr(unknown[0])
        lacks = f"{where} has no option {name}" if where else f"{name} is no option"
        raise InputError(f"{lacks}{hint} ({what})")
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}.{error}" if where else str(error)) from None


def overridden(
    kind: type[S],
    config: S | None,
    overrides: Mapping[str, Any],
    keywords: Sequence[str] = (),
) -> S:
    """Return settings with some of their fields given anew; default those of all defaults.

    ``keywords`` are the caller's other arguments, which an error may suggest, too.

    Raises
    ------
    InputError
        ``config`` is of another type, or a field is unknown or out of its range.
    """
    if config is not None and not isinstance(config, kind):
        raise InputError(f"config must be a {kind.__name__}; got {type(config).__name__}")
    base = config or kind()
    given = {one.name: getattr(base, one.name) for one in fields(kind)}
    unknown = [name for name in overrides if name not in given]
    if unknown:
        places = [one.path for one in options_of(kind) if one.field == unknown[0]]
        close = get_close_matches(unknown[0], [*given, *keywords], 1)
        hint = f" of its own; it is {places[0]}." if places else "."
        if close and not places:
            hint = f"; did you mean {close[0]!r}?"
        raise InputError(f"{unknown[0]!r} is no option{hint} The options are {', '.join(given)}")
    return made(kind, {**given, **overrides}, "")


_WORDS = {int: "a whole number", float: "a number", Module: "a torch.nn.Module"}


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
    elif not isinstance(value, (str, _kinds(rule["also"]))) or isinstance(value, bool):
        also = "" if rule["also"] is str else f" or {_WORDS[rule['also']]}"
        raise InputError(f"{name} must be text{also}; got {value!r}")


def _kinds(also: type) -> type:
    """Return the type of which a value must be: of a float any real number is one."""
    return Real if also is float else also


def _check_count(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if value is None and rule["none"]:
        return
    least, most = rule["least"], rule["most"]
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {limits}; got {value!r}")


def _check_number(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if rule["word"] is not None and value == rule["word"]:
        return
    low, high = rule["low"], rule["high"]
    is_number = isinstance(value, Real) and not isinstance(value, bool)
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


def described(settings: Settings) -> str:
    """Return what settings are called, and which of their fields are not the default."""
    changed = []
    for one in fields(settings):
        value = getattr(settings, one.name)
        if isinstance(value, Settings):
            value = described(value)
        elif isinstance(value, Module):
            value = type(value).__qualname__
        elif one.default is not MISSING and value == one.default:
            continue
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        changed.append(f"{one.name.replace('_', ' ')} {shown}")
    return settings.name + (f" ({', '.join(changed)})" if changed else "")


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
    defaults
        The default with each of the values ``of``, where these have several; else empty.
    """

    path: str
    kind: str
    default: Any
    choices: Mapping[str, str]
    help: str
    needs: str
    of: tuple[str, ...]
    rule: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def field(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]

    @property
    def flag(self) -> str:
        """The option as the command line calls it."""
        return "--" + self.path.replace(".", "-").replace("_", "-")


def options_of(
    kind: type[Settings],
    prefix: str = "",
    needs: str = "",
    of: tuple[str, ...] = (),
    values: Settings | None = None,
) -> list[Option]:
    """Return all options of some settings, and of those in them, in order.

    Defaults are those of ``values``, where they are given.
    """
    found: list[Option] = []
    for one in fields(kind):
        rule = one.metadata
        path = f"{prefix}{one.name}"
        if rule["kind"] != "nested":
            default = None if one.default is MISSING else one.default
            default = default if values is None else getattr(values, one.name)
            choices = rule.get("choices", {})
            found.append(
                Option(path, rule["kind"], default, choices, rule["help"], needs, of, rule)
            )
            continue
        inner: type[Settings] = rule["settings"]
        if not inner.variants():
            found += options_of(inner, f"{path}.", needs, of, cast(Settings, one.default))
            continue
        default = cast(Settings, one.default).name
        lines = {name: _summary(variant) for name, variant in inner.variants().items()}
        found.append(Option(path, "choice", default, lines, rule["help"], needs, of, rule))
        by_path: dict[str, list[Option]] = {}
        for name, variant in inner.variants().items():
            for option in options_of(variant, f"{path}.", path, (name,)):
                by_path.setdefault(option.path, []).append(option)
        found += [_as_one(same, path) for same in by_path.values()]
    return found


def _as_one(same: Sequence[Option], needs: str) -> Option:
    """Return one option for those of one path that several variants have.

    ``needs`` is the path of the option that chooses the variant.
    """
    first = same[0]
    if first.needs != needs:
        return first
    names = tuple(name for option in same for name in option.of)
    defaults = {name: option.default for option in same for name in option.of}
    differ = any(one != first.default for one in defaults.values())
    return replace(first, of=names, defaults=defaults if differ else {})


def _summary(kind: type[Settings]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].removesuffix(".")
