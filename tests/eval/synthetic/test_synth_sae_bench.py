"""SynthSAEBench-like data against what is published of it, and floors and ceilings against each other."""

import pytest
import torch

from sparsary.eval.synthetic.planted import levels
from sparsary.eval.synthetic.recovery import chance_mcc, evaluate_recovery
from sparsary.eval.synthetic.synth_sae_bench import SYNTH, judge_streamed, push_apart, references, synth_sae_bench
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder


def tiny(seed=0, **changes):
    sizes = {"n_features": 47, "d": 23, "roots": 5, "branching": 2, "depth": 2, "rank": 3, "orthogonalise_steps": 3}
    return synth_sae_bench(seed, p_min=0.02, p_max=0.4, **sizes | changes)


def test_the_full_size_is_the_published_one():
    planted = synth_sae_bench(orthogonalise_steps=0)
    assert (planted.n_features, planted.d) == (16_384, 768)
    assert [len(level) for level in levels(planted.parents)] == [128 + 5504, 512, 2048, 8192]
    fires = planted.sample(199, 0).coefficients > 0
    # Published: about 34 features fire on a token, about 25 of the 4096 most frequent.
    assert float(fires.sum(-1).float().mean()) == pytest.approx(34, abs=1.5)
    assert float(fires[:, :4096].sum(-1).float().mean()) == pytest.approx(25, abs=1)
    assert float(planted.bias.norm()) == pytest.approx(1)
    assert (float(planted.means[0]), float(planted.means[-1])) == (5, 4)


def test_children_fire_with_their_parent_and_without_their_siblings():
    planted = tiny()
    fires = planted.firing.draw(20_011, torch.Generator().manual_seed(0))
    for parent in range(15):
        children = (planted.parents == parent).nonzero()[:, 0]
        assert len(children) == 2
        assert not fires[:, children][~fires[:, parent]].any()
        assert fires[:, children].sum(-1).max() == 1
    # Roots do not exclude each other.
    assert fires[:, :5].sum(-1).max() > 1
    alone = torch.cat([planted.groups["roots"], planted.groups["loners"]])
    assert fires.float().mean(0)[alone].tolist() == pytest.approx(planted.firing.p[alone].tolist(), abs=0.015)
    assert torch.allclose(planted.firing.probabilities(), fires.float().mean(0), atol=0.02)


def test_children_are_scaled_by_their_parent():
    planted = tiny(n_features=35)
    sample = planted.sample(40_009, 1)
    child = int((planted.parents == 0).nonzero()[0])
    where = sample.coefficients[:, child] > 0
    both = torch.stack([sample.coefficients[where, 0], sample.coefficients[where, child]])
    free = planted.__class__(**{**planted.__dict__, "parents": None}).sample(40_009, 1).coefficients
    ratio = both[1] / free[where, child]
    assert torch.allclose(ratio, both[0] / planted.means[0], rtol=1e-4)
    assert torch.allclose(sample.x, sample.coefficients @ planted.atoms + planted.bias, atol=1e-5)


def test_atoms_are_pushed_apart_and_stay_units():
    torch.manual_seed(0)
    atoms = torch.randn(41, 17)
    before = torch.nn.functional.normalize(atoms, dim=-1)
    after = push_apart(atoms, 60, lr=3e-3)
    off = ~torch.eye(41, dtype=torch.bool)
    assert (after @ after.T)[off].pow(2).sum() < 0.9 * (before @ before.T)[off].pow(2).sum()
    assert torch.allclose(after.norm(dim=-1), torch.ones(41))
    assert torch.allclose(push_apart(atoms, 0), before, atol=1e-6)


def test_floors_lie_under_a_ceiling_that_is_perfect():
    planted = tiny()
    found = references(planted, 47, 2, 1009, seed=3)
    assert found["oracle"]["mcc"] == pytest.approx(1, abs=1e-6)
    assert found["oracle"]["latent_f1"] == pytest.approx(1, abs=0.02)
    assert found["oracle"]["fvu"] < 1e-4
    assert found["random"]["mcc"] == pytest.approx(chance_mcc(planted.atoms, 47), abs=0.05)
    for floor in ("random", "pca", "kmeans"):
        assert found[floor]["mcc"] < 0.8
        assert found[floor]["detector_f1"] < 0.7
        assert 0 < found[floor]["fvu"] < 1
        assert found[floor]["l0"] <= 2
    # Principal components can be no more than twice as many as dimensions.
    assert found["pca"]["fvu"] < found["random"]["fvu"]
    assert found == references(planted, 47, 2, 1009, seed=3)


def test_streaming_counts_what_one_sample_counts(monkeypatch):
    planted = tiny()
    dictionary = SAE(23, 53, build_encoder({"name": "topk", "k": 3}))
    monkeypatch.setattr("sparsary.eval.synthetic.synth_sae_bench._pieces", lambda planted, tokens, seed: [(tokens, seed)])
    assert judge_streamed(dictionary, planted, 401, 5) == evaluate_recovery(dictionary, planted, 401, 5)
    monkeypatch.undo()
    monkeypatch.setattr("sparsary.eval.synthetic.synth_sae_bench.DRAW_TOKENS", 101)
    report = judge_streamed(dictionary, planted, 401, 5)
    assert report["l0"] <= 3
    assert report["mcc"] == evaluate_recovery(dictionary, planted, 401, 5)["mcc"]
    with pytest.raises(ValueError, match="expected d_in = d_out = 31, as planted, got 23"):
        judge_streamed(dictionary, tiny(d=31), 11, 0)


def test_more_trees_than_features_are_refused():
    with pytest.raises(ValueError, match="n_features: expected at least 35, as many as the trees have, got 34"):
        tiny(n_features=34)


def test_the_small_size_can_be_learned_better_than_any_floor(train_on):
    planted = SYNTH["synth_sae_bench_small"](0)
    dictionary = train_on(SAE(32, 128, build_encoder({"name": "topk", "k": 3})), planted, 500)
    learned = judge_streamed(dictionary, planted, 4001, seed=9)
    found = references(planted, 128, 3, 4001, seed=1)
    for floor in ("random", "pca", "kmeans"):
        assert learned["mcc"] > found[floor]["mcc"] + 0.1
        assert learned["detector_f1"] > found[floor]["detector_f1"]
    assert learned["mcc"] < found["oracle"]["mcc"]


@pytest.fixture
def train_on():
    """Trains an SAE on planted data for so many steps of 512 tokens."""

    def train(sae, planted, steps):
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        sae.train()
        for step in range(steps):
            x = planted.sample(512, 10_000 + step).x
            (sae(x) - x).pow(2).sum(-1).mean().backward()
            sae.project_grad()
            optimizer.step()
            optimizer.zero_grad()
            sae.renormalize()
        return sae

    return train
