"""Edge scores as JSON in the format and with the names of EAP-IG's ``Graph``, which MIB's circuit track reads.

There the embedding is ``input``, and a head's query is ``a0.h1<q>``. Source: the code of Hanna et al. 2024, arXiv:2403.17806,
and of Mueller et al. 2025, arXiv:2504.13151.
"""

import re
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from ....sae.files import json_number
from ..units.edges import EdgeSpace


def edge_graph(space: EdgeSpace, scores: Float[Tensor, " edges"], kept: Bool[Tensor, " edges"]) -> dict[str, Any]:
    """Return the graph of a model with a score for every edge; edges that are ``kept`` are ``in_graph``.

    A node is in the graph if a kept edge starts or ends there.
    """
    edges, anatomy = space.edges, space.anatomy
    names = [_theirs(name) for name in edges.names()]
    senders, owners = edges.sources[kept], edges.owners[edges.targets[kept]]
    inside = {*senders.tolist(), *owners.tolist()}
    nodes = {_theirs(name): {"in_graph": number in inside} for number, name in enumerate([*edges.senders, "logits"])}
    cfg = {"n_layers": anatomy.n_layers, "n_heads": anatomy.n_heads, "d_model": anatomy.d_model}
    return {
        "cfg": cfg | {"parallel_attn_mlp": anatomy.parallel},
        "nodes": nodes,
        "edges": {
            name: {"score": json_number(score), "in_graph": member}
            for name, score, member in zip(names, scores.double().tolist(), kept.tolist(), strict=True)
        },
    }


def _theirs(name: str) -> str:
    """Return the EAP-IG name of a node or an edge."""
    return re.sub(r"\.([qkv])$", r"<\1>", re.sub(r"^embed\b", "input", name))
