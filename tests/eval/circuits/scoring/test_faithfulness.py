"""Faithfulness: 1 and 0 at the ends, known areas of known curves, intervals that cover, sizes to the unit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsary.eval.circuits.methods import METHODS, UnitScores
from sparsary.eval.circuits.scoring.faithfulness import (
    MEASURED_ON,
    SIZED_ON,
    FaithfulnessCurve,
    Trials,
    circuit_members,
    curve,
    growing_sizes,
    jaccard,
    minimality,
    pair_interval,
    ranked,
    share_sizes,
    smallest_size,
    stability,
)
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace
from sparsary.eval.circuits.units.passes import Cost


def synthetic(faithfulness, sizes, n_units, pairs=5, complements=None):
    """A curve of a model at 3 and nothing at 1, every pair alike."""
    values = np.repeat(1.0 + 2.0 * np.array(faithfulness)[:, None], pairs, axis=1)
    rest = np.full_like(values, np.nan) if complements is None else complements
    return FaithfulnessCurve(n_units, tuple(sizes), values, rest, np.full(pairs, 3.0), np.full(pairs, 1.0))


def scores_of(values, per_pair=None):
    return UnitScores(torch.tensor(values), Cost(), None if per_pair is None else torch.tensor(per_pair))


@pytest.fixture(scope="module")
def space(stream_model):
    """All that writes to the stream of a model with two MLPs."""
    model = stream_model(torch.nn.GELU, lambda: torch.nn.LayerNorm(12))
    parts = [Coordinates("embedding", "wte:out", 12, 3)]
    parts += [Coordinates(f"m{layer}", f"layers.{layer}.act:out", 7, 1) for layer in range(2)]
    return NodeSpace(model, parts)


@pytest.fixture(scope="module")
def pairs(stream_model, random_pairs):
    """Pairs whose answers the model prefers on the clean prompt, so that there is something to explain."""
    found = random_pairs(n=12)
    model = stream_model(torch.nn.GELU, lambda: torch.nn.LayerNorm(12))
    clean, corrupted = (model.logits(ids)[:, -1] for ids in (found.clean, found.corrupted))
    order = (clean - corrupted).argsort(dim=-1)
    questions = [
        (q._replace(answers=(int(row[-1]),), foils=(int(row[0]),)),) for (q,), row in zip(found.questions, order, strict=True)
    ]
    return replace(found, questions=tuple(questions))


def test_random_circuits_have_a_quarter_and_three_quarters():
    """The staircase of MIB's appendix: nothing until half of the units, then everything at all of them."""
    sizes = share_sizes(1000)
    assert sizes == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    steps = synthetic([0.0] * 9 + [1.0], sizes, 1000)
    assert steps.cpr() == pytest.approx(0.25)
    # The axis starts at a thousandth.
    assert steps.cmd() == pytest.approx(0.75, abs=0.0011)


def test_areas_of_known_curves():
    sizes = (0, 50, 100)
    straight, perfect, over = (synthetic(f, sizes, 100) for f in ([0, 0.5, 1], [1, 1, 1], [0, 2, 1]))
    assert (straight.cpr(), straight.cmd()) == pytest.approx((0.5, 0.5))
    assert (perfect.cpr(), perfect.cmd()) == pytest.approx((1.0, 0.0))
    # Above 1 counts for CPR, and against CMD.
    assert (over.cpr(), over.cmd()) == pytest.approx((1.25, 0.75))
    assert over.smallest(0.9) == 50
    assert straight.smallest(0.51) == 100
    assert straight.smallest(1.01) is None
    assert over.at((100, 50)).faithfulness().tolist() == [1.0, 2.0]


def test_pairs_are_averaged_before_dividing():
    uneven = FaithfulnessCurve(
        1, (1,), np.array([[2.0, 2.0]]), np.full((1, 2), np.nan), np.array([4.0, 2.0]), np.array([0.0, 1.0])
    )
    assert uneven.faithfulness() == pytest.approx([(2 - 0.5) / (3 - 0.5)])
    assert uneven.faithfulness(np.array([0.0, 2.0])) == pytest.approx([1.0])


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_everything_is_one_and_nothing_is_zero_exactly(space, pairs, ablation):
    order = ranked(METHODS["attribution"]().discover(space, pairs))
    along = curve(Trials(space, pairs, ablation_values(space, ablation, pairs), batch=5), order, [0, 3, space.size])
    assert along.faithfulness()[[0, 2]].tolist() == [0.0, 1.0]
    assert along.completeness()[[0, 2]].tolist() == [1.0, 0.0]
    assert along.faithfulness()[1] not in (0.0, 1.0, along.completeness()[1])
    assert along.full == pytest.approx(pairs.measure(space.model.logits(pairs.clean)).numpy())
    if ablation == "resample":
        assert along.empty == pytest.approx(pairs.measure(space.model.logits(pairs.corrupted)).numpy())


def test_a_curve_is_its_circuits_run_by_hand(space, pairs):
    order = torch.randperm(space.size, generator=torch.Generator().manual_seed(4))
    fill = ablation_values(space, "resample", pairs)
    along = curve(Trials(space, pairs, fill), order, [2, 5])
    for row, size in enumerate((2, 5)):
        kept = torch.zeros(space.size, dtype=torch.bool)
        kept[order[:size]] = True
        for found, run in ((along.circuits, kept), (along.complements, ~kept)):
            assert found[row] == pytest.approx(pairs.measure(space.run(pairs.clean, run, fill(pairs))).numpy())


def test_circuits_that_are_the_same_are_run_once(space, pairs):
    before = space.passes.forwards
    n = space.size
    curve(Trials(space, pairs, ablation_values(space, "zero", pairs)), torch.arange(n), [0, 1, 1, n])
    # The mean, the model, nothing, one unit, all, and all but one; complements of nothing and everything are there already.
    assert space.passes.forwards - before == 1 + 1 + 4


def test_the_smallest_size_is_to_the_unit(space, pairs):
    order = ranked(METHODS["exact"]().discover(space, pairs))
    trials = Trials(space, pairs, ablation_values(space, "resample", pairs))
    coarse = curve(trials, order, [0, space.size], complements=())
    assert np.isnan(coarse.completeness()).all()
    size = smallest_size(trials, order, 0.8, coarse)
    reached = curve(trials, order, [size - 1, size]).faithfulness()
    assert reached[0] < 0.8 <= reached[1]
    assert smallest_size(trials, order, 50.0, coarse) is None


def test_a_size_is_chosen_on_the_pairs_it_is_not_measured_on(space, pairs):
    order = ranked(METHODS["exact"]().discover(space, pairs))
    trials = Trials(space, pairs, ablation_values(space, "resample", pairs))
    coarse = curve(trials, order, [0, space.size])
    alone = Trials(space, pairs.take(SIZED_ON), ablation_values(space, "resample", pairs.take(SIZED_ON)))
    size = smallest_size(trials, order, 0.8, coarse, SIZED_ON)
    assert size is not None
    assert curve(trials, order, [size]).of_pairs(SIZED_ON).faithfulness()[0] >= 0.8
    # Whatever the other pairs do: here a circuit does nothing for them.
    metric = trials.metric

    def spoilt(kept):
        found = metric(kept).copy()
        found[MEASURED_ON] = -100.0
        return found

    trials.metric = spoilt
    again = curve(trials, order, [0, space.size])
    assert smallest_size(trials, order, 0.8, again, SIZED_ON) == size
    assert len(alone.full) == len(again.of_pairs(SIZED_ON).full) == 6


def test_noise_makes_chosen_sizes_too_small_and_the_other_pairs_say_so():
    """A slow true rise to 0.8, noisy pairs: where they first reach the level, pairs that did not choose do not."""
    rng, sizes = np.random.default_rng(0), tuple(range(60))
    truth = np.linspace(0.0, 1.0, 60)[:, None]
    at_level, held_out = [], []
    for _ in range(60):
        values = 1.0 + 2.0 * truth + rng.normal(0, 0.6, (60, 10))
        along = FaithfulnessCurve(60, sizes, values, np.full_like(values, np.nan), np.full(10, 3.0), np.full(10, 1.0))
        size = along.of_pairs(SIZED_ON).smallest(0.8)
        at_level.append(along.of_pairs(SIZED_ON).at([size]).faithfulness()[0])
        held_out.append(along.of_pairs(MEASURED_ON).at([size]).faithfulness()[0])
    assert min(at_level) >= 0.8
    assert np.mean(held_out) < 0.7


def test_a_bootstrap_interval_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("sparsary.eval.bootstrap.RESAMPLES", 150)
    rng, hits, widths = np.random.default_rng(0), 0, []
    for seed in range(40):
        full, empty = rng.normal(3.0, 0.5, 40), rng.normal(1.0, 0.5, 40)
        middle = 0.5 * (full + empty) + rng.normal(0.0, 0.3, 40)
        ends = [
            pair_interval(
                FaithfulnessCurve.faithfulness,
                FaithfulnessCurve(2, (1,), middle[None, :n], middle[None, :n], full[:n], empty[:n]),
                seed,
            )
            for n in (40, 10)
        ]
        hits += bool(ends[0][0][0] <= 0.5 <= ends[0][1][0])
        widths.append([float(high[0] - low[0]) for low, high in ends])
    # 38 of 40 expected, and more than three standard deviations below it is 33.
    assert 34 <= hits <= 40
    # A quarter of the pairs, intervals twice as wide; where all pairs are alike, none.
    many, few = np.mean(widths, axis=0)
    assert 1.6 < few / many < 2.3
    assert pair_interval(FaithfulnessCurve.cpr, synthetic([0, 1], (0, 2), 2)) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_bootstrap_interval_of_a_mean_is_as_wide_as_theory_says():
    full = np.random.default_rng(2).normal(size=50)
    along = FaithfulnessCurve(1, (1,), full[None], full[None], full, full - 1.0)
    for level, deviations in ((0.95, 1.96), (0.5, 0.674)):
        low, high = pair_interval(lambda at, weights: np.average(at.full, weights=weights), along, level=level)
        assert high - low == pytest.approx(2 * deviations * full.std() / np.sqrt(50), rel=0.1)


def test_a_task_that_ablation_does_not_break_is_refused():
    rng = np.random.default_rng(1)
    full = rng.normal(1.0, 1.0, 20)
    noise = FaithfulnessCurve(2, (1,), full[None], full[None], full, full + rng.normal(0.0, 1.0, 20))
    with pytest.raises(ValueError, match="equal within noise") as error:
        noise.require_signal()
    assert "20 pairs" in str(error.value)
    with pytest.raises(ValueError, match="equal within noise"):
        replace(noise, empty=full).require_signal()
    replace(noise, empty=full - 1.0).require_signal()
    # Also where the metric falls below that of nothing: a circuit can be of the wrong answer.
    replace(noise, empty=full + 1.0).require_signal()


def test_ranking():
    found = scores_of([0.5, -2.0, 1.0, 0.5])
    assert ranked(found).tolist() == [2, 0, 3, 1]
    assert ranked(found, "absolute").tolist() == [1, 2, 0, 3]
    assert circuit_members(ranked(found), 2).tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="ranking: expected one of signed, absolute, got 'up'"):
        ranked(found, "up")


def test_growing_sizes_go_from_nothing_to_everything():
    sizes = growing_sizes(1000, per_decade=4)
    assert (sizes[0], sizes[1], sizes[-1]) == (0, 1, 1000)
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) == 2 + 12
    assert growing_sizes(1) == (0, 1)


def test_minimality_is_what_is_lost_without_a_unit(space, pairs):
    order = ranked(METHODS["exact"]().discover(space, pairs))
    fill, kept = ablation_values(space, "resample", pairs), circuit_members(order, 5)
    trials = Trials(space, pairs, fill)
    lost = minimality(trials, kept, order[:2])
    along = curve(trials, order, [5])
    for unit, found in zip(order[:2].tolist(), lost, strict=True):
        fewer = kept.clone()
        fewer[unit] = False
        changed = pairs.measure(space.run(pairs.clean, fewer, fill(pairs))).mean()
        without = (float(changed) - along.empty.mean()) / (along.full.mean() - along.empty.mean())
        assert found == pytest.approx(along.faithfulness()[0] - without, abs=1e-5)
    assert len(minimality(trials, kept)) == 5


def test_stability_is_of_circuits_of_resampled_pairs():
    # Every pair says the same: so does every resampling.
    same = scores_of([3.0, 2.0, 1.0], [[3.0, 2.0, 1.0]] * 6)
    assert stability(same, 2) == 1.0
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 40))
    unlike = scores_of(noise.mean(0), noise)
    assert 0.1 < stability(unlike, 4) < 0.8
    assert stability(unlike, 40) == 1.0
    with pytest.raises(ValueError, match="stability: expected per-pair scores"):
        stability(scores_of([1.0]), 1)


def test_jaccard():
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a, a) == 1.0
    assert jaccard(a & False, a & False) == 1.0
