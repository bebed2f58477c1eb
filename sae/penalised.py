"""Penalised: encoders without a fixed budget, whose L0 results from a penalty in the loss."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .encoder import Encoder, Weights, require_argument
from .sparse_code import Revival
from .tiled_scores import Scorer, above, largest_of_batch, level_of_batch

# Every batch multiplies the penalty's weight by (l0 / target) ** GAIN, with an increase of at most 1 %: latents respond to the
# weight only after about a hundred batches, and faster increases drove the L0 to a fiftieth of its target and killed latents.
# Near the target, this gain lets the weight fall along with the learning rate.
GAIN = 0.1
FASTEST = 1.01
# The batch's own penalty is also multiplied by (l0 / target) ** PUSH, within a factor of 2: this acts immediately and damps the
# slower loop.
PUSH = 1.0
LIMIT = 2.0


class SparsityPenalty(nn.Module):
    """Sparsity penalty ``weight * factor * measure``; with a target L0, training adjusts ``factor`` until the L0 meets it.

    Without a target the factor stays 1. If several encoders share one target, ``shared`` is set and their dictionary calls
    ``steer`` with the common L0.
    """

    factor: Float[Tensor, ""]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))
        self.shared = False

    def forward(
        self,
        measure: Float[Tensor, ""],
        weight: int | float,
        l0: Float[Tensor, ""],
        target_l0: int | float | None,
        rests: bool = False,
    ) -> Float[Tensor, ""]:
        penalty = measure * (weight * self.factor.clone())
        if target_l0 is None or self.shared:
            return penalty
        return penalty * self.steer(l0, target_l0, rests)

    @torch.no_grad()
    def steer(self, l0: Float[Tensor, ""], target_l0: int | float, rests: bool = False) -> Float[Tensor, ""]:
        """Update the factor after a batch and return an extra multiplier for that batch's penalty.

        With ``rests`` nothing changes: while the weight is still ramping up, a wrong L0 is not the factor's fault.
        """
        ratio = (l0.detach() / target_l0).clamp(1 / LIMIT, LIMIT).to(self.factor)
        if rests:
            return torch.ones_like(ratio)
        self.factor.mul_(ratio.pow(GAIN).clamp(max=FASTEST))
        return ratio.pow(PUSH)


class Penalised(Encoder, ABC):
    """Base class of encoders whose latents fire above a threshold and are penalized, optionally toward a ``target_l0``.

    The penalty's weight rises linearly over the first ``ramp`` of training. Calibration at the end of training corrects any
    remaining deviation from the target by shifting all thresholds by one number. Dead latents are charged ``pre_act_loss``
    times their distance below the threshold.
    """

    def __init__(self, sparsity: int | float, target_l0: int | float | None, ramp: int | float, pre_act_loss: int | float):
        super().__init__()
        require_argument("sparsity", sparsity, 0.0, fix="0 is no penalty.")
        require_argument("ramp", ramp, 0.0, 1.0, "It is a share of the run.")
        require_argument("pre_act_loss", pre_act_loss, 0.0, fix="0 leaves dead latents to AuxK.")
        if target_l0 is not None:
            require_argument("target_l0", target_l0, 1, fix="It is the wanted mean number of latents per token.")
        self.sparsity, self.target_l0, self.ramp, self.pre_act_loss = sparsity, target_l0, ramp, pre_act_loss

    def prepare(self, n_latents: int) -> None:
        if self.target_l0 is not None:
            require_argument("target_l0", self.target_l0, 1, n_latents, "It cannot exceed dictionary.n_latents.")
        self.prepare_cuts(n_latents)

    @abstractmethod
    def prepare_cuts(self, n_latents: int) -> None:
        """Create the subclass's own per-latent state."""

    @abstractmethod
    def margins(self, scores: Scorer, weights: Weights) -> tuple[Scorer, Float[Tensor, " n_latents"] | None]:
        """Return the margins of scores over the shiftable threshold, and a fixed floor that they must also exceed, if any."""

    @abstractmethod
    def raise_cuts(self, by: float, weights: Weights) -> None:
        """Raise all thresholds by one number, in place."""

    def revival(self, cuts: Float[Tensor, " n_latents"]) -> Revival | None:
        """Return the auxiliary loss for dead latents, or ``None`` if it has no weight."""
        return Revival(self.pre_act_loss, cuts) if self.pre_act_loss else None

    def weight_now(self) -> float:
        """Return the penalty's weight at this point of training."""
        return self.sparsity * (min(1.0, self.progress / self.ramp) if self.ramp else 1.0)

    @property
    def rising(self) -> bool:
        """Return True while the penalty's weight is still ramping up."""
        return self.progress < self.ramp

    @property
    def controllers(self) -> list[SparsityPenalty]:
        """Penalties whose weight is steered."""
        return [module for module in self.modules() if isinstance(module, SparsityPenalty)]

    @torch.no_grad()
    def largest_margins(self, scores: Scorer, weights: Weights) -> Float[Tensor, " some"]:
        """Return the largest margins of a batch, about twice as many as the target L0 keeps."""
        assert self.target_l0 is not None
        margins, floor = self.margins(scores, weights)
        budget = min(round(2 * self.target_l0 * len(scores.x)), len(scores.x) * len(scores.W))
        if floor is None:
            return largest_of_batch(margins, budget)[0].values.cpu()
        return above(margins.tiles(), floor.clamp_min(level_of_batch(margins, budget)), *margins.shape).values.cpu()


def cut_for(margins: Float[Tensor, " n"], wanted: int) -> float:
    """Return a number that exactly ``wanted`` margins exceed, unless they tie there; 0 if there are too few."""
    if not 0 < wanted < len(margins):
        return 0.0
    best = margins.topk(wanted + 1).values
    return float((best[-1] + best[-2]) / 2)
