"""Training losses: pure functions of tensors in normalized units."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .encoder import Weights, pre_activations, scorer, with_gradient
from .ranks import Shards, largest_of_shards
from .sparse_code import SparseCode
from .sparse_ops import decode
from .tiled_scores import largest_per_token
from .zipf import underused

# Latents among which the nearest is looked for.
OVERLAP_GROUP = 1024


def normalized_mse(
    y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"], variance: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Return the squared error per token divided by ``variance``, the mean squared distance of targets from their mean.

    ``variance`` is a constant of the data set, not of the batch, so the loss approximates FVU and its gradient does not depend
    on which tokens share a batch. With one value per column, each column's squared error is divided by its own. Source: Gao et
    al. 2024, arXiv:2406.04093.
    """
    if variance.ndim:
        return _WeightedSquares.apply(y_hat, y, 1 / (variance * max(len(y), 1)))  # pyright: ignore[reportReturnType]
    return F.mse_loss(y_hat, y, reduction="sum") / (variance * max(len(y), 1))


class _WeightedSquares(torch.autograd.Function):
    """Weighted sum of squared differences: half the passes of autograd over tensors as large as the batch."""

    @staticmethod
    def forward(ctx: Any, y_hat: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        error = y_hat - y
        weighted = error * weight
        ctx.save_for_backward(weighted)
        return torch.dot(error.view(-1), weighted.view(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weighted,) = ctx.saved_tensors
        to_y_hat = 2 * grads[0] * weighted
        return to_y_hat, -to_y_hat if ctx.needs_input_grad[1] else None, None


def auxk(
    x: Float[Tensor, "tokens d_in"],
    error: Float[Tensor, "tokens d_out"],
    weights: Weights,
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """Return the AuxK loss: how badly the ``k_aux`` strongest dead latents reconstruct the residual error, initially about 1.

    ``x`` is centered and ``error`` is ``y - y_hat``; both are detached, so only encoder and decoder rows of dead latents
    receive gradients. The loss is zero without dead latents. Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    rows, ranks, shards = dead.nonzero().squeeze(-1), weights.ranks, weights.shards
    count = shards.total(rows.numel())
    if count == 0:
        return error.new_zeros(())
    x, error = x.detach(), error.detach()
    dead_weights = weights.rows(rows)
    if count <= k_aux:
        # All dead latents take part, so there is no selection and no sparsity to exploit.
        guess = pre_activations(x, dead_weights).relu() @ dead_weights.W_dec
    else:
        if rows.numel():
            code = largest_per_token(scorer(x, dead_weights).tiles(), min(k_aux, rows.numel()))
        else:
            code = SparseCode.from_rows(rows.expand(len(x), 0), x.new_empty(len(x), 0))
        code = code if shards.size == 1 else _largest_of_dead(code, k_aux, shards)
        guess = decode(with_gradient(code, x, dead_weights).relu(), dead_weights.W_dec)
    residual = shards.reduced(guess) - error
    spread = (error - ranks.mean(error.mean(0))).pow(2).sum()
    # The clamp prevents 0/0 after a perfect reconstruction.
    # The mean over ranks of these quotients is that of the sums over the whole batch.
    loss = residual.pow(2).sum() / ranks.mean(spread).clamp_min(torch.finfo(spread.dtype).tiny)
    # With few dead latents the term cannot become small, so its weight shrinks with their number.
    return loss * min(count / k_aux, 1.0)


def _largest_of_dead(code: SparseCode, k_aux: int, shards: Shards) -> SparseCode:
    """Return the entries of a shard's dead latents that are among the ``k_aux`` largest of all shards' dead latents."""
    values = code.values.view(code.n_tokens, -1)
    padding = values.new_full((len(values), shards.largest(values.shape[1]) - values.shape[1]), -torch.inf)
    kept = largest_of_shards(torch.cat([values, padding], dim=1), k_aux, shards)
    return code.where(kept[:, : values.shape[1]].reshape(-1))


def overlap(atoms: Float[Tensor, "n_latents d_out"], step: int, shards: Shards) -> Float[Tensor, ""]:
    """Return the mean over latents of the squared cosine with the nearest of some other decoder directions.

    ``step`` draws a partition of the latents into groups of about ``OVERLAP_GROUP``; the others are those of the same group, so
    the cost is proportional to the number of latents. Latents of different shards share no group. Gradients reach both
    directions of a pair. Source: the orthogonality penalty of OrtSAE, Korznikov et al. 2025, arXiv:2509.22033; group size and
    squared cosine, which also charges opposite directions, are specific to sparsary.
    """
    n_latents = len(atoms)
    if n_latents < 2:
        return atoms.new_zeros(())
    # Not from torch's own generator: dictionaries that train together share it.
    order = torch.randperm(n_latents, generator=torch.Generator().manual_seed(step)).to(atoms.device)
    nearest = torch.empty_like(order)
    with torch.no_grad():
        unit = F.normalize(atoms, dim=-1)
        for group in order.tensor_split(math.ceil(n_latents / OVERLAP_GROUP)):
            rows = unit[group]
            nearest[group] = group[(rows @ rows.T).abs_().fill_diagonal_(-1.0).argmax(1)]
    found = F.cosine_similarity(atoms, atoms.index_select(0, nearest), dim=-1).pow(2).sum()
    return shards.reduced(found / (n_latents * shards.size))


def pre_activation_loss(
    x: Float[Tensor, "tokens d_in"],
    weights: Weights,
    thresholds: Float[Tensor, " n_latents"],
    dead: Bool[Tensor, " n_latents"],
) -> Float[Tensor, ""]:
    """Return how far dead latents stay below their thresholds, in units of FVU.

    It is the mean over tokens of the sum over dead latents of ``relu(threshold - pre-activation) |decoder direction| / d_out``.
    Its gradient lowers thresholds and raises pre-activations of dead latents and reaches nothing else; ``x`` and decoder norms
    are constants. Source: the January 2025 update of Anthropic's Transformer Circuits thread.
    """
    rows, shards = dead.nonzero().squeeze(-1), weights.shards
    if len(x) == 0 or shards.total(rows.numel()) == 0:
        return x.new_zeros(())
    some = weights.rows(rows)
    below = (thresholds.index_select(0, rows) - pre_activations(x.detach(), some)).relu()
    return shards.reduced((below.sum(0) @ some.norms().detach()) / (len(x) * weights.unit))


def aux_zipf(
    x: Float[Tensor, "tokens d_in"],
    error: Float[Tensor, "tokens d_out"],
    weights: Weights,
    dead: Bool[Tensor, " n_latents"],
    density: Float[Tensor, " n_latents"],
    tau: float,
    k_aux: int,
    absolute: bool = False,
) -> Float[Tensor, ""]:
    """Return AuxK over dead latents plus AuxK over latents that fire less than ``tau`` times a Zipf law's prediction.

    The law is fitted to ``density``, the running fraction of tokens on which each latent fires, and predicts a density per
    rank. At ``tau = 0`` this is AuxK. Source: the ``aux_zipf_loss`` of Ayonrinde 2024, arXiv:2411.02124, which states its
    purpose; the criterion and the two separate terms are specific to sparsary. In one pool, underused latents, which still
    fire, displace dead ones (stories3M, tau 0.5: 20 % dead with one pool, 12 % with two).
    """
    return auxk(x, error, weights, dead, k_aux) + auxk(x, error, weights, underused(density, tau, absolute) & ~dead, k_aux)
