"""Encoder: how a dictionary chooses its latents. One subclass per variant, in ``sae/encoders``."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .code import SparseCode


@dataclass(frozen=True)
class Weights:
    """What an encoder may read of its dictionary. Row ``i`` of both matrices belongs to latent ``i``."""

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]


def pre_activations(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Float[Tensor, "tokens n_latents"]:
    """``W_enc x + b_enc``: the one dense product of a training step."""
    return F.linear(x, weights.W_enc, weights.b_enc)


class Encoder(nn.Module, ABC):
    """Turns inputs into a ``SparseCode``. ``x`` arrives normalised and centred: encoders know no units and no biases.

    The constructor's signature is the recipe's schema: every argument is kept under its own name, so that ``spec`` can
    read it back. In ``eval()`` mode the code of a token must not depend on the other tokens of the batch.
    """

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens d_in"],
        weights: Weights,
        grad: Float[Tensor, "tokens d_in"] | None = None,
    ) -> SparseCode:
        """The code of every token of ``x``; ``grad`` is the loss gradient at the hook, where the variant uses it."""

    @abstractmethod
    def validate(self, n_latents: int) -> None:
        """Raise ``ValueError`` if these arguments cannot work with ``n_latents`` latents."""

    @classmethod
    def parameters_of(cls) -> dict[str, inspect.Parameter]:
        """The constructor's arguments: what a recipe may set."""
        return {name: p for name, p in inspect.signature(cls).parameters.items() if name != "self"}

    def arguments(self) -> dict[str, Any]:
        """The arguments this object was built with."""
        return {name: getattr(self, name) for name in self.parameters_of()}
