"""Decomposition of a latent's pre-activation on one input into its terms, and the strongest paths that lead to it.

An MLP with a transcoder contributes its latents, skip path, bias, and error (the MLP output minus the reconstruction); any
other MLP is a single term. Attention patterns, norm denominators and the set of active latents are frozen at their values on
this input: everything is then linear, and the terms sum to the pre-activation. Terms from a latent, a skip path or a head are
linear functions of an earlier residual stream, and can be decomposed in the same way.

Source: Dunefsky, Chlenski and Nanda 2024, arXiv:2406.11944. Unlike there, norms are not linearized by a secant: with frozen
denominators they are exactly linear.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.sparse_code import bounds
from ...training.activations.architecture import Architecture, Norm
from ...transcoders.transcoder import Transcoder
from ..virtual_weights.connections import Connections
from ..virtual_weights.linear_readers import readers

OPENED = ("latent", "head", "skip")
KINDS = (*OPENED, "token", "position", "mlp", "error", "transcoder bias", "attention bias", "constant")


@dataclass(frozen=True)
class LinearReadout:
    """A scalar ``vector @ stream + constant``, with the residual stream taken at one position and depth.

    ``attentions`` and ``mlps`` count the attention and MLP layers that have written to the stream by then. The constant
    collects the biases of norms, values and encoders on the way, and any difference between a latent's value and its
    pre-activation (zero for most encoders).
    """

    attentions: int
    mlps: int
    position: int
    vector: Float[Tensor, " d_model"]
    constant: Float[Tensor, ""]


@dataclass(frozen=True)
class Term:
    """One summand, written at ``position``; a head's term was read at ``source``.

    Kinds: those of ``OPENED``; token and position (embeddings); mlp (one without a transcoder); error, transcoder bias,
    attention bias, constant; target, the root of a tree.
    """

    kind: str
    value: float
    position: int
    layer: int | None = None
    head: int | None = None
    source: int | None = None
    latent: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" {self.layer}"
        unit = "".join(f".{unit}" for unit in (self.head, self.latent) if unit is not None)
        source = "" if self.source is None else f" from {self.source}"
        return f"{self.kind}{layer}{unit} at {self.position}{source}: {self.value:+.4g}"


@dataclass(frozen=True)
class Decomposition:
    """All terms of a readout; those of heads (layer, head, source) and of latents (by layer) are kept as tensors."""

    position: int
    others: tuple[Term, ...]
    heads: Float[Tensor, "attentions n_heads sources"]
    latents: Mapping[int, tuple[Int[Tensor, " n"], Float[Tensor, " n"]]]

    def total(self) -> float:
        """Return the sum of all terms."""
        values = [self.heads.sum(), *(values.sum() for _, values in self.latents.values())]
        return sum(float(value) for value in values) + sum(term.value for term in self.others)

    def of_kind(self, kind: str) -> float:
        """Return the sum of the terms of one kind."""
        if kind == "head":
            return float(self.heads.sum())
        if kind == "latent":
            return sum(float(values.sum()) for _, values in self.latents.values())
        return sum(term.value for term in self.others if term.kind == kind)

    def largest(self, count: int, kinds: tuple[str, ...] | None = None) -> list[Term]:
        """Return the nonzero terms of greatest magnitude, optionally of some kinds only, in descending order."""
        terms = list(self.others)
        flat = self.heads.flatten()
        for index in flat.abs().topk(min(count, flat.numel())).indices.tolist():
            layer, head, source = (int(i) for i in torch.unravel_index(torch.tensor(index), self.heads.shape))
            terms.append(Term("head", float(flat[index]), self.position, layer, head, source))
        for layer, (latents, values) in self.latents.items():
            best = values.abs().topk(min(count, values.numel())).indices
            pairs = zip(latents[best].tolist(), values[best].tolist(), strict=True)
            terms.extend(Term("latent", value, self.position, layer, latent=latent) for latent, value in pairs)
        wanted = (term for term in terms if term.value and (kinds is None or term.kind in kinds))
        return sorted(wanted, key=lambda term: -abs(term.value))[:count]


@dataclass(frozen=True)
class Node:
    """A term and its largest subterms. ``rest`` is the part of its value in branches that were not followed."""

    term: Term
    children: tuple["Node", ...] = ()
    rest: float = 0.0

    def paths(self) -> list[tuple[Term, ...]]:
        """Return the paths from the root to every leaf, largest leaf first.

        Leaves and the rests of all nodes add up to the root's value.
        """
        return sorted(self._paths(), key=lambda path: -abs(path[-1].value))

    def rests(self) -> float:
        """Return the total of branches not followed, in this node and all below it."""
        return self.rest + sum(child.rests() for child in self.children)

    def _paths(self) -> Iterator[tuple[Term, ...]]:
        if not self.children:
            yield (self.term,)
        for child in self.children:
            yield from ((self.term, *path) for path in child._paths())


class Circuit:
    """A forward pass on one input, with transcoders by layer, whose latents and logits can be decomposed.

    Raises:
        ValueError: As in ``Connections``.
    """

    @torch.no_grad()
    def __init__(self, anatomy: Architecture, transcoders: Mapping[int, Transcoder], token_ids: Int[Tensor, " positions"]):
        self.anatomy, self.token_ids = anatomy, token_ids
        self.weights = Connections(anatomy, transcoders)
        self.trace = anatomy.trace(token_ids[None])
        self.codes, self.errors = {}, {}
        for layer, transcoder in self.weights.transcoders.items():
            at = self.trace.layers[layer]
            self.codes[layer] = transcoder.encode(at.mlp_in[0])
            self.errors[layer] = at.mlp_out[0] - transcoder.decode(self.codes[layer], at.mlp_in[0]).to(at.mlp_out.dtype)
        self._openers: dict[str, Callable[[LinearReadout, Term], LinearReadout]] = {
            "head": self._open_head,
            "latent": self._open_latent,
            "skip": self._open_skip,
        }

    @torch.no_grad()
    def latent(self, layer: int, latent: int, position: int) -> LinearReadout:
        """Return the readout of a latent's pre-activation.

        Raises:
            ValueError: If there is no such layer, latent or position.
        """
        self._check_position(position)
        vector, constant = self._reader(layer, latent)
        return self._before_mlp(layer, position, vector, constant)

    @torch.no_grad()
    def logit(self, token: int, position: int, against: int | None = None) -> LinearReadout:
        """Return the readout of a token's logit, or of its difference from the logit of ``against``.

        Raises:
            ValueError: If there is no such token or position.
        """
        self._check_position(position)
        W_U = self.anatomy.W_U
        for name, one in (("token", token), ("against", against)):
            if one is not None and not 0 <= one < W_U.shape[0]:
                raise ValueError(f"{name}: expected 0 to {W_U.shape[0] - 1}, got {one}.")
        vector = W_U[token] if against is None else W_U[token] - W_U[against]
        n, scale = self.anatomy.n_layers, self.trace.last_scale[0, position]
        return _before_norm(self.anatomy.final_norm, scale, LinearReadout(n, n, position, vector, vector.new_zeros(())))

    @torch.no_grad()
    def through_head(
        self, layer: int, head: int, position: int, source: int, vector: Float[Tensor, " d_head"]
    ) -> LinearReadout:
        """Return the readout of ``vector`` on a head's mixed values at ``position``, restricted to one ``source`` position.

        With the head's part of an encoder row, this decomposes a latent of an attention-output dictionary: over all heads and
        sources, the readouts sum to its pre-activation minus its constant.
        """
        at, weights = self.trace.layers[layer], self.anatomy.layers[layer]
        carried = at.pattern[0, head, position, source] * vector
        probe = LinearReadout(layer, layer, source, carried @ weights.W_V[head], carried @ weights.b_V[head])
        return _before_norm(weights.attention_norm, at.attention_scale[0, source], probe)

    @torch.no_grad()
    def decompose(self, probe: LinearReadout) -> Decomposition:
        """Return every term of a readout: all contributions to the residual stream it reads, and its constant."""
        u, t, anatomy = probe.vector, probe.position, self.anatomy
        others = [Term("constant", float(probe.constant), t), Term("token", float(u @ anatomy.W_E[self.token_ids[t]]), t)]
        if anatomy.W_P is not None:
            others.append(Term("position", float(u @ anatomy.W_P[t]), t))
        heads = [u.new_zeros(0, anatomy.n_heads, len(self.token_ids))]
        for layer in range(probe.attentions):
            at, weights = self.trace.layers[layer], anatomy.layers[layer]
            read = torch.einsum("shd,hd->hs", at.v[0], weights.W_O @ u)
            heads.append((at.pattern[0, :, t] * read)[None])
            others.append(Term("attention bias", float(u @ weights.b_O), t, layer))
        latents = {}
        for layer in range(probe.mlps):
            if layer not in self.codes:
                others.append(Term("mlp", float(u @ self.trace.layers[layer].mlp_out[0, t]), t, layer))
                continue
            transcoder = self.weights.transcoders[layer]
            fired, values = self._fired(layer, t)
            latents[layer] = fired, values * (self.weights.writing(layer, fired) @ u)
            reads, bias = self._bypass(transcoder)
            others.append(Term("transcoder bias", float(u @ bias), t, layer))
            others.append(Term("error", float(u @ self.errors[layer][t]), t, layer))
            if reads is not None:
                others.append(Term("skip", float(u @ reads @ self.trace.layers[layer].mlp_in[0, t]), t, layer))
        return Decomposition(t, tuple(others), torch.cat(heads), latents)

    @torch.no_grad()
    def open(self, probe: LinearReadout, term: Term) -> LinearReadout:
        """Return one term of a readout as a readout of the earlier residual stream.

        Raises:
            ValueError: If terms of this kind do not read from the residual stream.
        """
        if term.kind not in self._openers:
            raise ValueError(f"term: expected one of {', '.join(self._openers)}, which read from the stream, got {term.kind}.")
        return self._openers[term.kind](probe, term)

    def tree(self, probe: LinearReadout, levels: int = 2, branches: int = 5, kinds: tuple[str, ...] | None = None) -> Node:
        """Return the tree of a readout's largest terms, the largest terms of each of these, and so on for ``levels`` levels.

        With ``kinds``, such as ``("latent", "head", "token")``, only these are followed; all others are part of the rest.

        Raises:
            ValueError: If there is no such kind.
        """
        unknown = [kind for kind in kinds or () if kind not in KINDS]
        if unknown:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}.")
        decomposition = self.decompose(probe)
        root = Term("target", decomposition.total(), probe.position)
        return self._grow(probe, root, decomposition, levels, branches, kinds)

    def _grow(
        self, probe: LinearReadout, term: Term, terms: Decomposition, levels: int, branches: int, kinds: tuple[str, ...] | None
    ) -> Node:
        children = []
        for part in terms.largest(branches, kinds):
            if levels > 1 and part.kind in self._openers:
                opened = self.open(probe, part)
                children.append(self._grow(opened, part, self.decompose(opened), levels - 1, branches, kinds))
            else:
                children.append(Node(part))
        return Node(term, tuple(children), term.value - sum(child.term.value for child in children))

    def _open_head(self, probe: LinearReadout, term: Term) -> LinearReadout:
        assert term.layer is not None
        assert term.head is not None
        assert term.source is not None
        vector = self.anatomy.layers[term.layer].W_O[term.head] @ probe.vector
        return self.through_head(term.layer, term.head, term.position, term.source, vector)

    def _open_latent(self, probe: LinearReadout, term: Term) -> LinearReadout:
        assert term.layer is not None
        assert term.latent is not None
        vector, constant = self._reader(term.layer, term.latent)
        fired, values = self._fired(term.layer, term.position)
        value = values[fired == term.latent].sum()
        # Zero for encoders in which an active latent's value is its pre-activation.
        beyond = value - (vector @ self.trace.layers[term.layer].mlp_in[0, term.position] + constant)
        [weight] = self.weights.writing(term.layer, fired.new_tensor([term.latent])) @ probe.vector
        return self._before_mlp(term.layer, term.position, weight * vector, weight * (constant + beyond))

    def _open_skip(self, probe: LinearReadout, term: Term) -> LinearReadout:
        assert term.layer is not None
        reads, _ = self._bypass(self.weights.transcoders[term.layer])
        assert reads is not None
        return self._before_mlp(term.layer, term.position, probe.vector @ reads, probe.vector.new_zeros(()))

    def _before_mlp(self, layer: int, position: int, vector: Tensor, constant: Tensor) -> LinearReadout:
        attentions = layer if self.anatomy.parallel else layer + 1
        scale = self.trace.layers[layer].mlp_scale[0, position]
        probe = LinearReadout(attentions, layer, position, vector, constant)
        return _before_norm(self.anatomy.layers[layer].mlp_norm, scale, probe)

    def _reader(self, layer: int, latent: int) -> tuple[Tensor, Tensor]:
        index = torch.tensor([latent], device=self.token_ids.device)
        vectors, constants = readers(self.weights.at(layer), index)
        return vectors[0].to(self.anatomy.W_E.dtype), constants[0].to(self.anatomy.W_E.dtype)

    def _fired(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        code = self.codes[layer]
        first, end = bounds(code.latents, code.starts)[position : position + 2].tolist()
        return code.latents[first:end], code.values[first:end].to(self.anatomy.W_E.dtype)

    def _bypass(self, transcoder: Transcoder) -> tuple[Tensor | None, Tensor]:
        """Return the skip matrix in raw units and the transcoder's constant output."""
        bias, dtype = transcoder.b_dec, self.anatomy.W_E.dtype
        if transcoder.W_skip is None:
            return None, (bias * transcoder.out_scale).to(dtype)
        bias = bias - transcoder.W_skip @ transcoder.shift
        reads = transcoder.W_skip * (transcoder.out_scale / transcoder.in_scale)
        return reads.to(dtype), (bias * transcoder.out_scale).to(dtype)

    def _check_position(self, position: int) -> None:
        if not 0 <= position < len(self.token_ids):
            raise ValueError(f"position: expected 0 to {len(self.token_ids) - 1}, got {position}.")


def _before_norm(norm: Norm, scale: Tensor, probe: LinearReadout) -> LinearReadout:
    """Return a readout of a norm's output as a readout of its input."""
    constant = probe.constant + probe.vector @ norm.bias
    return replace(probe, vector=norm.fold(probe.vector) / scale, constant=constant)
