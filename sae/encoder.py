"""Encoder: base class of the rules that select a dictionary's latents. Subclasses are in ``sae/encoders``."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .dense_code import DenseInputs
from .kept_memory import kept_memory
from .ranks import ALONE, UNDIVIDED, Ranks, Shards, largest_of_shards
from .screen import Screen
from .sparse_code import SparseCode
from .sparse_ops import are_crowded, entries, row_norms, some_rows
from .tiled_scores import Scorer


@dataclass(frozen=True)
class Weights:
    """Dictionary weights that an encoder may read; row ``i`` of both matrices belongs to latent ``i``.

    With a tied encoder both matrices are one tensor and ``b_enc`` is ``None``. ``screen`` (approximate top-k) is set only in
    training, for encoders that support it.
    """

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"] | None
    W_dec: Float[Tensor, "n_latents d_out"]
    screen: Screen | None = None
    # Pre-encoder bias that was subtracted from the inputs, so that its gradient takes a shortcut.
    shift: Float[Tensor, " d_in"] | None = None
    # Output columns per site, if latents write to several sites: the unit of penalties is the error at one of them.
    site_width: int | None = None
    # Widths of the sites, if a latent's norm is the sum of its norms at each.
    norm_widths: tuple[int, ...] = ()
    # Processes that share a training batch, and those that hold the other latents.
    ranks: Ranks = ALONE
    shards: Shards = UNDIVIDED
    # Codes of many entries may be ``DenseCode``s.
    may_be_dense: bool = False

    @property
    def unit(self) -> int:
        """Squared error that is an FVU of 1 at one site: the divisor of sums over latents in penalties."""
        return self.site_width or self.W_dec.shape[1]

    def norms(self) -> Float[Tensor, " n_latents"]:
        """Return the decoder norms by which penalties weight values."""
        return row_norms(self.W_dec, self.norm_widths)

    def rows(self, latents: Int[Tensor, " some"]) -> "Weights":
        """Return the weights of some latents, which must be distinct."""
        W_enc = some_rows(self.W_enc, latents)
        W_dec = W_enc if self.W_dec is self.W_enc else some_rows(self.W_dec, latents)
        b_enc = None if self.b_enc is None else self.b_enc[latents]
        return replace(self, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, screen=None, shift=None, may_be_dense=False)


def pre_activations(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Float[Tensor, "tokens n_latents"]:
    """Return ``W_enc x + b_enc``, the one dense product of a training step."""
    return F.linear(x, weights.W_enc, weights.b_enc)


def scorer(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Scorer:
    """Return the pre-activations, without gradient and tile by tile, for selection: most of them are discarded."""
    return Scorer(*castable(x, weights.W_enc, weights.b_enc), ranks=weights.ranks, shards=weights.shards)


def full_scorer(x: Float[Tensor, "tokens d_in"], weights: Weights) -> Scorer:
    """Return a ``scorer`` in the weights' own precision, regardless of autocast."""
    b = None if weights.b_enc is None else weights.b_enc.detach()
    return Scorer(x.detach().to(weights.W_enc.dtype), weights.W_enc.detach(), b)


def castable(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return detached tensors in the active autocast dtype, if any: products with ``out=`` are not cast automatically."""
    x, W, b = x.detach(), W.detach(), None if b is None else b.detach()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    return x, W, b


def of_all_shards(found: SparseCode, k: int, shards: Shards) -> SparseCode:
    """Return the entries of ``largest_per_token`` that are among the ``k`` largest of all shards' latents."""
    if shards.size == 1:
        return found
    values = found.values.view(found.n_tokens, -1)
    return found.where(largest_of_shards(values, k, shards).view(-1))


def with_gradient(code: SparseCode, x: Float[Tensor, "tokens d_in"], weights: Weights) -> SparseCode:
    """Return a code from a scorer with its values made differentiable in ``x`` and the weights."""
    values = entries(x, weights.W_enc, weights.b_enc, code.values, code.latents, code.starts, weights.shift)
    return SparseCode(code.latents, values, code.starts, code.requests)


def crowded(x: Float[Tensor, "tokens d_in"], weights: Weights, *cuts: Float[Tensor, "..."]) -> tuple[bool, ...]:
    """Return for each cut True if so many pre-activations exceed it that a dense code is faster, and allowed."""
    if not weights.may_be_dense:
        return (False,) * len(cuts)
    found = tuple(are_crowded(x, weights.W_enc, weights.b_enc, cuts))
    if not any(found):
        kept_memory.free_idle()
    return found


def dense_inputs(x: Float[Tensor, "tokens d_in"], weights: Weights) -> DenseInputs:
    """Return what the pre-activations of a dense code are made of."""
    return DenseInputs(x, weights.W_enc, weights.b_enc, weights.shift)


class Encoder(nn.Module, ABC):
    """Base class of encoders, which map normalized, centered inputs to a ``SparseCode``.

    Encoders see no raw units and no pre-encoder bias. The constructor's signature is the recipe schema: every argument is
    stored under its own name, so that ``arguments`` can read it back, and a recipe's schedule may change numeric arguments
    during a run. In ``eval()`` mode the code of a token must not depend on the other tokens of the batch.

    >>> from sparsary import SAE, Encoder, SparseCode
    >>> class Top1(Encoder):
    ...     def forward(self, x, weights, grad=None):
    ...         values, latents = pre_activations(x, weights).max(dim=1, keepdim=True)
    ...         return SparseCode.from_rows(latents, values.relu())
    ...
    ...     def prepare(self, n_latents):
    ...         pass
    >>> SAE(d_in=8, n_latents=32, encoder=Top1()).encode(torch.randn(10, 8)).n_tokens
    10
    """

    # Training keeps decoder directions at unit norm; without it the penalty must be weighted by their norms.
    unit_atoms: bool = True
    # An SAE then has one matrix for encoder and decoder.
    tied: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    # Adam's betas, from the paper or its authors' code.
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    # Reason why the latents cannot be divided among processes; an empty string if they can.
    undivided: ClassVar[str] = ""
    # A latent's value is linear in the input wherever it fires: row ``i`` of W_enc is what latent ``i`` reads.
    linear: ClassVar[bool] = True
    # Values may be negative.
    signed: ClassVar[bool] = False
    # Reason why only SAEs, which reconstruct their own input, can have it; an empty string if all dictionaries can.
    for_saes: ClassVar[str] = ""
    # Supports approximate top-k (``screen``).
    can_screen: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # Minimum number of tokens in a training batch.
        self.smallest_batch = 1
        # Number of processes that divide the latents among them, set by the trainer.
        self.n_shards = 1
        # Set by the trainer at every step: fraction completed of the steps that use this encoder.
        self.progress = 1.0

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens d_in"],
        weights: Weights,
        grad: Float[Tensor, "tokens d_out"] | None = None,
    ) -> SparseCode:
        """Return the code of every token; ``grad`` is the loss gradient at the output, for encoders that use it."""

    @abstractmethod
    def prepare(self, n_latents: int) -> None:
        """Create parameters and buffers with one entry per latent.

        Raises:
            ValueError: If the arguments cannot work with ``n_latents`` latents.
        """

    @classmethod
    def parameters_of(cls) -> dict[str, inspect.Parameter]:
        """Return the constructor's parameters, which a recipe may set."""
        return {name: p for name, p in inspect.signature(cls).parameters.items() if name != "self"}

    def arguments(self) -> dict[str, Any]:
        """Return the current values of the constructor's arguments."""
        return {name: getattr(self, name) for name in self.parameters_of()}

    @torch.no_grad()
    def inherit(self, previous: "Encoder") -> None:
        """Copy every tensor that ``previous`` has under the same name and shape, when one training phase follows another."""
        own = self.state_dict()
        for name, tensor in previous.state_dict().items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


def require_argument(name: str, value: int | float, low: int | float, high: int | float = float("inf"), fix: str = "") -> None:
    """Raise ``ValueError``, naming the recipe key, unless ``low <= value <= high``."""
    if not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"{low} to {high}"
        raise ValueError(f"dictionary.encoder.{name}: expected {limits}, got {value}. {fix}".rstrip())


def require_k(k: int, n_latents: int) -> None:
    """Raise ``ValueError`` unless ``k`` latents can be chosen from ``n_latents``."""
    if k > n_latents:
        raise ValueError(
            f"dictionary.encoder.k: expected at most n_latents = {n_latents}, got {k}. Lower k or raise dictionary.n_latents."
        )
