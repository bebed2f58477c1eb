"""Fused Adam: gradient projection, clipping, update and decoder normalization in one pass, from sparse gradients."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae import SparseDictionary
from ..sae.kept_memory import kept_memory
from ..sae.kernels import AdamStep, Kernels, RowGrad, backend, loops_together
from ..sae.sparse_code import ByLatent
from ..sae.sparse_grad import SparseGrad, keep_ledger
from .optim import DictionaryAdam, norm_over_shards
from .phases import Phases
from .recipe import Recipe

# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
CLIP_EPS = 1e-6
# With so many entries per latent, a gradient that is read twice is written out: that costs as much as a few rows.
SUMMED_ENTRIES = 16


@dataclass(frozen=True)
class Pending:
    """A weight matrix and its gradient, not yet materialized; ``unit`` keeps the matrix's rows at norm 1."""

    weights: Tensor
    unit: bool
    gradient: RowGrad


class FusedAdam(DictionaryAdam):
    """Adam that never materializes the gradients of the weight matrices.

    It equals ``DictionaryAdam`` up to rounding, with the same optimizer state in checkpoints. Each weight matrix has a
    ``SparseGrad``, from which a row's gradient is summed when needed: once for the norm, if gradients are clipped, and once for
    the update. Weights and moments are read and written once per step.
    """

    def __init__(self, dictionary: SparseDictionary, phases: Phases, recipe: Recipe):
        super().__init__(dictionary, phases, recipe)
        weights = [block.weights for block in dictionary.blocks]
        self.atoms = {each.W_dec for each in weights}
        matrices = dict.fromkeys(matrix for each in weights for matrix in (each.W_dec, each.W_enc))
        self.ledgers: dict[Tensor, SparseGrad] = {matrix: keep_ledger(matrix) for matrix in matrices}
        # Cached step count of each matrix: reading it from the state at every step would synchronize with the GPU.
        self.taken: dict[Tensor, int] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for ledger in self.ledgers.values():
            ledger.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.taken.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sum over ranks, project, clip, update and renormalize, as ``DictionaryAdam.step`` does."""
        self.exchange(self.param_groups[0]["params"], self.ledgers)
        kernels = backend(self.dictionary.in_scale)
        assert kernels is not None
        pending = self._pending(kernels)
        others: list[Tensor] = [p for p in self.dictionary.parameters() if p.grad is not None and p not in self.ledgers]
        factor = self._clip(kernels, pending, others)
        with loops_together():
            for part in pending:
                # Without a gradient the matrix is skipped by torch's Adam below.
                part.weights.grad = None
                state = self._state(part.weights)
                moments, taken = (state["exp_avg"], state["exp_avg_sq"]), self.taken[part.weights]
                kernels.adam_(part.weights, part.unit, part.gradient, *moments, factor, self._adam_step(taken))
        for parameter in others:
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        self.plain_step()
        self.settle()

    def _pending(self, kernels: Kernels) -> list[Pending]:
        """Return the matrices that have a gradient. Encoder and decoder share the code, which is grouped by latent once."""
        grouped: dict[tuple[int, ...], ByLatent] = {}
        pending = []
        for weights, ledger in self.ledgers.items():
            if weights.grad is None and ledger.empty:
                continue
            product = ledger.product(weights)
            # The sparse gradients keep the codes alive, so distinct codes have distinct addresses.
            key = tuple(part.code.latents.data_ptr() for part in ledger.products)
            if key not in grouped:
                grouped[key] = product.code.by_latent(weights.shape[0])
            group = grouped[key]
            values = product.code.values.index_select(0, group.order)
            gradient = RowGrad(group.firsts, group.tokens, values, product.rows, *ledger.dense(weights))
            unit = weights in self.atoms and self.dictionary.encoder.unit_atoms
            pending.append(Pending(weights, unit, gradient))
        return pending if self.grad_clip is None else _summed(kernels, pending)

    def _clip(self, kernels: Kernels, pending: list[Pending], others: list[Tensor]) -> Float[Tensor, ""]:
        """Return the clipping factor, from the norm of the whole gradient."""
        device = self.dictionary.device
        if self.grad_clip is None:
            return torch.ones((), device=device)
        with loops_together():
            rows = {part.weights: self._squared_norms(kernels, part) for part in pending}
        squares = {weights: self.dictionary.ranks.sum(norms.sum()) for weights, norms in rows.items()}
        squares |= {p: p.grad.pow(2).sum() for p in others if p.grad is not None}
        norm = norm_over_shards(self.dictionary, squares)
        return (self.grad_clip / (norm + CLIP_EPS)).clamp(max=1.0)

    def _squared_norms(self, kernels: Kernels, part: Pending) -> Float[Tensor, " rows"]:
        """Return the squared norms of a matrix's gradient rows; each rank of the batch computes an equal part of them."""
        ranks, (n_latents, _) = self.dictionary.ranks, part.weights.shape
        first, last = (n_latents * i // ranks.size for i in (ranks.rank, ranks.rank + 1))
        own = part.gradient._replace(firsts=part.gradient.firsts[first : last + 1], dense_of=part.gradient.dense_of[first:last])
        return kernels.squared_norms(part.weights[first:last], part.unit, own)

    def _state(self, weights: Tensor) -> dict[str, Tensor]:
        """Return a matrix's Adam state, created as torch does, and count the step."""
        state = self.state[weights]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
        if weights not in self.taken:
            self.taken[weights] = int(state["step"])
        self.taken[weights] += 1
        state["step"] += 1
        return state

    def _adam_step(self, taken: int) -> AdamStep:
        """Return a matrix's Adam coefficients at step ``taken``, counted from 1."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        return AdamStep(beta1, beta2, group["lr"] / (1 - beta1**taken), 1 / math.sqrt(1 - beta2**taken), group["eps"])


def _summed(kernels: Kernels, pending: list[Pending]) -> list[Pending]:
    """Return gradients with the sums of many entries written out, so that the norm and the update need not make them each."""
    many = [p.weights.device.type == "cpu" and len(p.gradient.values) >= SUMMED_ENTRIES * len(p.weights) for p in pending]
    with loops_together():
        wholes = [_of_entries(kernels, part) if crowded else None for part, crowded in zip(pending, many, strict=True)]
    return [
        part if whole is None else replace(part, gradient=_with_dense(whole, part.gradient))
        for part, whole in zip(pending, wholes, strict=True)
    ]


def _of_entries(kernels: Kernels, part: Pending) -> Tensor:
    firsts, tokens, values, rows, _, _ = part.gradient
    return kernels.spread(
        firsts, tokens, values, rows, kept_memory.take(len(part.weights), part.weights.shape[1], part.weights)
    )


def _with_dense(whole: Tensor, gradient: RowGrad) -> RowGrad:
    """Return the gradient that is the sum of ``whole`` and of another one's dense rows."""
    firsts, tokens, values, rows, dense_of, dense = gradient
    if len(dense) == len(whole):
        whole += dense
    elif len(dense):
        written = (dense_of >= 0).nonzero().squeeze(1)
        whole.index_add_(0, written, dense[dense_of[written]])
    every = torch.arange(len(whole), device=whole.device)
    return RowGrad(torch.zeros_like(firsts), tokens[:0], values[:0], rows, every, whole)


def build_optimizer(dictionary: SparseDictionary, phases: Phases, recipe: Recipe) -> DictionaryAdam:
    """Return the fused optimizer if the recipe allows it, kernels exist, and nothing else must see the gradients first."""
    fits = backend(dictionary.in_scale) is not None and recipe.accumulate == 1
    return (FusedAdam if recipe.optimizer == "auto" and fits else DictionaryAdam)(dictionary, phases, recipe)
