"""The options of :class:`clafusion.FusionConfig`, and of a merge, on the command line.

Parameters of commands are made from what ``config`` says of each option, and what is typed is
put back into a configuration. An option that is added there is one here, with nothing to do.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, TypeVar, cast

import typer
import typer.core

from clafusion.config import (
    FusionConfig,
    Like,
    MergeConfig,
    Option,
    ReassemblyConfig,
    Settings,
    options_of,
)
from clafusion.errors import ClafusionError, FusionWarning, InputError, retold
from clafusion.presets import PRESETS, preset_of
from clafusion.settings import Module

__all__ = [
    "CommandWithSections",
    "advice",
    "changed",
    "configured",
    "messages_by_flags",
    "output_by_flag",
    "setting_at",
    "warnings_by_entries",
    "with_options",
]


_PRESET = "preset"
_CONFIGS: tuple[type[Settings], ...] = (FusionConfig, MergeConfig, ReassemblyConfig)
C = TypeVar("C", bound=Settings)


def _every_option() -> list[Option]:
    """Return the options of all commands, by their paths."""
    found = {one.path: one for kind in reversed(_CONFIGS) for one in options_of(kind)}
    return [one for kind in _CONFIGS for one in options_of(kind) if found.pop(one.path, None)]


# --- from config to parameters ------------------------------------------------------------------


def with_options(
    command: Callable[..., None], *stages: str, kind: type[Settings] = FusionConfig
) -> Callable[..., None]:
    """Return a command with one more parameter for each option of a fusion, or of a merge.

    ``command`` gets what was typed as ``options``: path of the option -> text, or True or False.
    ``stages`` are the fields of the configuration ``kind`` whose options it has; default all.
    """
    options = [one for one in options_of(kind) if not stages or _stage(one) in stages]

    has_preset = "profiling" in {_stage(one) for one in options}

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        preset = arguments.pop(_PRESET, None)
        typed = {one.path: arguments.pop(_parameter(one)) for one in options}
        given = {path: value for path, value in typed.items() if value is not None}
        if preset is not None:
            given = {_PRESET: preset, **given}
        with _warnings_spelled(_FLAGS):
            command(**arguments, options=given)

    own = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(command, eval_str=True).parameters.values()
        if one.name != "options"
    ]
    made = [
        inspect.Parameter(
            _parameter(one),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(one),
        )
        for one in options
    ]
    if has_preset:
        shown = typer.Option(
            help="Settings by one word, which other options change: "
            + "; ".join(f"{name}, {text}" for name, text in PRESETS.items())
            + ".",
            metavar=f"[{'|'.join(PRESETS)}]",
            autocompletion=lambda: list(PRESETS.items()),
        )
        place = inspect.Parameter.KEYWORD_ONLY
        preset = Annotated[str | None, shown]
        own.append(inspect.Parameter(_PRESET, place, default=None, annotation=preset))
    # typer reads both.
    run.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*own, *made)}
    return run


def _stage(option: Option) -> str:
    return option.path.partition(".")[0]


def _parameter(option: Option) -> str:
    return option.path.replace(".", "__")


def _annotation(option: Option) -> Any:
    if option.kind == "flag":
        flags = f"{option.flag}/{_negated(option)}"
        return Annotated[bool | None, typer.Option(flags, help=_help(option))]
    shown = typer.Option(
        option.flag,
        help=_help(option),
        metavar=_metavar(option),
        autocompletion=_completion(option) if option.choices else None,
    )
    return Annotated[str | None, shown]


def _completion(option: Option) -> Callable[[str], list[tuple[str, str]]]:
    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [one for one in option.choices.items() if one[0].startswith(incomplete)]

    return complete


def _negated(option: Option) -> str:
    return f"--no-{option.flag.removeprefix('--')}"


def _metavar(option: Option) -> str:
    if option.choices:
        return f"[{'|'.join(option.choices)}]"
    if option.kind == "number":
        word = option.rule["word"]
        return "X" if word is None else f"X|{word}"
    if option.kind == "count":
        return "N"
    if option.rule["also"] is float:
        return "X|TEXT"
    return "MODULE:FACTORY" if _is_module(option.rule) else "TEXT"


def _help(option: Option) -> str:
    parts = [_sentence(option.help)]
    if option.needs:
        parts.append(f"For {_needed(option)}.")
    default = _default(option)
    if default:
        parts.append(f"[default: {default}]")
    return " ".join(parts)


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}."


def _default(option: Option) -> str:
    """Return an option's default, or those with each choice it is for; "" where there is none."""
    if option.defaults:
        shown = {name: _typed(one, option.kind) for name, one in option.defaults.items()}
        return ", ".join(f"{value or 'none'} with {name}" for name, value in shown.items())
    return _typed(option.default, option.kind)


def _typed(default: Any, kind: str) -> str:
    if default is None or default == "":
        return ""
    if kind == "flag":
        return "yes" if default else "no"
    return str(default)


def _needed(option: Option) -> str:
    """Return which value of another option an option is for, as it is typed."""
    other = next(one for one in _every_option() if one.path == option.needs)
    return f"{other.flag} {' or '.join(option.of)}"


def _is_module(rule: Mapping[str, Any]) -> bool:
    return rule.get("also") is Module


_SECTIONS = {
    "Models": ("--arch", "--checkpoint-key", "--weights", "--config", "--preset", "--vocabulary"),
    "Data": (
        *("--data", "--data-key", "--labels", "--limit", "--shape", "--scale", "--mean", "--std"),
        *("--text-column", "--max-length", "--input-shape"),
    ),
    "Output": (
        *("--out", "--out-dir", "--out-dtype", "--max-shard-size", "--processor-of", "--plot"),
        *("--report", "--chosen", "--csv", "--json"),
    ),
}
"""The options that are none of a fusion's stages, by section of the help."""


class CommandWithSections(typer.core.TyperCommand):
    """A command of which the help lists the options of each stage of a fusion on their own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all parameters, by section."""
        stages = {one.flag: _stage(one) for one in _every_option()}
        titles = {
            one.name: f"{one.name.capitalize()}: {one.metadata['help']}"
            for kind in reversed(_CONFIGS)
            for one in fields(kind)
            if one.metadata["kind"] == "nested"
        }
        sections: dict[str, list[tuple[str, str]]] = {
            one: [] for one in ("Arguments", *_SECTIONS, "Options")
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            flag = parameter.opts[0]
            own = next((title for title, flags in _SECTIONS.items() if flag in flags), "Options")
            title = titles.get(stages.get(flag, ""), own)
            if parameter.param_type_name == "argument":
                title = "Arguments"
            sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


# --- from parameters to a configuration ---------------------------------------------------------


def configured(given: Mapping[str, str | bool], base: FusionConfig | None = None) -> FusionConfig:
    """Return a configuration with the options that were typed; errors name them by their flags.

    Raises
    ------
    InputError
        An option is out of its range, does not belong to the chosen variant, or lacks another one.
    """
    given = dict(given)
    preset = given.pop(_PRESET, None)
    with messages_by_flags():
        if preset is not None:
            if base is not None:
                raise InputError("--preset and --config are both whole settings: give one of them")
            if preset not in PRESETS:
                raise InputError(f"--preset must be one of {', '.join(PRESETS)}; got {preset}")
            base = preset_of(preset)
        config = changed(base or FusionConfig(), given)
        for option in options_of(FusionConfig):
            if _is_module(option.rule) and setting_at(config, option.path) == "":
                raise InputError(f"{_needed(option)} needs {option.flag} {_metavar(option)}")
    return config


def changed(config: C, given: Mapping[str, str | bool]) -> C:
    """Return a configuration with some options, given by their paths as text, changed.

    A variant that is chosen anew has its own defaults. Where none is named, and the base has the
    default, options that belong to one other variant alone choose that one.

    Raises
    ------
    InputError
        As for :func:`configured`; the message has the option's path.
    """
    return cast(C, _changed(config, type(config), given, "", is_default=False))


def setting_at(settings: Settings, path: str) -> Any:
    """Return the value of an option; None where the chosen variants do not have it."""
    found: Any = settings
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _changed(
    base: Settings,
    family: type[Settings],
    given: Mapping[str, str | bool],
    path: str,
    *,
    is_default: bool,
) -> Settings:
    prefix = f"{path}." if path else ""
    inner = [one for one in given if one.startswith(prefix)]
    chosen = str(given.get(path, base.name))
    if is_default and path not in given and inner:
        chosen = _meant(inner, base, family, prefix)
    if not inner and chosen == base.name:
        return base
    kind, values = type(base), dict[str, Any]()
    if family.variants():
        values["name"] = chosen
        if chosen not in family.variants():
            return family.parse(chosen, path)  # which refuses it
        kind = kind if chosen == base.name else family.variants()[chosen]
    for one in fields(kind):
        where = f"{prefix}{one.name}"
        value: Any = getattr(base, one.name) if kind is type(base) else one.default
        if one.metadata["kind"] == "nested":
            is_usual = value == one.default
            value = _changed(value, one.metadata["settings"], given, where, is_default=is_usual)
        elif where in given:
            value = _parsed(given[where], one.metadata)
        if value is not MISSING:
            values[one.name] = value
    _check_places(inner, kind, prefix)
    return family.parse(values, path)


def _meant(paths: list[str], base: Settings, family: type[Settings], prefix: str) -> str:
    """Return the name of the variant that options choose where none is named: base's if it has all.

    Raises
    ------
    InputError
        Several others have them.
    """
    names = {path.removeprefix(prefix).partition(".")[0] for path in paths}
    fitting = [
        name
        for name, kind in family.variants().items()
        if names <= {one.name for one in fields(kind)}
    ]
    if base.name in fitting or not fitting:
        return base.name
    if len(fitting) > 1:
        flags = {one.path: one.flag for one in _every_option()}
        several = " or ".join(fitting)
        choosing = flags[prefix.removesuffix(".")]
        raise InputError(
            f"{flags[paths[0]]} is for {choosing} {several}; this is {base.name}: add {choosing} "
            f"{several}"
        )
    return fitting[0]


def _check_places(paths: list[str], kind: type[Settings], prefix: str) -> None:
    """Refuse options that the chosen variant does not have."""
    known = {one.name for one in fields(kind)}
    for path in paths:
        if path.removeprefix(prefix).partition(".")[0] not in known:
            option = next(one for one in _every_option() if one.path == path)
            raise InputError(
                f"{option.flag} is for {_needed(option)}; this is {kind.name}: give that, or leave "
                f"{option.flag} out"
            )


def _parsed(value: str | bool, rule: Mapping[str, Any]) -> Any:
    """Return what a text stands for; what is no number is left for the settings to refuse."""
    if isinstance(value, bool):
        return value
    if _is_module(rule):
        from clafusion.weights.factories import build_model

        return build_model(value)
    number: type[int] | type[float] | None = {"number": float, "count": int}.get(rule["kind"])
    if rule["kind"] == "text" and issubclass(rule["also"], (int, float)):
        number = rule["also"]
    try:
        return value if number is None or value == rule.get("word") else number(value)
    except ValueError:
        return value


# --- messages as options are typed ---------------------------------------------------------------


@dataclass(frozen=True)
class _Spelling:
    """How a command calls options: by their flags, or by their entries in a manifest."""

    name: Callable[[Option], str]
    between: str  # a name and a value
    phrases: Mapping[str, str]  # what only Python has -> what there is instead

    def told(self, option: Option, value: str) -> str:
        return f"{self.name(option)}{self.between}{value}"


_PHRASES = {
    "training (clafusion.distill)": "training (in Python: clafusion.distill)",
    "clafusion.explain, or 'clafusion explain',": "'clafusion explain'",
    # Of these a fusion has an option for the first, whose path is spelled in turn.
    "raise epsilon, tolerance or max_iterations": "raise matching.solver.epsilon",
}
_FLAGS = _Spelling(
    lambda option: option.flag,
    " ",
    {
        **_PHRASES,
        "Give example_inputs as": "Give --data with inputs as",
        "(key=..., --checkpoint-key)": "(--checkpoint-key)",
        "memory_limit=": "--memory-limit ",
        "weight must be numbers": "--weight must be numbers",
        "seeds must be at least": "--seeds must be at least",
    },
)
_ENTRIES = _Spelling(
    lambda option: f"settings.{option.path}",
    ": ",
    {
        **_PHRASES,
        "Give example_inputs as": "Give data with inputs as",
        "(key=..., --checkpoint-key)": "(an entry key of the model)",
    },
)


@contextmanager
def messages_by_flags() -> Iterator[None]:
    """Let errors and warnings call options and models as the command line does, not as Python."""
    with _warnings_spelled(_FLAGS):
        try:
            yield
        except ClafusionError as error:
            told = _spelled(str(error), _FLAGS)
            if told == str(error):
                raise
            raise retold(error, told) from None


@contextmanager
def output_by_flag(flag: str) -> Iterator[None]:
    """Let errors call a file that cannot be written by the flag that names it."""
    try:
        yield
    except ClafusionError as error:
        told = str(error).replace("cannot write path ", f"cannot write {flag} ", 1)
        if told == str(error):
            raise
        raise retold(error, told) from None


@contextmanager
def warnings_by_entries() -> Iterator[None]:
    """Let warnings call options as a manifest does, not as Python."""
    with _warnings_spelled(_ENTRIES):
        yield


@contextmanager
def _warnings_spelled(spelling: _Spelling) -> Iterator[None]:
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, FusionWarning):
            message = category(_spelled(str(message), spelling))
        before(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _spelled(message: str, spelling: _Spelling) -> str:
    options = _every_option()
    paths = {one.path: one for one in options}
    start = message.partition(" ")[0]

    def option_of(name: str) -> Option | None:
        """Return the option of this path or, where only one is called so, of this name.

        The name of a stage stands for its first option, as a string does in Python.
        """
        stage = start.partition(".")[0]
        found = [one for one in options if one.field == name]
        near = [one for one in found if _stage(one) == stage] if len(found) > 1 else found
        of_stage = [one for one in options if _stage(one) == name][:1]
        return paths.get(name) or next(iter(of_stage or (near if len(near) == 1 else ())), None)

    def with_value(found: re.Match[str]) -> str:
        option, value = option_of(found["name"]), found["value"]
        if option is None or (found["between"] == " " and value not in option.choices):
            return found[0]
        return spelling.told(option, value)

    message = re.sub(r"models\[(?P<name>'[^']*')\]", r"model \g<name>", message)
    for phrase, instead in spelling.phrases.items():
        message = message.replace(phrase, instead)
    template = next(one for one in options if _is_module(one.rule) and Like.name in one.of)
    needed = spelling.told(paths[template.needs], Like.name)
    wanted = f"{needed} {spelling.told(template, _metavar(template))}"
    message = message.replace(f"{template.needs}={Like.__name__}(module)", wanted)
    name = r"(?<![-\w.])(?P<name>[a-z_]+(?:\.[a-z_]+)*)"
    value = r"(?P<quote>['\"])(?P<value>\w+)(?P=quote)"
    message = re.sub(f"{name}(?P<between>=| ){value}", with_value, message)
    if start in paths:
        message = re.sub(rf"^{re.escape(start)}(?= )", spelling.name(paths[start]), message)
    dotted = "|".join(re.escape(one) for one in sorted(paths, key=len, reverse=True) if "." in one)
    return re.sub(
        rf"(?<![-\w.])({dotted})(?![\w])", lambda found: spelling.name(paths[found[1]]), message
    )


def advice(flag: str) -> str:
    """Return what to say of an unknown option: that others have it, or what may have been meant."""
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    found = [one.flag for one in options_of(FusionConfig) if one.field == name]
    if flag in [one.flag for one in options_of(FusionConfig)]:
        return " It is an option of 'clafusion fuse'."
    return f" Did you mean {' or '.join(found)}?" if found else ""
