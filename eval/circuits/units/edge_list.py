"""Edges of a transformer's computation graph: names and indices of senders and receivers, without weights.

Senders are ``embed`` (tokens and positions together), heads ``a{layer}.h{head}`` and MLPs ``m{layer}``. Receivers are queries,
keys and values of heads, ``a{layer}.h{head}.q``, ``.k`` and ``.v``, MLPs, and ``logits``. Heads of a layer do not read each
other; an MLP reads the heads of its layer, unless both read the same stream (``parallel``).

Source: the graph of Conmy et al. 2023, arXiv:2304.14997, and Syed et al. 2023, arXiv:2310.10348.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

SIDES = "qkv"


class Stage(NamedTuple):
    """Receivers that share a residual stream and may read its first ``n_senders`` senders.

    The receivers are all heads of a layer, each with ``SIDES``, or an MLP, or the logits; ``edges`` are ordered by receiver.
    """

    edges: slice
    n_receivers: int
    n_senders: int

    def of(self, values: Shaped[Tensor, "*rows edges"]) -> Shaped[Tensor, "*rows n_receivers n_senders"]:
        """Return this stage's values from those of all edges."""
        return values[..., self.edges].unflatten(-1, (self.n_receivers, self.n_senders))


class EdgeList:
    """All edges, ordered by receiver in the order of computation (per head: q, k, v), then by sender.

    ``sources`` and ``targets`` are the sender and receiver of every edge. ``owners`` maps each receiver to the sender it
    belongs to, ``n_senders`` for the logits. ``mlps`` flags the blocks that have an MLP; ``stages`` follow the order of a
    forward pass.
    """

    def __init__(self, n_layers: int, n_heads: int, mlps: Sequence[bool] | None = None, parallel: bool = False):
        self.senders, self.receivers, self.stages = ["embed"], [], []
        owners: list[int] = []
        for layer, has_mlp in enumerate(mlps if mlps is not None else [True] * n_layers):
            before = len(self.senders)
            heads = [f"a{layer}.h{head}" for head in range(n_heads)]
            self._add_stage([f"{head}.{side}" for head in heads for side in SIDES], before)
            owners += [before + head for head in range(n_heads) for _ in SIDES]
            self.senders += heads
            if has_mlp:
                self._add_stage([f"m{layer}"], before if parallel else before + n_heads)
                owners.append(len(self.senders))
                self.senders.append(f"m{layer}")
        self._add_stage(["logits"], len(self.senders))
        self.owners = torch.tensor([*owners, len(self.senders)])
        readable = torch.tensor([stage.n_senders for stage in self.stages for _ in range(stage.n_receivers)])
        self.targets = torch.arange(len(readable)).repeat_interleave(readable)
        self.sources = torch.cat([torch.arange(int(n)) for n in readable])
        spans = zip(self.receivers, readable.tolist(), readable.cumsum(0).tolist(), strict=True)
        self.groups = {name: slice(end - n, end) for name, n, end in spans}

    def _add_stage(self, receivers: list[str], n_senders: int) -> None:
        start = self.stages[-1].edges.stop if self.stages else 0
        self.stages.append(Stage(slice(start, start + len(receivers) * n_senders), len(receivers), n_senders))
        self.receivers += receivers

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def n_senders(self) -> int:
        """Number of components that write to the residual stream."""
        return len(self.senders)

    def names(self) -> list[str]:
        """Return ``SENDER->RECEIVER`` for every edge."""
        ends = zip(self.sources.tolist(), self.targets.tolist(), strict=True)
        return [f"{self.senders[source]}->{self.receivers[target]}" for source, target in ends]
