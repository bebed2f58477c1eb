"""Paths and modules that documentation and docstrings name are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("sae", "transcoders", "training", "eval")
TOPS = (*LAYERS, "tests", "recipes", "docs")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
CODE = [path for top in (*LAYERS, "tests", "docs") for path in (ROOT / top).rglob("*.py")] + [*ROOT.glob("*.py")]
# A path from the root, wherever it stands; as an argument of a command or in backticks.
PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(TOPS)})/[\w./-]*\w)")
# A module in backticks, by what follows its layer: `eval.metrics.base`, ``sae.encoders.ENCODERS``, `sparsary.sae`.
MODULE = re.compile(rf"`(?:sparsary\.)?((?:{'|'.join(LAYERS)})(?:\.\w+)+)[`(]")
# What a study writes, files and attributes that look like modules, and patterns with capitals: sae/encoders/NAME.py.
OTHERS = re.compile(r".*[A-Z]{3}.*|docs/results/.*|sae\.(safetensors|pt|cfg)")


def gone(text):
    """Return what a text names and the tree has not."""
    paths = [name for name in PATH.findall(text) if not OTHERS.fullmatch(name)]
    missing = [name for name in paths if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))]
    return missing + [name for name in MODULE.findall(text) if not OTHERS.fullmatch(name) and not is_module(name)]


def is_module(name):
    """Return whether a dotted name leads to a module, or to something that its last module defines or imports."""
    *folders, last = name.split(".")
    for length in range(len(folders), 0, -1):
        path = ROOT.joinpath(*folders[:length])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if length == len(folders) and (path / f"{last}.py").is_file() | (path / last / "__init__.py").is_file():
            return True
        if file.is_file():
            return re.search(rf"\b{name.split('.')[length]}\b", file.read_text(encoding="utf-8")) is not None
    return False


def words(path):
    """Return the text of a page, or the docstrings and comments of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    comments = re.findall(r"(?m)(?:^|\s)(#.*)", text)
    return "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *comments])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(path):
    # History keeps its old names.
    text = path.read_text(encoding="utf-8") if path.name != "CHANGELOG.md" else ""
    assert gone(text) == []


def dead_links(path):
    """Return the relative links of a page that lead to no file, or to no heading of one."""
    found = []
    # Code has brackets before parentheses too.
    text = re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        # docs/reference.py makes these when the site is built, which checks links to them.
        made = "reference" in Path(name).parts
        if made or re.match(r"https?:|mailto:", link) or (target.exists() and (not heading or heading in headings(target))):
            continue
        found.append(link)
    return found


def headings(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(path):
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text("# One, two\n[a](b.md) [b](#one-two) [c](a.md#three) [d](https://nowhere.invalid)")
    assert dead_links(tmp_path / "a.md") == ["b.md", "a.md#three"]


def test_what_docstrings_and_recipes_name_is_there():
    paths = [*CODE, *(ROOT / "recipes").rglob("*.yaml")]
    # Parsing is slow, and most files name nothing that is missing, not even in their code.
    paths = [path for path in paths if gone(path.read_text(encoding="utf-8"))]
    found = {str(path.relative_to(ROOT)): gone(words(path)) for path in paths}
    found = {name: missing for name, missing in found.items() if missing}
    assert not found, "\n".join(["docstrings and comments name what is not there:", *map(str, found.items())])


def test_names_of_what_is_not_there_are_found():
    text = "`eval/gone.py`, tests/sae/encoders/test_topk.py, `eval.groups`, `sae.encoders.ENCODERS`, ``sae.files.no_such``"
    assert gone(text) == ["eval/gone.py", "eval.groups", "sae.files.no_such"]
