"""Edge circuits: growing connected circuits, pruning dead ends, and node scores from edge scores.

``faithfulness.circuit_members`` takes the highest scores anywhere in the graph. Here circuits grow from the logits upwards and
lose dead ends.

Sources: Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806 (growing, pruning); Mueller et al. 2025, arXiv:2504.13151.
"""

import heapq

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..methods.method import UnitScores
from ..units.edge_list import EdgeList
from .faithfulness import ranked

REDUCTIONS = ("max", "sum")


def grown(edges: EdgeList, scores: UnitScores, size: int, ranking: str = "signed") -> Bool[Tensor, " edges"]:
    """Return a connected circuit: the best edge into the logits, then repeatedly the best edge into any member.

    Ties are broken by the order of ``ranked``.

    Raises:
        ValueError: If the ranking is unknown.
    """
    place = torch.empty(len(edges), dtype=torch.long)
    place[ranked(scores, ranking).cpu()] = torch.arange(len(edges))
    places, sources, into = place.tolist(), edges.sources.tolist(), _edges_into(edges)
    kept, reached = torch.zeros(len(edges), dtype=torch.bool), {edges.n_senders}
    candidates = [(places[edge], edge) for edge in into[edges.n_senders]]
    heapq.heapify(candidates)
    for _ in range(min(size, len(edges))):
        _, edge = heapq.heappop(candidates)
        kept[edge] = True
        sender = sources[edge]
        if sender not in reached:
            reached.add(sender)
            for other in into[sender]:
                heapq.heappush(candidates, (places[other], other))
    return kept


def pruned(edges: EdgeList, kept: Bool[Tensor, " edges"]) -> Bool[Tensor, " edges"]:
    """Return a circuit without the edges from senders that read nothing in it, or into receivers that nothing in it reads.

    The embedding reads nothing and stays. Remaining edges lie on a path from the embedding to the logits.
    """
    owners = edges.owners[edges.targets]
    while True:
        reads, read = torch.zeros(2, edges.n_senders + 1, dtype=torch.bool)
        reads[owners[kept]] = True
        read[edges.sources[kept]] = True
        # The embedding reads nothing, and nothing reads the logits.
        reads[0] = read[edges.n_senders] = True
        fewer = kept & reads[edges.sources] & read[owners]
        if torch.equal(fewer, kept):
            return kept
        kept = fewer


def among(edges: EdgeList, nodes: Bool[Tensor, " senders"]) -> Bool[Tensor, " edges"]:
    """Return the edges of a node circuit: those between its nodes, and from them to the logits."""
    with_logits = torch.cat([nodes, torch.ones(1, dtype=torch.bool)])
    return with_logits[edges.sources] & with_logits[edges.owners[edges.targets]]


def node_scores(edges: EdgeList, values: Float[Tensor, "*rows edges"], by: str = "max") -> Float[Tensor, "*rows senders"]:
    """Return every sender's score: the maximum of its incoming and outgoing edges' scores, or their sum.

    Raises:
        ValueError: If the reduction is unknown.
    """
    require_choice("by", by, REDUCTIONS)
    both = torch.cat([values, values], dim=-1)
    ends = torch.cat([edges.sources, edges.owners[edges.targets]]).to(values.device)
    reduction = {"max": "amax", "sum": "sum"}[by]
    found = values.new_zeros(*values.shape[:-1], edges.n_senders + 1)
    found = found.scatter_reduce(-1, ends.expand_as(both), both, reduction, include_self=False)
    return found[..., : edges.n_senders]


def _edges_into(edges: EdgeList) -> list[list[int]]:
    """Return the incoming edges of every sender, and last those of the logits."""
    found: list[list[int]] = [[] for _ in range(edges.n_senders + 1)]
    for edge, owner in enumerate(edges.owners[edges.targets].tolist()):
        found[owner].append(edge)
    return found
