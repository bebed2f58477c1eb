"""Crosscoders trained by recipe: end to end, resumed, side by side, by several processes, evaluated, refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsary
from sparsary.sae import load_dictionary
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.info import describe_files
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe, load_recipe
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipe, resolve_recipes
from sparsary.training.run import train_all, train_recipe
from sparsary.transcoders import Crosscoder, CrossLayerTranscoder

# The last is four times as wide as the others.
HOOKS = ["transformer.h.1:out", "transformer.h.2:out", "transformer.h.3.mlp.c_proj:in"]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores") / "shared")


@pytest.fixture
def values(recipe_values, shared_store):
    recipe_values["harvest"] |= {"hooks": HOOKS, "store": shared_store}
    recipe_values["dictionary"] = crosscoder()
    return recipe_values


def crosscoder(**changes):
    return {"kind": "crosscoder", "hooks": HOOKS, "n_latents": 67, "encoder": {"name": "batch_topk", "k": 5}} | changes


def run(values, **changes):
    return train_recipe(resolve_recipe(check_recipe(values | changes, "recipe")))


def assert_equal_runs(a, b):
    for name in ("state.safetensors", "dictionary.safetensors"):
        first, second = load_file(Path(a) / name), load_file(Path(b) / name)
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])], name


def site_fvus(directory):
    """Return each site's fvu, over what training never saw."""
    dictionary = load_dictionary(directory)
    store = ActivationStore.open(load_recipe(Path(directory) / "recipe.yaml").harvest.store)
    stream = StoreStream(store, tuple(HOOKS), 100, seed=0, split="heldout")
    x = dictionary.split(stream.sample(250).x)
    stream.release()
    parts = zip(x, dictionary(x), strict=True)
    return [float((part - guess).detach().pow(2).sum() / (part - part.mean(0)).pow(2).sum()) for part, guess in parts]


@pytest.mark.parametrize(
    "encoder",
    [
        {"name": "topk", "k": 5},
        {"name": "batch_topk", "k": 5},
        {"name": "jumprelu", "target_l0": 5},
        {"name": "relu", "target_l0": 5},
    ],
    ids=lambda spec: spec["name"],
)
def test_it_learns_all_its_sites(values, encoder):
    values["dictionary"] = crosscoder(encoder=encoder)
    directory = run(values, tokens=6060, lr=3e-3)
    dictionary = load_dictionary(directory)
    assert isinstance(dictionary, Crosscoder)
    assert (dictionary.names, dictionary.widths) == (tuple(HOOKS), (128, 128, 512))
    assert len(set(dictionary.scales.tolist())) == 3
    assert dictionary.hooks == (tuple(HOOKS), tuple(HOOKS))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
    assert all(fvu < 0.8 for fvu in site_fvus(directory))
    shown, problems = describe_files(directory)
    assert not problems
    assert "crosscoder" in str(shown)


@pytest.mark.parametrize(
    "encoder", [{"name": "batch_topk", "k": 5}, {"name": "relu", "target_l0": 5}], ids=lambda spec: spec["name"]
)
@pytest.mark.parametrize("live", [False, True])
def test_stopped_and_continued_is_bit_equal_to_not_stopped(values, tmp_path, stopped_after, encoder, live):
    if live:
        values["harvest"] |= {"hooks": [], "store": None, "tokens": None, "live_buffer_tokens": 900}
    values["dictionary"] = crosscoder(encoder=encoder)
    whole = run(values, tokens=1010, out_dir=str(tmp_path / "whole"))
    for stop in (1, 7):
        with stopped_after(stop):
            run(values, tokens=1010, out_dir=str(tmp_path / "parts"))
    assert_equal_runs(whole, run(values, tokens=1010, out_dir=str(tmp_path / "parts")))


def test_members_of_a_grid_are_bit_equal_to_themselves_trained_alone(values, tmp_path):
    changes = [
        {"name": "three"},
        {"name": "two", "dictionary.hooks": HOOKS[:2], "dictionary.encoder": {"name": "topk", "k": 3}},
        {"name": "sae", "dictionary": {"hook": HOOKS[0], "n_latents": 67, "encoder": {"name": "topk", "k": 5}}},
    ]
    recipes = check_grid(values | {"tokens": 505, "grid": changes}, "recipe").recipes
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        alone = recipe.model_copy(update={"out_dir": str(tmp_path / "alone" / Path(recipe.out_dir).name)})
        assert_equal_runs(train_recipe(resolve_recipe(alone)), directory)


def test_layers_with_a_site_are_its_hooks(values):
    values["dictionary"] = {key: value for key, value in crosscoder(layers=[1, 2], site="resid_post").items() if key != "hooks"}
    recipe = resolve_recipe(check_recipe(values, "recipe")).recipe
    assert recipe.dictionary.hooks == tuple(HOOKS[:2])
    plan = preflight(resolve_recipe(check_recipe(values, "recipe")))
    assert plan.parameters == 67 * (256 + 256 + 1) + 256
    assert "crosscoder of 2 sites, 128 each -> 67, batch_topk" in plan.dictionary_words(recipe)


def test_a_user_s_tensors_stand_side_by_side(values):
    x = torch.randn(500, 26) @ torch.randn(26, 26)
    dictionary = load_dictionary(
        train_recipe(
            resolve_recipe(
                check_recipe(values | {"dictionary": crosscoder(hooks=["a:out", "b:out"])} | {"harvest": {}}, "recipe")
            ),
            [x],
        )
    )
    assert (dictionary.widths, dictionary.names) == ((13, 13), ("a:out", "b:out"))


def test_gradient_topk_reads_the_gradients_at_all_sites(values, tmp_path):
    values["harvest"] |= {"gradients": True, "store": str(tmp_path / "gradients"), "tokens": 1500}
    values["dictionary"] = crosscoder(encoder={"name": "gradient_topk", "k": 5, "beta": 2.0})
    assert load_dictionary(run(values, tokens=505)).n_sites == 3


def test_the_report_has_each_site_and_all_replaced(values):
    directory = run(values, tokens=3030, lr=3e-3)
    report = sparsary.evaluate(directory, tokens=1200)
    assert (report["kind"], report["layers"], report["layer_hooks"]) == ("crosscoder", 3, HOOKS)
    assert report["fvu_layer_mean"] == pytest.approx(sum(report["layer_fvu"]) / 3)
    assert report["l0_total"] == report["layer_l0"][0] == report["layer_l0"][2]
    assert report["ce_clean"] < min(report["layer_ce_spliced"])
    assert report["ce_spliced"] >= max(report["layer_ce_spliced"]) - 0.3
    assert sum(report["layer_norm_share"]) == pytest.approx(1)
    page = Path(report["report_path"]).read_text()
    assert "crosscoder, 3 sites" in page
    assert "norm share" in page


def test_warm_start_goes_on_from_one(values, tmp_path):
    first = run(values, tokens=2020, lr=3e-3)
    values["dictionary"] = crosscoder(start=str(first)) | {"encoder": {"name": "batch_topk", "k": 5}}
    second = run(values, tokens=1010, out_dir=str(tmp_path / "second"))
    record = json.loads((second / "dictionary.json").read_text())["provenance"]["start"]
    assert record["before"]["fvu"] == pytest.approx(record["as_read"]["fvu"], rel=1e-4)
    assert record["after"]["fvu"] < 1
    with pytest.raises(ValueError, match=r"dictionary\.start: .* has 3 sites, the recipe has 2\. Name as many"):
        run(values | {"dictionary": crosscoder(hooks=HOOKS[:2], start=str(first))}, out_dir=str(tmp_path / "third"))


@pytest.mark.parametrize("init", ["data", "random"])
def test_a_causal_crosscoder_reads_one_site_and_writes_to_it_and_later_ones(values, init, no_page):
    values["dictionary"] = crosscoder(hooks=HOOKS[:2], causal=True, n_latents=31, encoder={"name": "topk", "k": 3})
    values["dictionary"]["init"] = init
    directory = run(values, tokens=6060, lr=3e-3)
    dictionary = load_dictionary(directory)
    assert isinstance(dictionary, CrossLayerTranscoder)
    assert [tuple(W_dec.shape) for W_dec in dictionary.W_dec] == [(31, 256), (31, 128)]
    assert dictionary.hooks == (tuple(HOOKS[:2]), tuple(HOOKS[:2]))
    report = sparsary.evaluate(directory, tokens=1200)
    assert report["layer_hooks"] == HOOKS[:2]
    assert max(report["layer_fvu"]) < 0.8
    assert report["ce_spliced"] < report["ce_mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hooks": HOOKS[:1]},
            r"dictionary\.hooks: expected two or more hooks, got one\. What reconstructs a single activation is",
        ),
        ({"hooks": HOOKS[0]}, r"dictionary\.hooks: expected a list of two or more hooks, got 'transformer"),
        ({"hooks": [HOOKS[0], HOOKS[0]]}, r"dictionary\.hooks: expected each hook once, got one twice"),
        ({"hook": HOOKS[0]}, r"dictionary\.hook: expected it with kind sae only, got it with kind crosscoder\. Give hooks"),
        ({"hooks": None}, r"dictionary: expected hooks, or a layer and its site, got neither\. Give hooks, or layers and site"),
        (
            {"causal": True},
            r"dictionary\.encoder\.name: expected topk or jumprelu or relu in a causal crosscoder, got 'batch_topk'",
        ),
        ({"joint": True}, r"dictionary\.joint: expected it with kind cross_layer_transcoder only"),
        ({"hooks": ["transformer.h.1", HOOKS[1]]}, r"dictionary\.hooks: expected a module path and a side"),
    ],
    ids=["one", "text", "twice", "hook", "none", "causal", "joint", "side"],
)
def test_recipes_that_do_not_fit_are_refused_in_one_line(values, changes, message):
    values["harvest"]["hooks"] = []
    values["dictionary"] = {key: value for key, value in crosscoder(**changes).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        check_recipe(values, "recipe")
    assert len(str(caught.value).splitlines()) <= 2


def test_unknown_sites_and_objectives_are_refused(values):
    values["harvest"] |= {"hooks": [], "store": None, "tokens": None}
    with pytest.raises(ValueError, match=r"hook 'transformer\.h\.9:out' does not exist in embedded"):
        run(values | {"dictionary": crosscoder(hooks=[HOOKS[0], "transformer.h.9:out"])})
    with pytest.raises(ValueError, match=r"objective: expected reconstruction with a crosscoder"):
        check_recipe(values | {"objective": "kl"}, "recipe")
    two_sided = {key: value for key, value in crosscoder(layers="all", site="mlp").items() if key != "hooks"}
    with pytest.raises(
        ValueError, match=r"dictionary\.site: expected one of .*, because kind crosscoder reconstructs what it reads"
    ):
        resolve_recipe(check_recipe(values | {"dictionary": two_sided}, "recipe"))
    sae = {"hooks": HOOKS, "n_latents": 67, "encoder": {"name": "topk", "k": 5}}
    with pytest.raises(ValueError, match=r"dictionary\.hooks: expected it with kind crosscoder only, got it with kind sae"):
        check_recipe(values | {"dictionary": sae}, "recipe")
