"""How the source is laid out: what may import what, one name for each thing, and what is where."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("sae", "transcoders", "training", "eval")
# Who may print: command lines, and scripts that are run by path or as processes of their own.
PRINTING = re.compile(r"(.*\.)?cli|eval\.commands\..*|training\.console|training\.embedded\.(train|tune|bilingual)")
# What the lower layers stand on. Their folders may use more: kernels compile, formats read others' YAML.
CORE = {"torch", "safetensors", "numpy", "jaxtyping", "huggingface_hub", *sys.stdlib_module_names}
MORE = {"sae.kernels": {"numba", "triton"}, "sae.formats": {"ruamel"}}
# Whom these are met by only; nothing is unpickled anywhere.
ONLY = {
    "transformers": re.compile(r"(.*\.)?model_source|training\.embedded\..*"),
    "wandb": re.compile(r"training\.report"),
    "pickle": re.compile("nowhere"),
    "dill": re.compile("nowhere"),
    "joblib": re.compile("nowhere"),
}


def statements(tree):
    """Yield the statements of a tree, nested ones too: most of a tree is expressions, which take long to walk."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, field, ())
        yield node


class Tree:
    """The modules below a root, by their names in the package: ``sae.encoders.topk``; the package itself is ``sparsary``."""

    def __init__(self, root):
        self.root = root
        self.paths = {}
        paths = [path for path in root.glob("*.py") if path.name != "setup.py"]
        for path in sorted([*paths, *(path for layer in LAYERS for path in (root / layer).rglob("*.py"))]):
            parts = path.relative_to(root).with_suffix("").parts
            self.paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "sparsary"] = path
        self.texts = {name: path.read_text(encoding="utf-8") for name, path in self.paths.items()}
        self.parsed = {name: ast.parse(text) for name, text in self.texts.items()}
        # What a module imports, in functions too: modules of the tree, and other libraries' names.
        self.imports = {name: set(self._imported(name)) - {name} for name in self.paths}
        self.arrows = {name: {target for target in found if target in self.paths} for name, found in self.imports.items()}

    def _imported(self, name):
        package = name if self.paths[name].name == "__init__.py" else name.rpartition(".")[0]
        parts = [] if package == "sparsary" else package.split(".")
        for node in statements(self.parsed[name]):
            if isinstance(node, ast.Import):
                yield from (self._own(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = [*parts[: len(parts) - node.level + 1]] if node.level else []
                source = ".".join([*base, *filter(None, [node.module])])
                source = (source or "sparsary") if node.level else self._own(source)
                below = "" if source == "sparsary" else f"{source}."
                # A submodule is meant by its name; the package around it, only where something of its own is taken.
                yield from (f"{below}{alias.name}" if f"{below}{alias.name}" in self.paths else source for alias in node.names)

    def _own(self, name):
        return name.removeprefix("sparsary.") if name.startswith("sparsary.") else name


def layer(name):
    """Return how high a module stands; what joins the layers stands above them."""
    top = name.split(".")[0]
    return LAYERS.index(top) if top in LAYERS else len(LAYERS)


def upward_imports(tree):
    """Imports of a higher layer."""
    for name, targets in tree.arrows.items():
        yield from (f"{name} imports {target}" for target in sorted(targets) if layer(target) > layer(name))


def circles(arrows):
    """Sets of modules each of which imports, by way of others, all of them."""
    reached = {}
    for name in arrows:
        seen, waiting = set(), [name]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[name] = seen
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in arrows if name in reached[name]}
    return sorted(", ".join(sorted(circle)) for circle in found)


def circles_of_folders(tree):
    """Circles of the folders of a layer, whatever of one imports whatever of another; files beside them are left out."""
    for top in LAYERS:
        arrows = defaultdict(set)
        folder = {name: ".".join(name.split(".")[:2]) for name in tree.paths if name.split(".")[0] == top}
        folder = {name: where for name, where in folder.items() if (tree.root / where.replace(".", "/")).is_dir()}
        for name, where in folder.items():
            arrows[where] |= {folder[target] for target in tree.arrows[name] if target in folder} - {where}
        yield from circles({name: arrows[name] for name in set(folder.values())})


def repeated_names(tree):
    """Public classes and functions that are defined in more than one module."""
    where = defaultdict(list)
    for name, parsed in tree.parsed.items():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
                where[node.name].append(name)
    return [f"{name}: {', '.join(modules)}" for name, modules in sorted(where.items()) if len(modules) > 1]


def prints(tree):
    """Calls of ``print`` outside the command line."""
    for name, parsed in tree.parsed.items():
        if "print" not in tree.texts[name]:
            continue
        calls = [node for node in ast.walk(parsed) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        lines = [call.lineno for call in calls if call.func.id == "print"]
        if lines and not PRINTING.fullmatch(name):
            yield f"{name}: lines {lines}"


def markup(tree):
    """HTML in Python."""
    for name, text in tree.texts.items():
        if found := sorted(set(re.findall("<html|<style|<script", text))):
            yield f"{name}: {', '.join(found)}"


def evaluation_in_pages(tree):
    """Imports of evaluations by pages, which read what commands wrote."""
    for name, targets in tree.arrows.items():
        if name.startswith("eval.pages"):
            others = {target for target in targets if target.startswith("eval.") and not target.startswith("eval.pages")}
            yield from (f"{name} imports {target}" for target in sorted(others - {"eval.undefined"}))


def misplaced_libraries(tree):
    """Imports of other libraries where they do not belong."""
    for name in tree.paths:
        for target in sorted({target.split(".")[0] for target in tree.imports[name] if target not in tree.paths}):
            allowed = CORE.union(*(more for folder, more in MORE.items() if name.startswith(folder)))
            low = layer(name) <= LAYERS.index("transcoders") and target not in allowed
            if low or (target in ONLY and not ONLY[target].fullmatch(name)):
                yield f"{name} imports {target}"


def unknown_modules(tree):
    """Imports of modules of ours that there are not, or by the bare name of a layer."""
    for name in tree.paths:
        others = {target for target in tree.imports[name] if target not in tree.paths}
        yield from (f"{name} imports {target}" for target in sorted(others) if target.split(".")[0] in LAYERS)


def module_circles(tree):
    """Circles of modules."""
    return circles(tree.arrows)


# Each with a file that breaks it, and what is said of that.
CHECKS = {
    upward_imports: (
        {"sae/one.py": "def f():\n    from ..training.two import g\n", "training/two.py": ""},
        "sae.one imports training.two",
    ),
    module_circles: (
        {
            "sae/one.py": "from .two import f",
            "sae/two.py": "def f():\n    from . import three",
            "sae/three.py": "from .one import g",
        },
        "sae.one, sae.three, sae.two",
    ),
    circles_of_folders: (
        {"eval/a/x.py": "from ..b.y import f", "eval/a/z.py": "", "eval/b/y.py": "", "eval/b/w.py": "from ..a import z"},
        "eval.a, eval.b",
    ),
    repeated_names: ({"sae/one.py": "def f(): ...", "eval/two.py": "class f: ..."}, "f: eval.two, sae.one"),
    prints: ({"eval/one.py": "def f():\n    print(1)", "eval/cli.py": "print(2)"}, "eval.one: lines [2]"),
    markup: ({"eval/one.py": "PAGE = '<html><style>'"}, "eval.one: <html, <style"),
    evaluation_in_pages: (
        {"eval/pages/one.py": "from ..undefined import a\nfrom ..two import b", "eval/two.py": "", "eval/undefined.py": ""},
        "eval.pages.one imports eval.two",
    ),
    misplaced_libraries: (
        {"sae/one.py": "import scipy.stats, torch", "sae/kernels/two.py": "import numba, math"},
        "sae.one imports scipy",
    ),
    unknown_modules: ({"sae/one.py": "from .gone import f\nimport json"}, "sae.one imports sae.gone"),
}


@pytest.fixture(scope="module")
def tree():
    return Tree(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_has_none(check, tree):
    found = list(check(tree))
    assert not found, "\n  ".join([f"{check.__doc__} {len(found)}:", *found])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_planted_one_is_found(check, tmp_path):
    files, said = CHECKS[check]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    packages = {path.parent for path in tmp_path.rglob("*.py")} | {tmp_path, *(tmp_path / name for name in LAYERS)}
    for folder in packages:
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    assert list(check(Tree(tmp_path))) == [said]


def test_a_package_around_a_module_is_no_circle(tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "__init__.py").write_text("from .one import A")
    (tmp_path / "sae" / "one.py").write_text("from . import two")
    (tmp_path / "sae" / "two.py").write_text("")
    assert module_circles(Tree(tmp_path)) == []
    (tmp_path / "sae" / "two.py").write_text("def f():\n    from . import A")
    assert module_circles(Tree(tmp_path)) == ["sae, sae.one, sae.two"]


def folders():
    """Return the folders of source, by their paths from the root."""
    return {str(path.parent.relative_to(ROOT)) for name in LAYERS for path in (ROOT / name).rglob("*.py")}


def test_the_folders_of_the_architecture_page_are_the_tree():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"## Folders\n.*?```\n(.*?)```", page, re.S).group(1)
    mapped = [line.split()[0].rstrip("/") for line in block.splitlines() if line.strip()]
    assert len(mapped) == len(set(mapped))
    missing = folders() | {"tests", "recipes", "docs"}
    assert sorted(missing - set(mapped)) == []
    assert [name for name in mapped if not (ROOT / name).is_dir()] == []


def test_tests_stand_where_their_source_does():
    tests = sorted(path for name in LAYERS for path in (ROOT / "tests" / name).rglob("*.py"))
    assert [str(path) for path in tests if not (ROOT / path.parent.relative_to(ROOT / "tests")).is_dir()] == []
    # Packages under tests/ would stand before the source's own.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_importing_is_quiet_and_does_nothing():
    code = "import sys; before = set(sys.modules); import sparsary; print(len([m for m in sys.modules if m == 'torch']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (run.stdout, run.stderr) == ("0\n", "")


EVERYTHING = """
import importlib, os, signal, sys
import torch

def about():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    # torch._inductor notes there where it caches; scikit-learn, how OpenMP is to behave after a fork.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHINDUCTOR", "KMP_"))}
    return environment, list(sys.path), handlers, torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()

before = about()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert about() == before
"""


@pytest.mark.parametrize("layers", [LAYERS[:2], LAYERS], ids=["core", "all"])
def test_importing_every_module_is_quiet_and_changes_nothing(tree, layers):
    # What runs by path, with other libraries' Python, is no part of the package.
    names = [name for name in tree.paths if name.split(".")[0] in layers and name != "training.bench.peer_steps"]
    names = [f"sparsary.{name}" for name in names]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERYTHING, *names], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_its_bare_name_says_how_it_is_imported(name):
    run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        f"ImportError: {name} is a part of sparsary: write `from sparsary.{name} import ...`"
    )


def test_nothing_names_a_place_only_we_have():
    # The words are put together here so that this file does not find itself.
    words = ["/wo" + "rk/", "/t" + "mp/", "shar" + "ed/methods", "mirr" + "or"]
    if shutil.which("git") is None:
        pytest.skip("needs git, which knows the files of the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".txt", "") and path.is_file() and path.name != "lexicon.py":
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text.replace("mirror ladder", "")], name
