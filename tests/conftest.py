"""Fixtures, and run-time checks of every shape annotation while tests run."""

import json
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before the first import of ours: functions are wrapped when their module is loaded. The corpus is left out: it calls
# small functions millions of times and holds no tensors.
CHECKED = "activations checkpoints finish initialize loop objective optim phases preflight run state".split()
install_import_hook(["sae", "transcoders", "eval", *(f"training.{name}" for name in CHECKED)], "beartype.beartype")

import torch  # noqa: E402

HOOK = "transformer.h.2:out"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def recipe_values(tmp_path):
    """A recipe that runs in seconds: 6,000 tokens of the embedded model, 30 steps."""
    return {
        "text": {"context_length": 32},
        "harvest": {
            "hooks": [HOOK],
            "tokens": 6000,
            "store": str(tmp_path / "store"),
            "shard_tokens": 2000,
            "exclude_leading": 2,
        },
        "dictionary": {"hook": HOOK, "n_latents": 67, "encoder": {"name": "topk", "k": 5}},
        "tokens": 3030,
        "batch_tokens": 101,
        "lr_warmup_steps": 5,
        "dead_after_tokens": 500,
        "out_dir": str(tmp_path / "run"),
        "log_every": 5,
        "save_every": 10,
        "eval_tokens": 2000,
    }


@pytest.fixture
def write_recipe(tmp_path):
    """Writes values as a recipe file (JSON is YAML) and returns its path."""

    def write(values, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return str(path)

    return write


@pytest.fixture(scope="session")
def embedded_model():
    """The language model that ships with the package."""
    from training.activations.model import load_model
    from training.recipe import ModelSection

    return load_model(ModelSection(device="cpu"))


@pytest.fixture(scope="session")
def shared_data():
    """Real models and texts; users do not have them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the project's shared test data (models, texts), which is not part of the repository")
    return SHARED_DATA
