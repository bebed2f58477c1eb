"""Every recipe is valid, says how it is run, and builds."""

import itertools
from pathlib import Path

import pytest

from sparsary.sae import ENCODERS, SparseCode
from sparsary.training.activations.model_source import load_tokenizer
from sparsary.training.recipe import ModelSection
from sparsary.training.recipe.grid import load_grid
from sparsary.training.resolve_hooks import dictionary_arguments, resolve_recipes

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_opens_with_its_command_and_is_valid(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    header = "".join(
        itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines(keepends=True))
    )
    assert f"sparsary train {path.relative_to(ROOT)}" in header
    assert all(recipe.dictionary.encoder["name"] in ENCODERS for recipe in load_grid(path).recipes)


# Configurations of the hub models that recipes name, so that their hooks are checked without a network.
CONFIGS = {
    "openai-community/gpt2": ("GPT2Config", {}),
    "EleutherAI/pythia-70m-deduped": (
        "GPTNeoXConfig",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    ),
    # Made by a command that the recipe names.
    "runs/embedded/bilingual": ("GPT2Config", {"n_embd": 128, "n_layer": 4, "n_head": 4}),
    "models/stories3M": (
        "LlamaConfig",
        {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512},
    ),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_builds_on_the_meta_device(path, tmp_path, outlined_once):
    stored = load_grid(path).recipes[0].harvest.store is not None
    recipes = load_grid(path, {"harvest.store": str(tmp_path / "store")} if stored else None).recipes
    members = resolve_recipes([with_start(with_configuration(recipe, tmp_path), tmp_path) for recipe in recipes])
    # The members between differ from these in the same keys.
    for member in {0, len(members) - 1}:
        check_one(members[member])


def with_start(recipe, tmp_path):
    """The recipe with a start that is there: an SAE of the embedded model."""
    from sparsary.sae import SAE

    section = recipe.dictionary
    # An MLP's own weights are those of the recipe's model.
    if section.start is None or section.start.path == "mlp":
        return recipe
    # A start that is aligned is one of another hook.
    hook = section.hook if section.start.align is None else "transformer.h.2:out"
    SAE(128, 1024, ENCODERS["topk"](k=16)).save(tmp_path / "start", {"hook": hook, "model": {"id": "embedded"}})
    start = section.start.model_copy(update={"path": str(tmp_path / "start")})
    return recipe.model_copy(update={"dictionary": section.model_copy(update={"start": start})})


def with_configuration(recipe, tmp_path):
    """The recipe with its model's configuration from here, not from the hub."""
    import transformers

    if recipe.model.tuned is not None:
        # Made by a command that the recipe names.
        tuned = recipe.model.tuned.model_copy(update={"id": "embedded"})
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tuned": tuned})})
    if recipe.model.id == "embedded":
        return recipe
    name, sizes = CONFIGS[recipe.model.id]
    getattr(transformers, name)(**sizes).save_pretrained(tmp_path / "config")
    load_tokenizer(ModelSection()).save_pretrained(tmp_path / "config")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": str(tmp_path / "config")})})


def check_one(member):
    import torch

    from sparsary.sae.checkpoint import build_dictionary
    from sparsary.training.preflight import plan_all

    recipe, widths = member.recipe, member.widths
    with torch.device("meta"):
        built = build_dictionary(dictionary_arguments(recipe, widths))
        # Nothing can be chosen by value there; decoding shows that the shapes fit, where it needs no values.
        code = SparseCode.from_rows(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))
        if len(built.sites) == 1:
            assert built.decode(code, torch.zeros(3, built.d_in)).shape == (3, built.d_out)
    assert built.d_out == sum(widths[hook] for hook in recipe.dictionary.hooks_out)
    if (recipe.harvest.tokens or 0) * sum(widths.values()) < 1e9:
        # Whatever memory the machine has that runs the tests.
        assert plan_all([member])[0].parameters == sum(p.numel() for p in built.parameters())
