"""Folding changes nothing but where a number stands: every architecture, normalisation and precision."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from sparsary.sae.formats.canonical import ActivationFn, CanonicalSAE, forward
from sparsary.sae.formats.conversion import from_dictionary, representable, to_dictionary
from sparsary.sae.formats.folding import (
    fold_activation_scale,
    fold_all,
    fold_b_in,
    fold_b_out_in,
    fold_equal_norms,
    fold_norm_into_threshold,
    fold_norms,
    fold_scale_in,
    fold_scale_out,
    fold_whitening,
    norms_of,
)

D, D_OUT, LATENTS, TOKENS = 7, 5, 24, 13
GATES = ("relu", "topk", "topk_raw", "abs_topk", "threshold", "gated", "group_max", "pursuit")
BY_NORM = ("topk", "topk_raw", "abs_topk", "threshold", "group_max")
NORMS = ("none", "scaled", "layer_norm", "constant_norm")
# In float64 nothing can hide behind rounding; that is half of the time, though, and seldom finds what float32 does not.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Weights in bfloat16 are computed with in float32, and folded in it.
COMPUTING = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def neutral(gate, norm="none", dtype=torch.float64, kind="sae", by_norm=False, seed=5):
    """Random weights with norms that differ, an input bias unlike the output's, and scales unlike each other."""
    torch.manual_seed(seed)
    width = D if kind == "sae" else D_OUT
    pursuit = gate == "pursuit"
    tensors = {"W_enc": torch.randn(LATENTS, D), "b_enc": torch.randn(LATENTS), "b_out": torch.randn(width)}
    lengths = 0.3 + torch.rand(LATENTS, 1) * (0.8 if pursuit else 2)
    tensors |= {"W_dec": normalize(torch.randn(LATENTS, width), dim=1) * lengths, "b_in": torch.randn(D)}
    if kind == "transcoder":
        tensors["W_skip"] = torch.randn(width, D)
    extra = {
        "threshold": {"threshold": torch.rand(LATENTS, dtype=dtype) * 2},
        "gated": {"r_mag": torch.randn(LATENTS, dtype=dtype), "b_mag": torch.randn(LATENTS, dtype=dtype)},
        "pursuit": {"k": 4, "residual_norm": 0.8, "stop_on_repeat": True},
    }.get(gate, {"k": 4} if gate != "relu" else {})
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if pursuit:
        tensors |= {"W_enc": None, "b_enc": None, "b_in": tensors["b_out"]}
    scales = {"scale_in": 0.6, "scale_out": 0.6 if pursuit else 1.9} if norm == "scaled" else {}
    row_norm = norm if norm in ("layer_norm", "constant_norm") else None
    return CanonicalSAE(kind, gate=ActivationFn(gate, by_norm=by_norm, **extra), row_norm=row_norm, **tensors, **scales)


def inputs(dtype):
    torch.manual_seed(9)
    return (1.5 * torch.randn(TOKENS, D, dtype=torch.float64) + 1).to(COMPUTING[dtype])


def output(n, x):
    """By the equations; pursuits, which have none, as the dictionary that is built of them."""
    return to_dictionary(n, x.dtype)(x) if n.gate.name == "pursuit" else forward(n, x)[1]


def same(a, b, x):
    torch.testing.assert_close(output(b, x), output(a, x), rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", GATES)
def test_a_built_dictionary_computes_the_equations(gate, norm, dtype):
    """And is taken apart again into a form that computes them too."""
    for kind in ("sae", "transcoder") if gate != "pursuit" else ("sae",):
        n, x = neutral(gate, norm, dtype, kind), inputs(dtype)
        built = to_dictionary(n, x.dtype)
        close = {"rtol": TOLERANCE[x.dtype], "atol": TOLERANCE[x.dtype]}
        if gate != "pursuit":
            torch.testing.assert_close(built(x), forward(n, x)[1], **close)
        torch.testing.assert_close(output(from_dictionary(built), x), built(x), **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("gate", "by_norm"),
    [("relu", False), ("gated", False), ("threshold", False), *((gate, True) for gate in BY_NORM)],
)
def test_folding_norms_changes_nothing(gate, by_norm, norm, dtype):
    n, x = neutral(gate, norm, dtype, by_norm=by_norm), inputs(dtype)
    folded = fold_norms(n)
    same(n, folded, x)
    norms = folded.W_dec.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=1e-6)
    assert not folded.gate.by_norm
    assert folded.done == ("decoder norms folded into the encoder",)


@pytest.mark.parametrize("gate", GATES)
def test_equal_norms_become_one_and_others_stay(gate):
    """Trainers of other libraries keep directions at norm 1, and would change a function whose own have another norm."""
    n, x = neutral(gate), inputs(torch.float64)
    assert fold_equal_norms(n) is n
    n = replace(n, W_dec=normalize(n.W_dec, dim=1) * 0.8)
    folded = fold_equal_norms(n)
    if gate == "pursuit":
        assert folded is n
        return
    same(n, folded, x)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(LATENTS, dtype=torch.float64))
    assert fold_equal_norms(folded) is folded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_folding_norms_into_thresholds_touches_no_matrix(norm, dtype):
    n, x = neutral("threshold", norm, dtype, by_norm=True), inputs(dtype)
    folded = fold_norm_into_threshold(n)
    same(n, folded, x)
    assert folded.W_enc is n.W_enc
    assert folded.W_dec is n.W_dec
    assert not torch.equal(folded.gate.threshold, n.gate.threshold)


def test_a_dead_latent_keeps_its_threshold_s_meaning():
    n, x = neutral("threshold", by_norm=True), inputs(torch.float64)
    n.W_dec[3] = 0
    for theta, fires in ((0.1, False), (-0.1, True)):
        given = replace(n, gate=replace(n.gate, threshold=torch.full((LATENTS,), theta, dtype=torch.float64)))
        found = forward(fold_norm_into_threshold(given), x)[0]
        assert torch.equal(found != 0, forward(given, x)[0] != 0)
        assert bool((found[:, 3] > 0).any()) is fires


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gate", "by_norm", "kind"),
    [
        (gate, by_norm, kind)
        for gate in GATES
        for by_norm in ((False, True) if gate in BY_NORM else (False,))
        for kind in (("sae",) if gate == "pursuit" else ("sae", "transcoder"))
    ],
)
def test_folding_scales_changes_nothing(gate, by_norm, kind, dtype):
    n, x = neutral(gate, "scaled", dtype, kind, by_norm), inputs(dtype)
    inner = fold_scale_in(n)
    assert inner.scale_in == 1.0
    same(n, inner, x)
    if gate != "pursuit":
        outer = fold_scale_out(inner)
        assert not outer.scaled
        same(n, outer, x)
        assert fold_scale_in(outer) is fold_scale_out(outer) is outer
    else:
        assert inner.scale_out == pytest.approx(1.0)
    everything = fold_all(n)
    assert everything.scale_in == 1.0
    same(n, everything, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", [g for g in GATES if g != "pursuit"])
def test_folding_the_input_bias_changes_nothing(gate, norm, dtype):
    for kind in ("sae", "transcoder"):
        n, x = neutral(gate, norm, dtype, kind), inputs(dtype)
        folded = fold_b_in(n)
        same(n, folded, x)
        assert folded.b_in is None
        assert folded.W_enc is n.W_enc
        assert fold_b_in(folded) is folded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("gate", [g for g in GATES if g != "pursuit"])
def test_subtracting_the_output_bias_changes_nothing(gate, subtracted, dtype):
    n, x = neutral(gate, dtype=dtype), inputs(dtype)
    n = n if subtracted else replace(n, b_in=None)
    folded = fold_b_out_in(n)
    same(n, folded, x)
    assert folded.b_in is folded.b_out is n.b_out
    assert folded.W_enc is n.W_enc
    assert fold_b_out_in(folded) is folded


@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("gate", [g for g in GATES if g != "pursuit"])
def test_folding_whitening_changes_nothing(gate, subtracted):
    n, x = neutral(gate), inputs(torch.float64)
    n = n if subtracted else replace(n, b_in=None)
    mean, whiten = torch.randn(D, dtype=torch.float64), torch.randn(D, D, dtype=torch.float64)
    expected = forward(n, (x - mean) @ whiten)[1] @ torch.linalg.inv(whiten) + mean
    torch.testing.assert_close(forward(fold_whitening(n, mean, whiten, torch.linalg.inv(whiten)), x)[1], expected)


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("gate", BY_NORM)
def test_folding_factors_of_latents_scales_what_they_write(gate, by_norm):
    n, x = neutral(gate, by_norm=by_norm), inputs(torch.float64)
    factor = 0.5 + torch.rand(LATENTS, dtype=torch.float64)
    expected = (forward(n, x)[0] * factor) @ n.W_dec + n.b_out
    torch.testing.assert_close(forward(fold_activation_scale(n, factor), x)[1], expected)


@pytest.mark.parametrize("gate", BY_NORM)
def test_what_ranks_by_norm_is_built_so_that_it_does(gate):
    n, x = neutral(gate, by_norm=True), inputs(torch.float64)
    plain = replace(n, gate=replace(n.gate, by_norm=False))
    built = to_dictionary(n, torch.float64)
    torch.testing.assert_close(built(x), forward(n, x)[1])
    # If it did not, this could not be seen.
    assert not torch.allclose(forward(plain, x)[1], forward(n, x)[1])
    assert representable(plain).done == ("input bias folded into the encoder bias",)


def test_folds_that_would_change_something_are_refused():
    for gate in ("topk", "topk_raw", "abs_topk", "group_max", "pursuit"):
        with pytest.raises(ValueError, match=f"fold_norms: {gate} selects other latents"):
            fold_norms(neutral(gate))
    with pytest.raises(ValueError, match="expected thresholds by norm, got relu"):
        fold_norm_into_threshold(neutral("relu"))
    with pytest.raises(ValueError, match="without a per-token normalisation behind it"):
        fold_scale_in(replace(neutral("relu", "layer_norm"), scale_in=2.0))
    with pytest.raises(ValueError, match="without a per-token normalisation to undo"):
        fold_scale_out(replace(neutral("relu", "layer_norm"), scale_out=2.0))
    with pytest.raises(ValueError, match="matching pursuit has no encoder bias"):
        fold_b_in(neutral("pursuit"))
    for wrong in (neutral("relu", "scaled"), neutral("relu", "layer_norm"), neutral("relu", kind="transcoder")):
        with pytest.raises(ValueError, match="fold_b_out_in: expected an autoencoder without scales"):
            fold_b_out_in(wrong)
    with pytest.raises(ValueError, match="the encoder would change too"):
        fold_scale_out(neutral("pursuit", "scaled"))
    with pytest.raises(ValueError, match="expected a plain autoencoder"):
        fold_whitening(neutral("relu", "scaled"), torch.zeros(D), torch.eye(D), torch.eye(D))
    dead = neutral("relu")
    dead.W_dec[0] = 0
    with pytest.raises(ValueError, match="expected nonzero decoder directions"):
        fold_norms(dead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_a_decoder_that_lies_transposed_are_its_norms(dtype):
    W = torch.randn(70, 150).to(dtype).T
    assert not W.is_contiguous()
    torch.testing.assert_close(norms_of(W), norms_of(W.contiguous()), rtol=1e-6, atol=0)
    assert norms_of(W).dtype == torch.promote_types(dtype, torch.float32)


def test_an_atom_of_zero_ranks_as_nothing_by_norm():
    n, x = neutral("topk", by_norm=True), inputs(torch.float64)
    W_dec = n.W_dec.clone()
    W_dec[3] = 0
    n = replace(n, W_dec=W_dec)
    folded = fold_norms(n)
    torch.testing.assert_close(forward(folded, x)[1], forward(n, x)[1])
    with pytest.raises(ValueError, match="expected nonzero decoder directions"):
        fold_norms(replace(n, gate=ActivationFn("relu")))
