"""The site builds without a warning, shows no raw markup, and every link leads somewhere."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import clafusion

ROOT = Path(__file__).parents[2]
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|obj|math):`")


class Page(HTMLParser):
    """What the tests look at in a page: text, links, what it loads, anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors, self.text = [], [], set(), []
        self.formulas, self._code = 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.formulas += tag == "math"
        self._code += tag in ("code", "pre", "script", "style")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


# One test, so that the site is built once however the tests are shared out among processes.
@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="on Python 3.10 mkdocstrings and pymdown disagree"
)
def test_the_site_is_whole(site, pages):
    assert {Path("index.html"), Path("gallery.html"), Path("tutorials/mnist.html")} <= set(pages)
    for path, page in pages.items():
        text = "".join(page.text)
        assert not ROLE.search(text), path
        assert not re.search(r"\.\. math::|\\\[|\\\(|\\(?:frac|sum|min|operatorname)\b", text), path
        for source in page.loaded:
            assert not urlsplit(source).netloc, f"{path} loads {source} from elsewhere"
        if path != Path("404.html"):  # whose links are made for a server
            for link in (*page.links, *page.loaded):
                assert _leads_somewhere(link, path, site, pages), f"{path}: {link}"
    reference = pages[Path("reference.html")], pages[Path("reference-parts.html")]
    assert sum(page.formulas for page in reference) >= 10
    for name in (
        "clafusion.fuse_pairs",
        "clafusion.FusionResult",
        "clafusion.GraphVerificationError",
    ):
        assert name in reference[0].anchors
    assert "clafusion.sinkhorn" in reference[1].anchors
    assert "reference.html#clafusion.fuse" in " ".join(reference[1].links)
    assert "#clafusion.profiling.batches.Data" in reference[0].links  # from the signatures
    assert "--calibration-anchor" in (site / "options.html").read_text("utf-8")


def _leads_somewhere(link, path, site, pages):
    parts = urlsplit(link)
    if parts.scheme:
        return parts.scheme in ("http", "https") and bool(parts.netloc)
    file = (site / path).parent / unquote(parts.path) if parts.path else site / path
    if file.is_dir():
        file /= "index.html"
    if not file.is_file():
        return False
    other = pages.get(file.resolve().relative_to(site.resolve()))
    return not parts.fragment or other is None or unquote(parts.fragment) in other.anchors


# --- what the docstrings' roles become -----------------------------------------------------------


@pytest.fixture(scope="module")
def roles():
    griffe = pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_roles", ROOT / "docs" / "roles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, griffe.load("clafusion", search_paths=[ROOT / "src"])


def test_roles_become_links_and_formulas(roles):
    module, package = roles
    found = package["fusion.fuse"]
    shown = {"clafusion.fusion.fuse", "clafusion.config.fusion.FusionConfig"}

    def made(text):
        return module.markdown(text, found, shown)

    assert made("see :func:`clafusion.fuse`.") == "see [`clafusion.fuse`][clafusion.fusion.fuse]."
    assert made(":class:`FusionConfig`") == "[`FusionConfig`][clafusion.config.fusion.FusionConfig]"
    assert made(":func:`clafusion.trace`") == "`clafusion.trace`"  # not among what is shown
    assert made(r"with :math:`S_{gg}`") == "with $S_{gg}$"
    block = "so\n\n    .. math:: a +\n              b\n\n    behind"
    assert made(block) == "so\n\n    $$\n    a + b\n    $$\n\n    behind"
    assert made(".. math::\n\n    a\n    + b,\n\nbehind") == "$$\na + b,\n$$\n\nbehind"


def test_settings_have_their_fields(roles):
    module, package = roles
    section = module.fields_of(package["config.calibration.LeastSquares"])
    assert "\nsamples\n    How many inputs are used; " in section
    assert "more than 4 GB. Default ``2000``." in section
    section = module.fields_of(package["config.fusion.FusionConfig"])
    assert "\ntarget\n    Which structure the result gets. Default ``'deeper'``." in section
    assert "\nprofiling\n    What is recorded of the parents.\n" in section
    assert module.fields_of(package["config.calibration.Repair"]) == ""
    names = re.findall(r"^(\w+)$", section, re.MULTILINE)[1:]
    assert names == [one.name for one in dataclasses.fields(clafusion.FusionConfig)]


def test_every_role_names_something(roles):
    module, package = roles
    dead = [
        f"{found.path}: {name}"
        for found in module.objects(package)
        if found.docstring is not None
        for name in module.ROLE.findall(found.docstring.value)
        if module.resolved(name.lstrip("~!."), found) is None
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert not dead
