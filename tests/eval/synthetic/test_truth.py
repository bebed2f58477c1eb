"""``sparsary bench truth``: what it trains, scores and compares."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.eval.synthetic.truth import Arm, Samples, TruthSet, bench_truth, truth_set, truth_tables

GOLDEN = Path(__file__).parents[2] / "golden" / "synthetic" / "flat"


@pytest.fixture
def small():
    """32 latents of the small hierarchical set, and a few steps."""
    return replace(truth_set("hierarchical_0"), n_latents=32, samples=20_480, batch_tokens=512)


def test_an_arm_trained_longer_recovers_more_and_the_test_says_so(small, tmp_path):
    # An encoder that learns at a hundredth of the rate is worse in every figure.
    arms = [Arm("batch_topk", {}), Arm("batch_topk", {"lr": 3e-6})]
    told = []
    report = bench_truth(small, arms, seeds=3, scored_tokens=2048, out=tmp_path, told=told.append)
    assert told == [1, 2, 3, 4, 5, 6]
    better, worse = report["arms"].values()
    assert len(better["runs"]) == 3
    for metric, sign in (("mcc", 1), ("latent_f1", 1), ("fvu", -1)):
        assert all(sign * (a[metric] - b[metric]) > 0 for a, b in zip(better["runs"], worse["runs"], strict=True))
    fvu = next(row for row in report["differences"] if row["figure"] == "fvu")
    assert fvu["against"] == "batch_topk"
    assert fvu["difference"] > 0
    assert fvu["detectable"] > 0
    assert fvu["verdict"] in ("worse", "not at equal l0")
    assert report["baselines"]["oracle"]["latent_f1"] == pytest.approx(1.0, abs=0.01)
    # Runs that are kept are continued: nothing is trained again, and the figures are the same.
    again = bench_truth(small, arms, seeds=3, scored_tokens=2048, out=tmp_path)
    assert again["arms"] == report["arms"]
    titles = [title for title, _, _ in truth_tables(json.loads(json.dumps(report)))]
    assert titles[0].startswith("hierarchical_0: 32 latents")
    assert titles[1] == "against batch_topk"


def test_published_figures_stand_beside_the_published_size_only():
    assert not truth_set("synth_sae_bench_16k").published
    found = truth_set(str(GOLDEN))
    assert isinstance(found, TruthSet)
    assert (found.n_latents, found.fixed, found.published) == (41, True, {})
    report = {
        "data": {"name": "x", "n_latents": 1, "k": 1, "samples": 1, "published": {"BatchTopK": (0.82, "source")}},
        "arms": {},
        "baselines": {},
        "differences": [],
        "seeds": 1,
    }
    assert truth_tables(report)[0][2] == [["[BatchTopK, source]", "0.82", *[""] * 6]]


def test_samples_are_equal_in_every_pass_and_differ_by_seed():
    planted = truth_set("flat").planted(0)
    once, again, other = (torch.cat(list(Samples(planted, 100, 50, seed))) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    x, grad = next(iter(Samples(truth_set("small_but_decisive").planted(0), 10, 10, 0)))
    assert x.shape == grad.shape == (10, 64)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([Arm("topk", {"tokens": 5})], "bench truth: tokens: expected the value from --samples, got 5"),
        ([Arm("topk", {}), Arm("topk", {})], "expected different runs, got topk, topk"),
        ([Arm("gradient_topk", {})], "expected data with loss gradients, got hierarchical_0"),
        ([Arm("topk", {"lrr": 5})], "lrr"),
    ],
)
def test_invalid_arms_are_refused_before_anything_is_trained(small, arms, words):
    with pytest.raises(ValueError, match=words):
        bench_truth(small, arms)


def test_the_command_prints_and_writes_what_was_measured(tmp_path, capsys, monkeypatch):
    out = tmp_path / "truth.json"
    words = f"bench truth --data {GOLDEN} --family topk --samples 2048 --seeds 1 --scored 2048 --n-latents 16 --k 3"
    monkeypatch.setattr("sys.argv", ["sparsary", *words.split(), "--json", str(out)])
    with pytest.raises(SystemExit) as end:
        sparsary.main()
    assert not end.value.code
    report = json.loads(out.read_text())
    assert report["arms"]["topk"]["samples"] == 2048
    assert report["arms"]["topk"]["runs"][0]["l0"] <= 3
    said = capsys.readouterr().out
    assert "16 latents, k 3, 2,048 samples, 1 seeds" in said
    assert "(oracle)" in said


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"--data: expected one of .*flat.*, got 'flatt'. Did you mean 'flat'\?"):
        truth_set("flatt")
