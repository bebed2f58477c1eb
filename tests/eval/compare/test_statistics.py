"""Intervals that cover, verdicts that need evidence, and corrections for many tests."""

import numpy as np
import pytest

from sparsary.eval.bootstrap import percentiles
from sparsary.eval.compare.statistics import decide, difference, holm, margin_of, sd_of, uncertainty


def test_holm_s_correction_is_that_of_the_textbook():
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.005, 0.8), "holm")
    assert holm([0.01, 0.02, 0.03, 0.005, 0.8]) == pytest.approx([0.04, 0.06, 0.06, 0.025, 0.8])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def crossed(rng, seeds=3, documents=40, seed_sd=1.0, document_sd=6.0):
    """Values of seeds on documents: what retraining changes, what documents differ in, and the rest."""
    parts = (
        rng.normal(0, seed_sd, (seeds, 1)),
        rng.normal(0, document_sd, (1, documents)),
        rng.normal(0, 1, (seeds, documents)),
    )
    return sum(parts)


def of_documents(rng, values, draws=200):
    n = values.shape[1]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return float((weights @ values.mean(0)).var(ddof=1))


@pytest.mark.parametrize("document_sd", [0.0, 6.0, 30.0])
def test_intervals_over_seeds_and_documents_cover_as_often_as_they_say(document_sd):
    rng, hits, bootstrap_hits, trials = np.random.default_rng(0), 0, 0, 400
    for _ in range(trials):
        values = crossed(rng, document_sd=document_sd)
        found = uncertainty([(sd_of(values.mean(1).tolist()), 3)], (of_documents(rng, values), values.shape[1]))
        hits += abs(values.mean()) <= found.half_width
        # What is not done: seeds drawn anew too.
        again = np.array([values[rng.integers(3, size=3)][:, rng.integers(40, size=40)].mean() for _ in range(100)])
        low, high = percentiles(again)
        bootstrap_hits += bool(low <= 0 <= high)
    assert 0.93 <= hits / trials <= 0.995
    if document_sd == 0:
        # Three seeds have ten draws: nine in ten intervals are promised to hold, and hardly three in four do.
        assert bootstrap_hits / trials < 0.85


def test_without_one_of_the_parts_the_interval_is_of_the_other():
    both = uncertainty([(2.0, 4)], (1.0, 50))
    assert (both.over, both.seed_sd, both.error) == ("seeds and documents", 2.0, pytest.approx(np.sqrt(2)))
    assert 3 < both.df < 49
    seeds = uncertainty([(2.0, 4)], None)
    # Student's t: 3.182446 at three degrees of freedom.
    assert (seeds.over, seeds.df, seeds.half_width) == ("seeds", pytest.approx(3), pytest.approx(3.182446))
    documents = uncertainty([(0.0, 1)], (4.0, 1000))
    assert (documents.over, documents.seed_sd, documents.half_width) == ("documents", None, pytest.approx(3.9247, abs=1e-3))
    assert uncertainty([(0.0, 1)], None) is None
    assert uncertainty([(0.0, 1)], (0.0, 1)) is None


def test_the_detectable_difference_is_detected_four_times_in_five():
    rng, found, trials = np.random.default_rng(1), 0, 600
    detectable = uncertainty([(1.0, 5)], None).detectable
    for _ in range(trials):
        row = difference("fvu", (rng.normal(0, 1, 5) + detectable).tolist(), [0.0] * 5, None, paired=True)
        found += row["p"] < 0.05
    assert 0.72 < found / trials < 0.9


def verdicts(*groups, key="fvu", documents=None, off=False, lower=True):
    rows = [difference(key, ours, theirs, documents, paired=True) for ours, theirs in groups]
    return [row["verdict"] for row in decide(rows, [lower] * len(rows), [off] * len(rows))]


NOISE = [0.0, 0.001, -0.001]


@pytest.mark.parametrize(
    ("shift", "spread", "expected"),
    [(-0.1, 1, "better"), (0.1, 1, "worse"), (0.0, 1, "equivalent"), (0.03, 30, "undecided"), (0.0, 30, "undecided")],
)
def test_undecided_is_not_no_difference(shift, spread, expected):
    theirs = [0.5, 0.51, 0.49]
    ours = [value + shift + spread * noise for value, noise in zip(theirs, NOISE, strict=True)]
    assert verdicts((ours, theirs)) == [expected]
    opposite = {"better": "worse", "worse": "better"}
    assert verdicts((ours, theirs), lower=False) == [opposite.get(expected, expected)]
    # Away from the common l0 nothing is called better, whatever the test says.
    assert verdicts((ours, theirs), off=True) == ["not at equal l0"]


def test_documents_that_differ_widen_the_interval_and_take_verdicts_back():
    ours, theirs = [0.4, 0.401, 0.399], [0.5, 0.5, 0.5]
    assert verdicts((ours, theirs)) == ["better"]
    assert verdicts((ours, theirs), documents=(0.2, 30)) == ["undecided"]


def test_one_seed_decides_nothing_however_many_documents():
    row = difference("fvu", [0.4], [0.5], (1e-10, 500), paired=True)
    assert (row["interval_over"], row["seed_sd"]) == ("documents", None)
    assert row["p"] < 1e-6
    assert decide([row], [True], [False])[0]["verdict"] == "undecided"
    (nothing,) = decide([difference("fvu", [0.4], [0.5], None, paired=True)], [True], [False])
    assert (nothing["verdict"], nothing["p_holm"], nothing["low"]) == ("undecided", None, None)


def test_a_correction_is_over_all_that_is_asked():
    """Significant alone, and no more among twenty that show nothing."""
    ours, theirs = [0.48, 0.485, 0.475], [0.5, 0.5, 0.5]
    assert verdicts((ours, theirs)) == ["better"]
    others = [([0.5, 0.45, 0.56], [0.5, 0.5, 0.5])] * 20
    assert verdicts((ours, theirs), *others)[0] == "undecided"


def test_a_difference_below_the_margin_is_there_and_of_no_account():
    theirs = [0.5, 0.5, 0.5]
    rows = decide([difference("fvu", [0.499, 0.49901, 0.49899], theirs, None, paired=True)], [True], [False])
    assert (rows[0]["verdict"], rows[0]["negligible"]) == ("better", True)


def test_runs_that_are_the_same_are_equivalent():
    (row,) = decide([difference("dead_fraction", [0.0] * 3, [0.0] * 3, None, paired=True)], [True], [False])
    assert (row["p"], row["verdict"], row["detectable"]) == (1.0, "equivalent", 0.0)


def test_seeds_that_agree_to_a_latent_are_not_certain():
    """Three latents of 1024 in every seed: counts that agree by chance, as one in a dozen triples of them does."""
    ours, theirs = [8 / 1024] * 3, [5 / 1024] * 3
    certain, rounded = (difference("dense_fraction", ours, theirs, None, True, step) for step in (0.0, 1 / 1024))
    assert (certain["p"], certain["detectable"]) == (0.0, 0.0)
    assert rounded["p"] > 0.001
    assert rounded["detectable"] > 1e-4


def test_seeds_that_are_not_the_same_are_not_paired():
    ours, theirs = [0.50, 0.60, 0.70], [0.51, 0.61, 0.71]
    paired, apart = (difference("fvu", ours, theirs, None, paired=flag) for flag in (True, False))
    assert paired["seed_sd"] == pytest.approx(0, abs=1e-12)
    assert apart["seed_sd"] == pytest.approx(np.sqrt(2) * 0.1)
    assert apart["high"] - apart["low"] > 0.3
    assert difference("fvu", ours, theirs[:2], None, paired=False)["interval_over"] == "seeds"


def test_margins_are_of_what_a_figure_means():
    assert margin_of("fvu", 0.5) == pytest.approx(0.01)
    # A share of 0.999 recovered: two percent of it would be twenty times what is missing.
    assert margin_of("ce_recovered_mean", 0.999) == pytest.approx(0.00002)
    assert margin_of("dead_fraction", 0.0) == 0.01
