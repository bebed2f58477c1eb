"""LISTA: selection repeated on pre-activations that are corrected by the error of the reconstruction so far."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batch_encoder import LEVEL_BATCHES, NO_THRESHOLD, Calibrated, level_for
from ..encoder import Weights, of_all_shards, require_argument, require_k, scorer, with_gradient
from ..sparse_code import AuxTerms, SparseCode
from ..sparse_ops import decode
from ..tiled_scores import Scorer, above, largest_of_batch, largest_per_token, smallest_of
from .matryoshka import required_shares, widths_of


class Lista(Calibrated):
    """Encoder that selects latents, then ``steps`` times corrects all pre-activations by the error and selects again.

    After ``h = W_enc x + b_enc`` and ``z = S(h)`` every step is ``h <- h + eta W_enc (x - W_dec^T z)``, ``z <- S(h)``: latents
    that others already account for fall, and latents of what is missing rise. ``S`` keeps the ``tokens x k`` largest
    pre-activations of the batch (``budget: batch``), or the ``k`` largest of every token (``budget: token``), and drops
    negative ones. A step costs one more product with the encoder. Because ``h = W_enc u + b_enc`` with ``u = x + eta * (sum of
    the errors so far)``, only ``u`` is kept between steps. Gradients flow through every step.

    With ``budget: batch``, eval mode applies one threshold per step in place of the batch, calibrated one after the other at
    the end of training. Only an SAE has an error in the space of its input, so transcoders cannot use it.

    ``select: soft`` also subtracts the smallest kept value from all kept values (soft thresholding), and continues from the
    code: ``h <- z + eta (W_enc (x - W_dec^T z) + b_enc)``. That is ISTA, whose every step is the feed-forward block of CRATE
    with ``-b_enc`` as its penalty (Yu et al. 2023, arXiv:2306.01129); the budget then sets the rest of the penalty. The
    threshold is a constant for the gradient.

    Sources: Gregor and LeCun 2010 for the unrolled iteration; for its form with the budget of BatchTopK, one step and eta 0.3,
    the LISTA-Matryoshka of Chanin 2026, where ``k`` falls from a larger one (``schedules: {k: [[0, 40], [0.6, 16]]}``). On the
    embedded model that raised the error (fvu 0.0255 without it, 0.0293 with it). ``shares`` nests dictionaries as in
    ``matryoshka``: prefixes of the code after the last step are trained to reconstruct as well.

    Args:
        k: Active latents per token; on average over a batch with ``budget: batch``.
        steps: Number of corrections.
        eta: Length of a correction.
        budget: Pairs that compete: all of a batch, or those of one token.
        select: Kept values as they are, or reduced by the threshold.
        shares: Widths of nested dictionaries, as fractions of all latents; the whole dictionary alone by default.
    """

    linear = False
    for_saes = "every step subtracts the reconstruction from the input"

    levels: Float[Tensor, " selections"]
    batches: Int[Tensor, ""]

    def __init__(
        self,
        k: int,
        steps: int = 1,
        eta: int | float = 0.3,
        budget: Literal["batch", "token"] = "batch",
        select: Literal["hard", "soft"] = "hard",
        shares: Sequence[float] = (1.0,),
    ):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token.")
        require_argument("steps", steps, 1, fix="Without a step it is batch_topk or topk.")
        require_argument("eta", eta, 0.0, fix="It is the length of a step, 0.3 in the paper.")
        self.k, self.steps, self.eta, self.budget, self.select = k, steps, eta, budget, select
        self.shares = required_shares(shares)
        self._n_latents = 0
        # Guesses of the next batch's levels. They save work without changing results, so they are not saved.
        self._cuts: list[float | None] = [None] * (steps + 1)

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
        self._n_latents = n_latents
        if self.has_thresholds:
            self.register_buffer("levels", torch.zeros(self.steps + 1))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @property
    def has_thresholds(self) -> bool:
        return self.budget == "batch"

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        if self.has_thresholds and not self.training and not int(self.batches):
            raise ValueError(NO_THRESHOLD)
        code, _ = self._after(self.steps, x, weights)
        if self.has_thresholds and self.training and len(x):
            self.batches += 1
        if self.training and len(self.shares) > 1:
            prefixes = widths_of(self.shares, self._n_latents * self.n_shards)
            return SparseCode(code.latents, code.values, code.starts, AuxTerms(prefixes=prefixes))
        return code

    def calibrate_on(self, inputs: Iterable[Float[Tensor, "tokens d_in"]], weights: Weights) -> None:
        self.fit_levels(inputs, weights, self.k)

    @torch.no_grad()
    def fit_levels(self, inputs: Iterable[Float[Tensor, "tokens d_in"]], weights: Weights, per_token: int | float) -> None:
        """Set the threshold of every selection in turn, so that ``per_token`` latents per token pass it on average.

        Raises:
            ValueError: If there are no tokens.
        """
        was, self.training = self.training, False
        try:
            for step in range(self.steps + 1):
                # A pass for every selection, because the scores of one depend on the thresholds of those before.
                self.levels[step] = level_for((self._scores(step, x, weights) for x in inputs), per_token)
        finally:
            self.training = was
        self.batches.clamp_(min=1)

    def _after(self, step: int, x: Tensor, weights: Weights) -> tuple[SparseCode, Tensor]:
        """Return the code after a number of steps, and the ``u`` whose pre-activations it was selected from."""
        u, code = x, self._selected(0, scorer(x, weights), x, weights)
        for number in range(1, step + 1):
            u = self._corrected(u, code, x, weights)
            code = self._next(number, u, code, weights)
        return code, u

    def _scores(self, step: int, x: Tensor, weights: Weights) -> Scorer:
        """Return the scores that the selection of a step chooses from."""
        if step == 0:
            return scorer(x, weights)
        code, u = self._after(step - 1, x, weights)
        u = self._corrected(u, code, x, weights)
        return self._soft_scores(u, code, weights) if self.select == "soft" else scorer(u, weights)

    def _corrected(self, u: Tensor, code: SparseCode, x: Tensor, weights: Weights) -> Tensor:
        """Return the next ``u``: the last plus, or for ``select: soft`` alone, eta times the error of the code."""
        missing = self.eta * (x - weights.shards.reduced(decode(code, weights.W_dec)))
        return missing if self.select == "soft" else u + missing

    def _next(self, step: int, u: Tensor, before: SparseCode, weights: Weights) -> SparseCode:
        if self.select == "hard":
            return self._selected(step, scorer(u, weights), weights.shards.shared(u), replace(weights, shift=None))
        scores = self._soft_scores(u, before, weights)
        b = None if weights.b_enc is None else weights.b_enc * self.eta
        return self._selected(step, scores, weights.shards.shared(u), replace(weights, b_enc=b, shift=None), before)

    def _soft_scores(self, u: Tensor, before: SparseCode, weights: Weights) -> Scorer:
        scores = scorer(u, weights)
        return replace(scores, b=None if scores.b is None else scores.b * self.eta, plus=_detached(before))

    def _selected(self, step: int, scores: Scorer, u: Tensor, weights: Weights, before: SparseCode | None = None) -> SparseCode:
        """Return the code that a step selects, differentiable in ``u``, the weights and the code before."""
        found, level = self._chosen(step, scores)
        code = with_gradient(found, u, weights)
        values = code.values if before is None else _with_values_of(before, code, len(scores.W))
        if self.select == "soft":
            values = values - level.clamp_min(0).to(values.dtype)
        return SparseCode(code.latents, values, code.starts).relu()

    @torch.no_grad()
    def _chosen(self, step: int, scores: Scorer) -> tuple[SparseCode, Tensor]:
        """Return the selected scores and the threshold, one number or one for each of them; a soft one is among them."""
        one_more = int(self.select == "soft")
        if self.budget == "token":
            k = min(self.k + one_more, len(scores.W))
            found = of_all_shards(largest_per_token(scores.tiles(), k), self.k + one_more, scores.shards)
            return found, _smallest_of_tokens(found, scores) if one_more else scores.x.new_zeros(())
        if not self.training:
            level = self.levels[step]
            return above(scores.tiles(), level, *scores.shape), level
        found, self._cuts[step] = largest_of_batch(scores, scores.batch_tokens * self.k + one_more, self._cuts[step])
        if not len(scores.x):
            return found, scores.x.new_zeros(())
        level = smallest_of(found, scores.selecting)
        # A plain mean over the first batches, an exponential one afterwards.
        share = (1 / (self.batches.double() + 1)).clamp_min(1 / LEVEL_BATCHES)
        self.levels[step].lerp_(level.clamp_min(0).to(self.levels), share.to(self.levels))
        return found, level


def _smallest_of_tokens(found: SparseCode, scores: Scorer) -> Float[Tensor, " nnz"]:
    """Return for each entry the smallest value of its token, over all shards."""
    tokens = found.token_ids()
    smallest = found.values.new_full((found.n_tokens,), torch.inf).scatter_reduce_(0, tokens, found.values, "amin")
    return scores.shards.least(smallest)[tokens]


def _detached(code: SparseCode) -> SparseCode:
    return SparseCode(code.latents, code.values.detach(), code.starts)


def _with_values_of(before: SparseCode, code: SparseCode, n_latents: int) -> Float[Tensor, " nnz"]:
    """Return a code's values, which include those of ``before``, with the gradient to these; latents are once per token."""
    if not len(before.values):
        return code.values
    cells, order = (before.token_ids() * n_latents + before.latents).sort()
    wanted = code.token_ids() * n_latents + code.latents
    place = torch.searchsorted(cells, wanted).clamp_max(len(cells) - 1)
    held = before.values.index_select(0, order[place]) * (cells[place] == wanted)
    return code.values + (held - held.detach()).to(code.values.dtype)
