"""Encoder: how a dictionary chooses its latents. One subclass per variant, in ``sae/encoders``."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .screen import Screen
from .sparse_code import SparseCode
from .sparse_ops import entries, some_rows
from .tiled_scores import Scorer


@dataclass(frozen=True)
class Weights:
    """What an encoder may read of its dictionary. Row ``i`` of both matrices belongs to latent ``i``.

    In a dictionary with a tied encoder both matrices are one tensor, and there is no ``b_enc``. A ``screen``, where training
    has one, is for encoders that can use it.
    """

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"] | None
    W_dec: Float[Tensor, "n_latents d_out"]
    screen: Screen | None = None
    # What inputs are centred by, where that is a weight as well.
    shift: Float[Tensor, " d_in"] | None = None
    # Columns of the output that are one site's, where latents write to several.
    site_width: int | None = None

    @property
    def unit(self) -> int:
        """The squared error that is an fvu of 1 at one site: what sums over latents are divided by in penalties."""
        return self.site_width or self.W_dec.shape[1]

    def rows(self, latents: Int[Tensor, " some"]) -> "Weights":
        """The weights of some latents, which differ."""
        W_enc = some_rows(self.W_enc, latents)
        W_dec = W_enc if self.W_dec is self.W_enc else some_rows(self.W_dec, latents)
        return Weights(W_enc, None if self.b_enc is None else self.b_enc[latents], W_dec, site_width=self.site_width)


def pre_activations(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Float[Tensor, "tokens n_latents"]:
    """``W_enc x + b_enc``: the one dense product of a training step."""
    return F.linear(x, weights.W_enc, weights.b_enc)


def scorer(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Scorer:
    """The pre-activations as numbers to choose by, a tile at a time: most of them are thrown away."""
    return Scorer(*castable(x, weights.W_enc, weights.b_enc))


def full_scorer(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Scorer:
    """The same in the weights' own precision, whatever autocast is in force."""
    b = None if weights.b_enc is None else weights.b_enc.detach()
    return Scorer(x.detach().to(weights.W_enc.dtype), weights.W_enc.detach(), b)


def castable(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the precision of the autocast in force, if there is one: products into a buffer do not see to it themselves."""
    x, W, b = x.detach(), W.detach(), None if b is None else b.detach()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    return x, W, b


def with_gradient(code: SparseCode, x: Float[Tensor, "tokens d_in"], weights: Weights) -> SparseCode:
    """The same entries, taken from a scorer, as differentiable functions of ``x`` and the weights."""
    values = entries(x, weights.W_enc, weights.b_enc, code.values, code.latents, code.starts, weights.shift)
    return SparseCode(code.latents, values, code.starts, code.requests)


class Encoder(nn.Module, ABC):
    """Turns inputs into a ``SparseCode``. ``x`` arrives normalised and centred: encoders know no units and no biases.

    The constructor's signature is the recipe's schema: every argument is kept under its own name, so that ``spec`` can
    read it back; a recipe's schedule may change numbers among them during a run. In ``eval()`` mode the code of a token
    must not depend on the other tokens of the batch.
    """

    # Atoms of norm 1 are kept so by training; without it the penalty has to weigh an atom's norm.
    unit_atoms: ClassVar[bool] = True
    # An SAE then has one matrix for both sides.
    tied: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    # Adam's, in the paper or its authors' code.
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    # Whether it finds its latents by way of a coarse product where training asks for that.
    can_screen: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # Fewer tokens in one batch cannot be trained on.
        self.smallest_batch = 1
        # Set by training at every step: the share that is done of the steps in which this encoder is in force.
        self.progress = 1.0

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens d_in"],
        weights: Weights,
        grad: Float[Tensor, "tokens d_out"] | None = None,
    ) -> SparseCode:
        """The code of every token of ``x``; ``grad`` is the loss gradient at the output, where the variant uses it."""

    @abstractmethod
    def prepare(self, n_latents: int) -> None:
        """Create whatever has one entry per latent.

        Raises:
            ValueError: If the arguments cannot work with ``n_latents`` latents.
        """

    @classmethod
    def parameters_of(cls) -> dict[str, inspect.Parameter]:
        """The constructor's arguments: what a recipe may set."""
        return {name: p for name, p in inspect.signature(cls).parameters.items() if name != "self"}

    def arguments(self) -> dict[str, Any]:
        """The arguments this object was built with."""
        return {name: getattr(self, name) for name in self.parameters_of()}

    @torch.no_grad()
    def inherit(self, previous: "Encoder") -> None:
        """Take over every tensor that ``previous`` holds under the same name and shape, as one phase follows another."""
        own = self.state_dict()
        for name, tensor in previous.state_dict().items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


def require_argument(name: str, value: int | float, low: int | float, high: int | float = float("inf"), fix: str = "") -> None:
    """Raise ``ValueError``, naming the recipe's key, unless ``low <= value <= high``."""
    if not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"{low} to {high}"
        raise ValueError(f"dictionary.encoder.{name}: expected {limits}, got {value}. {fix}".rstrip())


def require_k(k: int, n_latents: int) -> None:
    """Raise ``ValueError`` unless ``k`` latents can be chosen from ``n_latents``."""
    if k > n_latents:
        raise ValueError(
            f"dictionary.encoder.k: expected at most n_latents = {n_latents}, got {k}. Lower k or raise dictionary.n_latents."
        )
