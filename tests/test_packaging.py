"""What is shipped and what it needs: the wheel beside a user's own modules, editable installs, extras, public names."""

import ast
import doctest
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparsary
from sparsary.sae.extras import OPTIONAL
from sparsary.sae.formats import SourceFiles

ROOT = Path(__file__).parents[1]
LAYERS = ("sae", "transcoders", "training", "eval")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE_OF = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
EXAMPLE = re.compile(r"(?m)^ *>>> (?!.*\+SKIP)")
EXAMPLES = [name for name, path in SOURCE_OF.items() if EXAMPLE.search(path.read_text(encoding="utf-8"))]
# Modules that Windows, or macOS, does not have.
POSIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}


def run(command, cwd, **more):
    """A process that knows nothing of this checkout; its output. Fails the test if it fails."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder):
    """A virtual environment that sees the packages of this one, but no sparsary; its interpreter."""
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # Of a folder that a .pth file names, the .pth files are not read: an editable sparsary there stays out.
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    return python


def pip(python, *arguments):
    """The pip of this environment, at work in another. Nothing is fetched: what builds is installed here."""
    run([sys.executable, "-m", "pip", "--python", python, *arguments, "--quiet", "--no-deps", "--no-index"], python.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is in the repository, with tests and recipes, that may be built in."""
    folder = tmp_path_factory.mktemp("checkout") / "sparsary"
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "golden", "results")
    return shutil.copytree(ROOT, folder, ignore=left_out, symlinks=True)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel made from the unpacked source distribution, which so has all that a wheel needs."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    out = tmp_path_factory.mktemp("dist")
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run([sys.executable, "-c", build, "build_sdist", out], checkout)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    run([sys.executable, "-c", build, "build_wheel", out], next(path for path in out.iterdir() if path.is_dir()))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, and a folder with a user's own modules of our folders' names."""
    python = environment(tmp_path_factory.mktemp("installed"))
    pip(python, "install", wheel)
    folder = tmp_path_factory.mktemp("theirs")
    for name in ("training.py", "eval.py", "sae/__init__.py", "transcoders/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise RuntimeError('the user\\'s own module was imported')\n")
    return python, folder


def test_the_wheel_holds_one_package_with_its_data_and_nothing_else(wheel):
    data = [*(ROOT / "training/embedded/model").iterdir(), ROOT / "py.typed", ROOT / "transcoders/releases.json.gz"]
    data += [path for path in (ROOT / "eval/pages").rglob("*") if path.suffix in (".html", ".css", ".js")]
    shipped = {f"sparsary/{path.relative_to(ROOT).as_posix()}" for path in (*SOURCES, *data)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped | {"sparsary/__init__.py", "sparsary/__main__.py"}


def test_the_wheel_works_beside_a_users_own_modules(installed):
    python, folder = installed
    code = f"""
import importlib.resources, runpy, sys
# Without it torch's code is used: the kernels would be compiled, for this folder alone.
sys.modules["numba"] = None
import torch
import sparsary, sparsary.eval.cli, sparsary.training.bench.cli
from sparsary.sae import SAE
from sparsary.training.recipe import check_recipe
assert not sparsary.__file__.startswith({str(ROOT)!r}), sparsary.__file__
assert SAE is sparsary.SAE is sparsary.sae.SAE
SAE(5, 7, sparsary.ENCODERS["relu"](target_l0=2)).save("saved", {{}})
d = sparsary.load("saved")
x = torch.randn(3, 5)
assert torch.equal(d.decode(d.encode(x), x), d(x))
assert (importlib.resources.files("sparsary.training.embedded") / "model" / "model.safetensors").is_file()
print(sparsary.__version__)
sys.argv[1:] = ["--help"]
runpy.run_module("sparsary", run_name="__main__", alter_sys=True)
"""
    version, _, said = run([python, "-c", code], folder).partition("\n")
    assert version == PROJECT["version"]
    assert "harvest" in said
    script = python.parent / ("sparsary.exe" if os.name == "nt" else "sparsary")
    assert "harvest" in run([script, "--help"], folder)


def test_an_editable_install_runs_from_anywhere(checkout, tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    python = environment(tmp_path / "environment")
    pip(python, "install", "--no-build-isolation", "--editable", checkout)
    # The command in the same process: with -c, the folder is looked through first, as it is with -m.
    code = "import runpy, sparsary; from sparsary.sae import SAE; print(sparsary.__file__); "
    code += "runpy.run_module('sparsary', run_name='__main__', alter_sys=True)"
    for folder in (checkout, checkout / "training", Path(checkout.anchor)):
        found, _, said = run([python, "-c", code, "--help"], folder).partition("\n")
        assert Path(found) == checkout / "__init__.py"
        assert "harvest" in said
    bare = subprocess.run([python, "-c", "import sae"], cwd=checkout, capture_output=True, text=True, check=False)
    assert "write `from sparsary.sae import ...`" in bare.stderr
    (checkout / "tests" / "sae" / "test_one.py").write_text(
        "from sparsary.sae import SAE\n\n\ndef test_one():\n    assert SAE\n"
    )
    options = ["-n", "0", "-p", "no:cacheprovider"]
    assert "1 passed" in run([python, "-m", "pytest", *options, "tests/sae/test_one.py"], checkout)


def packages_with(requirements):
    """The names of installed distributions that requirements bring with them, their own included."""
    found, left = set(), [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            left += map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            # On this system, or with this build of torch, it is not needed.
            continue
        found.add(name)
    return found


# Runs code as if some top-level modules were not installed.
WITHOUT = """
import json, sys
missing, code = json.loads(sys.argv[1]), sys.argv[2]
class Filtered:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Filtered(finder) for finder in sys.meta_path]
exec(compile(code, "code", "exec"))
"""


def without(missing, code, cwd):
    command = [sys.executable, "-c", WITHOUT, json.dumps(sorted(missing)), code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def not_core():
    """Every installed top-level module that the core's requirements do not bring."""
    core = packages_with(PROJECT["dependencies"])
    modules = {
        module: {re.sub(r"[-_.]+", "-", name).lower() for name in names}
        for module, names in metadata.packages_distributions().items()
    }
    found = {module for module, names in modules.items() if not names & core} - {"sparsary"}
    assert {"typer", "pydantic", "scipy", "transformers", "ruamel"} <= found | {"typer"}
    return found


def test_the_core_alone_loads_encodes_and_decodes(not_core, tmp_path):
    golden = ROOT / "tests/golden/formats/saelens/topk-none"
    code = f"""
import torch, sparsary
for path, to in (({str(golden)!r}, "ours"), ("ours", "theirs")):
    d = sparsary.load(path)
    x = torch.randn(3, d.d_in)
    assert torch.equal(d.decode(d.encode(x), x), d(x))
    sparsary.convert(path, to, "sparsary" if to == "ours" else "saelens")
for name in ("train", "evaluate"):
    try:
        getattr(sparsary, name)
    except ImportError as error:
        print(error)
"""
    done = without(not_core, code, tmp_path)
    assert done.returncode == 0, done.stderr
    train, evaluate = done.stdout.splitlines()
    assert re.fullmatch(r"sparsary\.train: needs \S+: pip install 'sparsary\[train\]'", train)
    assert re.fullmatch(r"sparsary\.evaluate: needs \S+: pip install 'sparsary\[eval\]'", evaluate)


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ({"typer"}, ["--help"], "sparsary: needs typer: pip install 'sparsary[train]'"),
        ({"scipy"}, ["probe", "nowhere"], "sparsary probe: needs scipy: pip install 'sparsary[eval]'"),
        ({"pydantic"}, ["train", "recipe.yaml"], "sparsary train: needs pydantic: pip install 'sparsary[train]'"),
        ({"pydantic"}, ["features", "nowhere"], "sparsary features: needs pydantic: pip install 'sparsary[eval]'"),
    ],
)
def test_a_command_says_which_extra_it_needs(missing, arguments, says, tmp_path):
    code = f"import sys, sparsary; sys.argv = ['sparsary', *{arguments!r}]; sparsary.main()"
    done = without(missing, code, tmp_path)
    # A first line says what is being loaded.
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1:]) == (2, "", [says])


def test_a_format_that_keeps_yaml_says_which_extra_it_needs(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    # As if it were not installed.
    for name in ("ruamel", "ruamel.yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"config\.yaml: needs ruamel\.yaml: pip install 'sparsary\[train\]'"):
        SourceFiles(str(tmp_path)).yaml("config.yaml")


def test_the_extras_are_those_of_the_message():
    extras = {
        extra: {Requirement(text).name for text in texts if not text.startswith("sparsary[")}
        for extra, texts in PROJECT["optional-dependencies"].items()
    }
    assert extras.pop("all") == set()
    listed = {extra: {package for package, own in OPTIONAL.values() if own == extra} for extra in extras}
    assert extras == listed


def test_public_names_are_the_same_for_importers_type_checkers_and_people():
    assert set(sparsary.__all__) <= set(dir(sparsary))
    assert {*sparsary._HOME_OF, *LAYERS, "__version__"} == set(sparsary.__all__)
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            typed |= {alias.asname or alias.name: node.module for alias in node.names}
    assert typed == sparsary._HOME_OF | dict.fromkeys(LAYERS)
    with pytest.raises(AttributeError, match="module 'sparsary' has no attribute 'evalute'"):
        sparsary.evalute  # noqa: B018


def test_every_public_name_is_there():
    for name in sparsary.__all__:
        assert getattr(sparsary, name) is not None
    assert sparsary.__version__ == metadata.version("sparsary")
    assert sparsary.load.__module__ == "sparsary.transcoders.load"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(f"sparsary.{name}"))
    assert not found.failed
    # Otherwise doctest found fewer than there are, because a decorator hides them.
    assert found.attempted == len(EXAMPLE.findall(SOURCE_OF[name].read_text(encoding="utf-8")))


def test_importing_needs_no_posix():
    found = []
    # Parsing is slow, and most files do not even contain such a name.
    named = re.compile(rf"\b({'|'.join(POSIX_ONLY)})\b")
    for text, path in ((path.read_text(encoding="utf-8"), path) for path in SOURCES):
        for node in ast.parse(text).body if named.search(text) else ():
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            found += [(str(path.relative_to(ROOT)), name) for name in names & POSIX_ONLY]
    assert found == []
