"""What mkdocs makes of the sources: the table of options, the gallery, pages of the root, formulas.

The package has to be installed, for the options are asked of it.
"""

from __future__ import annotations

import ast
import html
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from clafusion.config import (
    FusionConfig,
    MergeConfig,
    Option,
    ReassemblyConfig,
    Settings,
    options_of,
)
from clafusion.presets import PRESETS, preset_of

ROOT = Path(__file__).parents[1]
OPTIONS_MARK = "<!-- table of all options -->"
MERGE_MARK = "<!-- table of the options of a merge -->"
REASSEMBLY_MARK = "<!-- table of the options of a reassembly -->"
PRESETS_MARK = "<!-- table of all presets -->"
FIGURES = "benchmarks/results/"  # pictures that pages show from there
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)
FLAG = re.compile(r"<code>(?=--?[a-z][\w-]*</code>)")
FIGURE = re.compile(r"(<td>|<td [^>]*>)(\d[\d.,]*(?: ?%)?(?: ± [\d.]+)?(?: ?%)?)(?=</td>)")
# Page -> the file at the root that it shows. Links in it lead to docs/ where they can.
PAGES_OF_THE_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


# --- what mkdocs calls --------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files in docs/."""
    from mkdocs.structure.files import File

    pages = {page: page_of_root(file) for page, file in PAGES_OF_THE_ROOT.items()}
    pages["gallery.md"] = gallery(ROOT / "examples", ROOT / "docs" / "gallery")
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    for figure in sorted((ROOT / FIGURES).glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of options and presets where their marks are, and figures in the site."""
    for mark, made in (
        (OPTIONS_MARK, options),
        (MERGE_MARK, merge_options),
        (REASSEMBLY_MARK, reassembly_options),
        (PRESETS_MARK, presets),
    ):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown.replace(f"](../{FIGURES}", "](figures/").replace(
        f"](../../{FIGURES}", "](../figures/"
    )


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML, which browsers draw without a script, in place of every formula.

    Flags get a class, by which they are not broken at their hyphens, and figures in tables stay on
    one line with what belongs to them.
    """
    content = FLAG.sub('<code class="flag">', FORMULA.sub(_mathml, content))
    return FIGURE.sub(lambda cell: f"{cell[1]}{cell[2].replace(' ', '&nbsp;')}", content)


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]).strip(), display=display)
    return f'<div class="arithmatex">{formula}</div>' if match[1] == "div" else formula


def page_of_root(file: str) -> str:
    """Return a file of the root as a page, with the links into docs/ that it has there."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for page, other in PAGES_OF_THE_ROOT.items():
        text = text.replace(f"]({other}", f"]({page}")
    return re.sub(r"\]\(docs/", "](", text)


# --- options ------------------------------------------------------------------------------------


def options(config: type[Settings] = FusionConfig) -> str:
    """Return all options as Markdown: a section for each stage, and one for those of none."""
    every = options_of(config)
    sections: list[str] = []
    single = [one.name for one in fields(config) if one.metadata["kind"] != "nested"]
    for stage in fields(config):
        if stage.metadata["kind"] == "nested":
            inner: type[Settings] = stage.metadata["settings"]
            own = [one for one in every if one.path.partition(".")[0] == stage.name]
            what = f"{_sentence(stage.metadata['help'])} {_advice(inner)}".strip()
            shorthand = _shorthand(stage.name, inner, stage.default)
            sections += [f"## {stage.name}", f"{what} {shorthand}", _table(own)]
    rest = [one for one in every if one.path in single]
    sections += ["## Others", _table(rest)]
    return "\n\n".join(sections)


def merge_options() -> str:
    """Return the options of a merge as one table."""
    return _table(options_of(MergeConfig))


def reassembly_options() -> str:
    """Return the options of a reassembly as one table."""
    return _table(options_of(ReassemblyConfig))


def presets() -> str:
    """Return all presets as Markdown: what each sets that is not the default."""
    lines = ["| Preset | What it is | Where it differs from the defaults |", "|---|---|---|"]
    default = dict(_flat(FusionConfig().to_dict()))
    for name, text in PRESETS.items():
        own = dict(_flat(preset_of(name).to_dict()))
        changed = [f"`{path}={own[path]!r}`" for path in own if own[path] != default.get(path)]
        lines.append(f"| `{name}` | {_sentence(text)} | {'<br>'.join(changed)} |")
    return "\n".join(lines)


def _flat(found: Any, path: str = "") -> Any:
    """Yield the path and the value of every setting in plain data; a variant by its name."""
    if not isinstance(found, dict):
        yield path, found
        return
    for name, value in found.items():
        inner = path if name == "name" else f"{path}.{name}" if path else name
        yield from _flat(value, inner)


def _advice(settings: type[Settings]) -> str:
    """Return what the settings' docstring advises those who are not sure."""
    found = re.search(r"If you are not sure[^.]*\.", " ".join((settings.__doc__ or "").split()))
    return found.group() if found else ""


def _shorthand(name: str, settings: type[Settings], default: Any) -> str:
    if settings.variants():
        return f'A string chooses a variant with its defaults: `{name}="{default.name}"`.'
    first = next(iter(fields(settings)))
    if first.metadata["kind"] != "choice":
        return f"Give `{name}={settings.__name__}(...)` or a mapping."
    return (
        f"A string stands for `{first.name}`: `{name}={first.default!r}` is "
        f"`{name}={settings.__name__}({first.name}={first.default!r})`."
    ).replace("'", '"')


def _table(found: list[Option]) -> str:
    lines = ["| Option | Values | Default | Meaning |", "|---|---|---|---|"]
    for one in found:
        names = f"`{one.path}`<br>`{one.flag}`"
        if one.kind == "flag":
            names += f", `--no-{one.flag.removeprefix('--')}`"
        meaning = _sentence(one.help)
        if one.needs:
            meaning += f" With `{one.needs}` {_listed(one.of)}."
        cells = [names, _values(one), _default(one), meaning]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines)


def _values(option: Option) -> str:
    rule = option.rule
    if option.choices:
        return "<br>".join(f"`{name}`: {_capital(text)}" for name, text in option.choices.items())
    if option.kind == "flag":
        return "`True`, `False`"
    if option.kind == "count":
        return _limits("a whole number", rule["least"], rule["most"])
    if option.kind == "number":
        limits = _limits("a number", rule["low"], rule["high"], rule["above_low"])
        return limits if rule["word"] is None else f"{limits}, or `{rule['word']}`"
    also = {"int": "text, or a whole number", "float": "text, or a number", "Module": "a module"}
    return also.get(rule["also"].__name__, "text")


def _limits(what: str, low: float, high: float | None, above: bool = False) -> str:
    if high is None or high >= 2**63 - 1:
        return f"{what} {'above' if above else 'of at least'} {low:g}"
    return f"{what} {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"


def _default(option: Option) -> str:
    """Return an option's default; of one that has several, each with the value it is for."""
    if option.defaults:
        return ", ".join(f"`{name}`: `{one}`" for name, one in option.defaults.items())
    return "" if option.default in (None, "") else f"`{option.default}`"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _sentence(text: str) -> str:
    return f"{_capital(text)}."


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(f"`{name}`" for name in names)


# --- examples -----------------------------------------------------------------------------------


def gallery(examples: Path, pictures: Path) -> str:
    """Return the page of all examples: title and text of the docstring, picture, code.

    An example's picture is the file of its name in ``pictures``, if there is one.
    """
    text = [
        "# Examples",
        "Each is a script that runs in a few minutes. With `--out FILE` it draws its picture.",
    ]
    for path in sorted(examples.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        module = ast.parse(source)
        title, _, rest = (ast.get_docstring(module) or path.stem).partition("\n")
        text += [f"## {title.rstrip('.')}", f"`python examples/{path.name} --out picture.png`"]
        text += [rest.strip()] if rest.strip() else []
        shown = sorted(pictures.glob(f"{path.stem}.*"))
        text += [f"![{title.rstrip('.')}]({pictures.name}/{one.name})" for one in shown]
        text.append(f"~~~~python\n{_without_docstring(source, module)}\n~~~~")
    if len(text) == 2:
        text.append("There are none in this version.")
    return "\n\n".join(text) + "\n"


def _without_docstring(source: str, module: ast.Module) -> str:
    lines = source.splitlines()
    if ast.get_docstring(module) is not None:
        lines = lines[module.body[0].end_lineno :]
    return "\n".join(lines).strip()
