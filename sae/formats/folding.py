"""Folding of scales, biases, and norms into the weights, without changing the dictionary's output.

Each fold is pure: it takes a ``CanonicalSAE`` and returns another with the same output, and lists in ``done`` what was folded.
Only what native dictionaries cannot represent is folded. Formats differ in the units of thresholds; here
``ActivationFn.threshold`` is compared with ``p``, or with ``p`` times the decoder norm if ``by_norm`` is set, and every fold
must rely on this alone. Folds of half-precision weights return float32: rounding again would change the function.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from .canonical import COMPARING, CanonicalCrossLayer, CanonicalSAE


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Number of rows squared at once.
COLUMN_ROWS = 64
# Relative tolerance for equal norms: differences within float32 rounding.
EQUAL = 1e-6


def norms_of(W_dec: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, " n_latents"]:
    """Return the decoder norms in float32 or wider, without a copy of the matrix."""
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    if W_dec.is_contiguous() or not W_dec.T.is_contiguous():
        return torch.linalg.vector_norm(W_dec, dim=1, dtype=dtype)
    # A decoder that is transposed in its file is summed along its columns: 9 ms instead of 175 for 16k x 2304.
    squares = W_dec.new_zeros(len(W_dec), dtype=dtype)
    for rows in W_dec.T.split(COLUMN_ROWS):
        squares += rows.to(dtype).square().sum(0)
    return squares.sqrt()


def equal_norms(W_dec: Float[Tensor, "n_latents d_out"], tolerance: float = EQUAL) -> bool:
    """Return True if all decoder norms are equal and positive, so that ranking by norm changes nothing."""
    least, most = norms_of(W_dec).aminmax()
    return bool(least > 0) and bool(most / least - 1 < tolerance)


def norm_of(tensor: Tensor) -> Float[Tensor, ""]:
    """Return the norm of a whole tensor in float32 or wider, without a copy."""
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def fold_norms(n: CanonicalSAE) -> CanonicalSAE:
    """Normalize decoder directions to norm 1 and fold the norms into the encoder; activations are multiplied by the norms.

    The same latents fire, provided the activation function compares by norm or each latent with its own threshold.

    Raises:
        ValueError: For activation functions that rank unweighted pre-activations, whose ranking would change, for pursuits,
            and for decoder directions of zero without ``by_norm``.
    """
    if n.gate.name == "pursuit" or (n.gate.name in COMPARING and n.gate.name != "threshold" and not n.gate.by_norm):
        raise ValueError(
            f"fold_norms: {n.gate.name} selects other latents after decoder directions are scaled to unit norm. Keep the norms."
        )
    assert n.W_enc is not None
    assert n.b_enc is not None
    norms = norms_of(n.W_dec)
    # With by_norm, a latent with a zero decoder direction ranks as zero: its encoder row becomes zero too.
    dead = norms == 0
    if bool(dead.any()) and not n.gate.by_norm:
        raise ValueError("fold_norms: expected nonzero decoder directions, got zeros. They cannot be scaled to unit norm.")
    gate = n.gate
    if gate.threshold is not None and not gate.by_norm:
        gate = replace(gate, threshold=gate.threshold * norms)
    if gate.b_mag is not None:
        gate = replace(gate, b_mag=gate.b_mag * norms)
    return n.noting(
        "decoder norms folded into the encoder",
        W_enc=n.W_enc * norms[:, None],
        b_enc=n.b_enc * norms,
        W_dec=n.W_dec / norms.where(~dead, 1)[:, None],
        gate=replace(gate, by_norm=False),
    )


def fold_equal_norms(n: CanonicalSAE) -> CanonicalSAE:
    """Normalize decoder directions if their norms are all equal, which changes no ranking; return others as they are.

    Trainers of other libraries keep directions at norm 1: those of another norm would change the function at their first step.
    """
    if n.W_enc is None or n.b_enc is None or not equal_norms(n.W_dec):
        return n
    # One factor for all, so that a threshold that all latents share stays one.
    norm = norms_of(n.W_dec).mean()
    if float((norm - 1).abs()) < EQUAL:
        return n
    gate = n.gate
    if gate.threshold is not None and not gate.by_norm:
        gate = replace(gate, threshold=gate.threshold * norm)
    if gate.b_mag is not None:
        gate = replace(gate, b_mag=gate.b_mag * norm)
    weights = {"W_enc": n.W_enc * norm, "b_enc": n.b_enc * norm, "W_dec": n.W_dec / norm}
    return n.noting("decoder norm folded into the encoder", gate=gate, **weights)


def fold_norm_into_threshold(n: CanonicalSAE) -> CanonicalSAE:
    """Convert thresholds on norm-weighted pre-activations to unweighted ones: ``p n_i > theta`` is ``p > theta / n_i``.

    No matrix is changed. Latents with a zero decoder direction have no effect on the output but fire as before.
    """
    if n.gate.name != "threshold" or not n.gate.by_norm:
        raise ValueError(f"fold_norm_into_threshold: expected thresholds by norm, got {n.gate.name}.")
    assert n.gate.threshold is not None
    norms = norms_of(n.W_dec)
    theta = n.gate.threshold.to(norms.dtype).expand_as(norms)
    # With norm 0 the comparison is 0 > theta, the same for every p.
    limit = torch.where(norms > 0, theta / norms, torch.where(theta < 0, -torch.inf, torch.inf))
    limit = limit.nan_to_num(posinf=torch.finfo(limit.dtype).max, neginf=torch.finfo(limit.dtype).min)
    return n.noting(
        "thresholds on norm-weighted pre-activations divided by the norms", gate=replace(n.gate, threshold=limit, by_norm=False)
    )


def fold_scale_in(n: CanonicalSAE) -> CanonicalSAE:
    """Fold the fixed input scale into the weights.

    ``W_enc`` is multiplied by the scale, so pre-activations and thresholds keep their units. A pursuit's encoder is its
    decoder, which must stay: its activations are divided by the scale instead, and ``scale_out`` with them.
    """
    s = n.scale_in
    if s == 1.0:
        return n
    note = f"input scale {s:.6g} folded"
    if n.row_norm is not None:
        # Both norms remove a scale except for the epsilon in layer_norm, so dropping it would not be exact.
        raise ValueError("fold_scale_in: expected a fixed scale without a per-token normalisation behind it, got both.")
    b_in = None if n.b_in is None else wide(n.b_in) / s
    if n.gate.name != "pursuit":
        assert n.W_enc is not None
        return n.noting(note, W_enc=wide(n.W_enc) * s, b_in=b_in, scale_in=1.0)
    if n.W_enc is not None or n.kind != "sae":
        raise ValueError("fold_scale_in: expected a matching-pursuit autoencoder, got a transcoder.")
    gate = replace(n.gate, residual_norm=n.gate.residual_norm / s)
    # The codes are divided by s, so scale_out must be too.
    return n.noting(note, b_in=b_in, b_out=wide(n.b_out) / s, gate=gate, scale_in=1.0, scale_out=n.scale_out / s)


def fold_scale_out(n: CanonicalSAE) -> CanonicalSAE:
    """Fold the fixed output scale into the decoder and output bias; thresholds by norm are rescaled to match."""
    s = n.scale_out
    if s == 1.0:
        return n
    if n.row_norm is not None and n.kind == "sae":
        raise ValueError("fold_scale_out: expected a fixed scale without a per-token normalisation to undo, got both.")
    if n.gate.name == "pursuit":
        raise ValueError(
            "fold_scale_out: the encoder and decoder of matching pursuit are tied, so the encoder would change too."
        )
    gate = n.gate
    if gate.by_norm and gate.threshold is not None:
        # Decoder norms are divided by s, so norm-weighted pre-activations are too.
        gate = replace(gate, threshold=wide(gate.threshold) / s)
    return n.noting(f"output scale {s:.6g} folded", W_dec=wide(n.W_dec) / s, b_out=wide(n.b_out) / s, gate=gate, scale_out=1.0)


def fold_b_in(n: CanonicalSAE) -> CanonicalSAE:
    """Fold the input bias into ``b_enc``; no matrix is changed.

    Raises:
        ValueError: For pursuits with a nonzero input bias, which have no ``b_enc``.
    """
    if n.b_in is None:
        return n
    if n.W_enc is None or n.b_enc is None:
        if not bool(n.b_in.any()):
            return n.noting("input bias of zero dropped", b_in=None)
        raise ValueError("fold_b_in: matching pursuit has no encoder bias to fold an input bias into.")
    return _recentred(n, -wide(n.b_in)).noting("input bias folded into the encoder bias", b_in=None)


def fold_b_out_in(n: CanonicalSAE) -> CanonicalSAE:
    """Make the output bias the input bias too and correct ``b_enc``: for formats that store a single bias.

    Raises:
        ValueError: For transcoders, whose inputs and outputs are different spaces, for pursuits, and for scaled or normalized
            inputs.
    """
    if n.kind != "sae" or n.scaled or n.row_norm is not None:
        raise ValueError("fold_b_out_in: expected an autoencoder without scales, got one with, or a transcoder.")
    if n.b_in is not None and torch.equal(n.b_in, n.b_out):
        return n
    n = fold_b_in(n)
    return _recentred(n, wide(n.b_out)).noting(
        "output bias subtracted from the input too, the encoder bias made up", b_in=n.b_out
    )


def _recentred(n: CanonicalSAE, shift: Float[Tensor, " d_in"]) -> CanonicalSAE:
    """Return a copy whose encoder biases act as if its input were ``x + shift``."""
    if n.W_enc is None or n.b_enc is None:
        raise ValueError("fold: matching pursuit has no encoder bias to fold an input bias into.")
    b_enc, gate = wide(n.b_enc) + wide(n.W_enc) @ shift, n.gate
    # Gated magnitudes use W_enc x' without b_enc. Part of x' now moves into b_enc, so b_mag must compensate.
    if gate.name == "gated":
        assert gate.r_mag is not None
        assert gate.b_mag is not None
        gate = replace(gate, b_mag=wide(gate.b_mag) + wide(gate.r_mag).exp() * (b_enc - n.b_enc))
    return replace(n, b_enc=b_enc, gate=gate)


def fold_whitening(
    n: CanonicalSAE, mean: Float[Tensor, " d"], whiten: Float[Tensor, "d d"], unwhiten: Float[Tensor, "d d"]
) -> CanonicalSAE:
    """Fold an affine whitening into an SAE trained on ``(x - mean) @ whiten``.

    Raises:
        ValueError: For pursuits, transcoders, activation functions by norm, and dictionaries with a scale or row norm.
    """
    if n.kind != "sae" or n.W_enc is None or n.b_enc is None or n.scaled or n.row_norm is not None or n.gate.by_norm:
        raise ValueError("fold_whitening: expected a plain autoencoder with an encoder of its own.")
    dtype = torch.promote_types(n.W_enc.dtype, whiten.dtype)
    mean, whiten, unwhiten = mean.to(dtype), whiten.to(dtype), unwhiten.to(dtype)
    b_out = n.b_out.to(dtype) @ unwhiten + mean
    # The encoder sees (x - mean) whiten - b_in, which is (x - mean - b_in unwhiten) whiten.
    b_in = mean if n.b_in is None else n.b_in.to(dtype) @ unwhiten + mean
    return n.noting(
        "covariance whitening folded",
        W_enc=n.W_enc.to(dtype) @ whiten.T,
        W_dec=n.W_dec.to(dtype) @ unwhiten,
        b_in=b_in,
        b_out=b_out,
    )


def fold_activation_scale(n: CanonicalSAE, factor: Float[Tensor, " n_latents"]) -> CanonicalSAE:
    """Fold a per-latent factor, applied to activations before decoding, into the decoder.

    The factor applies after latents are selected. Comparisons by norm are folded first, with the original norms.
    """
    if n.gate.by_norm:
        n = fold_norm_into_threshold(n) if n.gate.name == "threshold" else fold_norms(n)
    return n.noting("per-latent scaling factors folded into the atoms", W_dec=wide(n.W_dec) * factor[:, None])


def fold_all(n: CanonicalSAE) -> CanonicalSAE:
    """Fold scales and norm-weighted thresholds into the weights, for formats that store weights only."""
    if n.gate.name == "threshold" and n.gate.by_norm:
        n = fold_norm_into_threshold(n)
    n = fold_scale_in(n)
    return n if n.scale_out == 1.0 else fold_scale_out(n)


def fold_layers(n: CanonicalCrossLayer) -> CanonicalCrossLayer:
    """Fold all scales and input biases of a cross-layer transcoder into its weights.

    Every decoder that writes to a layer, whatever its source layer, is divided by that layer's output scale.

    Raises:
        ValueError: For per-token normalization, which weights cannot represent.
    """
    if any(layer.row_norm is not None for layer in n.layers):
        raise ValueError("fold_layers: expected layers without per-token normalisation, got one with.")
    folded = []
    for i, layer in enumerate(n.layers):
        if layer.gate.by_norm:
            # Before the scales change the norms.
            layer = fold_norm_into_threshold(layer) if layer.gate.name == "threshold" else fold_norms(layer)
        layer = fold_b_in(fold_scale_in(layer))
        scales = [later.scale_out for later in n.layers[i:]]
        if any(scale != 1.0 for scale in scales):
            each = torch.tensor(scales, dtype=wide(layer.W_dec).dtype).repeat_interleave(layer.b_out.shape[0])
            W_dec, b_out = wide(layer.W_dec) / each, wide(layer.b_out) / layer.scale_out
            layer = layer.noting("output scales folded", W_dec=W_dec, b_out=b_out, scale_out=1.0)
        folded.append(layer)
    words = dict.fromkeys(word for layer in folded for word in layer.done)
    return n.noting(*words, layers=tuple(folded))
