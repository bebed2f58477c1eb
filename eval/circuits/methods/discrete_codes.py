"""Discrete codes: heads scored by the number of codes that occur on clean prompts and never on corrupted ones.

A head's output on a prompt is replaced by the index of the latent with the largest activation, in one small sparse autoencoder
that all heads share and that needs only a few prompts. No unit is ablated and the model needs no gradient: scores are numbers
of codes, not drops in the metric. They show which heads distinguish the two kinds of prompts, so they are uninformative if
corrupted prompts are as likely as clean ones and only have other answers. Compare them with ``shuffled_counts``, because heads
with many codes rank first in either case: on the embedded model's heads for indirect objects (those whose exact effect exceeds
0.5; 3 seeds) codes had an area under the curve of 0.94, 0.68, 0.78 and 0.81 by corruption, shuffled labels 0.83, 0.74, 0.81 and
0.80, and ``MeanDifference`` 1.00, 0.98, 0.96 and 0.92.

Source: O'Neill and Bui 2024, arXiv:2405.12522, and the authors' code for details that the paper leaves open.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.nodes import Coordinates, NodeSpace, Part
from ..units.passes import Seen
from ..units.space import Space
from .method import Method, UnitScores

TOKENS = ("mean", "last")
COUNTS = ("nodes", "pairs")


@dataclass(frozen=True, eq=False)
class Codes:
    """The code of every unit on clean (positive) and on corrupted (negative) prompts, from 0 to ``n_codes - 1``."""

    positive: Int[Tensor, "pairs units"]
    negative: Int[Tensor, "pairs units"]
    n_codes: int

    def counts(self) -> Float[Tensor, " units"]:
        """Return the number of codes of each unit that occur on positives and never on negatives."""
        offsets = torch.arange(self.positive.shape[1]) * self.n_codes
        return _only_positive(self.positive + offsets, self.negative + offsets, self.n_codes, self.positive.shape[1])

    def pair_counts(self) -> Float[Tensor, "units units"]:
        """Return the number of code pairs of two units that co-occur on positives and never on negatives.

        The matrix is symmetric, as the order of the two units is ignored; the diagonal is 0.
        """
        n = self.positive.shape[1]
        offsets = torch.arange(n) * self.n_codes**2
        rows = []
        for unit in range(n):
            positive, negative = (
                codes[:, unit, None] * self.n_codes + codes + offsets for codes in (self.positive, self.negative)
            )
            rows.append(_only_positive(positive, negative, self.n_codes**2, n))
        return torch.stack(rows).fill_diagonal_(0.0)

    def shuffled_counts(self, shuffles: int = 100, seed: int = 0) -> Float[Tensor, "shuffles units"]:
        """Return the counts under shuffled labels, as a control: a unit with many codes has high counts for any task."""
        every, n = torch.cat([self.positive, self.negative]), len(self.positive)
        draw = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(shuffles):
            order = torch.randperm(len(every), generator=draw)
            found.append(Codes(every[order[:n]], every[order[n:]], self.n_codes).counts())
        return torch.stack(found)


def _only_positive(positive: Tensor, negative: Tensor, per_unit: int, n_units: int) -> Float[Tensor, " units"]:
    """Count, per unit, the keys that occur among positives and not among negatives."""
    keys = np.setdiff1d(positive.numpy(), negative.numpy())
    return torch.bincount(torch.from_numpy(keys) // per_unit, minlength=n_units).float()


def appearances(pair_counts: Float[Tensor, "units units"]) -> Float[Tensor, " units"]:
    """Return node scores from pair counts: how often each unit is among the strongest quarter of all ordered pairs."""
    n = len(pair_counts)
    first, second = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    order = pair_counts[first, second].argsort(descending=True, stable=True)
    # The top n^2 / 4 pairs, with two ends each.
    ends = torch.stack([first[order], second[order]], dim=1).flatten()[: n**2 // 2]
    return torch.bincount(ends, minlength=n).float()


class DiscreteCodes(Method):
    """Discovery by discrete codes: scores are numbers of codes that occur on clean prompts only.

    ``examples`` prompts, clean and corrupted together, train the autoencoder with ``n_codes`` latents, L1 weight ``sparsity``
    and ``epochs`` steps of Adam; then all prompts are encoded. ``tokens`` represents a prompt by the mean over its tokens or by
    its last token; units that are separate by position are used as they are. ``count`` is of a unit's own codes (``nodes``), or
    of codes that ``pairs`` of units have at the same time.

    Spaces must have units that write to the residual stream: heads, and whole components.
    """

    def __init__(
        self,
        n_codes: int = 200,
        sparsity: float = 0.02,
        lr: float = 1e-3,
        epochs: int = 500,
        examples: int = 10,
        tokens: str = "mean",
        count: str = "nodes",
        seed: int = 0,
    ):
        for name, value, choices in (("tokens", tokens, TOKENS), ("count", count, COUNTS)):
            require_choice(name, value, choices)
        for name, least in (("n_codes", n_codes), ("epochs", epochs), ("examples", examples)):
            if least < 1:
                raise ValueError(f"{name}: expected at least 1, got {least}.")
        self.n_codes, self.sparsity, self.lr, self.epochs, self.examples = n_codes, sparsity, lr, epochs, examples
        self.tokens, self.count, self.seed = tokens, count, seed

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        with space.passes.counted() as cost:
            found = self.codes(space, pairs)
            values = found.counts() if self.count == "nodes" else appearances(found.pair_counts())
        return UnitScores(values, cost)

    def codes(self, space: Space, pairs: PromptPairs) -> Codes:
        """Return the codes of all prompts.

        Raises:
            ValueError: If units are neither coordinates that a projection writes to the residual stream nor already in it.
        """
        return self.encode(*written_codes(space, pairs, self.tokens))

    def encode(self, positive: Float[Tensor, "pairs units d"], negative: Float[Tensor, "pairs units d"]) -> Codes:
        """Return the codes of unit outputs."""
        every = torch.cat([positive, negative])
        draw = torch.Generator().manual_seed(self.seed)
        encoder = _Autoencoder(every.shape[-1], self.n_codes, draw)
        encoder.fit(every[torch.randperm(len(every), generator=draw)[: self.examples]], self.sparsity, self.lr, self.epochs)
        with torch.no_grad():
            return Codes(encoder.encode(positive).argmax(-1), encoder.encode(negative).argmax(-1), self.n_codes)


class MeanDifference(Method):
    """Control without codes: distance between a unit's mean outputs on clean and on corrupted prompts."""

    def __init__(self, tokens: str = "mean"):
        require_choice("tokens", tokens, TOKENS)
        self.tokens = tokens

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        with space.passes.counted() as cost:
            positive, negative = written_codes(space, pairs, self.tokens)
        return UnitScores((positive.mean(0) - negative.mean(0)).norm(dim=-1), cost)


class _Autoencoder(nn.Module):
    """Sparse autoencoder ``z = relu(W_enc (x - b) + b_enc)``, ``x_hat = W_dec z + b``.

    As in the authors' code the rows of both matrices have unit norm; rows of ``W_dec (d, n_codes)`` are coordinates, not
    decoder directions.
    """

    def __init__(self, d: int, n_codes: int, draw: torch.Generator):
        super().__init__()
        self.W_enc = nn.Parameter(F.normalize(torch.randn(n_codes, d, generator=draw), dim=-1))
        self.W_dec = nn.Parameter(F.normalize(torch.randn(d, n_codes, generator=draw), dim=-1))
        self.b_enc = nn.Parameter(torch.zeros(n_codes))
        self.b = nn.Parameter(torch.zeros(d))

    def encode(self, x: Float[Tensor, "prompts units d"]) -> Float[Tensor, "prompts units n_codes"]:
        return F.linear(x - self.b, self.W_enc, self.b_enc).relu()

    @torch.enable_grad()
    def fit(self, x: Float[Tensor, "prompts units d"], sparsity: float, lr: float, epochs: int) -> None:
        """Train with all prompts in every step; the error is averaged over all entries, the penalty over prompts and units."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(epochs):
            z = self.encode(x)
            loss = F.mse_loss(F.linear(z, self.W_dec, self.b), x) + sparsity * z.sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            for W in (self.W_enc, self.W_dec):
                assert W.grad is not None
                W.grad -= (W.grad * W.detach()).sum(-1, keepdim=True) * W.detach()
            optimizer.step()
            for W in (self.W_enc, self.W_dec):
                W.data = F.normalize(W.data, dim=-1)


@torch.no_grad()
def written_codes(space: Space, pairs: PromptPairs, tokens: str) -> tuple[Tensor, Tensor]:
    """Return every unit's output to the residual stream on clean and on corrupted prompts, each ``(pairs, units, d_model)``.

    Raises:
        ValueError: If units are neither coordinates that a projection writes to the residual stream nor already in it.
    """
    if not isinstance(space, NodeSpace):
        raise ValueError("discrete_codes: expected a space of heads or components, got one of edges. Choose nodes.")
    writers = [_writer(space, part) for part in space.parts]
    widths = {writer.shape[-1] for writer in writers}
    if len(widths) > 1:
        raise ValueError(f"discrete_codes: expected units that all write to one stream, got widths {sorted(widths)}.")
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for some in pairs.batches(BATCH):
        for token_ids, rows in zip((some.clean, some.corrupted), found, strict=True):
            _, seen = space.passes.see(token_ids, space.hooks)
            rows.append(_contributions(space, writers, seen, some, tokens))
    return torch.cat(found[0]), torch.cat(found[1])


def _contributions(space: NodeSpace, writers: list[Tensor], seen: Seen, pairs: PromptPairs, tokens: str) -> Tensor:
    every = []
    for part, writer in zip(space.parts, writers, strict=True):
        x = seen[part.hook_out].float().cpu()
        # Projections are linear, so tokens can be averaged first.
        x = x if space.copies > 1 else _of_prompt(x, pairs, tokens)
        units = x.unflatten(-1, writer.shape[:2])
        every.append(torch.einsum("ptug,ugd->ptud", units, writer).flatten(1, 2))
    return torch.cat(every, dim=1)


def _of_prompt(x: Float[Tensor, "pairs positions width"], pairs: PromptPairs, tokens: str) -> Float[Tensor, "pairs 1 width"]:
    if tokens == "last":
        return x[torch.arange(len(x)), pairs.lengths - 1][:, None]
    valid = pairs.valid.to(x)[..., None]
    return (x * valid).sum(1, keepdim=True) / pairs.lengths[:, None, None]


def _writer(space: NodeSpace, part: Part) -> Float[Tensor, "units group d_model"]:
    """Return the output weights of a part's units: those of the projection that reads them, or the identity."""
    module, side = space.model.find(part.hook_out)
    if not isinstance(part, Coordinates):
        raise ValueError(f"discrete_codes: {part.name}: expected heads or whole components, got latents of a dictionary.")
    if side == "in" and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
        eye = torch.eye(part.width, device=space.model.device, dtype=module.weight.dtype)  # pyright: ignore[reportArgumentType]
        # Independent of the weights' layout; the bias belongs to no head.
        return (module(eye) - module(torch.zeros_like(eye))).float().cpu().unflatten(0, (part.n_units, part.group))
    if part.n_units > 1:
        raise ValueError(
            f"discrete_codes: {part.name}: expected heads in front of their output projection (site attn_heads) or a whole "
            f"component, got {part.n_units} units at {part.hook_out}."
        )
    return torch.eye(part.width)[None]
