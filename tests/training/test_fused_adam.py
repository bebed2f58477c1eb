"""The fused step against the plain one: the same weights, moments and checkpoints, in every family; and who may use it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae import ENCODERS, SAE
from sparsary.sae.kernels import backend
from sparsary.sae.sparse_grad import ledger_of
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.activations.tensor_stream import TensorStream
from sparsary.training.fused_adam import FusedAdam, build_optimizer
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.training.optim import DictionaryAdam, Schedule
from sparsary.training.phases import Phases
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
from sparsary.training.state import Logged, Randomness, TrainState

TOKENS, D, LATENTS, STEPS = 37, 19, 67, 5


def needs_kernels():
    pytest.importorskip("numba")


@dataclasses.dataclass
class Run:
    """A run in small: what ``training.run`` builds, without a model."""

    dictionary: SAE
    phases: Phases
    optimizer: DictionaryAdam
    schedule: Schedule
    objective: Objective
    dead: int

    def step(self, number: int) -> None:
        """One step on a batch that depends on its number only."""
        generator = torch.Generator().manual_seed(number)
        dtype = self.dictionary.W_dec.dtype
        x, grad = (torch.randn(TOKENS, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        density = torch.rand(LATENTS, generator=generator, dtype=torch.float64).pow(4)
        self.schedule.apply(number)
        dead = torch.arange(LATENTS) < self.dead
        if self.dictionary.tied:
            # What is left over is orthogonal to the atom taken last: relu would cut at 0 plus or minus rounding.
            dead &= self.dictionary.encode(x).firings(LATENTS) == 0
            density.zero_()
        usage = LatentUsage(dead, density)
        loss, _ = self.objective(ActivationBatch(x, grad=grad), usage)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def build(recipe_values, encoder_arguments):
    """Makes runs that start from the same weights."""

    def make(kind, name, dtype=torch.float64, dead=0, tau=0.0, later=None, **changes):
        recipe_values["dictionary"]["encoder"] = {"name": name, **encoder_arguments[name]}
        recipe_values["harvest"]["gradients"] = True
        if later is not None:
            encoder = {"name": later, **encoder_arguments[later]}
            changes["phases"] = [{"start": 0.1, "encoder": encoder}]
        recipe = check_recipe(recipe_values | {"lr_warmup_steps": 2} | changes, "recipe")
        torch.manual_seed(7)
        sae = SAE(D, LATENTS, ENCODERS[name](**encoder_arguments[name])).to(dtype)
        phases = Phases(sae, recipe).to(dtype)
        optimizer = kind(sae, phases, recipe)
        objective = Objective(sae, float(D), AuxSettings(1 / 32, 5, tau)).to(dtype)
        return Run(sae.train(), phases, optimizer, Schedule(optimizer, sae, phases, recipe), objective, dead)

    return make


def named(run: Run) -> dict[str, torch.nn.Parameter]:
    encoders = {f"phases.{name}": parameter for name, parameter in run.phases.named_parameters()}
    return dict(run.dictionary.named_parameters()) | encoders


def assert_same(fused: Run, plain: Run, tolerance: float) -> None:
    """Weights and moments agree, each to a share of its largest number."""
    weights, expected = named(fused), named(plain)
    assert weights.keys() == expected.keys()
    for name, other in expected.items():
        pairs = {"": (weights[name].detach(), other.detach())}
        a, b = fused.optimizer.state[weights[name]], plain.optimizer.state[other]
        assert a.keys() == b.keys(), name
        pairs |= {key: (a[key], b[key]) for key in b}
        for key, (found, wanted) in pairs.items():
            assert found.dtype == wanted.dtype, (name, key)
            scale = wanted.abs().max().clamp_min(1e-30)
            torch.testing.assert_close(
                found / scale, wanted / scale, rtol=0, atol=tolerance, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )
    if fused.dictionary.encoder.unit_atoms:
        assert (fused.dictionary.W_dec.norm(dim=1) - 1).abs().max() < 1e-12


# Gradients of 1e-17 that ought to be zero are far below Adam's eps in float64, so agreement is to rounding: 1e-9 after a few
# steps. In float32 they are about eps, and Adam makes steps of them: agreement there is to a share of the learning rate.
EXACT = 1e-9


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize(
    "settings",
    [{"grad_clip": None}, {"grad_clip": 1e-3}, {"dead": 23, "grad_clip": 1.0}, {"dead": 3, "tau": 0.9}],
    ids=["no clipping", "clipping", "dead latents", "few dead and underused latents"],
)
def test_fused_and_plain_steps_agree_in_every_family(build, name, settings):
    needs_kernels()
    fused, plain = build(FusedAdam, name, **settings), build(DictionaryAdam, name, **settings)
    start = fused.dictionary.W_dec.detach().clone()
    assert torch.equal(start, plain.dictionary.W_dec)
    for number in range(STEPS):
        fused.step(number)
        plain.step(number)
        assert_same(fused, plain, EXACT)
    assert (fused.dictionary.W_dec - start).abs().max() > 1e-4
    assert all(p.grad is None for p in fused.dictionary.parameters())


@pytest.mark.parametrize(("first", "later"), [("mutual_choice", "feature_choice"), ("relu", "topk"), ("topk", "jumprelu")])
def test_they_agree_across_phases(build, first, later):
    needs_kernels()
    fused, plain = build(FusedAdam, first, later=later, dead=11), build(DictionaryAdam, first, later=later, dead=11)
    for number in range(STEPS):
        fused.step(number)
        plain.step(number)
    assert type(fused.dictionary.encoder) is ENCODERS[later]
    assert_same(fused, plain, EXACT)
    assert (fused.dictionary.W_dec.norm(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["topk", "relu", "matching_pursuit"])
def test_in_float32_they_agree_to_a_share_of_the_learning_rate(build, name):
    needs_kernels()
    fused, plain = build(FusedAdam, name, torch.float32), build(DictionaryAdam, name, torch.float32)
    start = plain.dictionary.W_dec.detach().clone()
    for number in range(STEPS):
        fused.step(number)
        plain.step(number)
    for key, weights in plain.dictionary.named_parameters():
        difference = (dict(fused.dictionary.named_parameters())[key] - weights).norm()
        assert difference < 1e-4 * (plain.dictionary.W_dec - start).norm(), key


def test_codes_so_full_that_gradients_are_written_out_agree_as_well(build, monkeypatch):
    needs_kernels()
    monkeypatch.setattr("sparsary.sae.sparse_ops.DENSE_ENTRIES", 0)
    monkeypatch.setattr("sparsary.sae.sparse_ops.dense_share", lambda rows: 0.0)
    fused, plain = build(FusedAdam, "relu", dead=9), build(DictionaryAdam, "relu", dead=9)
    for number in range(3):
        fused.step(number)
        plain.step(number)
    assert_same(fused, plain, EXACT)


@pytest.mark.parametrize("name", ["gated", "jumprelu"])
def test_dense_codes_agree_as_well(build, name, monkeypatch):
    needs_kernels()
    monkeypatch.setattr("sparsary.sae.sparse_ops.DENSE_ENTRIES", 1)
    monkeypatch.setattr("sparsary.sae.sparse_ops.dense_share", lambda rows: 0.0)
    fused, plain = build(FusedAdam, name, dead=9), build(DictionaryAdam, name, dead=9)
    for number in range(3):
        fused.step(number)
        plain.step(number)
    assert_same(fused, plain, EXACT)


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_gradients_that_are_summed_once_agree_as_well(build, name, monkeypatch):
    needs_kernels()
    monkeypatch.setattr("sparsary.training.fused_adam.SUMMED_ENTRIES", 0)
    fused, plain = build(FusedAdam, name, dead=9), build(DictionaryAdam, name, dead=9)
    for number in range(3):
        fused.step(number)
        plain.step(number)
    assert_same(fused, plain, EXACT)


def test_several_backward_passes_add_up(build):
    needs_kernels()
    runs = build(FusedAdam, "topk", dead=23), build(DictionaryAdam, "topk", dead=23)
    for run in runs:
        for seed in (1, 2):
            x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            run.objective(ActivationBatch(x), LatentUsage(torch.arange(LATENTS) < 20 * seed, torch.zeros(LATENTS).double()))[
                0
            ].backward()
        run.optimizer.step()
    assert_same(*runs, EXACT)


# What is left behind.


def test_the_matrices_gradients_are_never_written_out(build):
    needs_kernels()
    run = build(FusedAdam, "topk", dead=23)
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    run.objective(ActivationBatch(x), LatentUsage(torch.arange(LATENTS) < 23, torch.zeros(LATENTS).double()))[0].backward()
    d = run.dictionary
    assert d.W_dec.grad is None
    assert d.W_enc.grad is None
    assert d.b_enc.grad is not None
    assert [len(ledger_of(w).products) for w in (d.W_dec, d.W_enc)] == [1, 1]
    assert [len(ledger_of(w).rows) for w in (d.W_dec, d.W_enc)] == [1, 1]
    run.optimizer.zero_grad()
    assert d.b_enc.grad is None
    assert not any(ledger_of(w).products or ledger_of(w).rows for w in (d.W_dec, d.W_enc))


@pytest.mark.parametrize("kind", [FusedAdam, DictionaryAdam])
def test_biases_learn_at_their_own_rate(build, kind):
    needs_kernels()
    runs = [build(kind, "topk", lr_bias=factor) for factor in (1.0, 7.0)]
    starts = [{name: p.detach().clone() for name, p in run.dictionary.named_parameters()} for run in runs]
    for run in runs:
        run.step(0)
    one, seven = (
        {name: p.detach() - start[name] for name, p in run.dictionary.named_parameters()}
        for run, start in zip(runs, starts, strict=True)
    )
    assert one["b_enc"].abs().max() > 0
    for name, moved in one.items():
        torch.testing.assert_close(seven[name], (7 if name == "b_enc" else 1) * moved)


def test_a_step_without_any_gradient_changes_nothing(build):
    needs_kernels()
    run = build(FusedAdam, "topk", grad_clip=0.1)
    for number in range(2):
        run.step(number)
    before = {name: p.detach().clone() for name, p in named(run).items()}
    state = {name: {k: v.clone() for k, v in run.optimizer.state[p].items()} for name, p in named(run).items()}
    run.optimizer.step()
    for name, parameter in named(run).items():
        assert torch.equal(parameter, before[name])
        for key, value in run.optimizer.state[parameter].items():
            assert torch.equal(value, state[name][key]), (name, key)


def no_stream():
    """A stream of which only the position is asked for."""
    return TensorStream([torch.zeros(1, D)], 1)


@pytest.mark.parametrize(
    ("first", "second"), [(FusedAdam, DictionaryAdam), (DictionaryAdam, FusedAdam), (FusedAdam, FusedAdam)]
)
@pytest.mark.parametrize("name", ["topk", "relu", "jumprelu", "matching_pursuit"])
def test_a_checkpoint_of_one_goes_on_under_the_other(build, tmp_path, name, first, second):
    needs_kernels()
    whole, begun = build(DictionaryAdam, name), build(first, name)
    for number in range(3):
        whole.step(number)
        begun.step(number)
    state = TrainState(LATENTS, 500, torch.device("cpu"), Randomness(0))
    state.step = 3
    state.contents(begun.dictionary, begun.phases, begun.optimizer, no_stream(), Logged()).write(tmp_path)
    resumed = build(second, name)
    with torch.no_grad():
        resumed.dictionary.W_dec.zero_()
    TrainState(LATENTS, 500, torch.device("cpu"), Randomness(0)).restore(
        tmp_path, resumed.dictionary, resumed.phases, resumed.optimizer
    )
    for number in range(3, 6):
        whole.step(number)
        resumed.step(number)
    assert_same(resumed, whole, EXACT)


def test_states_that_are_loaded_again_are_gone_on_from(build):
    """Steps were counted apart from the state, and the count outlived it."""
    needs_kernels()
    run, plain = build(FusedAdam, "topk"), build(DictionaryAdam, "topk")
    weights = {name: tensor.clone() for name, tensor in run.dictionary.state_dict().items()}
    run.step(0)
    after_one, state = {n: t.clone() for n, t in run.dictionary.state_dict().items()}, run.optimizer.state_dict()
    state = {
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()},
        "param_groups": state["param_groups"],
    }
    for number in range(1, 5):
        run.step(number)
    run.dictionary.load_state_dict(after_one)
    run.optimizer.load_state_dict(state)
    run.step(1)
    plain.dictionary.load_state_dict(weights)
    for number in range(2):
        plain.step(number)
    assert_same(run, plain, EXACT)


# Who may use it.


def test_the_fused_step_is_taken_where_nobody_else_needs_the_gradients(build, recipe_values, monkeypatch):
    needs_kernels()

    def chosen(dtype=torch.float32, **changes):
        run = build(DictionaryAdam, "topk", dtype)
        recipe = check_recipe(recipe_values | changes, "recipe")
        optimizer = build_optimizer(run.dictionary, run.phases, recipe)
        assert (ledger_of(run.dictionary.W_dec) is None) == (type(optimizer) is DictionaryAdam)
        return type(optimizer)

    assert chosen() is FusedAdam
    assert chosen(dtype=torch.float64) is FusedAdam
    assert chosen(optimizer="plain") is DictionaryAdam
    assert chosen(batch_tokens=102, accumulate=2) is DictionaryAdam
    assert chosen(dtype=torch.bfloat16) is DictionaryAdam
    monkeypatch.setattr("sparsary.training.fused_adam.backend", lambda *tensors: None)
    assert chosen() is DictionaryAdam


def test_a_plain_optimizer_after_a_fused_one_trains_the_matrices(build, recipe_values):
    """The ledgers of an optimizer that is gone went on taking the gradients."""
    needs_kernels()
    run = build(FusedAdam, "topk")
    run.step(0)
    plain = DictionaryAdam(run.dictionary, run.phases, check_recipe(recipe_values, "recipe"))
    run.optimizer = plain
    before = run.dictionary.W_dec.detach().clone()
    run.step(1)
    assert (run.dictionary.W_dec - before).abs().max() > 1e-4


# Whole runs.


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator)
    return [torch.randn(500, D, generator=generator).relu() @ mixing for _ in range(3)]


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def final_state(directory):
    return load_file(Path(directory) / "state.safetensors")


@pytest.mark.parametrize("changes", [{"screen": "int8", "screen_floor": 0.5}, {"optimizer": "auto"}], ids=["screened", "fused"])
def test_a_run_stopped_and_continued_is_bit_equal(recipe_values, rows, tmp_path, stopped_after, monkeypatch, changes):
    monkeypatch.setattr("sparsary.sae.screen.int8_is_faster", lambda W: True)
    recipe_values |= {"dead_after_tokens": 300, **changes}
    whole = train_recipe(resolve_recipe(check_recipe(recipe_values | {"out_dir": str(tmp_path / "whole")}, "recipe")), rows)
    recipe = check_recipe(recipe_values | {"out_dir": str(tmp_path / "parts")}, "recipe")
    for stop in (1, 11):
        with stopped_after(stop):
            train_recipe(resolve_recipe(recipe), rows)
    first, second = final_state(whole), final_state(train_recipe(resolve_recipe(recipe), rows))
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    assert ("screen/recall" in first) == ("screen_recall" in metrics(whole)[0]) == ("screen" in changes)
    if "screen" in changes:
        assert int(first["screen/batches"]) == 30
        assert all(0.9 < line["screen_recall"] <= 1 for line in metrics(whole))


def test_a_screened_run_ends_near_an_exact_one(recipe_values, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsary.sae.screen.int8_is_faster", lambda W: True)
    ends = {}
    for screen in ("none", "int8"):
        recipe = check_recipe(recipe_values | {"screen": screen, "out_dir": str(tmp_path / screen)}, "recipe")
        ends[screen] = metrics(train_recipe(resolve_recipe(recipe), rows))[-1]["fvu"]
    assert ends["int8"] == pytest.approx(ends["none"], rel=0.005)


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"topk"}))
def test_screens_are_refused_where_no_encoder_can_use_one(recipe_values, encoder_arguments, name):
    recipe_values["dictionary"]["encoder"] = {"name": name, **encoder_arguments[name]}
    recipe_values["harvest"]["gradients"] = True
    with pytest.raises(ValueError, match=r"screen: expected none, because only topk can screen, got 'int8'"):
        check_recipe(recipe_values | {"screen": "int8"}, "recipe")
    # One phase that can is enough.
    later = [{"start": 0.5, "encoder": {"name": "topk", "k": 5}}]
    if name not in ("matching_pursuit", "gradient_topk"):
        assert check_recipe(recipe_values | {"screen": "int8", "phases": later}, "recipe").screen == "int8"


def test_settings_out_of_range_are_named(recipe_values):
    with pytest.raises(ValueError, match="screen_floor") as caught:
        check_recipe(recipe_values | {"screen": "int4", "screen_floor": 1.5, "optimizer": "fast"}, "recipe")
    assert "screen: " in str(caught.value)
    assert "optimizer: " in str(caught.value)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_without_the_compiler_every_family_trains_to_the_same(
    recipe_values, encoder_arguments, rows, tmp_path, monkeypatch, name
):
    needs_kernels()
    recipe_values["dictionary"]["encoder"] = {"name": name, **encoder_arguments[name]}
    recipe_values["harvest"]["gradients"] = True
    recipe_values |= {"tokens": 6 * 101, "dead_after_tokens": 200, "calibration_tokens": 500}
    pairs = [(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(i))) for i, x in enumerate(rows)]
    data = pairs if ENCODERS[name].needs_gradient else rows
    found = train_recipe(resolve_recipe(check_recipe(recipe_values | {"out_dir": str(tmp_path / "with")}, "recipe")), data)
    monkeypatch.setattr("sparsary.sae.kernels.has_numba", lambda: False)
    assert backend(torch.ones(1)) is None
    expected = train_recipe(
        resolve_recipe(check_recipe(recipe_values | {"out_dir": str(tmp_path / "without")}, "recipe")), data
    )
    first, second = final_state(found), final_state(expected)
    assert first.keys() == second.keys()
    assert metrics(found)[-1]["fvu"] == pytest.approx(metrics(expected)[-1]["fvu"], rel=1e-3)
    change = (first["dictionary/W_dec"] - second["dictionary/W_dec"]).norm() / first["dictionary/W_dec"].norm()
    assert change < 1e-4
