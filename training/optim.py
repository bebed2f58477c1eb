"""Optimizer and learning-rate schedule."""

from collections.abc import Mapping
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sae import SparseDictionary
from ..sae.sparse_grad import drop_ledger
from .divided import per_latent
from .gradient_exchange import GradientExchange
from .objective import Objective
from .phases import Phases
from .recipe import Recipe, peak_lr, total_steps

# Gao et al. 2024: gradients of rarely active latents are small, and Adam's default of 1e-8 would swamp them.
ADAM_EPS = 6.25e-10
# Key of a parameter's running mean in the optimizer's state, which saved states hold.
AVERAGE = "average"


class DictionaryAdam(torch.optim.Adam):
    """Adam with a unit-norm decoder. Its ``step`` does everything between the gradient and the next forward pass.

    torch's methods are called without their decorators for ``torch.compile``, which would import the compiler at the first
    call: that takes longer than torch itself, and nothing here is compiled by it.
    """

    def __init__(self, dictionary: SparseDictionary, phases: Phases, recipe: Recipe):
        parameters = list(dict.fromkeys([*dictionary.parameters(), *phases.parameters()]))
        # A previous optimizer may have left sparse gradients attached, which would receive the new gradients.
        for parameter in parameters:
            drop_ledger(parameter)
        betas = dictionary.encoder.betas if recipe.betas == "auto" else recipe.betas
        super().__init__(parameters, lr=peak_lr(recipe), betas=betas, eps=ADAM_EPS, fused=True)
        self.dictionary, self.grad_clip = dictionary, recipe.grad_clip
        self.aligned, self.decay = recipe.dictionary.aligned, recipe.weight_average
        self.lr_bias = recipe.lr_bias
        self.biases = [p for name, p in dictionary.named_parameters() if name.rpartition(".")[2] == "b_enc"]
        # Steps so far, known after the first; read from the state of a resumed run.
        self._steps: int | None = None
        if self.aligned:
            for block in dictionary.blocks:
                align_(block.weights.W_enc, block.weights.W_dec)
        self.exchange = GradientExchange(dictionary.ranks)

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sum gradients over ranks, project, clip, update, renormalize."""
        self.exchange(self.param_groups[0]["params"], {})
        # Before clipping: the radial part of a decoder row's gradient is discarded and must not count toward the norm.
        self.dictionary.project_grad()
        if self.grad_clip is not None:
            clip_gradients(self.dictionary, self.grad_clip)
        self.plain_step()
        # After the update: the next forward pass must see a unit-norm decoder.
        self.dictionary.renormalize()
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Align the encoder after an update, then move the averages of the weights."""
        if not self.aligned and not self.decay:
            return
        blocks = [block.weights for block in self.dictionary.blocks]
        if self.aligned:
            for weights in blocks:
                align_(weights.W_enc, weights.W_dec)
        if not self.decay:
            return
        kept = {p: self.state[p] for p in self.param_groups[0]["params"] if self.state[p]}
        self._steps = max(int(state["step"]) for state in kept.values()) if self._steps is None else self._steps + 1
        # A plain mean over the first steps, an exponential one afterwards.
        share = max(1 - self.decay, 1 / max(self._steps, 1))
        for parameter, state in kept.items():
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, share)
            else:
                state[AVERAGE] = parameter.detach().clone()
        for weights in blocks:
            atoms = kept[weights.W_dec][AVERAGE] if weights.W_dec in kept else None
            if atoms is not None and self.dictionary.encoder.unit_atoms:
                F.normalize(atoms, dim=-1, out=atoms)
            if atoms is not None and self.aligned and weights.W_enc in kept:
                align_(kept[weights.W_enc][AVERAGE], atoms)

    @torch.no_grad()
    def plain_step(self) -> None:
        """Update the parameters that have a gradient, as torch's Adam does, and biases at their own rate.

        An update is proportional to the rate, so a multiple of it is added. A group of its own for the biases would change
        the layout of saved states.
        """
        before = [] if self.lr_bias == 1 else [bias.clone() for bias in self.biases]
        unwrap(torch.optim.Adam.step)(self)
        for bias, old in zip(self.biases, before, strict=False):
            bias.lerp_(old, 1 - self.lr_bias)

    def zero_grad(self, set_to_none: bool = True) -> None:
        unwrap(torch.optim.Adam.zero_grad)(self, set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unwrap(torch.optim.Adam.load_state_dict)(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unwrap(torch.optim.Adam.add_param_group)(self, param_group)


@torch.no_grad()
def align_(W_enc: Tensor, W_dec: Tensor) -> None:
    """Move encoder rows by the least that makes their products with their decoder directions 1."""
    short = 1 - (W_enc * W_dec).sum(-1, keepdim=True)
    W_enc.addcmul_(short / W_dec.pow(2).sum(-1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny), W_dec)


def averages(dictionary: SparseDictionary, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the averaged weights of a dictionary by name; nothing if none are kept."""
    named = {name: optimizer.state.get(parameter, {}) for name, parameter in dictionary.named_parameters()}
    return {name: state[AVERAGE] for name, state in named.items() if AVERAGE in state}


def clip_gradients(dictionary: SparseDictionary, largest: float) -> None:
    """Scale the gradients so that their norm, over the latents of all shards, is at most ``largest``."""
    if dictionary.shards.size == 1:
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), largest)
        return
    squares = {p: p.grad.pow(2).sum() for p in dictionary.parameters() if p.grad is not None}
    torch.nn.utils.clip_grads_with_norm_(squares.keys(), largest, norm_over_shards(dictionary, squares))


def norm_over_shards(dictionary: SparseDictionary, squares: Mapping[Any, Tensor]) -> Tensor:
    """Return the norm of a gradient from the sums of squares of its parameters; shared parameters are counted once."""
    if not squares:
        return torch.zeros((), device=dictionary.device)
    if dictionary.shards.size == 1:
        return torch.stack(list(squares.values())).sum().sqrt()
    names: dict[Any, str] = {parameter: name for name, parameter in dictionary.named_parameters()}
    zero, n_latents, layers = torch.zeros((), device=dictionary.device), dictionary.n_latents, len(dictionary.blocks)
    own = sum((s for p, s in squares.items() if per_latent(names[p], p, n_latents, layers)), zero)
    shared = sum((s for p, s in squares.items() if not per_latent(names[p], p, n_latents, layers)), zero)
    return (dictionary.shards.sum(own) + shared).sqrt()


def lr_share(recipe: Recipe, step: int) -> float:
    """Return the learning rate of step ``step``, counted from 0, as a fraction of ``lr``, after warm-up and decay."""
    steps, warmup = total_steps(recipe), recipe.lr_warmup_steps
    decay = round(steps * recipe.lr_decay)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, (steps - step) / decay) if decay else 1.0
    return min(rise, fall)


class Schedule:
    """Per-step schedule of the learning rate, the active encoder and its scheduled arguments, and the objective's weights.

    The rate warms up linearly, stays constant, and decays linearly to 0 over the last share of the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dictionary: SparseDictionary,
        phases: Phases,
        recipe: Recipe,
        objective: Objective | None = None,
    ):
        self.optimizer, self.dictionary, self.phases, self.objective = optimizer, dictionary, phases, objective
        self.recipe, self.peak = recipe, peak_lr(recipe)

    def lr(self, step: int) -> float:
        """Return the learning rate of step ``step``, counted from 0."""
        return self.peak * lr_share(self.recipe, step) * self.phases.lr_factor(step)

    def apply(self, step: int) -> None:
        self.phases.enter(self.dictionary, step)
        if self.objective is not None:
            self.objective.weights = self.phases.weights(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
