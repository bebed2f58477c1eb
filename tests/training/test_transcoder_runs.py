"""Transcoders, stacks and cross-layer transcoders trained by recipe: end to end, resumed, side by side, refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsary
from sparsary.sae import load_dictionary
from sparsary.training import members
from sparsary.training import preflight as preflight_module
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.info import describe_files
from sparsary.training.objective import Divergence
from sparsary.training.preflight import preflight, preflight_all
from sparsary.training.recipe import check_recipe, load_recipe
from sparsary.training.recipe.grid import check_grid, load_grid
from sparsary.training.resolve_hooks import resolve_recipe, resolve_recipes
from sparsary.training.run import run_harvest, train_all, train_recipe
from sparsary.training.training_plan import grid_lines
from sparsary.transcoders import CrossLayerTranscoder, Stack, Transcoder
from sparsary.transcoders.stack import hooks_of_provenance

MLPS = [f"transformer.h.{layer}.mlp:{side}" for layer in range(4) for side in ("in", "out")]
TOPK = {"name": "topk", "k": 5}


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores") / "shared")


@pytest.fixture
def values(recipe_values, shared_store):
    """Over one store with what every MLP reads and writes, for all tests of this file."""
    recipe_values["harvest"] |= {"hooks": MLPS, "store": shared_store}
    recipe_values["dictionary"] = transcoder()
    return recipe_values


def transcoder(layer=1, **changes):
    return {"kind": "transcoder", "layer": layer, "site": "mlp", "n_latents": 67, "encoder": TOPK} | changes


def cross_layer(**changes):
    kind = {"kind": "cross_layer_transcoder", "layers": "all", "site": "mlp"}
    return kind | {"n_latents": 31, "encoder": {"name": "topk", "k": 3}} | changes


def run(values, **changes):
    return train_recipe(resolve_recipe(check_recipe(values | changes, "recipe")))


def assert_equal_runs(a, b):
    for name in ("state.safetensors", "dictionary.safetensors"):
        first, second = load_file(Path(a) / name), load_file(Path(b) / name)
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])], name


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def heldout_fvu(directory):
    """Of the target, over what training never saw."""
    dictionary = load_dictionary(directory)
    reads, writes = hooks_of_provenance(json.loads((Path(directory) / "dictionary.json").read_text())["provenance"])
    store = ActivationStore.open(load_recipe(Path(directory) / "recipe.yaml").harvest.store)
    stream = StoreStream(store, reads, 100, seed=0, split="heldout", hooks_out=writes)
    batch = stream.sample(250)
    stream.release()
    error = (dictionary(batch.x) - batch.target).pow(2)
    variance = (batch.target - batch.target.mean(0)).pow(2)
    widths = batch.target.shape[1] // len(writes)
    return (error.unflatten(1, (-1, widths)).sum((0, 2)) / variance.unflatten(1, (-1, widths)).sum((0, 2))).tolist()


# End to end.


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_learns_what_the_mlp_writes(values, skip):
    values["dictionary"] = transcoder(skip=skip)
    directory = run(values, tokens=12_120, lr=3e-3)
    dictionary = load_dictionary(directory)
    assert isinstance(dictionary, Transcoder)
    assert (dictionary.d_in, dictionary.d_out, dictionary.n_latents) == (128, 128, 67)
    assert (dictionary.W_skip is not None) == skip
    assert float(dictionary.in_scale) != float(dictionary.out_scale)
    first, last = metrics(directory)[0], metrics(directory)[-1]
    assert last["fvu"] < 0.8 * first["fvu"]
    (fvu,) = heldout_fvu(directory)
    assert fvu < 0.6
    provenance = json.loads((directory / "dictionary.json").read_text())["provenance"]
    assert "hook" not in provenance
    assert hooks_of_provenance(provenance) == ((MLPS[2],), (MLPS[3],))


@pytest.mark.parametrize(
    "changes",
    [{}, {"joint": True}, {"encoder": {"name": "jumprelu", "target_l0": 3}}, {"encoder": {"name": "relu", "target_l0": 3}}],
    ids=["each", "joint", "jumprelu", "relu"],
)
def test_a_cross_layer_transcoder_learns_what_all_mlps_write(values, changes):
    values["dictionary"] = cross_layer(**changes)
    directory = run(values, tokens=6060, lr=3e-3)
    dictionary = load_dictionary(directory)
    assert isinstance(dictionary, CrossLayerTranscoder)
    assert (dictionary.n_layers, dictionary.d_in, dictionary.d_out, dictionary.n_latents) == (4, 512, 512, 124)
    first, last = metrics(directory)[0], metrics(directory)[-1]
    assert last["fvu"] < 0.9 * first["fvu"]
    assert all(fvu < 1 for fvu in heldout_fvu(directory))


def test_some_layers_only_write_to_those(values):
    values["dictionary"] = cross_layer(layers=[1, 3])
    directory = run(values, tokens=303)
    dictionary = load_dictionary(directory)
    assert [tuple(W_dec.shape) for W_dec in dictionary.W_dec] == [(31, 256), (31, 128)]
    provenance = json.loads((directory / "dictionary.json").read_text())["provenance"]
    assert hooks_of_provenance(provenance) == ((MLPS[2], MLPS[6]), (MLPS[3], MLPS[7]))


def test_a_site_of_an_sae_is_its_hook(values):
    values["harvest"] |= {"hooks": [], "store": values["harvest"]["store"] + "-attention"}
    values["dictionary"] = {"layer": 2, "site": "attn_heads", "n_latents": 67, "encoder": TOPK}
    recipe = load_recipe(run(values, tokens=303) / "recipe.yaml")
    assert recipe.dictionary.hook is not None
    assert recipe.harvest.hooks == (recipe.dictionary.hook,)
    assert list(ActivationStore.open(recipe.harvest.store).manifest["hooks"]) == [recipe.dictionary.hook]


def test_end_to_end_a_transcoder_stands_in_for_the_mlp(values, monkeypatch):
    places = []
    monkeypatch.setattr(members, "Divergence", lambda model, hook, *shards: places.append(hook) or Divergence(model, hook))
    values["harvest"] |= {"hooks": [], "store": None, "tokens": None, "live_buffer_tokens": 900}
    lines = metrics(run(values, objective="kl", reconstruction_weight=1.0, tokens=2020))
    assert lines[-1]["kl"] < lines[0]["kl"]
    assert places == [MLPS[3]]


# A stack.


def test_a_grid_over_layers_is_a_stack_over_one_harvest(values, tmp_path):
    values["harvest"] |= {"hooks": [], "store": str(tmp_path / "store")}
    grid = check_grid(values | {"tokens": 1010, "grid": {"dictionary.layer": [0, 2, 3]}}, "recipe")
    directories = train_all(resolve_recipes(grid.recipes))
    assert [path.name for path in directories] == ["layer=0", "layer=2", "layer=3"]
    # In the order of layers, and nothing of layer 1.
    assert list(ActivationStore.open(tmp_path / "store").manifest["hooks"]) == MLPS[:2] + MLPS[4:]
    stack = sparsary.load(grid.out_dir)
    assert isinstance(stack, Stack)
    assert list(stack) == [MLPS[1], MLPS[5], MLPS[7]]
    assert torch.equal(stack[MLPS[4]].W_dec, load_dictionary(directories[1]).W_dec)
    lines, problems = describe_files(grid.out_dir)
    assert [name for name, _ in lines] == ["checkpoints", "layer=0", "layer=2", "layer=3"]
    assert f"transcoder 128 -> 67 -> 128, topk, k 5  {MLPS[4]} -> {MLPS[5]}  checksum matches" == dict(lines)["layer=2"]
    assert not problems
    # The same recipe as it was written, with layers, finds itself finished.
    before = [(path / "dictionary.safetensors").stat().st_mtime_ns for path in directories]
    saved = [(path / "state.safetensors").read_bytes() for path in directories]
    assert train_all(resolve_recipes(grid.recipes)) == directories
    assert [(path / "state.safetensors").read_bytes() for path in directories] == saved
    assert before != [(path / "dictionary.safetensors").stat().st_mtime_ns for path in directories]


@pytest.mark.parametrize("live", [False, True])
def test_every_member_is_bit_equal_to_itself_trained_alone(values, tmp_path, live):
    if live:
        values["harvest"] |= {"hooks": [], "store": None, "tokens": None, "live_buffer_tokens": 900}
    apart = {"kind": "transcoder", "hook_in": MLPS[2], "hook_out": MLPS[5], "n_latents": 67, "encoder": TOPK}
    changes = [
        {"name": "plain"},
        {"name": "skip", "dictionary.skip": True, "lr": 2e-3},
        {"name": "above", "dictionary.layer": 2},
        {"name": "apart", "dictionary": apart},
        {"name": "choice", "dictionary.encoder": {"name": "mutual_choice", "k": 5}},
        {"name": "sae", "dictionary": {"hook": MLPS[3], "n_latents": 67, "encoder": TOPK}},
        {"name": "across", "dictionary": cross_layer(joint=True)},
    ]
    recipes = check_grid(values | {"tokens": 505, "grid": changes}, "recipe").recipes
    for directory, recipe in zip(train_all(resolve_recipes(recipes)), recipes, strict=True):
        alone = train_recipe(
            resolve_recipe(recipe.model_copy(update={"out_dir": str(tmp_path / "alone" / Path(recipe.out_dir).name)}))
        )
        assert_equal_runs(alone, directory)


# Stopped and continued.


@pytest.mark.parametrize(
    "dictionary",
    [
        transcoder(skip=True),
        transcoder(encoder={"name": "mutual_choice", "k": 5}),
        cross_layer(),
        cross_layer(joint=True),
        cross_layer(encoder={"name": "jumprelu", "target_l0": 3}),
    ],
    ids=["transcoder", "choice", "across", "joint", "jumprelu"],
)
@pytest.mark.parametrize("live", [False, True])
def test_stopped_and_continued_is_bit_equal_to_not_stopped(values, tmp_path, stopped_after, dictionary, live):
    if live:
        values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 900}
    values["dictionary"] = dictionary
    whole = run(values, tokens=1010, out_dir=str(tmp_path / "whole"))
    for stop in (1, 7):
        with stopped_after(stop):
            run(values, tokens=1010, out_dir=str(tmp_path / "parts"))
    assert_equal_runs(whole, run(values, tokens=1010, out_dir=str(tmp_path / "parts")))


def test_the_saved_recipe_names_hooks_and_goes_on_by_itself(values, stopped_after):
    recipe = check_recipe(values | {"tokens": 1010}, "recipe")
    with stopped_after(3):
        train_recipe(resolve_recipe(recipe))
    saved = load_recipe(Path(recipe.out_dir) / "recipe.yaml")
    assert (saved.dictionary.hook_in, saved.dictionary.hook_out) == (MLPS[2], MLPS[3])
    assert (saved.dictionary.layer, saved.dictionary.site) == (None, None)
    assert resolve_recipe(saved).recipe == saved
    train_recipe(resolve_recipe(saved))
    with pytest.raises(ValueError, match=r"dictionary.hook_in: 'transformer.h.1.mlp:in' there, 'transformer.h.2.mlp:in' here"):
        run(values | {"dictionary": transcoder(layer=2)}, tokens=1010)


# A user's tensors.


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(19, 13, generator=generator)
    rows = [torch.randn(500, 19, generator=generator) for _ in range(3)]
    return [{"x": x, "target": x.relu() @ mixing} for x in rows]


def test_a_transcoder_of_tensors(values, pairs):
    directory = train_recipe(resolve_recipe(check_recipe(values, "recipe")), pairs)
    dictionary = load_dictionary(directory)
    assert (dictionary.d_in, dictionary.d_out) == (19, 13)
    assert metrics(directory)[-1]["fvu"] < metrics(directory)[0]["fvu"]
    assert json.loads((directory / "dictionary.json").read_text())["provenance"]["model"] is None


def test_gradients_of_tensors_are_those_at_the_output(values, pairs):
    values["harvest"]["gradients"] = True
    values["dictionary"]["encoder"] = {"name": "gradient_topk", "k": 5, "beta": 2.0}
    directory = train_recipe(
        resolve_recipe(check_recipe(values, "recipe")), [pair | {"grad": torch.ones_like(pair["target"])} for pair in pairs]
    )
    assert load_dictionary(directory).d_out == 13


def test_layers_of_tensors_stand_side_by_side(values, pairs):
    values["dictionary"] = cross_layer()
    with pytest.raises(ValueError, match=r"activations: expected a width divisible by the 4 hooks, got 19\."):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), pairs)
    wide = [{"x": pair["x"][:, :16], "target": pair["target"][:, :12]} for pair in pairs]
    dictionary = load_dictionary(
        train_recipe(resolve_recipe(check_recipe(values | {"out_dir": values["out_dir"] + "2"}, "recipe")), wide)
    )
    assert (dictionary.d_in, dictionary.d_out, dictionary.n_layers) == (16, 12, 4)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "transcoder",
            lambda pair: pair["x"],
            r"targets: tensor 0: expected targets for a transcoder, got activations only\. Give \{\"x",
        ),
        ("sae", lambda pair: pair, r"targets: tensor 0: expected none, because an SAE reconstructs x"),
        (
            "transcoder",
            lambda pair: pair | {"target": pair["target"][:7]},
            r"expected \(tokens, d_out\) of 500 tokens, got \(7, 13\)",
        ),
        ("transcoder", lambda pair: pair | {"y": pair["x"]}, r"expected x, and target and grad .*got \['x', 'target', 'y'\]"),
        (
            "transcoder",
            lambda pair: pair | {"grad": pair["x"]},
            r"gradients: tensor 0: expected \(tokens, d_out\).*got \(500, 19\)",
        ),
    ],
    ids=["missing", "superfluous", "rows", "names", "gradients"],
)
def test_tensors_that_do_not_fit_are_named(values, pairs, kind, change, message):
    if kind == "sae":
        values["dictionary"] = {"hook": MLPS[3], "n_latents": 67, "encoder": TOPK}
    with pytest.raises(ValueError, match=message):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), [change(pair) for pair in pairs])


def test_targets_of_another_width_are_named(values, pairs):
    pairs[2]["target"] = torch.randn(500, 17)
    with pytest.raises(ValueError, match=r"targets: tensor 2: expected width 13, as before, got 17\."):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), pairs)


# Refusals.


def test_a_store_without_targets_is_refused(values, tmp_path):
    values["harvest"] |= {"hooks": MLPS[2:3], "store": str(tmp_path / "inputs")}
    reads = {"hook": MLPS[2], "n_latents": 67, "encoder": TOPK}
    store = run_harvest(resolve_recipe(check_recipe(values | {"dictionary": reads}, "recipe")))
    with pytest.raises(
        ValueError, match=rf"dictionary\.hook_out: {MLPS[3]} is not in .*inputs, which holds {MLPS[2]}\. Choose"
    ):
        StoreStream(store, (MLPS[2],), 100, seed=0, hooks_out=(MLPS[3],))
    values["harvest"]["hooks"] = []
    with pytest.raises(ValueError, match=rf"harvest\.hooks: {MLPS[3]} is not in the store, which holds {MLPS[2]}"):
        run(values)


def test_layers_of_other_widths_are_refused(values):
    hooks = {"hook_in": MLPS[:4:2], "hook_out": [MLPS[1], "transformer.h.1.mlp.c_fc:out"]}
    values["dictionary"] = {"kind": "cross_layer_transcoder", "n_latents": 31, "encoder": TOPK, **hooks}
    values["harvest"] |= {"hooks": [], "store": None}
    with pytest.raises(ValueError, match=r"dictionary\.hook_out: expected one width at all layers, got 128, 512\."):
        run(values)


def test_a_plan_that_does_not_fit_in_memory_is_refused_with_its_size(values, monkeypatch):
    monkeypatch.setattr(preflight_module, "free_bytes", lambda device: 21_000_000_000)
    values["dictionary"] = cross_layer(n_latents=2_000_000)
    with pytest.raises(ValueError, match="memory") as caught:
        preflight(resolve_recipe(check_recipe(values, "recipe")))
    parameters = 4 * (2_000_000 * 128 + 2_000_000) + 10 * 2_000_000 * 128 + 512
    assert str(caught.value).startswith("memory: training needs about 4")
    assert f"{12 * parameters / 1e9:.1f} GB of them for {parameters:,} parameters" in str(caught.value)
    assert "21.0 GB are free. Lower dictionary.n_latents or batch_tokens, or name fewer layers" in str(caught.value)
    assert not Path(values["out_dir"]).exists()
    values["dictionary"]["n_latents"] = 67
    assert preflight(resolve_recipe(check_recipe(values, "recipe"))).parameters == 4 * (67 * 129) + 10 * 67 * 128 + 512


def test_on_a_gpu_weights_and_batches_are_in_different_memories(values, monkeypatch):
    gpu, limits = torch.device("cuda", 0), {"cuda": 10**12, "cpu": 10**12}
    monkeypatch.setattr(preflight_module, "resolve_device", lambda name: gpu)
    monkeypatch.setattr(preflight_module, "free_bytes", lambda device: limits[device.type])
    values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 5_000_000}
    recipes = check_grid(values | {"grid": {"dictionary.layer": [0, 1]}}, "recipe").recipes
    plans = preflight_all(resolve_recipes(recipes))
    # Two buffers of two hooks each, and as much again while they are shuffled: 20 GB, of which the GPU sees nothing.
    limits["cuda"] = 200_000_000
    preflight_all(resolve_recipes(recipes))
    limits["cpu"] = 20_000_000_000
    with pytest.raises(
        ValueError, match=r"memory: training needs about 2\d\.\d GB on cpu, .* or lower harvest\.live_buffer_tokens"
    ):
        preflight_all(resolve_recipes(recipes))
    limits |= {"cuda": sum(plan.weights_bytes for plan in plans), "cpu": 10**12}
    with pytest.raises(ValueError, match=r"memory: training needs about .* KB on cuda:0, "):
        preflight_all(resolve_recipes(recipes))


def test_members_that_fit_one_by_one_may_not_fit_together(values, monkeypatch):
    grid = check_grid(values | {"grid": {"dictionary.layer": [0, 1, 2]}}, "recipe")
    one, all_ = preflight(resolve_recipe(grid.recipes[0])).memory_bytes, preflight_all(resolve_recipes(grid.recipes))
    monkeypatch.setattr(preflight_module, "free_bytes", lambda device: one)
    assert preflight(resolve_recipe(grid.recipes[1])).memory_bytes == one
    assert sum(plan.memory_bytes for plan in all_) > one
    with pytest.raises(ValueError, match=r"memory: .* or train fewer members at once\.$"):
        preflight_all(resolve_recipes(grid.recipes))


# The plan.


def test_the_plan_says_what_is_mapped(values, write_recipe):
    member = resolve_recipe(check_recipe(values | {"dictionary": transcoder(skip=True)}, "recipe"))
    plan = preflight(member)
    assert plan.parameters == 2 * 67 * 128 + 67 + 128 + 128 * 128
    words = f"transcoder 128 -> 67 -> 128, with skip, topk, k 5, {plan.parameters:,} parameters"
    assert dict(plan.lines(member))["dictionary"] == words
    member = resolve_recipe(check_recipe(values | {"dictionary": cross_layer(joint=True)}, "recipe"))
    shown = dict(preflight(member).lines(member))["dictionary"]
    assert shown.startswith("cross_layer_transcoder of 4 layers, each 128 -> 31 -> 128, chosen over all layers, topk, k 3, ")
    grid = load_grid(write_recipe(values | {"grid": {"dictionary.layer": [0, 1]}}))
    recipes = resolve_recipes(grid.recipes)
    shown = dict(grid_lines(grid, recipes, preflight_all(recipes)))
    assert shown["layer=1"].startswith("transcoder 128 -> 67 -> 128, without skip")
    assert shown["members"] == "2 on 2 streams of batches"
