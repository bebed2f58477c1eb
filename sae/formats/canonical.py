"""Canonical representation of a dictionary, between the formats of other libraries and native dictionaries.

    x' = row_norm(scale_in x)               per token; both are optional
    p  = W_enc (x' - b_in) + b_enc          pre-activations
    a  = gate(p)
    y' = W_dec^T a + b_out                  per-token normalization is undone here for SAEs, not for transcoders
    y  = y' / scale_out + W_skip x          the skip path reads the raw input

Row ``i`` of ``W_enc`` and ``W_dec`` is latent ``i``. Readers transpose with views and copy nothing: tensors keep the file's
dtype and stay memory-mapped until a dictionary is built from them.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..row_norm import ROW_NORMS

KINDS = ("sae", "transcoder")
# Activation functions of the pre-activations p.
#   relu       p where it is positive
#   topk       the k largest of a token, then the positive ones of them
#   topk_raw   the k largest of a token, including negative ones
#   abs_topk   the k largest by absolute value, with their signs
#   threshold  p where it exceeds both the latent's threshold and zero
#   gated      relu(exp(r_mag) (p - b_enc) + b_mag) where p is positive
#   group_max  the largest of each of k groups of consecutive latents, if it is positive
#   pursuit    at most k steps of matching pursuit (`encoders/residual_pursuit.py`, `encoders/matching_pursuit.py`)
ACTIVATION_FNS = ("relu", "topk", "topk_raw", "abs_topk", "threshold", "gated", "group_max", "pursuit")
# Activation functions that rank or threshold p, so that weighting p by the decoder norm can change the selected latents.
COMPARING = ("topk", "topk_raw", "abs_topk", "threshold", "group_max")


@dataclass(frozen=True)
class ActivationFn:
    """Activation function of a dictionary: one of ``ACTIVATION_FNS`` and its parameters.

    With ``by_norm``, p times the decoder norm is ranked or compared with the threshold; the activation is still p. Pursuit
    stops for a token when the residual's norm is below ``residual_norm`` or below ``tolerance`` times the input's norm, or,
    with ``stop_on_repeat``, when a step adds no new latent.
    """

    name: str
    # As read from the file; validation.py requires an int.
    k: Any = None
    threshold: Tensor | None = None
    by_norm: bool = False
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    residual_norm: int | float = 0.0
    tolerance: int | float = 0.0
    stop_on_repeat: bool = False

    def __post_init__(self) -> None:
        assert self.name in ACTIVATION_FNS, self.name


@dataclass(frozen=True)
class CanonicalSAE:
    """One SAE or transcoder, with the forward pass given in the module docstring.

    ``W_enc (n_latents, d_in)``, ``b_enc (n_latents,)``, ``W_dec (n_latents, d_out)``, ``b_out (d_out,)``, ``b_in (d_in,)``,
    ``W_skip (d_out, d_in)``. The annotations carry no shapes because readers fill in unchecked tensors; ``validation.py``
    enforces these shapes afterwards.

    ``W_enc`` is ``None`` if the encoder is tied to the decoder. ``provenance`` has the form used in native checkpoints:
    ``model``, ``hooks_in``, ``hooks_out`` (module paths with a side), ``text`` (context length, BOS), and the complete
    third-party configuration under ``source``. ``done`` lists what was renamed, transposed, and folded, ``evidence`` says how
    the format was recognized, ``warnings`` lists the reader's doubts.
    """

    kind: str
    W_enc: Tensor | None
    b_enc: Tensor | None
    W_dec: Tensor
    b_out: Tensor
    gate: ActivationFn
    b_in: Tensor | None = None
    scale_in: int | float = 1.0
    scale_out: int | float = 1.0
    row_norm: str | None = None
    W_skip: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    evidence: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def n_latents(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_in(self) -> int:
        return self.d_out if self.W_enc is None else self.W_enc.shape[1]

    @property
    def scaled(self) -> bool:
        """True if a fixed input or output scale is not folded into the weights."""
        return self.scale_in != 1.0 or self.scale_out != 1.0

    def noting(self, *words: str, **changes: Any) -> "CanonicalSAE":
        """Return a copy with fields changed and descriptions of the changes appended to ``done``."""
        return replace(self, done=(*self.done, *words), **changes)


@dataclass(frozen=True)
class CanonicalCrossLayer:
    """Cross-layer transcoder: one ``CanonicalSAE`` per layer, in order of layers.

    Layer ``l`` reads its own input. Its ``W_dec`` ``(n_latents, (n_layers - l) d_out)`` is the concatenation of the decoders
    to layers ``l, l+1, ...``; its ``b_out`` ``(d_out,)``, ``scale_out``, and ``W_skip`` apply to the output of layer ``l``.
    ``provenance``, ``done``, ``evidence``, and ``warnings`` refer to the whole transcoder.
    """

    layers: tuple[CanonicalSAE, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    evidence: str = ""
    warnings: tuple[str, ...] = ()
    kind: str = "cross_layer_transcoder"

    def noting(self, *words: str, **changes: Any) -> "CanonicalCrossLayer":
        """Return a copy with fields changed and descriptions of the changes appended to ``done``."""
        return replace(self, done=(*self.done, *words), **changes)


@dataclass(frozen=True)
class CanonicalCrosscoder:
    """Crosscoder: ``whole`` is one dictionary of the concatenated sites, in units in which site ``s`` is ``scales[s] x^s``.

    ``widths`` are those of the sites. ``provenance``, ``done``, ``evidence``, and ``warnings`` refer to the crosscoder.
    """

    whole: CanonicalSAE
    widths: tuple[int, ...]
    scales: tuple[float, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    evidence: str = ""
    warnings: tuple[str, ...] = ()
    kind: str = "crosscoder"

    def noting(self, *words: str, **changes: Any) -> "CanonicalCrosscoder":
        """Return a copy with fields changed and descriptions of the changes appended to ``done``."""
        return replace(self, done=(*self.done, *words), **changes)


@torch.no_grad()
def forward(
    n: CanonicalSAE, x: Float[Tensor, "tokens d_in"]
) -> tuple[Float[Tensor, "tokens n_latents"], Float[Tensor, "tokens d_out"]]:
    """Compute dense activations and the output: the reference implementation that folds and converted dictionaries must match.

    Everything is computed in the dtype of ``x``, whatever the dtype of the weights.

    Raises:
        ValueError: For pursuit encoders, which have no pre-activations.
    """
    if n.W_enc is None or n.b_enc is None:
        raise ValueError(
            "forward: expected a gate with pre-activations, got a pursuit. Build the dictionary and call its encode."
        )
    n = widened(n, x.dtype)
    W_enc, b_enc = n.W_enc, n.b_enc
    assert W_enc is not None
    assert b_enc is not None
    seen, scale, mean = n.scale_in * x, torch.ones(()), torch.zeros(())
    if n.row_norm is not None:
        seen, scale, mean = ROW_NORMS[n.row_norm](seen)
    p = (seen if n.b_in is None else seen - n.b_in) @ W_enc.T + b_enc
    acts = _activations(n.gate, p, b_enc, n.W_dec.norm(dim=1))
    y = acts @ n.W_dec + n.b_out
    if n.kind == "sae":
        y = y * scale + mean
    y = y / n.scale_out
    return acts, y if n.W_skip is None else y + x @ n.W_skip.T


def widened(n: CanonicalSAE, dtype: torch.dtype) -> CanonicalSAE:
    """Return a copy with all tensors cast to ``dtype``."""

    def cast(thing: Any) -> dict[str, Tensor]:
        return {name: value.to(dtype) for name, value in vars(thing).items() if isinstance(value, Tensor)}

    return replace(n, gate=replace(n.gate, **cast(n.gate)), **cast(n))


def _activations(
    gate: ActivationFn,
    p: Float[Tensor, "tokens n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    norms: Float[Tensor, " n_latents"],
) -> Float[Tensor, "tokens n_latents"]:
    seen = p * norms if gate.by_norm else p
    if gate.name == "relu":
        return p.relu()
    if gate.name == "threshold":
        assert gate.threshold is not None
        return p.relu() * (seen > gate.threshold)
    if gate.name == "gated":
        assert gate.r_mag is not None
        assert gate.b_mag is not None
        return (gate.r_mag.exp() * (p - b_enc) + gate.b_mag).relu() * (p > 0)
    k = gate.k or 0
    if gate.name == "group_max":
        best = seen.view(len(p), k, -1).argmax(dim=-1) + torch.arange(k) * (p.shape[1] // k)
        return torch.zeros_like(p).scatter_(1, best, p.relu().gather(1, best))
    best = (seen.abs() if gate.name == "abs_topk" else seen).topk(k, dim=-1).indices
    values = p.gather(1, best)
    return torch.zeros_like(p).scatter_(1, best, values.relu() if gate.name == "topk" else values)
