"""What the reference makes of the roles in docstrings: links, and formulas.

Docstrings have the roles of Sphinx, which editors show well: ``:func:`fuse```, ``:math:`x^2``` and
``.. math::``. An extension of griffe makes Markdown of them, for the pages only: a link where the
reference shows what is named, else its name as code, and ``$x^2$``, of which ``hooks.py`` makes
MathML. Settings say what their fields are by what the fields themselves say.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe

__all__ = ["Roles", "documented", "fields_of", "markdown", "objects", "resolved"]

DOCS = Path(__file__).parent
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|obj):`([^`]+)`")
MATH = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *(?=\n\1 )))*)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrite the docstrings of the whole package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Make Markdown of every docstring's roles."""
        shown = documented(pkg)
        for found in objects(pkg["config"]):
            if found.is_class and found.docstring is not None:
                found.docstring.value += fields_of(found)
        for found in objects(pkg):
            if found.docstring is not None:
                found.docstring.value = markdown(found.docstring.value, found, shown)


def fields_of(settings: griffe.Object) -> str:
    """Return what a class of settings has as a section of its docstring; "" for no options."""
    kind = getattr(import_module(settings.module.path), settings.name)
    own = [one for one in fields(kind) if "help" in one.metadata] if is_dataclass(kind) else []
    if not own:
        return ""
    lines = ["", "", "Attributes", "----------"]
    for one in own:
        told = one.metadata["help"]
        default = getattr(one.default, "name", one.default)
        if one.metadata["kind"] == "nested" and not default:
            default = None  # settings of one kind only
        shown = "" if default in (None, "") else f" Default ``{default!r}``."
        lines += [one.name, f"    {told[:1].upper()}{told[1:]}.{shown}"]
    return "\n".join(lines)


def markdown(text: str, found: griffe.Object, shown: set[str]) -> str:
    """Return a docstring of an object with Markdown in place of roles."""

    def block(match: re.Match[str]) -> str:
        indent = match[1]
        formula = " ".join(match[2].split())
        return f"{indent}$$\n{indent}{formula}\n{indent}$$"

    def link(match: re.Match[str]) -> str:
        name = match[1].lstrip("~!.")
        path = resolved(name, found)
        return f"[`{name}`][{path}]" if path in shown else f"`{name}`"

    text = BLOCK.sub(block, text)
    text = MATH.sub(lambda match: f"${' '.join(match[1].split())}$", text)
    return ROLE.sub(link, text)


def resolved(name: str, found: griffe.Object) -> str | None:
    """Return the path of the object that a name in a docstring means, None if there is none."""
    scope: griffe.Object | None = found
    while scope is not None:
        try:
            named = scope[name] if not name.startswith("clafusion.") else scope.package[name[10:]]
            return str(named.canonical_path)
        except (KeyError, griffe.AliasResolutionError):
            scope = scope.parent if isinstance(scope.parent, griffe.Object) else None
    return None


def documented(pkg: griffe.Module) -> set[str]:
    """Return the paths of all objects that the pages of the reference show."""
    shown: set[str] = set()
    for page in sorted(DOCS.glob("reference*.md")):
        names = re.findall(r"^::: clafusion\.([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)
        for name in names:
            found = pkg[name]
            shown.add(found.canonical_path)
            if found.is_class or found.is_module:
                shown |= {
                    one.path
                    for name, one in found.members.items()
                    if not name.startswith("_") and not one.is_alias and one.has_docstring
                }
    return shown


def objects(scope: griffe.Object) -> list[griffe.Object]:
    """Return an object and all that are defined in it."""
    own = [one for one in scope.members.values() if isinstance(one, griffe.Object)]
    return [scope, *(inner for one in own for inner in objects(one))]
