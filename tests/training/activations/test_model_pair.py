"""Two models in one recipe: what is harvested of both, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.training.activations.harvest import harvest_activations
from sparsary.training.activations.model import load_model, load_model_for, paired, skeleton
from sparsary.training.activations.model_source import section_content
from sparsary.training.activations.shards import ActivationStore, RowReader
from sparsary.training.content import model_problems
from sparsary.training.embedded import MODEL_DIR
from sparsary.training.preflight import plan_all
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection, TunedSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe

BASE, TUNED = "base/transformer.h.1:out", "tuned/transformer.h.2:out"
TEXT = TextSection(context_length=32)


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory):
    """A copy of the embedded model with other weights in its first blocks."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    shutil.copytree(MODEL_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    changed = {name: x + 0.05 * torch.randn_like(x) if "h.0." in name else x for name, x in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def pair_of(folder, **options):
    return ModelSection(id="embedded", device="cpu", tuned=TunedSection(id=str(folder), device="cpu"), **options)


@pytest.fixture(scope="module")
def pair(tuned_folder):
    return load_model(pair_of(tuned_folder))


def harvest(directory, model, tokens=1200, hooks=(BASE, TUNED)):
    section = HarvestSection(hooks=hooks, tokens=tokens, store=str(directory), shard_tokens=500, exclude_leading=2, heldout=0.2)
    return harvest_activations(model, TEXT, section)


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory):
    return harvest(tmp_path_factory.mktemp("stores") / "pair", pair)


def test_a_pass_gives_each_model_s_own_activations(pair, tuned_folder, embedded_model):
    ids = torch.randint(3, 900, (2, 9), generator=torch.Generator().manual_seed(1))
    tuned = load_model(ModelSection(id=str(tuned_folder), device="cpu"))
    found = pair.activations(ids, (BASE, TUNED))
    for hook, model in ((BASE, embedded_model), (TUNED, tuned)):
        own = hook.split("/")[1]
        torch.testing.assert_close(found[hook], model.activations(ids, (own,))[own])
    both = pair.module(input_ids=ids)
    torch.testing.assert_close(both.tuned_logits, tuned.logits(ids))
    torch.testing.assert_close(pair.logits(ids), embedded_model.logits(ids))


def test_a_hook_that_one_model_lacks_is_refused_with_hooks_of_that_model(pair):
    message = r"hook 'tuned/transformer\.h\.9:out' does not exist in the tuned model\. Nearest: (tuned/\S+,? ?){4}$"
    with pytest.raises(ValueError, match=message):
        pair.find("tuned/transformer.h.9:out")


def test_each_model_is_loaded_up_to_its_own_last_hook(pair, tuned_folder):
    section = pair_of(tuned_folder)
    found = load_model_for(section, (BASE, TUNED), skeleton(section))
    ids = torch.arange(3, 13).view(2, 5)
    parts = [type(block).__name__ for side in (found.module.base, found.module.tuned) for block in side.transformer.h]
    assert [name == "NotLoaded" for name in parts] == [False, False, True, True, False, False, False, True]
    expected = pair.activations(ids, (BASE, TUNED))
    for hook, x in found.activations(ids, (BASE, TUNED)).items():
        torch.testing.assert_close(x, expected[hook])


def test_a_store_holds_both_models_at_the_same_tokens(store, pair):
    rows = np.arange(20)
    tokens = RowReader(store, "train", "token").gather(rows)
    places = RowReader(store, "train", "position").gather(rows)
    x = {hook: RowReader(store, "train", f"x:{hook}").gather(rows) for hook in (BASE, TUNED)}
    from sparsary.training.text import contexts

    first = next(contexts(TEXT, pair.tokenizer))
    seen = pair.activations(torch.from_numpy(first.token_ids).long()[None], (BASE, TUNED))
    found = 0
    for row in range(20):
        place = int(places[row])
        if first.token_ids[place] != tokens[row]:
            continue
        for hook in (BASE, TUNED):
            torch.testing.assert_close(x[hook][row], seen[hook][0, place], rtol=1e-4, atol=1e-4)
        found += 1
    assert found > 10
    tuned = store.manifest["model"]["tuned"]
    assert tuned["dtype"] == "float32"
    assert Path(tuned["id"]).name == "tuned"
    assert store.manifest["content"]["model"]["weights"] != store.manifest["content"]["model"]["tuned"]["weights"]


def test_an_interrupted_harvest_of_two_models_resumes(store, pair, tmp_path):
    half = harvest(tmp_path / "store", pair, tokens=600)
    assert half.tokens("train") + half.tokens("heldout") < 1200
    whole = harvest(tmp_path / "store", pair)
    assert [shard["sha256"] for shard in whole.manifest["shards"]] == [shard["sha256"] for shard in store.manifest["shards"]]


def test_a_store_of_another_tuned_model_is_refused(store, tmp_path, tuned_folder, embedded_model):
    copy = shutil.copytree(store.directory, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"model\.tuned: its weights changed"):
        harvest(copy, paired(load_model(ModelSection(device="cpu")), load_model(ModelSection(device="cpu"))))
    with pytest.raises(ValueError, match=r"model\.tuned\.id: .*tuned' in the store, None in the recipe"):
        harvest(copy, embedded_model, hooks=("transformer.h.1:out",))
    # A copy of the tuned model elsewhere is the same model.
    moved = shutil.copytree(tuned_folder, tmp_path / "moved")
    assert harvest(copy, load_model(pair_of(moved))).manifest["shards"] == store.manifest["shards"]


def other_tokenizer(tuned_folder, folder):
    shutil.copytree(tuned_folder, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["and"], vocabulary["to"] = vocabulary["to"], vocabulary["and"]
    path.write_text(json.dumps(tokenizer))
    return folder


def test_models_with_different_tokenizers_are_refused(tuned_folder, tmp_path):
    section = pair_of(other_tokenizer(tuned_folder, tmp_path / "other"))
    message = r"models: expected models of one tokenizer.*embedded \(sha256 [0-9a-f]{12}\) and .*other \(sha256 [0-9a-f]{12}\)"
    for use in (load_model, section_content):
        with pytest.raises(ValueError, match=message):
            use(section)


def test_models_may_differ_in_width_and_layers(pair, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1157, n_positions=128, n_embd=24, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path / "small")
    found = load_model(pair_of(tmp_path / "small"))
    assert found.widths((BASE, "tuned/transformer.h.1:out")) == {BASE: 128, "tuned/transformer.h.1:out": 24}
    with pytest.raises(ValueError, match=r"hook 'tuned/transformer\.h\.2:out' does not exist"):
        found.widths((BASE, TUNED))


def values_of(tmp_path, folder, **changes):
    dictionary = {"kind": "sae", "hook": BASE, "n_latents": 32, "encoder": {"name": "topk", "k": 4}}
    return {
        "models": ["embedded", str(folder)],
        "model": {"device": "cpu"},
        "dictionary": dictionary,
        "harvest": {"store": str(tmp_path / "store"), "tokens": 2000, "hooks": ["transformer.h.1:out"]},
        "tokens": 4096,
        "batch_tokens": 512,
        "out_dir": str(tmp_path / "run"),
    } | changes


def test_a_recipe_names_two_models_and_shares_their_keys(tmp_path, tuned_folder):
    recipe = check_recipe(values_of(tmp_path, tuned_folder), "recipe")
    assert recipe.model.pair is not None
    base, tuned = recipe.model.pair
    assert (base.id, base.device, tuned.id, tuned.device) == ("embedded", "cpu", str(tuned_folder), "cpu")
    assert recipe.harvest.hooks == ("base/transformer.h.1:out", "tuned/transformer.h.1:out")
    plan = plan_all([resolve_recipe(recipe)])[0]
    assert plan.widths == {"base/transformer.h.1:out": 128, "tuned/transformer.h.1:out": 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["embedded"]}, "models: expected a list of two models"),
        ({"models": "embedded"}, "models: expected a list of two models"),
        (
            {"dictionary": {"kind": "sae", "hook": "transformer.h.1:out", "n_latents": 8, "encoder": {"name": "topk", "k": 2}}},
            r"dictionary\.hook: expected a hook of the base or the tuned model, like base/transformer\.h\.1:out",
        ),
        ({"harvest": {"gradients": True}}, r"harvest\.gradients: expected false with two models"),
        ({"objective": "kl"}, "objective: expected reconstruction with two models"),
    ],
)
def test_mistakes_in_recipes_of_two_models(tmp_path, tuned_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(values_of(tmp_path, tuned_folder, **({"harvest": {}} | changes)), "recipe")


def test_a_hook_of_a_pair_needs_two_models(recipe_values):
    recipe_values["dictionary"]["hook"] = BASE
    recipe_values["harvest"]["hooks"] = [BASE]
    with pytest.raises(ValueError, match=r"expected a hook of one model, got 'base/.*models: \[embedded, TUNED\]"):
        check_recipe(recipe_values, "recipe")


def test_changes_of_either_model_are_told_apart():
    then, now = ({"model": {"weights": "a", "tuned": {"weights": tuned}}} for tuned in "bc")
    assert [line.split(":")[0] for line in model_problems(then, now)] == ["model.tuned"]


def test_a_store_of_two_models_opens(store):
    assert set(ActivationStore.open(store.directory).manifest["hooks"]) == {BASE, TUNED}
