"""A turned residual stream: the same function, the same circuit, and no axis left."""

from dataclasses import replace

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN, ToyTransformer
from sparsary.eval.circuits.known.rotation import rotated, rotation
from sparsary.training.activations.model import LanguageModel

TURNED = ["and_gate", "induction", "reverse"]


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_are_the_same(name, dtype, atol):
    known = KNOWN[name](n_pairs=4)
    known.module.to(dtype)
    turned = rotated(known, seed=3)
    one, other = (model.logits(known.pairs.clean) for model in (known.model, turned.model))
    assert other.dtype == dtype
    # Scores of 30 are what rounding acts on.
    torch.testing.assert_close(one, other, rtol=0, atol=atol)
    assert not torch.allclose(known.module.wte.weight, turned.module.wte.weight)


@pytest.mark.parametrize("name", TURNED)
def test_directions_turn_with_the_stream(name):
    known = KNOWN[name](n_pairs=4)
    turned = rotated(known, seed=3)
    hook = (f"h.{known.config.n_layers - 1}:out",)
    before, after = (model.activations(known.pairs.clean, hook)[hook[0]] for model in (known.model, turned.model))
    for label, direction in known.directions.items():
        torch.testing.assert_close(before @ direction, after @ turned.directions[label], rtol=0, atol=1e-5)
    axes = torch.stack(list(turned.directions.values()))
    assert axes.abs().amax(1).mean() < 0.9
    torch.testing.assert_close(axes @ axes.T, torch.eye(len(axes)), rtol=0, atol=1e-5)


def test_the_circuit_stays(check_truth):
    turned = rotated(KNOWN["and_gate"](n_pairs=3), seed=5)
    assert turned.edges == KNOWN["and_gate"]().edges
    # Written in float32: what reads another's axis reads it by as much as that rounds.
    check_truth(turned, floor=1e-2, leak=1e-4)


def test_rotations_are_orthogonal_and_depend_on_the_seed():
    turn = rotation(11, 0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(11).double())
    assert torch.equal(turn, rotation(11, 0))
    assert not torch.equal(turn, rotation(11, 1))


def test_root_mean_square_norms_commute_and_others_are_refused():
    known = KNOWN["and_gate"](n_pairs=3)

    def with_norm(norm):
        config = replace(known.config, norm=norm)
        model = LanguageModel(ToyTransformer(config).double(), None, "known:normed", None)
        return replace(known, model=model)

    normed = with_norm("rms")
    turned = rotated(normed, seed=1)
    one, other = (model.logits(known.pairs.clean) for model in (normed.model, turned.model))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="norms subtract the mean"):
        rotated(with_norm("layer"), seed=1)
    normed.module.ln_f.weight[2] = 0.5
    with pytest.raises(ValueError, match="norms weigh the axes differently"):
        rotated(normed, seed=1)
