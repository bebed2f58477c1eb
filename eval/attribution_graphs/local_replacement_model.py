"""Local replacement model of one prompt: linear in embeddings, active latents and errors.

Frozen at their values on this prompt: attention patterns, norm denominators, the set of active latents, and the errors (MLP
outputs minus their reconstructions). A latent's pre-activation and a logit are then sums over everything written before
them. At excluded positions the whole MLP output is a constant. Norms after attention and MLP (Gemma 2 and 3) are divisions by
frozen denominators like all others; soft caps on attention scores are part of the frozen patterns; a soft cap on logits is left
out: logits here are those before it.

circuit-tracer 0.5.0 differs in two ways. For models with learned positions (GPT-2), its token nodes hold the token embedding
only, and the position embedding is part of the constant; here a token node is the initial residual stream. For transcoders
with a skip path, it lets influence pass through the skip at position 0 too, where the MLP output is frozen; here none does.

Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...training.activations.architecture import Architecture, Norm
from .replacement_model import Replacement


@dataclass(frozen=True)
class Active:
    """Active latents, ordered by layer, position and index."""

    layers: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    pre_acts: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.layers.shape[0]

    def where(self, chosen: Tensor) -> "Active":
        """Return a subset, by mask or by ascending index."""
        return Active(*(part[chosen] for part in (self.layers, self.positions, self.latents, self.values, self.pre_acts)))

    def groups(self) -> Iterator[tuple[int, int, slice]]:
        """Yield layer, position and slice of each run of latents that share both."""
        if not len(self):
            return
        keys, counts = torch.stack([self.layers, self.positions]).unique_consecutive(dim=1, return_counts=True)
        start = 0
        for (layer, position), count in zip(keys.T.tolist(), counts.tolist(), strict=True):
            yield layer, position, slice(start, start + count)
            start += count


class Slopes(NamedTuple):
    """Gradients of targets with respect to the initial residual stream, and the targets' constant parts."""

    embeddings: Float[Tensor, "targets positions d_model"]
    constants: Float[Tensor, " targets"]


# Called with a layer, and the gradients of targets with respect to what its transcoder replaces: (targets, positions, d_model).
LayerVisitor = Callable[[int, Tensor], None]


class FrozenNorm(NamedTuple):
    """The linear part of a norm with fixed denominators, one per position."""

    norm: Norm
    scale: Float[Tensor, " positions"]

    def carry(self, x: Float[Tensor, "... positions d_model"]) -> Float[Tensor, "... positions d_model"]:
        """Return what the norm makes of ``x``, without its bias."""
        return self.norm.centre(x) / self.scale[:, None] * self.norm.weight

    def pull(self, grad: Float[Tensor, "... positions d_model"]) -> Float[Tensor, "... positions d_model"]:
        """Return the gradient with respect to the norm's input."""
        return self.norm.fold(grad) / self.scale[:, None]


class Replayed(NamedTuple):
    """Pre-activations of the active latents, and the input of the unembedding at the last position."""

    pre_acts: Float[Tensor, "runs n"]
    last: Float[Tensor, "runs d_model"]


class LocalReplacement:
    """The local replacement model of ``token_ids``.

    ``errors[l]`` is the part of the MLP output that latents do not explain, ``fixed[l]`` its constant part; without a
    transcoder, the whole output is error. The MLP output is what the layer's transcoder replaces, before or after the norm
    that follows the MLP. The first ``exclude_leading`` positions have neither latents nor errors.

    Raises:
        ValueError: If the prompt is empty, longer than the model's context, or has no position beyond ``exclude_leading``.
    """

    @torch.no_grad()
    def __init__(self, replacement: Replacement, token_ids: Int[Tensor, " positions"], exclude_leading: int = 0):
        _require_prompt(replacement.anatomy, token_ids, exclude_leading)
        self.replacement, self.anatomy, self.token_ids = replacement, replacement.anatomy, token_ids
        self.exclude_leading = exclude_leading
        self.trace = self.anatomy.trace(token_ids[None])
        self.codes = {layer: replacement.encode(layer, self._mlp_in(layer)) for layer in replacement.layers}
        self.active = self._active()
        self.skips: dict[int, Tensor] = {}
        parts = [self._error_and_fixed(layer) for layer in range(self.anatomy.n_layers)]
        self.errors, self.fixed = torch.stack([error for error, _ in parts]), torch.stack([fixed for _, fixed in parts])
        self._attention_biases = [self._attention_bias(layer) for layer in range(self.anatomy.n_layers)]

    @property
    def embeddings(self) -> Float[Tensor, "positions d_model"]:
        """Initial residual stream: token embeddings, plus position embeddings if there are any."""
        return self.trace.layers[0].pre[0]

    def mlp_out(self, layer: int) -> Float[Tensor, "positions d_model"]:
        """Return the tensor on this prompt that the layer's transcoder replaces: before or after the norm that follows."""
        at = self.trace.layers[layer]
        return (at.mlp_written if self.replacement.after_norm(layer) else at.mlp_out)[0]

    def attention_post_norm(self, layer: int) -> FrozenNorm | None:
        """Return the norm between the attention output and the stream, if there is one."""
        norm, scale = self.anatomy.layers[layer].attention_post_norm, self.trace.layers[layer].attention_post_scale
        return None if norm is None or scale is None else FrozenNorm(norm, scale[0])

    def mlp_post_norm(self, layer: int) -> FrozenNorm | None:
        """Return the norm between ``mlp_out`` and the stream, if there is one."""
        norm, scale = self.anatomy.layers[layer].mlp_post_norm, self.trace.layers[layer].mlp_post_scale
        return None if norm is None or scale is None or self.replacement.after_norm(layer) else FrozenNorm(norm, scale[0])

    def latent_slopes(self, active: Active, visit: LayerVisitor) -> Slopes:
        """Return the gradients of latents' pre-activations; ``visit`` gets those with respect to each layer's MLP output."""
        vectors, own = self.readers(active)
        slopes = self.slopes(active.layers, active.positions, vectors, visit)
        return slopes._replace(constants=slopes.constants + own)

    @torch.no_grad()
    def slopes(
        self,
        layers: Int[Tensor, " targets"],
        positions: Int[Tensor, " targets"],
        vectors: Float[Tensor, "targets d_model"],
        visit: LayerVisitor,
        at_attention: bool = False,
    ) -> Slopes:
        """Return the gradients of ``vectors @ x``, where ``x`` is the MLP input of a layer at a position.

        Layer ``n_layers`` stands for the input of the unembedding. With ``at_attention``, ``x`` is the attention input of the
        layer instead. ``visit`` is called from the last layer to the first; gradients of one layer only are held at a time.
        """
        anatomy, n = self.anatomy, self.anatomy.n_layers
        grad = vectors.new_zeros(len(vectors), len(self.token_ids), anatomy.d_model)
        constants = vectors.new_zeros(len(vectors))

        def behind(norm: Norm, scale: Tensor, readers: Tensor) -> Tensor:
            """Return gradients before a norm from those after it, and add its bias to the constants."""
            constants.add_(readers.sum(1) @ norm.bias)
            return FrozenNorm(norm, scale).pull(readers)

        def post(norm: FrozenNorm | None, after: Tensor) -> Tensor:
            return after if norm is None else behind(norm.norm, norm.scale, after)

        def readers_at(layer: int) -> Tensor:
            chosen = (layers == layer).nonzero()[:, 0]
            return torch.zeros_like(grad).index_put_((chosen, positions[chosen]), vectors[chosen])

        if not at_attention:
            grad = grad + behind(anatomy.final_norm, self.trace.last_scale[0], readers_at(n))
        for layer in reversed(range(min(n, int(layers.max()) + 1) if len(layers) else 0)):
            at, weights = self.trace.layers[layer], anatomy.layers[layer]
            written = post(self.mlp_post_norm(layer), grad)
            visit(layer, written)
            constants += torch.einsum("btm,tm->b", written, self.fixed[layer])
            into = torch.zeros_like(grad) if at_attention else readers_at(layer)
            if layer in self.skips:
                into[:, self.exclude_leading :] += written[:, self.exclude_leading :] @ self.skips[layer]
            to_mid = behind(weights.mlp_norm, at.mlp_scale[0], into)
            heads = post(self.attention_post_norm(layer), grad if anatomy.parallel else grad + to_mid)
            constants += torch.einsum("btm,tm->b", heads, self._attention_biases[layer])
            mixed = torch.einsum("btm,hdm->bthd", heads, weights.W_O)
            values = torch.einsum("hts,bthd->bshd", at.pattern[0], mixed)
            read = torch.einsum("bshd,hdm->bsm", values, weights.W_V)
            norm = FrozenNorm(weights.attention_norm, at.attention_scale[0])
            # Not through `behind`: the attention bias already contains the norm's bias as passed on by the values.
            grad = grad + to_mid + norm.pull(read)
            if at_attention:
                grad = grad + behind(*norm, readers_at(layer))
        return Slopes(grad, constants)

    @torch.no_grad()
    def replay(
        self, active: Active, values: Float[Tensor, "runs n"], given: Bool[Tensor, "runs n"], hold: bool = False
    ) -> Replayed:
        """Run forward passes with latents fixed to ``values`` where ``given``; other latents in ``active`` respond.

        A latent responds by the change of its pre-activation. With ``hold`` it keeps its value, so that pre-activations change
        by direct effects only. Latents that are not in ``active`` always keep their values.
        """
        anatomy, runs = self.anatomy, len(values)
        vectors, own = self.readers(active)
        pre_acts, now = values.new_zeros(values.shape), active.values.expand_as(values).clone()
        stream = self.embeddings.expand(runs, -1, -1)
        changes = values.new_zeros(runs, anatomy.n_layers, *stream.shape[1:])
        for layer in range(anatomy.n_layers):
            at, weights = self.trace.layers[layer], anatomy.layers[layer]
            v = weights.attention_norm.apply(stream, at.attention_scale) @ weights.W_V.flatten(0, 1).T + weights.b_V.flatten()
            v = v.unflatten(-1, weights.b_V.shape)
            z = torch.einsum("hts,bshd->bthd", at.pattern[0], v)
            attention = torch.einsum("bthd,hdm->btm", z, weights.W_O) + weights.b_O
            if weights.attention_post_norm is not None and at.attention_post_scale is not None:
                attention = weights.attention_post_norm.apply(attention, at.attention_post_scale)
            x = weights.mlp_norm.apply(stream if anatomy.parallel else stream + attention, at.mlp_scale)
            here = (active.layers == layer).nonzero()[:, 0]
            if len(here):
                pre_acts[:, here] = torch.einsum("bnm,nm->bn", x[:, active.positions[here]], vectors[here]) + own[here]
                if not hold:
                    now[:, here] += pre_acts[:, here] - active.pre_acts[here]
                now[:, here] = torch.where(given[:, here], values[:, here], now[:, here])
                self._write(changes, active.where(here), now[:, here])
            moved, post_norm = changes[:, layer], self.mlp_post_norm(layer)
            if layer in self.skips:
                moved[:, self.exclude_leading :] += (x - at.mlp_in)[:, self.exclude_leading :] @ self.skips[layer].T
            stream = stream + attention + at.mlp_written + (moved if post_norm is None else post_norm.carry(moved))
        return Replayed(pre_acts, anatomy.final_norm.apply(stream[:, -1], self.trace.last_scale[:, -1]))

    def _write(self, changes: Tensor, some: Active, now: Float[Tensor, "runs n"]) -> None:
        """Add the effect of one layer's changed latents on the MLP outputs to ``changes``."""
        for layer, position, which in some.groups():
            delta = now[:, which] - some.values[which]
            atoms = self.replacement.writes(layer, some.latents[which])
            written = list(self.replacement.written(layer))
            changes[:, written, position] += torch.einsum("bn,nwm->bwm", delta, atoms)

    def readers(self, active: Active) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """Return the latents' encoder directions on the MLP input, and their constants."""
        vectors = self.errors.new_zeros(len(active), self.anatomy.d_model)
        constants = self.errors.new_zeros(len(active))
        for layer in active.layers.unique().tolist():
            here = active.layers == layer
            vectors[here], constants[here] = self.replacement.reads(layer, active.latents[here])
        return vectors, constants

    def _mlp_in(self, layer: int) -> Tensor:
        return self.trace.layers[layer].mlp_in[0]

    def _active(self) -> Active:
        parts = []
        for layer, code in self.codes.items():
            chosen = (code.values > 0) & (code.token_ids() >= self.exclude_leading)
            positions, latents, values = code.token_ids()[chosen], code.latents[chosen], code.values[chosen]
            order = latents.argsort(stable=True)
            order = order[positions[order].argsort(stable=True)]
            positions, latents = positions[order], latents[order]
            vectors, constants = self.replacement.reads(layer, latents)
            pre_acts = torch.einsum("nm,nm->n", vectors, self._mlp_in(layer)[positions]) + constants
            parts.append(Active(torch.full_like(latents, layer), positions, latents, values[order].to(pre_acts), pre_acts))
        return Active(*(torch.cat(column) for column in zip(*(_columns(part) for part in parts), strict=True)))

    def _error_and_fixed(self, layer: int) -> tuple[Tensor, Tensor]:
        written = self.mlp_out(layer)
        error, fixed = written.clone(), torch.zeros_like(written)
        if layer in self.codes:
            error -= self.replacement.decode(layer, self.codes, self._mlp_in(layer))
            bias, skip = self.replacement.bypass(layer)
            fixed += bias
            if skip is not None:
                self.skips[layer] = skip
        leading = slice(0, self.exclude_leading)
        error[leading], fixed[leading] = 0.0, written[leading]
        return error, fixed

    def _attention_bias(self, layer: int) -> Float[Tensor, "positions d_model"]:
        """Return the input-independent part of the attention output, from its biases and the norm's bias."""
        at, weights = self.trace.layers[layer], self.anatomy.layers[layer]
        values = weights.W_V @ weights.attention_norm.bias + weights.b_V
        return torch.einsum("hts,hd,hdm->tm", at.pattern[0], values, weights.W_O) + weights.b_O


def _columns(active: Active) -> tuple[Tensor, ...]:
    return active.layers, active.positions, active.latents, active.values, active.pre_acts


def _require_prompt(anatomy: Architecture, token_ids: Int[Tensor, "..."], exclude_leading: int) -> None:
    if token_ids.ndim != 1 or not len(token_ids):
        raise ValueError(f"prompt: expected the ids of at least one token, got {tuple(token_ids.shape)}.")
    limit = getattr(anatomy.model.module.config, "max_position_embeddings", None)
    if limit is not None and len(token_ids) > limit:
        raise ValueError(f"prompt: expected at most {limit} tokens, the context of {anatomy.model.id}, got {len(token_ids)}.")
    n_tokens = anatomy.W_E.shape[0]
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < n_tokens:
        raise ValueError(
            f"prompt: expected token ids 0 to {n_tokens - 1}, got {int(token_ids.min())} to {int(token_ids.max())}."
        )
    if not 0 <= exclude_leading < len(token_ids):
        raise ValueError(
            f"exclude_leading: expected 0 to {len(token_ids) - 1}, so that a position is left of {len(token_ids)}, got "
            f"{exclude_leading}. Give a longer prompt."
        )
