"""Rule by which attention scores follow from what a block's heads read: linear maps by position, scaling, soft cap.

``score = scaling * q @ k`` with ``q = rotation(q_norm(W_Q x + b_Q))`` and keys alike; the pattern is the softmax over the
visible positions of the score or, with a soft cap c, of ``c * tanh(score / c)``. With the recorded denominators of the head's
norms, queries and keys are linear in the attention input.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .architecture import Architecture, Norm, Trace


class HeadReader(NamedTuple):
    """Queries or keys of one head at one position as a linear function of its input: ``matrix @ x + constant``."""

    matrix: Float[Tensor, "d_head d_model"]
    constant: Float[Tensor, " d_head"]


@dataclass(frozen=True)
class AttentionRule:
    """Scores of one block on one recorded context. ``rotations`` are those of rotary position embeddings, if there are any."""

    anatomy: Architecture
    trace: Trace
    layer: int
    scaling: float
    cap: float | None
    rotations: Float[Tensor, "positions d_head d_head"] | None

    @torch.no_grad()
    def reader(self, side: str, head: int, position: int) -> HeadReader:
        """Return the head's queries (``side`` q) or keys (k) at a position, as a function of the attention input there."""
        weights = self.anatomy.layers[self.layer]
        matrix, constant = {"q": (weights.W_Q, weights.b_Q), "k": (weights.W_K, weights.b_K)}[side]
        matrix, constant = matrix[head], constant[head]
        norm = weights.q_norm if side == "q" else weights.k_norm
        if norm is not None:
            x = self.trace.layers[self.layer].attention_in[0, position]
            matrix, constant = _normed(norm, matrix, constant, norm.scale(matrix @ x + constant))
        if self.rotations is not None:
            matrix, constant = self.rotations[position] @ matrix, self.rotations[position] @ constant
        return HeadReader(matrix, constant)

    @torch.no_grad()
    def scores(self, head: int, query: int) -> Float[Tensor, " positions"]:
        """Return the head's scores, before the cap, from one position to all positions; masked ones have a score too."""
        x = self.trace.layers[self.layer].attention_in[0]
        reader = self.reader("q", head, query)
        q = reader.matrix @ x[query] + reader.constant
        keys = [self.reader("k", head, position) for position in range(len(x))]
        return self.scaling * torch.stack([(key.matrix @ x[at] + key.constant) @ q for at, key in enumerate(keys)])

    def capped(self, scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return scores after the soft cap, if there is one."""
        return scores if self.cap is None else self.cap * (scores / self.cap).tanh()


def attention_rule(anatomy: Architecture, trace: Trace, layer: int) -> AttentionRule:
    """Return how the scores of one block follow from its input, on the first context of a trace."""
    path = anatomy.blocks[layer].attention
    assert path is not None
    attention: Any = anatomy.model.module.get_submodule(path)
    scaling = float(getattr(attention, "scaling", anatomy.d_head**-0.5))
    # Gemma 3 has the attribute, but does not use it.
    capped = getattr(anatomy.model.module.config, "model_type", None) == "gemma2"
    cap = getattr(attention, "attn_logit_softcapping", None) if capped else None
    rotations = _rotations(anatomy, attention, trace.layers[layer].attention_in[:1])
    return AttentionRule(anatomy, trace, layer, scaling, cap, rotations)


def _normed(norm: Norm, matrix: Tensor, constant: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a linear map followed by a norm over its output with a fixed denominator."""
    columns = norm.centre(matrix.T) / scale * norm.weight
    return columns.T, norm.centre(constant) / scale * norm.weight + norm.bias


@torch.no_grad()
def _rotations(anatomy: Architecture, attention: Any, x: Tensor) -> Tensor | None:
    """Return the matrix by which rotary embeddings multiply queries and keys at each position, from the model's own module."""
    rotary = next((part for name, part in anatomy.model.module.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return None
    positions = torch.arange(x.shape[1], device=x.device)[None]
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    cos, sin = rotary(x, positions, attention.layer_type) if typed else rotary(x, positions)
    width = cos.shape[-1]
    # Columns of the matrix are what unit vectors become; only the first dimensions may be rotated (GPT-NeoX).
    eye = torch.eye(anatomy.d_head, dtype=x.dtype, device=x.device)
    half = torch.cat([-eye[:, width // 2 : width], eye[:, : width // 2]], -1)
    turned = eye[:, :width] * cos[0, :, None] + half * sin[0, :, None]
    rest = eye[:, width:].expand(x.shape[1], -1, -1)
    return torch.cat([turned, rest], -1).transpose(1, 2)
