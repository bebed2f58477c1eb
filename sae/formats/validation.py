"""Validation of dictionaries read from third-party files: errors for wrong values, warnings for unusual ones."""

import torch
from jaxtyping import Float
from torch import Tensor

from .base import require_shape
from .canonical import CanonicalCrossLayer, CanonicalSAE
from .folding import norm_of, norms_of

# Number of latents whose encoder and decoder directions are compared.
SAMPLE = 512
# Matching encoder and decoder rows point the same way; unrelated ones of width d have cosines of about 1/sqrt(d).
# The orientation counts as swapped if rows look unrelated and those of the transpose clearly do not.
UNRELATED, RELATED = 0.1, 0.3
# Accepted dtypes of weights; narrower ones are not computed with.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# A decoder direction this much shorter than the median one counts as dead.
DEAD = 1e-6


def check(n: CanonicalSAE, where: object) -> list[str]:
    """Validate a dictionary and return its warnings, including the reader's.

    Raises:
        ValueError: For inconsistent shapes, non-finite numbers, a missing k or threshold, a transposed square matrix, and a
            decoder of zeros.
    """
    check_shapes(n, where)
    check_gate(n, where)
    norms = check_numbers(n, where)
    check_orientation(n, where)
    warnings = list(n.warnings)
    dead = int((norms <= DEAD * norms.median()).sum())
    if dead == n.n_latents:
        raise ValueError(
            f"{where}: W_dec: expected nonzero decoder directions, got only zeros. The file was saved before weights "
            "were loaded."
        )
    if dead:
        warnings.append(f"{dead} of {n.n_latents} atoms are zero: these latents write nothing")
    if n.W_enc is not None and n.W_enc.dtype != n.W_dec.dtype:
        warnings.append(f"encoder in {n.W_enc.dtype}, decoder in {n.W_dec.dtype}".replace("torch.", ""))
    return warnings


def check_layers(n: CanonicalCrossLayer, where: object) -> list[str]:
    """Validate every layer of a cross-layer transcoder; errors and warnings name the layer."""
    return [
        w for i, layer in enumerate(n.layers) for w in (f"layer {i}: {text}" for text in check(layer, f"{where}: layer {i}"))
    ]


def check_shapes(n: CanonicalSAE, where: object) -> None:
    """Raise ``ValueError`` unless the shapes of all tensors are consistent."""
    if n.W_dec.ndim != 2 or 0 in n.W_dec.shape:
        raise ValueError(f"{where}: W_dec: expected a matrix of latents by width, got {tuple(n.W_dec.shape)}.")
    latents, width = n.W_dec.shape
    if n.W_enc is not None:
        require_shape(where, "W_enc, its latents first", tuple(n.W_enc.shape), (latents, None))
    d_in = n.d_in
    if n.kind == "sae":
        require_shape(where, "W_enc, its latents first", (latents, d_in), (latents, width))
    for name, tensor, size in (
        ("b_enc", n.b_enc, latents),
        ("b_in", n.b_in, d_in),
        ("r_mag", n.gate.r_mag, latents),
        ("b_mag", n.gate.b_mag, latents),
    ):
        if tensor is not None:
            require_shape(where, name, tuple(tensor.shape), (size,))
    if n.b_out.ndim != 1 or width % n.b_out.shape[0]:
        # A layer of a cross-layer transcoder writes several concatenated outputs.
        require_shape(where, "b_out", tuple(n.b_out.shape), (width,))
    if n.gate.threshold is not None and n.gate.threshold.numel() != 1:
        require_shape(where, "threshold", tuple(n.gate.threshold.shape), (latents,))
    if n.W_skip is not None:
        require_shape(where, "W_skip, outputs first", tuple(n.W_skip.shape), (n.b_out.shape[0], d_in))
    if n.gate.name != "pursuit" and (n.W_enc is None or n.b_enc is None):
        raise ValueError(f"{where}: expected W_enc and b_enc for {n.gate.name}, found none.")


def check_gate(n: CanonicalSAE, where: object) -> None:
    """Raise ``ValueError`` if the activation function lacks k or a threshold, or k or a scale is invalid."""
    gate = n.gate
    if gate.name == "threshold" and gate.threshold is None:
        raise ValueError(f"{where}: threshold: expected one, found none. Give it as threshold=NUMBER, or --threshold NUMBER.")
    if gate.name in ("topk", "topk_raw", "abs_topk", "group_max", "pursuit"):
        if gate.k is None:
            raise ValueError(
                f"{where}: k: expected the number of latents per token, found none. Give it: k=NUMBER, or --k NUMBER."
            )
        if not isinstance(gate.k, int) or isinstance(gate.k, bool) or gate.k < 1:
            raise ValueError(f"{where}: k: expected a whole number from 1, got {gate.k!r}. Give it: k=NUMBER, or --k NUMBER.")
        if gate.name != "pursuit" and gate.k > n.n_latents:
            raise ValueError(f"{where}: k: expected at most the {n.n_latents} latents there are, got {gate.k}.")
    for name, scale in (("scale_in", n.scale_in), ("scale_out", n.scale_out)):
        if not 0 < scale < float("inf"):
            raise ValueError(f"{where}: {name}: expected a number above 0, got {scale}.")


def check_numbers(n: CanonicalSAE, where: object) -> Float[Tensor, " n_latents"]:
    """Raise ``ValueError`` if a tensor is not floating-point or not finite; return the decoder norms, computed on the way."""
    named = {"W_dec": n.W_dec, "W_enc": n.W_enc, "W_skip": n.W_skip, "b_enc": n.b_enc, "b_in": n.b_in, "b_out": n.b_out}
    named |= {"threshold": n.gate.threshold, "r_mag": n.gate.r_mag, "b_mag": n.gate.b_mag}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{where}: {name}: expected floating-point numbers, got {tensor.dtype}.")
    norms = norms_of(n.W_dec)
    if not bool(torch.isfinite(norms).all()):
        _require_finite(where, "W_dec", n.W_dec)
    for name, tensor in list(named.items())[1:]:
        # The norm needs one pass and no copy, and is finite only if all numbers are; if it overflows, check each number.
        if tensor is not None and not bool(torch.isfinite(norm_of(tensor))):
            _require_finite(where, name, tensor)
    return norms


def _require_finite(where: object, name: str, tensor: Tensor) -> None:
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(f"{where}: {name}: expected finite numbers, got {float(tensor[tuple(place)])} at {place}.")


def check_orientation(n: CanonicalSAE, where: object) -> None:
    """Raise ``ValueError`` if a square matrix appears to be transposed; for other matrices the shape shows it.

    In a trained autoencoder, a latent's encoder and decoder directions are similar. The check does not apply to transcoders,
    whose encoder and decoder live in different spaces.
    """
    if n.kind != "sae" or n.W_enc is None or n.W_enc.shape[0] != n.W_enc.shape[1]:
        return
    as_read, swapped = _cosine(n.W_enc, n.W_dec), _cosine(n.W_enc.T, n.W_dec)
    if as_read < UNRELATED and swapped > RELATED:
        raise ValueError(
            f"{where}: W_enc and W_dec: swapped orientation: the mean cosine of their rows is {as_read:.3f}, but {swapped:.3f} "
            "if one of them is transposed. Transpose W_enc or W_dec in the file."
        )


def _cosine(W_enc: Float[Tensor, "n d"], W_dec: Float[Tensor, "n d"]) -> float:
    """Return the mean cosine similarity of the first ``SAMPLE`` rows."""
    some = (W_enc[:SAMPLE].float(), W_dec[:SAMPLE].float())
    return float(torch.nn.functional.cosine_similarity(*some, dim=1).mean())
