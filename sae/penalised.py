"""Penalised: encoders without a budget, whose l0 a penalty in the loss brings about."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .encoder import Encoder, Weights, require_argument
from .sparse_code import Revival
from .tiled_scores import Scorer, above, largest_of_batch, level_of_batch

# Per batch the penalty's weight is multiplied by (l0 / target) ** GAIN, and raised by 1 % at most: latents follow the weight
# only after a hundred batches, and one that had risen faster meanwhile drove the l0 to a fiftieth of its target and latents
# to death. Near the target the gain is what keeps up with a weight that has to fall as the learning rate does.
GAIN = 0.1
FASTEST = 1.01
# The batch itself pays (l0 / target) ** PUSH times that, within a factor of 2: this answers at once and damps the other.
PUSH = 1.0
LIMIT = 2.0


class SparsityPenalty(nn.Module):
    """``weight x factor x measure``. With a target the factor is steered, in training, until the l0 meets it.

    Without a target the factor stays 1 and the l0 is what the weight makes it. Where several encoders answer for one l0
    together, ``shared`` is set, and whoever knows that l0 calls ``steer``.
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
        """Move the factor after a batch, unless it rests, and return what the batch's own penalty is multiplied by besides.

        It rests while the weight is still rising: what the l0 lacks then is not the factor's fault.
        """
        ratio = (l0.detach() / target_l0).clamp(1 / LIMIT, LIMIT).to(self.factor)
        if rests:
            return torch.ones_like(ratio)
        self.factor.mul_(ratio.pow(GAIN).clamp(max=FASTEST))
        return ratio.pow(PUSH)


class Penalised(Encoder, ABC):
    """Encoders whose latents fire above a cut and are paid for; with ``target_l0`` so that that many fire per token.

    The penalty's weight rises linearly over the first ``ramp`` of training. What a target leaves to be wished for when
    training ends, calibration makes up for: all cuts move by one number. Latents that are dead are charged ``pre_act_loss``
    times how far they stay below their cuts.
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
        """Create what the variant itself keeps per latent."""

    @abstractmethod
    def margins(self, scores: Scorer, weights: Weights) -> tuple[Scorer, Float[Tensor, " n_latents"] | None]:
        """Return by how much scores exceed the cut that moves, and what these margins must exceed wherever it is."""

    @abstractmethod
    def raise_cuts(self, by: float, weights: Weights) -> None:
        """Move all cuts, in place."""

    def revival(self, cuts: Float[Tensor, " n_latents"]) -> Revival | None:
        """Return the request to bring dead latents back to their cuts, if it has a weight."""
        return Revival(self.pre_act_loss, cuts) if self.pre_act_loss else None

    def weight_now(self) -> float:
        """Return the penalty's weight at this point of training."""
        return self.sparsity * (min(1.0, self.progress / self.ramp) if self.ramp else 1.0)

    @property
    def rising(self) -> bool:
        """Whether the penalty's weight is still on its way up."""
        return self.progress < self.ramp

    @property
    def controllers(self) -> list[SparsityPenalty]:
        """What steers the penalty's weight; none where nothing does."""
        return [module for module in self.modules() if isinstance(module, SparsityPenalty)]

    @torch.no_grad()
    def largest_margins(self, scores: Scorer, weights: Weights) -> Float[Tensor, " some"]:
        """Return the margins of many tokens' firing latents and of as many again."""
        assert self.target_l0 is not None
        margins, floor = self.margins(scores, weights)
        budget = min(round(2 * self.target_l0 * len(scores.x)), len(scores.x) * len(scores.W))
        if floor is None:
            return largest_of_batch(margins, budget)[0].values.cpu()
        return above(margins.tiles(), floor.clamp_min(level_of_batch(margins, budget)), *margins.shape).values.cpu()


def cut_for(margins: Float[Tensor, " n"], wanted: int) -> float:
    """Return the number that exactly ``wanted`` of the margins exceed, if they differ there; 0 if there are too few."""
    if not 0 < wanted < len(margins):
        return 0.0
    best = margins.topk(wanted + 1).values
    return float((best[-1] + best[-2]) / 2)
