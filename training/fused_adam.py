"""FusedAdam: projection, clipping, Adam and unit atoms in one pass over the latents, from the entries of the gradient."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae import SparseDictionary
from ..sae.kernels import AdamStep, Kernels, RowGrad, backend
from ..sae.sparse_code import ByLatent
from ..sae.sparse_grad import SparseGrad, keep_ledger
from .optim import DictionaryAdam
from .phases import Phases
from .recipe import Recipe

# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Pending:
    """A weight matrix, whether its rows are kept at norm 1, and its gradient, not yet written out."""

    weights: Tensor
    unit: bool
    gradient: RowGrad


class FusedAdam(DictionaryAdam):
    """Equal to ``DictionaryAdam`` up to rounding, in its checkpoints too; the matrices' gradients are never written out.

    Each weight matrix has a ledger, from which a row's gradient is summed up when its turn comes: once for the norm, if
    there is clipping, and once more for the step. Weights and moments are read and written once.
    """

    def __init__(self, dictionary: SparseDictionary, phases: Phases, recipe: Recipe):
        super().__init__(dictionary, phases, recipe)
        weights = [block.weights for block in dictionary.blocks]
        self.atoms = {each.W_dec for each in weights}
        matrices = dict.fromkeys(matrix for each in weights for matrix in (each.W_dec, each.W_enc))
        self.ledgers: dict[Tensor, SparseGrad] = {matrix: keep_ledger(matrix) for matrix in matrices}
        # Steps of each matrix so far: read from the state once, because reading it at every step would wait for a GPU.
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
        """The same step as ``DictionaryAdam``'s."""
        kernels = backend(self.dictionary.in_scale)
        assert kernels is not None
        pending = self._pending()
        others: list[Tensor] = [p for p in self.dictionary.parameters() if p.grad is not None and p not in self.ledgers]
        factor = self._clip(kernels, pending, others)
        for part in pending:
            # Of it, nothing must be left for Adam's own step.
            part.weights.grad = None
            state = self._state(part.weights)
            moments = state["exp_avg"], state["exp_avg_sq"]
            kernels.adam_(part.weights, part.unit, part.gradient, *moments, factor, self._adam_step(self.taken[part.weights]))
        for parameter in others:
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        torch.optim.Adam.step(self)

    def _pending(self) -> list[Pending]:
        """The matrices that have a gradient. Both sides of a dictionary share the code, which is grouped once."""
        grouped: dict[tuple[int, ...], ByLatent] = {}
        pending = []
        for weights, ledger in self.ledgers.items():
            if weights.grad is None and not ledger.products and not ledger.rows:
                continue
            product = ledger.product(weights)
            # The ledgers keep the codes alive, and distinct ones have distinct storage.
            key = tuple(part.code.latents.data_ptr() for part in ledger.products)
            if key not in grouped:
                grouped[key] = product.code.by_latent(weights.shape[0])
            group = grouped[key]
            values = product.code.values[group.order]
            gradient = RowGrad(group.firsts, group.tokens, values, product.rows, *ledger.dense(weights))
            unit = weights in self.atoms and self.dictionary.encoder.unit_atoms
            pending.append(Pending(weights, unit, gradient))
        return pending

    def _clip(self, kernels: Kernels, pending: list[Pending], others: list[Tensor]) -> Float[Tensor, ""]:
        """What the whole gradient is multiplied by."""
        device = self.dictionary.device
        if self.grad_clip is None:
            return torch.ones((), device=device)
        squares = [kernels.squared_norms(part.weights, part.unit, part.gradient).sum() for part in pending]
        squares += [p.grad.pow(2).sum() for p in others if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=device)
        return (self.grad_clip / (norm + CLIP_EPS)).clamp(max=1.0)

    def _state(self, weights: Tensor) -> dict[str, Tensor]:
        """A matrix's moments as torch's Adam would make them, its step counted."""
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
        """The numbers of a matrix's step ``taken``, counted from 1."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        return AdamStep(beta1, beta2, group["lr"] / (1 - beta1**taken), 1 / math.sqrt(1 - beta2**taken), group["eps"])


def build_optimizer(dictionary: SparseDictionary, phases: Phases, recipe: Recipe, processes: int = 1) -> DictionaryAdam:
    """The recipe's optimizer; the fused one unless somebody else has to see the gradients before the step."""
    fits = backend(dictionary.in_scale) is not None and recipe.accumulate == 1 and processes == 1
    return (FusedAdam if recipe.optimizer == "auto" and fits else DictionaryAdam)(dictionary, phases, recipe)
