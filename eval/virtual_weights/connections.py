"""Virtual weights between latents of per-layer transcoders, and between latents, embeddings and unembeddings.

To get a latent's actual contribution to a later latent's pre-activation on an input, multiply the connection by the lower
latent's value, divide by the norm's denominator and, if it passes through a head, multiply by its attention weight
(``eval.attribution_graphs.paths``). Source: Dunefsky, Chlenski and Nanda 2024, arXiv:2406.11944.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...training.activations.architecture import Architecture
from ...transcoders.stack import Stack, hooks_of_provenance
from ...transcoders.transcoder import Transcoder
from .linear_readers import readers

# Tile size for the connection matrix of shape (n_latents, n_latents), which may not fit into memory.
TILE_LATENTS = 512


class Strongest(NamedTuple):
    """The strongest connections (by magnitude, in descending order) of every upper latent to lower latents."""

    latents: Int[Tensor, "upper k"]
    values: Float[Tensor, "upper k"]


def transcoders_by_layer(anatomy: Architecture, stack: Stack) -> dict[int, Transcoder]:
    """Return the transcoders of a stack that replace an MLP, by layer.

    Raises:
        ValueError: If there are none.
    """
    hooks = {block.sites().get("mlp"): layer for layer, block in enumerate(anatomy.blocks)}
    found = {}
    for hook, dictionary in stack.items():
        reads, writes = hooks_of_provenance(stack.provenances[hook])
        layer = hooks.get((reads[0], writes[0]))
        if layer is not None and dictionary.arguments()["kind"] == "transcoder":
            found[layer] = dictionary
    if not found:
        raise ValueError(
            "stack: expected transcoders trained at site mlp of this model, got none. Train one with dictionary.site: mlp."
        )
    return dict(sorted(found.items()))


class Connections:
    """Input-independent connections through per-layer transcoders.

    Values are in raw units per unit of a latent's value. ``head`` is a (layer, head) pair for connections through a head.

    Raises:
        ValueError: If a layer does not exist, or a transcoder's widths are not the model's.
    """

    def __init__(self, anatomy: Architecture, transcoders: Mapping[int, Transcoder]):
        for layer, transcoder in transcoders.items():
            if not 0 <= layer < anatomy.n_layers:
                raise ValueError(f"transcoders: expected layers 0 to {anatomy.n_layers - 1}, got {layer}.")
            if (transcoder.d_in, transcoder.d_out) != (anatomy.d_model, anatomy.d_model):
                raise ValueError(
                    f"transcoders: layer {layer}: expected d_in = d_out = {anatomy.d_model}, the model's width, got "
                    f"{transcoder.d_in} and {transcoder.d_out}."
                )
            if transcoder.training:
                raise ValueError(
                    f"transcoders: layer {layer}: expected eval mode, as codes depend on the batch in training. Call eval()."
                )
        self.anatomy, self.transcoders = anatomy, dict(transcoders)

    @torch.no_grad()
    def reading(self, layer: int, latents: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n d_model"]:
        """Return the residual-stream directions that latents read, before division by the norm."""
        vectors = readers(self.at(layer), latents).vectors.to(self.anatomy.W_E.dtype)
        return self.anatomy.layers[layer].mlp_norm.fold(vectors)

    @torch.no_grad()
    def writing(self, layer: int, latents: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n d_model"]:
        """Return the latents' decoder directions in raw units."""
        transcoder = self.at(layer)
        atoms = transcoder.atoms if latents is None else transcoder.atoms[latents]
        return (atoms * transcoder.out_scale).to(self.anatomy.W_E.dtype)

    @torch.no_grad()
    def reading_through(
        self, layer: int, latents: Int[Tensor, " n"] | None, head: tuple[int, int] | None
    ) -> Float[Tensor, "n d_model"]:
        """Return the directions that latents read at a head's source position, before division by both norms.

        Raises:
            ValueError: If the head's output does not reach the latents.
        """
        vectors = self.reading(layer, latents)
        if head is None:
            return vectors
        at, index = head
        last = layer - 1 if self.anatomy.parallel else layer
        if not (0 <= at <= last and 0 <= index < self.anatomy.n_heads):
            raise ValueError(
                f"head: expected a layer of 0 to {last}, so that it comes before the latents' MLP, and a head of 0 to "
                f"{self.anatomy.n_heads - 1}, got {head}."
            )
        values = self.anatomy.layers[at]
        return values.attention_norm.fold(vectors @ values.W_O[index].T @ values.W_V[index])

    @torch.no_grad()
    def between(
        self, lower: int, upper: int, latents: Int[Tensor, " n"] | None = None, head: tuple[int, int] | None = None
    ) -> Float[Tensor, "n_lower n"]:
        """Return the connections from all latents of one layer to latents of a later one.

        Raises:
            ValueError: If the lower layer's output does not reach the upper layer, or the head between them.
        """
        above = upper if head is None else head[0]
        if lower >= above:
            raise ValueError(f"lower: expected a layer before {above}, which reads it, got {lower}.")
        return self.writing(lower) @ self.reading_through(upper, latents, head).T

    @torch.no_grad()
    def strongest(self, lower: int, upper: int, k: int, head: tuple[int, int] | None = None) -> Strongest:
        """Return the ``k`` strongest connections of every upper latent, without holding the whole matrix in memory."""
        everything = torch.arange(self.at(upper).n_latents, device=self.anatomy.W_E.device)
        tiles = []
        for some in everything.split(TILE_LATENTS):
            matrix = self.between(lower, upper, some, head).T
            latents = matrix.abs().topk(min(k, matrix.shape[1]), dim=-1).indices
            tiles.append(Strongest(latents, matrix.gather(1, latents)))
        return Strongest(*(torch.cat(parts) for parts in zip(*tiles, strict=True)))

    @torch.no_grad()
    def deembeddings(
        self, layer: int, latents: Int[Tensor, " n"], head: tuple[int, int] | None = None
    ) -> Float[Tensor, "n vocabulary"]:
        """Return every token embedding's connection to latents, at its own position or through a head."""
        return self.reading_through(layer, latents, head) @ self.anatomy.W_E.T

    @torch.no_grad()
    def unembeddings(self, layer: int, latents: Int[Tensor, " n"]) -> Float[Tensor, "n vocabulary"]:
        """Return the latents' direct effect on every logit, before division by the final norm."""
        return self.writing(layer, latents) @ self.anatomy.final_norm.fold(self.anatomy.W_U).T

    @torch.no_grad()
    def mean_attributions(
        self,
        layer: int,
        latent: int,
        batches: Iterable[Int[Tensor, "..."]],
        where_active: bool = True,
        exclude_leading: int = 0,
    ) -> dict[int, Float[Tensor, "..."]]:
        """Return the mean contribution of earlier layers' latents to a latent's pre-activation at the same position, by layer.

        Averages gradient times value over tokens; only over tokens on which the latent fires, unless ``where_active`` is false.
        ``batches`` are token ids ``(contexts, positions)``, of varying shapes; the first ``exclude_leading`` positions of every
        context are skipped.

        Raises:
            ValueError: If no token counts.
        """
        blocks, norm = self.anatomy.blocks, self.anatomy.layers[layer].mlp_norm
        lower = [index for index in self.transcoders if index < layer]
        hooks = {index: blocks[index].sites()["mlp"][0] for index in (*lower, layer)}
        sites = blocks[layer].sites()
        stream = sites["resid_pre" if self.anatomy.parallel else "resid_mid"][0]
        sums = {index: torch.zeros_like(self.writing(index)[:, 0]) for index in lower}
        counted = 0
        for token_ids in batches:
            seen = self.anatomy.model.activations(token_ids, (*hooks.values(), stream))
            seen = {hook: x[:, exclude_leading:].flatten(0, 1) for hook, x in seen.items()}
            weights = 1.0 / norm.scale(seen[stream])
            counts = torch.ones_like(weights)
            if where_active:
                code = self.at(layer).encode(seen[hooks[layer]])
                fires = code.token_ids()[(code.latents == latent) & (code.values != 0)]
                counts = torch.zeros_like(weights).index_fill_(0, fires, 1.0)
            counted += int(counts.sum())
            for index in lower:
                code = self.transcoders[index].encode(seen[hooks[index]])
                sums[index].index_add_(0, code.latents, (weights * counts)[code.token_ids()] * code.values.to(weights.dtype))
        if not counted:
            raise ValueError(f"batches: expected tokens on which latent {latent} of layer {layer} fires, got none. Give more.")
        one = torch.tensor([latent], device=self.anatomy.W_E.device)
        return {index: sums[index] / counted * self.between(index, layer, one)[:, 0] for index in lower}

    def at(self, layer: int) -> Transcoder:
        """Return the transcoder of a layer; raise ``ValueError`` if there is none."""
        if layer not in self.transcoders:
            raise ValueError(f"layer: expected one with a transcoder, {sorted(self.transcoders)}, got {layer}.")
        return self.transcoders[layer]
