"""The map of the folders, the direction of imports, and what is shipped."""

import ast
import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparsary.sae import ENCODERS, SparseCode
from sparsary.training.activations.model import hook_widths
from sparsary.training.recipe.grid import load_grid
from sparsary.training.resolve_hooks import dictionary_arguments, resolved

ROOT = Path(__file__).parents[1]
LAYERS = ("sae", "transcoders", "training", "eval")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "base.yaml")


def imported(path):
    """Absolute names of all modules a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, node.module or "")).rstrip(".")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    for name in imported(path):
        top = name.split(".")[0]
        if top in LAYERS:
            assert LAYERS.index(top) <= own, f"{path} imports {name}"
        assert top not in ("sparsary", "pickle", "dill", "joblib"), f"{path} imports {name}"
        if own <= 1:
            allowed = {"torch", "safetensors", "jaxtyping", "huggingface_hub", *sys.stdlib_module_names, *LAYERS[:2]}
            # Compilers, and what they compile from, are met in their own folder only.
            allowed |= {"numba", "numpy", "triton"} if "kernels" in path.parts else set()
            # Other libraries keep dictionaries as archives of arrays and describe them in YAML.
            allowed |= {"numpy", "ruamel"} if "formats" in path.parts else set()
            assert top in allowed, f"{path} imports {name}"
        if top == "transformers":
            assert path.name == "model.py" or "embedded" in path.parts
        if top == "wandb":
            assert path.name == "report.py"


def test_the_readme_s_map_is_the_tree():
    block = re.search(r"## The map\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    mapped = {line.split()[0].rstrip("/") for line in block.splitlines() if line.strip()}
    tree = {str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py"}
    tree |= {"sae/encoders/__init__.py", "sae/formats/__init__.py", "eval/circuits/methods/__init__.py"}
    tree |= {"sparsary.py", "recipes", "tests", "docs", "training/embedded/model"}
    assert mapped == tree


def test_importing_is_quiet_and_does_nothing():
    code = "import sys; before = set(sys.modules); import sparsary; print(len([m for m in sys.modules if m == 'torch']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_nothing_names_a_place_only_we_have():
    # The words are put together here so that this file does not find itself.
    words = ["/wo" + "rk/", "/t" + "mp/", "shar" + "ed/methods", "mirr" + "or"]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".txt", "") and path.is_file() and path.name != "lexicon.py":
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text.replace("mirror ladder", "")], name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_opens_with_its_command_and_is_valid(path):
    assert path.read_text().startswith("# ")
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines(keepends=True)))
    assert f"sparsary train {path.relative_to(ROOT)}" in header
    assert all(recipe.dictionary.encoder["name"] in ENCODERS for recipe in load_grid(path).recipes)


# Configurations of the hub models that recipes name, so that their hooks are checked without a network.
CONFIGS = {
    "openai-community/gpt2": ("GPT2Config", {}),
    "EleutherAI/pythia-70m-deduped": (
        "GPTNeoXConfig",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    ),
    "models/stories3M": (
        "LlamaConfig",
        {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512},
    ),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_builds_on_the_meta_device(path, tmp_path):
    stored = load_grid(path).recipes[0].harvest.store is not None
    recipes = load_grid(path, {"harvest.store": str(tmp_path / "store")} if stored else None).recipes
    members = resolved([with_configuration(recipe, tmp_path) for recipe in recipes])
    # The members between differ from these in the same keys.
    for member in {0, len(members) - 1}:
        check_one(members[member])


def with_configuration(recipe, tmp_path):
    """The recipe with its model's configuration from here, not from the hub."""
    import transformers

    if recipe.model.id == "embedded":
        return recipe
    name, sizes = CONFIGS[recipe.model.id]
    getattr(transformers, name)(**sizes).save_pretrained(tmp_path / "config")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": str(tmp_path / "config")})})


def check_one(recipe):
    import torch

    from sparsary.sae.checkpoint import build_dictionary
    from sparsary.training.preflight import plan_all

    widths = hook_widths(recipe.model, recipe.harvest.hooks)
    with torch.device("meta"):
        built = build_dictionary(dictionary_arguments(recipe, widths))
        # Nothing can be chosen by value there; decoding shows that the shapes fit, where it needs no values.
        code = SparseCode.from_rows(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))
        if len(built.sites) == 1:
            assert built.decode(code, torch.zeros(3, built.d_in)).shape == (3, built.d_out)
    assert built.d_out == sum(widths[hook] for hook in recipe.dictionary.hooks_out)
    if (recipe.harvest.tokens or 0) * sum(widths.values()) < 1e9:
        # Whatever memory the machine has that runs the tests.
        assert plan_all([recipe])[0].parameters == sum(p.numel() for p in built.parameters())


def test_the_wheel_holds_the_packages_the_model_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*LAYERS, "sparsary.py"}
    assert "training/embedded/model/model.safetensors" in names
    assert {f"{layer}/py.typed" for layer in LAYERS} <= set(names)
    assert sum(1 for name in names if name.endswith(".py")) == len(SOURCES) + 1
