"""Latents divided among ranks compute what the whole dictionary does."""

import itertools

import pytest
import torch

from sparsary import CrossLayerTranscoder
from sparsary.sae import SAE
from sparsary.sae.encoders import ENCODERS, build_encoder
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.divided import own_part, whole_tensors
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.transcoders import Crosscoder

TOKENS, D = 36, 11


@pytest.fixture
def on_mesh(load_beside):
    return load_beside("thread_ranks").on_mesh


def part(tensor, ranks):
    return tensor.chunk(ranks.size)[ranks.rank]


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=str)
def test_latents_divided_among_ranks_give_the_whole_dictionary(on_mesh, divided_spec, mesh):
    """Codes, reconstructions, gradients and statistics, with dead latents and every auxiliary loss."""
    compare_with_whole(on_mesh, divided_spec, mesh)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("progress", [0.1, 0.5])
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "relu", "target_l0": 3},
        {"name": "gated", "target_l0": 3},
        {"name": "jumprelu", "target_l0": 3, "start": 1.5},
        {"name": "jumprelu", "penalty": "l0", "target_l0": 3, "start": 1.5},
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_dense_codes_are_divided_too(on_mesh, spec, mesh, progress, monkeypatch):
    monkeypatch.setattr("sparsary.sae.sparse_ops.DENSE_ENTRIES", 1)
    monkeypatch.setattr("sparsary.sae.sparse_ops.dense_share", lambda rows: 0.0)
    compare_with_whole(on_mesh, spec, mesh, progress)


def test_ranks_with_dense_and_with_sparse_codes_compute_the_same(on_mesh, monkeypatch):
    """Densities are those of each rank's own tokens; thresholds are raised by all ranks together."""
    from sparsary.sae import sparse_ops

    monkeypatch.setattr(sparse_ops, "DENSE_ENTRIES", 1)
    monkeypatch.setattr(sparse_ops, "dense_share", lambda rows: 0.5)
    for shares in ([1.0, 1.0], [1.0, 0.0]):
        estimates = itertools.cycle(shares)
        monkeypatch.setattr(sparse_ops, "shares_above", lambda x, W, b, cuts, e=estimates: [next(e)] * len(cuts))
        for progress in (0.1, 0.5):
            compare_with_whole(on_mesh, {"name": "jumprelu", "target_l0": 3, "start": 1.5}, (2, 1), progress)
    compare_with_whole(on_mesh, {"name": "relu", "target_l0": 3}, (2, 1))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("spec", "joint"),
    [
        ({"name": "topk", "k": 3}, False),
        ({"name": "topk", "k": 3}, True),
        ({"name": "relu", "target_l0": 3}, False),
        ({"name": "jumprelu", "target_l0": 3, "start": 1.5}, False),
        ({"name": "jumprelu", "penalty": "l0", "target_l0": 3, "start": 1.5}, True),
    ],
    ids=str,
)
def test_ranks_divide_the_latents_of_every_layer(on_mesh, spec, joint, mesh):
    def build():
        return CrossLayerTranscoder(3, 3 * D, 3 * D, 3 * 16, build_encoder(spec), joint)

    compare_with_whole(on_mesh, spec, mesh, build=build)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [{"name": "batch_topk", "k": 3}, {"name": "relu", "target_l0": 3}, {"name": "jumprelu", "target_l0": 3, "penalty": "tanh"}],
    ids=lambda spec: spec["name"],
)
def test_a_crosscoder_is_divided_as_an_sae_is(on_mesh, spec, mesh):
    def build():
        crosscoder = Crosscoder([6, 5], 32, build_encoder(spec))
        crosscoder.in_scale[:6] = crosscoder.out_scale[:6] = 1.7
        return crosscoder

    compare_with_whole(on_mesh, spec, mesh, build=build)


def compare_with_whole(on_mesh, spec, mesh, progress=0.5, build=None):
    torch.manual_seed(5)
    build = build or (lambda: SAE(D, 32, build_encoder(spec)))
    dictionary = build()
    start, n, d, layers = dictionary.state_dict(), dictionary.n_latents, dictionary.d_in, len(dictionary.blocks)
    batches = [(torch.randn(TOKENS, d), torch.randn(TOKENS, d)) for _ in range(3)]
    dead = torch.rand(n) < 0.4

    def run(ranks, shards):
        whole = build()
        whole.load_state_dict(start)
        sae = own_part(whole, shards)
        sae.ranks, sae.encoder.n_shards = ranks, shards.size
        sae.train()
        sae.encoder.progress = progress
        objective = Objective(sae, 7.0, AuxSettings(0.3, 5))
        usage = LatentUsage(shards.part(dead, layers), torch.zeros(sae.n_latents).double())
        for x, grad in batches:
            sae.zero_grad()
            loss, terms = objective(ActivationBatch(part(x, ranks), grad=part(grad, ranks)), usage)
            loss.backward()
        grads = {name: ranks.sum(p.grad) for name, p in sae.named_parameters()}
        tensors = whole_tensors(grads | dict(sae.encoder.named_buffers(prefix="encoder")), sae.n_latents, shards, layers)
        firings = shards.joined(terms.firings, layers)
        return terms.named, firings, {name: tensor.clone() for name, tensor in tensors.items()}

    ((named, firings, tensors),) = on_mesh(1, 1, run)
    for own_named, own_firings, own_tensors in on_mesh(*mesh, run):
        assert torch.equal(own_firings, firings)
        for have, wanted in ((own_named, named), (own_tensors, tensors)):
            assert have.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(
                    have[key], value, rtol=1e-4, atol=1e-5, check_dtype=False, msg=lambda text, key=key: f"{key}: {text}"
                )


def test_every_trainable_encoder_is_divided_or_says_why_not(encoder_specs):
    assert {name for name, encoder in ENCODERS.items() if encoder.undivided} == set(encoder_specs.UNDIVIDED)
