"""Attribution graph of one prompt: direct effects of latents, errors and tokens on latents and logits.

An edge is the direct effect of its source on its target: along the residual stream and through attention with this prompt's
patterns, but through no other latent. The edges into a target and its constant add up to its pre-activation, or to its logit
minus the mean logit; ``eval.attribution_graphs.local_replacement_model`` lists what is frozen. Where a model has a soft cap on
logits, they are those before it.

Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...training.activations.architecture import Architecture
from ...training.activations.model import LanguageModel
from .edges import MAX_NUMBERS, Edges, latents_within, targets_within
from .local_replacement_model import Active, LocalReplacement, Slopes
from .pruning import SMALLEST_SUM, GraphScores, Pruned, influence, partial_influence, prune, scores
from .replacement_model import Replacement, ReplacementDictionaries

MAX_LOGITS, LOGIT_MASS = 10, 0.95
# Latents are chosen in steps of this many.
BATCH_TARGETS = 256
KINDS = ("latent", "error", "token", "logit")


@dataclass(frozen=True)
class Target:
    """A logit minus the mean logit, or minus the foil's logit. A soft cap on logits acts on ``probability`` only.

    ``weight`` is the influence that starts there: the token's probability, or 1 for an explicit answer.
    """

    token: int
    foil: int | None
    probability: float
    weight: float


@dataclass(frozen=True)
class GraphNode:
    """A node of the graph. ``index`` is the latent or token id (None for errors), ``layer`` is None for tokens and logits."""

    kind: str
    position: int
    layer: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class AttributionGraph:
    """Attribution graph with edges ``adjacency[target, source]``.

    Nodes are ordered: latents, errors layer by layer, tokens, logits. ``totals`` are the pre-activations and logits; they equal
    ``adjacency.sum(1) + constants + left_out``: ``constants`` come from no node, ``left_out`` from latents that are not in the
    graph. Latent values are in the units of their code. ``left_out_share`` is the share of influence that ends in the
    ``n_left_out`` latents.
    """

    token_ids: Int[Tensor, " positions"]
    n_layers: int
    active: Active
    targets: tuple[Target, ...]
    adjacency: Float[Tensor, "nodes nodes"]
    constants: Float[Tensor, " nodes"]
    left_out: Float[Tensor, " nodes"]
    totals: Float[Tensor, " nodes"]
    exclude_leading: int
    n_left_out: int
    left_out_share: float

    @property
    def n_nodes(self) -> int:
        return len(self.adjacency)

    @property
    def latents(self) -> slice:
        return slice(0, len(self.active))

    @property
    def errors(self) -> slice:
        return slice(self.latents.stop, self.latents.stop + self.n_layers * len(self.token_ids))

    @property
    def tokens(self) -> slice:
        return slice(self.errors.stop, self.errors.stop + len(self.token_ids))

    @property
    def logits(self) -> slice:
        return slice(self.tokens.stop, self.n_nodes)

    @cached_property
    def weights(self) -> Float[Tensor, " nodes"]:
        """Starting influence of each node."""
        weights = torch.zeros_like(self.constants)
        weights[self.logits] = torch.tensor([target.weight for target in self.targets]).to(weights)
        return weights

    @cached_property
    def influence(self) -> Float[Tensor, " nodes"]:
        return influence(self.adjacency, self.weights)

    def scores(self) -> GraphScores:
        """Return replacement and completeness scores of the whole graph."""
        return scores(self.adjacency, self.weights, self.errors, self.tokens)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
        """Return the nodes and edges that carry these shares of the influence."""
        kept = self.n_nodes - self.tokens.start
        return prune(self.adjacency, self.weights, len(self.active), kept, node_threshold, edge_threshold)

    def error_shares(self) -> Float[Tensor, " n_layers"]:
        """Return each layer's error influence as a share of all influence on errors and tokens."""
        reached = self.influence
        errors = reached[self.errors].unflatten(0, (self.n_layers, -1)).sum(1)
        return errors / (errors.sum() + reached[self.tokens].sum())

    def changes(
        self, pre_acts: Float[Tensor, "runs latents"], logits: Float[Tensor, "runs targets"]
    ) -> Float[Tensor, "runs nodes"]:
        """Return the changes of pre-activations and targets relative to this prompt's, by node; errors and tokens have zero."""
        changes = pre_acts.new_zeros(len(pre_acts), self.n_nodes)
        changes[:, self.latents] = pre_acts - self.totals[self.latents]
        changes[:, self.logits] = logits - self.totals[self.logits]
        return changes

    def node(self, number: int) -> GraphNode:
        """Return the description of a node."""
        positions = len(self.token_ids)
        if number < self.latents.stop:
            at = self.active
            return GraphNode("latent", int(at.positions[number]), int(at.layers[number]), int(at.latents[number]))
        if number < self.errors.stop:
            layer, position = divmod(number - self.errors.start, positions)
            return GraphNode("error", position, layer)
        if number < self.tokens.stop:
            position = number - self.tokens.start
            return GraphNode("token", position, index=int(self.token_ids[position]))
        return GraphNode("logit", positions - 1, index=self.targets[number - self.logits.start].token)


def build_graph(
    model: LanguageModel,
    dictionaries: ReplacementDictionaries,
    token_ids: Int[Tensor, " positions"] | Sequence[int],
    layers: Sequence[int] | None = None,
    answer: int | None = None,
    foil: int | None = None,
    exclude_leading: int = 1,
    max_latents: int | None = None,
    batch_targets: int = BATCH_TARGETS,
    max_numbers: int = MAX_NUMBERS,
    hooks: Mapping[int, tuple[str, str]] | None = None,
) -> AttributionGraph:
    """Return the attribution graph of the model's prediction after ``token_ids``, with transcoders in place of its MLPs.

    Args:
        dictionaries: A stack, transcoders by layer, or a cross-layer transcoder (of all layers, or of ``layers``).
        answer: Target token. By default the targets are the likeliest next tokens, at most ten, until their probabilities
            sum to 0.95.
        foil: The target is the logit of ``answer`` minus that of ``foil``.
        exclude_leading: MLP outputs at the first positions are constants. Activations at the first token, an attention sink,
            are outliers; circuit-tracer excludes them too.
        max_latents: Keep only this many latents, chosen greedily by their influence on the graph so far; by default all, or
            as many as ``max_numbers`` allows.
        batch_targets: Number of latents chosen at a time.
        max_numbers: Entries of the largest tensor that the graph makes, beside those of the model's own forward pass.
            ``edges.latents_within`` has the formula.
        hooks: Hooks that the transcoders read and write, by layer, if they differ from those of site ``mlp`` and are not in a
            stack's provenances: in Gemma 2 and 3 a transcoder may write the output of the norm after the MLP.

    Raises:
        ValueError: If the dictionaries do not fit the model, the prompt or a token is not one of the model's, or the graph
            exceeds ``max_numbers``.
    """
    token_ids = torch.as_tensor(token_ids, dtype=torch.long, device=model.device)
    replacement = Replacement(Architecture(model, post_norms=True), dictionaries, layers, hooks)
    local = LocalReplacement(replacement, token_ids, exclude_leading)
    return graph_of(local, answer, foil, max_latents, batch_targets, max_numbers)


@torch.no_grad()
def graph_of(
    local: LocalReplacement,
    answer: int | None = None,
    foil: int | None = None,
    max_latents: int | None = None,
    batch_targets: int = BATCH_TARGETS,
    max_numbers: int = MAX_NUMBERS,
) -> AttributionGraph:
    """Return the attribution graph of a local replacement model."""
    if max_latents is not None and max_latents < 1:
        raise ValueError(f"max_latents: expected at least 1, got {max_latents}.")
    targets = _targets(local, answer, foil)
    count = latents_within(local, len(targets), max_latents, max_numbers)
    rows = _Rows(local, targets, batch_targets, targets_within(local, batch_targets, max_numbers))
    rows.explore(count)
    return rows.graph()


def target_vectors(local: LocalReplacement, targets: Sequence[Target]) -> Float[Tensor, "targets d_model"]:
    """Return the targets' directions in the input space of the unembedding, after the final norm."""
    W_U = local.anatomy.W_U
    mean = W_U.mean(0)
    return torch.stack([W_U[t.token] - (mean if t.foil is None else W_U[t.foil]) for t in targets])


def _targets(local: LocalReplacement, answer: int | None, foil: int | None) -> tuple[Target, ...]:
    logits = local.trace.logits[0, -1]
    for name, token in (("answer", answer), ("foil", foil)):
        if token is not None and not 0 <= token < len(logits):
            raise ValueError(f"{name}: expected a token id of 0 to {len(logits) - 1}, got {token}.")
    if foil is not None and answer is None:
        raise ValueError("foil: expected an answer beside the foil, got none. Give answer too.")
    probabilities = logits.softmax(-1)
    if answer is not None:
        return (Target(answer, foil, float(probabilities[answer]), 1.0),)
    best, tokens = probabilities.topk(min(MAX_LOGITS, len(logits)))
    count = int((best.cumsum(0) < LOGIT_MASS).sum()) + 1
    pairs = zip(best[:count].tolist(), tokens[:count].tolist(), strict=True)
    return tuple(Target(token, None, probability, probability) for probability, token in pairs)


class _Rows:
    """Rows of the adjacency matrix: the targets' first, then the latents' in the order in which they were computed."""

    def __init__(self, local: LocalReplacement, targets: tuple[Target, ...], step: int, at_once: int):
        self.local, self.targets, self.step, self.at_once = local, targets, step, at_once
        vectors = target_vectors(local, targets)
        last = vectors.new_full((len(targets),), len(local.token_ids) - 1, dtype=torch.long)
        self.parts: list[Tensor] = []
        self.constants: list[Tensor] = []
        for some in torch.arange(len(targets)).split(at_once):
            edges = Edges(local, len(some))
            slopes = local.slopes(torch.full_like(some, local.anatomy.n_layers), last[some], vectors[some], edges.visit)
            self._add(edges, slopes)
        self.seen: list[Tensor] = []
        self.none = last[:0]
        self.totals = vectors @ local.anatomy.final_norm.apply(local.trace.last[0, -1], local.trace.last_scale[0, -1])

    def explore(self, count: int) -> None:
        """Add the rows of ``count`` latents, chosen by influence in the graph so far unless all are wanted."""
        everything = len(self.local.active)
        device = self.totals.device
        while (done := sum(len(part) for part in self.seen)) < count:
            size = min(self.step, count - done)
            if count == everything:
                chosen = torch.arange(done, done + size, device=device)
            else:
                reached = self._influence()[:everything]
                reached[torch.cat([self.none, *self.seen])] = -1.0
                chosen = reached.topk(size).indices.sort().values
            for some in chosen.split(self.at_once):
                edges = Edges(self.local, len(some))
                self._add(edges, self.local.latent_slopes(self.local.active.where(some), edges.visit))
            self.seen.append(chosen)

    def _add(self, edges: Edges, slopes: Slopes) -> None:
        self.parts.append(edges.whole(slopes))
        self.constants.append(slopes.constants)

    def graph(self) -> AttributionGraph:
        local, n_targets, everything = self.local, len(self.targets), len(self.local.active)
        seen = torch.cat([self.none, *self.seen])
        chosen, order = seen.sort()
        outside = torch.ones(everything, dtype=torch.bool, device=seen.device).index_fill_(0, chosen, False)
        # Back to node order: latents, then errors and tokens, which have no rows, then targets.
        rows, constants = torch.cat(self.parts), torch.cat(self.constants)
        by_node = torch.cat([order + n_targets, torch.arange(n_targets, device=order.device)])
        rows, constants = rows[by_node], constants[by_node]
        columns = torch.cat([chosen, torch.arange(everything, rows.shape[1], device=seen.device)])
        n_nodes = len(columns) + n_targets
        places = torch.cat([torch.arange(len(chosen)), torch.arange(n_nodes - n_targets, n_nodes)]).to(rows.device)
        adjacency = rows.new_zeros(n_nodes, n_nodes)
        adjacency[places, : len(columns)] = rows[:, columns]
        active = local.active.where(chosen)
        totals = torch.cat([active.pre_acts, self.totals])
        reached = self._influence()
        ends = torch.cat([reached[:everything] * outside, reached[everything:]])

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(n_nodes).index_put_((places,), values)

        return AttributionGraph(
            token_ids=local.token_ids,
            n_layers=local.anatomy.n_layers,
            active=active,
            targets=self.targets,
            adjacency=adjacency,
            constants=spread(constants),
            left_out=spread(rows[:, :everything][:, outside].sum(1)),
            totals=spread(totals),
            exclude_leading=local.exclude_leading,
            n_left_out=everything - len(chosen),
            left_out_share=float(ends[:everything].sum() / ends.sum().clamp_min(SMALLEST_SUM)),
        )

    def _influence(self) -> Float[Tensor, " sources"]:
        """Return the influence on all active latents, errors and tokens; latents without a row pass nothing on."""
        rows = torch.cat(self.parts)
        weights = torch.tensor([target.weight for target in self.targets]).to(rows)
        return partial_influence(rows, weights, torch.cat([self.none, *self.seen]))
