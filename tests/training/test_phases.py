"""Phases and schedules: what is in force at which step, across stops, and every way to get them wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.encoder import pre_activations
from sparsary.training import run as run_module
from sparsary.training.optim import DictionaryAdam, Schedule
from sparsary.training.phases import Phases, interpolate
from sparsary.training.recipe import check_recipe, dump_recipe, load_recipe, total_steps
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe

K = 7
STEPS, START = 30, 12


@pytest.fixture
def values(recipe_values):
    """Thirty steps: mutual choice, from step 12 blending into feature choice until step 20, with fewer and fewer latents."""
    encoder = {"name": "mutual_choice", "k": K}
    later = {"name": "feature_choice", "k": K, "rerank_every": 4}
    recipe_values["dictionary"]["encoder"] = encoder
    recipe_values["phases"] = [{"start": 0.4, "blend": 0.3, "lr_factor": 0.5, "encoder": later}]
    recipe_values["schedules"] = {"k": [[0.0, K], [0.5, 4]]}
    return recipe_values


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(19, 19, generator=generator)
    return [torch.randn(500, 19, generator=generator).relu() @ mixing for _ in range(3)]


def started(values):
    """A dictionary and its phases, not yet trained."""
    recipe = check_recipe(values, "recipe")
    torch.manual_seed(0)
    sae = SAE(19, 67, ENCODERS[values["dictionary"]["encoder"]["name"]](**_arguments(values["dictionary"]["encoder"])))
    return sae, Phases(sae, recipe), recipe


def _arguments(spec):
    return {name: value for name, value in spec.items() if name != "name"}


def in_force(values, steps=range(STEPS)):
    sae, phases, _ = started(values)
    names = []
    for step in steps:
        phases.enter(sae, step)
        names.append(type(sae.encoder).__name__)
    return names


# Curves.


def test_interpolation_goes_through_its_knots_and_is_constant_outside():
    knots = ((0.2, 1.0), (0.4, 3.0), (0.8, -1.0))
    assert [interpolate(knots, share) for share in (0.2, 0.4, 0.8)] == [1.0, 3.0, -1.0]
    assert [interpolate(knots, share) for share in (0.0, 0.1, 0.9, 1.0)] == [1.0, 1.0, -1.0, -1.0]
    assert interpolate(knots, 0.25) == pytest.approx(1.5)
    assert interpolate(knots, 0.6) == pytest.approx(1.0)
    assert interpolate(((0.5, 2.5),), 0.1) == interpolate(((0.5, 2.5),), 0.9) == 2.5


def test_whole_numbers_stay_whole(values):
    _, phases, _ = started(values | {"schedules": {"k": [[0.0, 10], [1.0, 4]]}})
    found = [phases.values(step)["k"] for step in range(STEPS)]
    assert all(type(value) is int for value in found)
    assert sorted(found, reverse=True) == found
    assert set(found) == set(range(4, 11))


def test_a_schedule_of_a_number_that_need_not_be_whole_is_smooth(values):
    values["dictionary"]["encoder"] = {"name": "gradient_topk", "k": K, "beta": 4.0}
    values |= {"phases": [], "schedules": {"beta": [[0.0, 0], [1.0, 4]]}}
    values["harvest"]["gradients"] = True
    _, phases, _ = started(values)
    assert phases.values(3)["beta"] == pytest.approx(4 * 3 / 29)


def test_scheduled_values_begin_with_the_first_step_and_end_with_the_last(values):
    sae, phases, _ = started(values | {"schedules": {"k": [[0.0, K], [1.0, 4]]}})
    seen = []
    for step in range(STEPS):
        phases.enter(sae, step)
        seen.append(sae.encoder.k)
    assert (seen[0], seen[-1]) == (K, 4)
    assert sorted(seen, reverse=True) == seen
    # The encoder that is not in force has the same argument.
    assert {encoder.k for encoder in phases.encoders} == {4}


def test_a_scheduled_beta_rises_from_topk(values):
    values["dictionary"]["encoder"] = {"name": "gradient_topk", "k": K, "beta": 16.0}
    values |= {"phases": [], "schedules": {"beta": [[0.0, 0.0], [0.5, 16.0]]}}
    values["harvest"]["gradients"] = True
    sae, phases, _ = started(values)
    for step, beta in ((0, 0.0), (7, 16 * 14 / 29), (15, 16.0), (29, 16.0)):
        phases.enter(sae, step)
        assert sae.encoder.beta == pytest.approx(beta)


def test_a_schedule_leaves_encoders_without_that_argument_alone(values):
    values["phases"][0] |= {"encoder": {"name": "relu", "sparsity": 0.1}, "blend": 0.0}
    sae, phases, _ = started(values)
    phases.enter(sae, 29)
    assert not hasattr(sae.encoder, "k")


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_a_scheduled_target_l0_is_what_the_controller_steers_to(values, name):
    values["dictionary"]["encoder"] = {"name": name, "target_l0": 60}
    sae, phases, _ = started(values | {"phases": [], "schedules": {"target_l0": [[0.0, 60], [1.0, 2]]}})
    phases.enter(sae, STEPS - 1)
    assert sae.encoder.target_l0 == 2
    sae.encode(torch.randn(101, 19))
    assert float(sae.encoder.penalty.factor) > 1


def test_phases_without_an_encoder_keep_it_and_its_progress(values):
    values["phases"] = [{"start": 0.4, "objective": "kl"}, {"start": 0.6, "reconstruction_weight": 2.0, "objective": "kl"}]
    values["harvest"] |= {"store": None, "tokens": None}
    sae, phases, _ = started(values | {"schedules": {}})
    first, seen = sae.encoder, []
    for step in range(STEPS):
        phases.enter(sae, step)
        seen.append(sae.encoder.progress)
        assert sae.encoder is first
    assert seen == pytest.approx([step / (STEPS - 1) for step in range(STEPS)])
    found = [phases.weights(step) for step in (0, 11, 12, 17, 18, 29)]
    assert [(each.reconstruction, each.kl) for each in found] == [(1, 0), (1, 0), (0, 1), (0, 1), (2, 1), (2, 1)]


def test_encoders_know_how_far_their_phase_is(values):
    values["phases"][0] |= {"encoder": {"name": "relu", "sparsity": 0.1}, "blend": 0.0}
    sae, phases, _ = started(values)
    shares = []
    for step in (0, START - 1, START, STEPS - 1):
        phases.enter(sae, step)
        shares.append(sae.encoder.progress)
    assert shares == [0.0, 1.0, 0.0, 1.0]


def test_densities_of_encoders_have_the_run_s_half_life(values):
    _, phases, recipe = started(values)
    assert {encoder.density_half_life for encoder in phases.encoders} == {recipe.dead_after_tokens / 4}


# Phases.


def test_without_a_blend_the_encoder_changes_at_the_start_of_the_phase(values):
    values["phases"][0]["blend"] = 0.0
    assert in_force(values) == ["MutualChoice"] * START + ["FeatureChoice"] * (STEPS - START)


def test_a_blend_mixes_both_until_it_is_over(values):
    names = in_force(values)
    assert names[:START] == ["MutualChoice"] * START
    assert names[START + 9 :] == ["FeatureChoice"] * (STEPS - START - 9)
    assert set(names[START : START + 9]) == {"MutualChoice", "FeatureChoice"}


def test_the_draws_of_a_blend_are_a_function_of_the_step_and_the_seed(values):
    assert in_force(values, range(STEPS - 1, -1, -1)) == in_force(values)[::-1]
    assert in_force(values | {"seed": 1})[START : START + 9] != in_force(values)[START : START + 9]


def test_a_blend_becomes_more_and_more_the_new_phase(values):
    values["phases"][0] |= {"start": 0.2, "blend": 0.8}
    names = in_force(values | {"tokens": 101 * 2500}, range(500, 2500))
    new = torch.tensor([name == "FeatureChoice" for name in names]).double().view(5, -1).mean(1)
    # Expected 0.1, 0.3, 0.5, 0.7, 0.9; 400 draws each.
    assert (new - torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double()).abs().max() < 0.08


def test_three_phases_come_in_order(values):
    values["phases"] = [
        {"start": 1 / 3, "encoder": {"name": "topk", "k": K}},
        {"start": 2 / 3, "encoder": {"name": "batch_topk", "k": K}},
    ]
    assert in_force(values) == ["MutualChoice"] * 10 + ["TopK"] * 10 + ["BatchTopK"] * 10


def test_a_phase_inherits_what_the_one_before_measured_once(values):
    sae, phases, _ = started(values)
    for step in range(START):
        phases.enter(sae, step)
        sae.encode(torch.randn(101, 19))
    mutual, feature = phases.encoders
    assert feature.density.sum() == 0
    phases.enter(sae, START)
    assert torch.equal(feature.density, mutual.density)
    assert int(feature.batches) == START
    feature.density.fill_(0.25)
    phases.enter(sae, START + 1)
    phases.select(sae, START)
    assert torch.equal(feature.density, torch.full((67,), 0.25))


def test_an_encoder_that_comes_into_force_is_in_the_dictionary_s_mode(values):
    sae, phases, _ = started(values)
    phases.encoders[1].eval()
    phases.enter(sae, STEPS - 1)
    assert sae.encoder.training
    phases.encoders[0].train()
    sae.eval()
    phases.select(sae, 0)
    assert not sae.encoder.training


def test_the_phase_s_factor_multiplies_the_learning_rate(values):
    values |= {"lr": 1.0, "lr_warmup_steps": 0, "lr_decay": 0.0}
    sae, phases, recipe = started(values)
    schedule = Schedule(DictionaryAdam(sae, phases, recipe), sae, phases, recipe)
    assert [schedule.lr(step) for step in range(STEPS)] == [1.0] * START + [0.5] * (STEPS - START)
    schedule.apply(START)
    assert schedule.optimizer.param_groups[0]["lr"] == 0.5


def test_one_optimizer_holds_the_weights_of_all_phases_once(values):
    values["phases"][0]["encoder"] = {"name": "gated"}
    sae, phases, recipe = started(values)
    held = [id(p) for group in DictionaryAdam(sae, phases, recipe).param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    gated = phases.encoders[1]
    assert set(held) == {id(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, gated.r_mag, gated.b_mag)}


def test_going_over_to_unit_atoms_keeps_what_the_dictionary_computes(values):
    values["dictionary"]["encoder"] = {"name": "relu"}
    # All latents: TopK without a choice is ReLU.
    values |= {"phases": [{"start": 0.4, "encoder": {"name": "topk", "k": 67}}], "schedules": {}}
    sae, phases, _ = started(values)
    phases.enter(sae, START - 1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3.0, 67)[:, None])
    x = torch.randn(11, 19)
    before = sae(x)
    phases.enter(sae, START)
    sae.renormalize()
    torch.testing.assert_close(sae(x), before)


# Whole runs.


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def dictionary_of(directory):
    return json.loads((Path(directory) / "dictionary.json").read_text())["dictionary"]


def test_scheduled_k_shows_in_metrics_and_in_what_is_saved(values, rows):
    values["dictionary"]["encoder"] = {"name": "topk", "k": 2}
    values |= {"phases": [], "schedules": {"k": [[0.0, K], [1.0, 3]]}, "log_every": 1}
    recipe = check_recipe(values, "recipe")
    directory = train_recipe(resolve_recipe(recipe), rows)
    expected = [round(interpolate(((0.0, K), (1.0, 3)), step / (STEPS - 1))) for step in range(STEPS)]
    assert [line["l0"] for line in metrics(directory)] == pytest.approx(expected)
    assert dictionary_of(directory)["encoder"] == {"name": "topk", "k": 3}
    assert (load_dictionary(directory).encode(rows[0]).l0() == 3).all()


def test_a_stopped_run_saves_the_encoder_of_its_last_step(values, rows, stopped_after):
    values["phases"][0]["blend"] = 0.0
    with stopped_after(START):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    assert dictionary_of(values["out_dir"])["encoder"] == {"name": "mutual_choice", "k": 5}
    with stopped_after(3):
        train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    assert dictionary_of(values["out_dir"])["encoder"] == {
        "name": "feature_choice",
        "k": 4,
        "budget": "zipf",
        "rerank_every": 4,
    }
    assert torch.isfinite(load_dictionary(values["out_dir"])(rows[0])).all()


@pytest.mark.parametrize("stops", [(1, START - 1, 3, 5), (START + 1, 8)], ids=str)
def test_a_run_with_phases_and_schedules_stopped_and_continued_is_bit_equal(values, rows, tmp_path, stopped_after, stops):
    """Stops fall before the switch, right at it, one step into the blend, within it and at its end."""
    whole = train_recipe(resolve_recipe(check_recipe(values | {"out_dir": str(tmp_path / "whole")}, "recipe")), rows)
    recipe = check_recipe(values | {"out_dir": str(tmp_path / "parts")}, "recipe")
    for stop in stops:
        with stopped_after(stop):
            train_recipe(resolve_recipe(recipe), rows)
    parts = train_recipe(resolve_recipe(recipe), rows)
    for name in ("state.safetensors", "dictionary.safetensors"):
        first, second = load_file(whole / name), load_file(parts / name)
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])], name
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert {k: v for k, v in a.items() if k not in ("tokens_per_second", "data_wait_share")} == {
            k: v for k, v in b.items() if k not in ("tokens_per_second", "data_wait_share")
        }
    # Both encoders are in the state.
    assert {name.split("/")[0] for name in load_file(whole / "state.safetensors")} >= {"encoder-0", "encoder-1"}


def test_a_later_phase_s_weights_and_moments_survive_a_stop(values, rows, tmp_path, stopped_after):
    values["phases"][0]["encoder"] = {"name": "jumprelu", "target_l0": 5}
    whole = train_recipe(resolve_recipe(check_recipe(values | {"out_dir": str(tmp_path / "whole")}, "recipe")), rows)
    recipe = check_recipe(values | {"out_dir": str(tmp_path / "parts")}, "recipe")
    for stop in (START + 4, 9):
        with stopped_after(stop):
            train_recipe(resolve_recipe(recipe), rows)
    first, second = (
        load_file(whole / "state.safetensors"),
        load_file(train_recipe(resolve_recipe(recipe), rows) / "state.safetensors"),
    )
    assert "optimizer/encoder-1/log_threshold/exp_avg" in first
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]


def test_the_final_dictionary_is_the_last_phase_s_and_calibrated(values, rows):
    directory = train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    sae = load_dictionary(directory)
    assert type(sae.encoder).__name__ == "FeatureChoice"
    assert sae.encoder.k == 4
    x = torch.cat(rows)
    with torch.no_grad():
        scores = pre_activations(sae.centre(x / sae.in_scale), sae.weights)
        code = sae.encode(x)
    due = (sae.encoder.budgets(101, 67).double() / 101 * len(x)).round().long()
    positive = (scores > 0).sum(0)
    assert torch.equal(code.firings(67), torch.minimum(due, positive))
    assert len(due.unique()) > 3
    # Training's running thresholds are kept where training goes on from.
    in_training = load_file(directory / "state.safetensors")["encoder-1/thresholds"]
    assert not torch.equal(in_training, sae.encoder.thresholds)
    before = (directory / "dictionary.safetensors").read_bytes()
    assert train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows) == directory
    assert (directory / "dictionary.safetensors").read_bytes() == before


def test_no_thread_reads_on_when_the_thresholds_are_calibrated(values, rows, monkeypatch):
    threads = []

    def finish(dictionary, stream, *settings):
        threads.append(stream._coming)
        return run_module_finish(dictionary, stream, *settings)

    run_module_finish = run_module.finish
    monkeypatch.setattr(run_module, "finish", finish)
    train_recipe(resolve_recipe(check_recipe(values, "recipe")), iter([*rows, *rows, *rows]))
    assert threads == [None]


def test_free_atoms_are_unit_in_what_is_saved_and_free_in_the_state(values, rows):
    values["dictionary"]["encoder"] = {"name": "relu", "sparsity": 0.1}
    values |= {"phases": [], "schedules": {}}
    directory = train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    saved, state = load_dictionary(directory), load_file(directory / "state.safetensors")
    torch.testing.assert_close(saved.W_dec.norm(dim=-1), torch.ones(67))
    norms = state["dictionary/W_dec"].norm(dim=-1)
    assert (norms - 1).abs().max() > 1e-3
    torch.testing.assert_close(saved.W_enc.detach(), state["dictionary/W_enc"] * norms[:, None])


def test_phases_and_schedules_survive_dumping_and_loading(values, tmp_path):
    recipe = check_recipe(values, "recipe")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    again = load_recipe(path)
    assert again == recipe
    assert all(type(value) is int for _, value in again.schedules["k"])
    assert total_steps(again) == STEPS


# Mistakes.

FEATURE = {"name": "feature_choice", "k": K}
TOPK = {"name": "topk", "k": K}
GRADIENT = {"name": "gradient_topk", "k": K, "beta": 1.0}


def phases(*changes):
    return {"phases": [{"start": 0.5, "encoder": TOPK} | change for change in changes]}


def schedule(**knots):
    return {"schedules": knots}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": [{"encoder": TOPK}]}, "phases.0.start: required, but missing."),
        ({"phases": [{"start": 0.5}]}, "phases.0: expected an encoder, an objective or a reconstruction_weight, got none."),
        (phases({"start": 0.0}), "phases.0.start: expected greater than 0, got 0.0."),
        (phases({"start": 1.0}), "phases.0.start: expected less than 1, got 1.0."),
        (phases({"blend": 1.0}), "phases.0.blend: expected less than 1, got 1.0."),
        (phases({"lr_factor": 0.0}), "phases.0.lr_factor: expected greater than 0, got 0.0."),
        (phases({"start": 0.5}, {"start": 0.3}), "phases: expected starts that ascend, got [0.5, 0.3]."),
        (phases({"start": 0.5}, {"start": 0.5}), "phases: expected starts that ascend, got [0.5, 0.5]."),
        (
            phases({"start": 0.25, "blend": 0.5}, {"start": 0.5}),
            "phases.0.blend: expected at most 0.25, until the phase ends, got 0.5.",
        ),
        (phases({"blend": 0.75}), "phases.0.blend: expected at most 0.5, until the phase ends, got 0.75."),
        (phases({"encoder": {"name": "topkk", "k": 3}}), "phases.0.encoder.name: expected one of topk, mutual_choice"),
        (phases({"encoder": {"name": "topkk", "k": 3}}), "got 'topkk'. Did you mean 'topk'?"),
        (phases({"encoder": {"k": 3}}), "phases.0.encoder.name: required, but missing."),
        (phases({"encoder": {"name": "topk"}}), "phases.0.encoder.k: required, but missing. topk takes k."),
        (phases({}, {"start": 0.7, "encoder": {"name": "topk", "kk": 3}}), "phases.1.encoder.kk: unknown key. topk takes k."),
        (phases({"encoder": TOPK | {"k": 0}}), "phases.0.encoder.k: expected at least 1, got 0."),
        (
            phases({"encoder": TOPK | {"k": 68}}),
            "phases.0.encoder.k: expected at most n_latents = 67, got 68. Lower k or raise dictionary.n_latents.",
        ),
        (
            phases({"encoder": {"name": "matching_pursuit", "k": 3}}),
            "phases: an encoder with tied weights (matching_pursuit) cannot share a run with one without.",
        ),
        (phases({"encoder": GRADIENT}), "harvest.gradients: expected true, because gradient_topk chooses latents"),
        (phases({"encoder": GRADIENT}), "got false. Set it, choose a new harvest.store, and run: sparsary harvest RECIPE"),
        (
            phases({"encoder": FEATURE}) | {"batch_tokens": 6},
            "batch_tokens: feature_choice needs one match per latent, got 6 tokens x k 7 = 42 matches for 67 "
            "latents. Set batch_tokens / accumulate to at least 10, raise k, or lower n_latents.",
        ),
        (
            phases({"encoder": FEATURE}) | {"batch_tokens": 100, "accumulate": 20},
            "batch_tokens: feature_choice needs one match per latent, got 5 tokens x k 7 = 35 matches for 67 latents.",
        ),
        (
            phases({"encoder": FEATURE}) | schedule(k=[[0.0, 7], [1.0, 2]]) | {"batch_tokens": 11},
            "schedules.k.1: batch_tokens: feature_choice needs one match per latent, got 11 tokens x k 2 = 22 matches",
        ),
        (schedule(kk=[[0.0, 3]]), "schedules.kk: no encoder of this recipe has that argument. Did you mean 'k'?"),
        (schedule(beta=[[0.0, 3.0]]), "schedules.beta: no encoder of this recipe has that argument."),
        (
            schedule(k=[[0.5, 3], [0.2, 5]]),
            "schedules.k: expected shares of the run that ascend within 0 to 1, got [0.5, 0.2].",
        ),
        (
            schedule(k=[[0.5, 3], [0.5, 5]]),
            "schedules.k: expected shares of the run that ascend within 0 to 1, got [0.5, 0.5].",
        ),
        (
            schedule(k=[[0.0, 3], [1.5, 5]]),
            "schedules.k: expected shares of the run that ascend within 0 to 1, got [0.0, 1.5].",
        ),
        (
            schedule(k=[[-0.5, 3], [1.0, 5]]),
            "schedules.k: expected shares of the run that ascend within 0 to 1, got [-0.5, 1.0].",
        ),
        (schedule(k=[]), "schedules.k: expected at least 1 item, got []"),
        (schedule(k=[["0.5", 3]]), "schedules.k.0.0: expected a valid number, got '0.5'."),
        (schedule(k=[[0.0, "3"]]), "schedules.k.0.1"),
        (schedule(k=[[0.0, 3.5], [1.0, 5]]), "schedules.k.0: dictionary.encoder.k: expected a valid integer, got 3.5."),
        (schedule(k=[[0.0, 7], [1.0, 0]]), "schedules.k.1: dictionary.encoder.k: expected at least 1, got 0."),
        (schedule(k=[[0.0, 68], [1.0, 7]]), "schedules.k.0: dictionary.encoder.k: expected at most n_latents = 67, got 68."),
        (
            phases({"encoder": {"name": "jumprelu", "target_l0": 9}}) | schedule(target_l0=[[0.0, 9], [1.0, 68]]),
            "schedules.target_l0.1: phases.0.encoder.target_l0: expected 1 to 67, got 68.",
        ),
    ],
)
def test_a_mistake_is_named_with_key_value_and_remedy(recipe_values, changes, message):
    recipe_values["dictionary"]["encoder"] = TOPK
    with pytest.raises(ValueError, match="recipe: ") as caught:
        check_recipe(recipe_values | changes, "recipe")
    assert message in str(caught.value)


def test_everything_wrong_with_phases_is_told_at_once(recipe_values):
    changes = phases({"encoder": TOPK | {"k": 68}}, {"encoder": {"name": "nope"}}) | schedule(beta=[[0.0, 1.0]])
    with pytest.raises(ValueError, match="recipe: ") as caught:
        check_recipe(recipe_values | changes, "recipe")
    lines = str(caught.value).splitlines()
    for start in ("phases.0.encoder.k:", "phases.1.encoder.name:", "schedules.beta:", "phases: expected starts"):
        assert sum(line.startswith(f"recipe: {start}") for line in lines) == 1, lines


def test_an_unknown_key_of_a_phase_is_named(recipe_values):
    with pytest.raises(ValueError, match=r"phases\.0\.blen: unknown key.*Did you mean 'blend'"):
        check_recipe(recipe_values | phases({"blen": 0.1}), "recipe")


def test_a_blend_may_reach_exactly_to_the_next_phase(recipe_values):
    check_recipe(recipe_values | phases({"start": 0.1, "blend": 0.2}, {"start": 0.3}), "recipe")


@pytest.mark.parametrize("starts", [(0.99,), (0.01,), (0.4, 0.41)])
def test_a_phase_that_would_never_begin_is_refused(recipe_values, starts):
    with pytest.raises(ValueError, match="phases: expected starts at different steps from 1 to 29 of the run's 30"):
        check_recipe(recipe_values | phases(*({"start": start} for start in starts)), "recipe")


def test_free_and_unit_atoms_do_not_blend(recipe_values):
    with pytest.raises(
        ValueError, match=r"phases\.0\.blend: expected 0 between encoders with free and with unit-norm decoders"
    ):
        check_recipe(recipe_values | phases({"start": 0.5, "blend": 0.1, "encoder": {"name": "relu"}}), "recipe")


def test_missing_gradients_are_told_once(recipe_values):
    recipe_values["dictionary"]["encoder"] = GRADIENT
    with pytest.raises(ValueError, match=r"harvest\.gradients: expected true") as caught:
        check_recipe(recipe_values | schedule(beta=[[0.0, 0.0], [1.0, 1.0]]), "recipe")
    assert len(str(caught.value).splitlines()) == 1
