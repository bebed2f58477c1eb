"""Discrete codes: heads that say something on clean prompts which they never say on corrupted ones.

What each head writes on a prompt is replaced by the number of the latent that it excites most, in one small sparse
autoencoder that all heads share and that a few prompts are enough for. No unit is ever taken out, and no gradient of the
model is needed: scores are numbers of codes, not falls of a metric. They say which heads tell the two kinds of prompts apart,
so they say nothing where corrupted prompts are as likely as clean ones, only with other answers. Compare them with
``shuffled_counts``, as heads of many codes come first either way: of the embedded model's heads for indirect objects (those
whose exact effect exceeds 0.5; 3 seeds) codes had an area under the curve of 0.94, 0.68, 0.78 and 0.81 by corruption, shuffled
labels 0.83, 0.74, 0.81 and 0.80, and ``MeanDifference`` 1.00, 0.98, 0.96 and 0.92.

Source: O'Neill and Bui 2024, arXiv:2405.12522, and the authors' code for what the paper leaves open.
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
        """How many codes of each unit occur on positives and never on negatives."""
        offsets = torch.arange(self.positive.shape[1]) * self.n_codes
        return _only_positive(self.positive + offsets, self.negative + offsets, self.n_codes, self.positive.shape[1])

    def pair_counts(self) -> Float[Tensor, "units units"]:
        """How many pairs of codes two units have at once on positives and never at once on negatives; without direction.

        Which of two units comes before the other is not asked; the diagonal is 0.
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
        """The counts with labels drawn anew, as a control: a unit of many codes has high counts whatever the task."""
        every, n = torch.cat([self.positive, self.negative]), len(self.positive)
        draw = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(shuffles):
            order = torch.randperm(len(every), generator=draw)
            found.append(Codes(every[order[:n]], every[order[n:]], self.n_codes).counts())
        return torch.stack(found)


def _only_positive(positive: Tensor, negative: Tensor, per_unit: int, n_units: int) -> Float[Tensor, " units"]:
    """Keys that occur among the first and not among the second, counted by the unit they are of."""
    keys = np.setdiff1d(positive.numpy(), negative.numpy())
    return torch.bincount(torch.from_numpy(keys) // per_unit, minlength=n_units).float()


def appearances(pair_counts: Float[Tensor, "units units"]) -> Float[Tensor, " units"]:
    """How often each unit is among the strongest quarter of all ordered pairs: scores of nodes from those of pairs."""
    n = len(pair_counts)
    first, second = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    order = pair_counts[first, second].argsort(descending=True, stable=True)
    # Half as many ends as there are cells in the matrix, two to a pair.
    ends = torch.stack([first[order], second[order]], dim=1).flatten()[: n**2 // 2]
    return torch.bincount(ends, minlength=n).float()


class DiscreteCodes(Method):
    """Numbers of codes that only clean prompts have.

    ``examples`` prompts, clean and corrupted together, train the autoencoder: ``n_codes`` latents, an L1 penalty weighing
    ``sparsity``, ``epochs`` steps of Adam; codes are then read off on all prompts. ``tokens`` says what a prompt is: the mean
    over its tokens, or its last one; where units are told apart by position each position is a unit as it is.
    ``count`` is of units' own codes (``nodes``), or of codes that ``pairs`` of units have at once.

    For spaces whose units write to the residual stream: heads, and whole components.
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
        """The codes of all prompts.

        Raises:
            ValueError: If units are not coordinates that a projection writes to the residual stream, or already lie in it.
        """
        return self.encode(*written_codes(space, pairs, self.tokens))

    def encode(self, positive: Float[Tensor, "pairs units d"], negative: Float[Tensor, "pairs units d"]) -> Codes:
        """The codes of what units write."""
        every = torch.cat([positive, negative])
        draw = torch.Generator().manual_seed(self.seed)
        encoder = _Autoencoder(every.shape[-1], self.n_codes, draw)
        encoder.fit(every[torch.randperm(len(every), generator=draw)[: self.examples]], self.sparsity, self.lr, self.epochs)
        with torch.no_grad():
            return Codes(encoder.encode(positive).argmax(-1), encoder.encode(negative).argmax(-1), self.n_codes)


class MeanDifference(Method):
    """A control without codes: the distance between what a unit writes on clean and on corrupted prompts, on average."""

    def __init__(self, tokens: str = "mean"):
        require_choice("tokens", tokens, TOKENS)
        self.tokens = tokens

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        with space.passes.counted() as cost:
            positive, negative = written_codes(space, pairs, self.tokens)
        return UnitScores((positive.mean(0) - negative.mean(0)).norm(dim=-1), cost)


class _Autoencoder(nn.Module):
    """``z = relu(W_enc (x - b) + b_enc)``, ``x_hat = W_dec z + b``.

    As in the authors' code the rows of both matrices have unit norm; those of ``W_dec (d, n_codes)`` belong to coordinates,
    not to atoms.
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
        """All prompts in every step. The error is a mean over everything, the penalty one over prompts and units."""
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
    """What every unit writes to the residual stream on clean and on corrupted prompts, each ``(pairs, units, d_model)``.

    Raises:
        ValueError: If units are not coordinates that a projection writes to the residual stream, or already lie in it.
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
        # Projections are linear: tokens may be averaged first.
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
    """How the units of a part write: by the projection that reads them, or as they are."""
    module, side = space.model.find(part.hook_out)
    if not isinstance(part, Coordinates):
        raise ValueError(f"discrete_codes: {part.name}: expected heads or whole components, got latents of a dictionary.")
    if side == "in" and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
        eye = torch.eye(part.width, device=space.model.device, dtype=module.weight.dtype)  # pyright: ignore[reportArgumentType]
        # Whichever way round the weights are stored; the bias is no head's.
        return (module(eye) - module(torch.zeros_like(eye))).float().cpu().unflatten(0, (part.n_units, part.group))
    if part.n_units > 1:
        raise ValueError(
            f"discrete_codes: {part.name}: expected heads in front of their output projection (site attn_heads) or a whole "
            f"component, got {part.n_units} units at {part.hook_out}."
        )
    return torch.eye(part.width)[None]
