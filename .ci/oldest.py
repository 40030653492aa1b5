"""Print from pyproject.toml what a nightly run needs to know.

oldest.py            the oldest releases of what the package needs, and of what its tests give it
oldest.py --build    the oldest releases of what builds it
oldest.py --pythons  the Pythons that wheels are built for, oldest first

Releases come as `name==version`, one a line: constraints of pip.
"""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The ranges of these extras are promises to users; those of the others concern developers alone.
EXTRAS = ("dask", "demo")
# Only the tests need it, but users bring models of any release of it.
BROUGHT = ("transformers",)


def pins(lines: list[str]) -> list[str]:
    """Return the oldest release of each requirement that holds here, or stop."""
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bounds = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(bounds) != 1:
            sys.exit(f"oldest.py: {requirement} needs one lower bound, written with >=")
        found.append(f"{requirement.name}=={bounds[0]}")
    return found


def releases(project: dict) -> list[str]:
    """Return the oldest releases of what the package needs and of what its tests give it."""
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for one in EXTRAS for line in extras[one])]
    for name in BROUGHT:
        given = [line for one in extras.values() for line in one if Requirement(line).name == name]
        if not given:
            sys.exit(f"oldest.py: no extra of pyproject.toml names {name}")
        lines += given
    return pins(lines)


def pythons(settings: dict) -> list[str]:
    """Return the versions in cibuildwheel's selectors: 3.10 for cp310-*."""
    tags = [one.removeprefix("cp").partition("-")[0] for one in settings["build"]]
    return [f"{tag[0]}.{tag[1:]}" for tag in sorted(tags, key=int)]


def main() -> None:
    """Print what the arguments ask for."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    if sys.argv[1:] == []:
        lines = releases(data["project"])
    elif sys.argv[1:] == ["--build"]:
        lines = pins(data["build-system"]["requires"])
    elif sys.argv[1:] == ["--pythons"]:
        lines = pythons(data["tool"]["cibuildwheel"])
    else:
        sys.exit(__doc__)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
