"""The documentation site builds without a warning, has no dead link, loads nothing from elsewhere, and is complete."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import sparsary
from sparsary.sae import ENCODERS
from sparsary.training.recipe.schema import Recipe, Section

ROOT = Path(__file__).parents[2]
# Elements whose address the browser loads by itself.
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}


class Links(HTMLParser):
    """Addresses that a page links to, those that it loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.loads += [found[LOADS[tag]]] if LOADS.get(tag) in found else []


def faults(site):
    """Return dead links within a site, and what its pages load from elsewhere."""
    pages = {
        path.resolve(): Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"
    }
    found = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loads and parts.scheme != "data":
                    found.append(f"{path.name} loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{path.name} links to {address}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__codelineno"}:
                found.append(f"{path.name} links to {address}, which has no such anchor")
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found += [f"{path.name} loads {word}" for word in ("@import", "url(http", "url(//") if word in text]
    return found


def test_faults_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="one"><a href="b.html">gone</a><a href="#two">no</a><a href="#one">yes</a><a href="https://arxiv.org">out</a>'
        '<script src="https://cdn.example/x.js"></script>'
    )
    (tmp_path / "s.css").write_text("@import 'x'")
    assert faults(tmp_path) == [
        "a.html links to b.html",
        "a.html links to #two, which has no such anchor",
        "a.html loads https://cdn.example/x.js",
        "s.css loads @import",
    ]


@pytest.fixture(scope="module")
def reference():
    for name in ("mkdocs", "material", "mkdocstrings", "jupytext", "nbconvert"):
        pytest.importorskip(name, reason=f"needs {name}, which `make docs` installs")
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_warnings_and_dead_links(reference, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    assert faults(tmp_path / "site") == []
    text = (tmp_path / "site" / "reference" / "api" / "dictionaries.html").read_text(encoding="utf-8")
    # A signature and a docstring, which mkdocstrings read from the source.
    assert 'id="sparsary.load"' in text
    assert "top_latents" in text


def test_no_page_is_listed_twice():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"[\w/]+\.md", nav)
    assert sorted(listed) == sorted(set(listed))


def test_examples_of_docstrings_become_code(reference):
    from runpy import run_path

    fenced = run_path(str(ROOT / "docs" / "doctests.py"))["fenced"]
    assert fenced("Return 1.\n\n>>> f(1)[0](k=2)\n1\n\nThat is all.") == (
        "Return 1.\n\n```pycon\n>>> f(1)[0](k=2)\n1\n```\n\nThat is all."
    )
    assert fenced("Example::\n\n    f()\n\n>>> f()") == "Example:\n\n    f()\n\n```pycon\n>>> f()\n```"


def test_the_reference_has_every_public_name(reference):
    listed = [name for _, _, names in reference.API.values() for name in names.split()]
    assert sorted(listed) == sorted(set(sparsary.__all__) - reference.NOT_IN_API)


def sections(section=Recipe):
    yield section
    for annotation in section.model_fields.values():
        for part in parts_of(annotation.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part)


def parts_of(annotation):
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from parts_of(part)


def test_every_recipe_key_is_described():
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        # A section describes itself.
        if not field.description
        and not any(isinstance(part, type) and issubclass(part, Section) for part in parts_of(field.annotation))
    ]
    assert undescribed == []


def test_the_recipe_page_has_every_key(reference):
    page = reference.recipe_page()
    keys = {name for section in sections() for name in section.model_fields}
    assert [name for name in sorted(keys) if f"| `{name}` |" not in page and f"| [`{name}`]" not in page] == []
    assert "| `tokens` | integer ≥ 1 | required | number of training tokens" in page
    assert "| `lr` | number or `auto` | `0.001` | peak learning rate" in page


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_argument_is_described(name, reference):
    _, described = reference.documented(ENCODERS[name])
    assert list(described) == list(ENCODERS[name].parameters_of())


def test_the_command_page_has_every_option(reference):
    page = reference.cli_page()
    for said in ("## `sparsary train`", "--dry-run", "### `sparsary bench step`", "## `sparsary hooks`", "`--match-l0"):
        assert said in page
