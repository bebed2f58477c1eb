"""Edges of an attribution graph, computed for some targets and one layer at a time, within a bound on memory."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .local_replacement_model import LocalReplacement, Slopes

# Entries of the largest tensor that a graph makes: 4 GiB in float32.
MAX_NUMBERS = 2**30


class Edges:
    """Edges into some targets from every active latent, error and token, filled by ``LocalReplacement.slopes``.

    Gradients of a layer are turned into edges when the backward pass reaches it, so that those of one layer are held at a time.
    """

    def __init__(self, local: LocalReplacement, n_targets: int):
        self.local = local
        self.values = local.errors.new_zeros(n_targets, n_sources(local))

    def visit(self, layer: int, grads: Float[Tensor, "targets positions d_model"]) -> None:
        """Add the edges from what is written to the layer's MLP output."""
        local, active = self.local, self.local.active
        for earlier, position, which in active.groups():
            if layer in local.replacement.written(earlier):
                atoms = local.replacement.writes_into(earlier, active.latents[which], layer) * active.values[which, None]
                self.values[:, which] += grads[:, position] @ atoms.T
        start = len(active) + layer * len(local.token_ids)
        errors = slice(start, start + len(local.token_ids))
        self.values[:, errors] = torch.einsum("btm,tm->bt", grads, local.errors[layer])

    def whole(self, slopes: Slopes) -> Float[Tensor, "targets sources"]:
        """Return all edges, those from tokens included."""
        self.values[:, -len(self.local.token_ids) :] = torch.einsum("btm,tm->bt", slopes.embeddings, self.local.embeddings)
        return self.values


def n_sources(local: LocalReplacement) -> int:
    """Return the number of active latents, errors and tokens."""
    return len(local.active) + (local.anatomy.n_layers + 1) * len(local.token_ids)


def targets_within(local: LocalReplacement, batch_targets: int, max_numbers: int) -> int:
    """Return the number of targets whose edges are computed at once, with tensors of at most ``max_numbers`` entries."""
    # One column more for constants.
    return max(1, min(batch_targets, max_numbers // max(_numbers_per_target(local), n_sources(local) + 1)))


def latents_within(local: LocalReplacement, n_targets: int, max_latents: int | None, max_numbers: int) -> int:
    """Return the number of latents of a graph, of which no tensor has more than ``max_numbers`` entries.

    With L layers, T positions, a active latents and K targets, m latents take (m + (L + 1) T + K)^2 numbers in the adjacency
    matrix and (m + K) (a + (L + 1) T) in its rows while latents are chosen. ``max_latents`` of None is as many as fit.

    Raises:
        ValueError: If not one latent fits, or fewer than ``max_latents``.
    """
    positions, everything = len(local.token_ids), len(local.active)
    others = (local.anatomy.n_layers + 1) * positions + n_targets
    fitting = min(math.isqrt(max_numbers) - others, max_numbers // n_sources(local) - n_targets)
    if fitting < min(1, everything) or _numbers_per_target(local) > max_numbers:
        needed = max((others + 1) ** 2, (n_targets + 1) * n_sources(local), _numbers_per_target(local))
        raise ValueError(
            f"prompt: expected a graph with tensors of at most {max_numbers:,} numbers (max_numbers), got a prompt of "
            f"{positions} positions with {everything:,} active latents, which takes {needed:,} for a single latent. Give a "
            "shorter prompt, or a larger max_numbers if memory allows it."
        )
    if max_latents is not None and fitting < min(max_latents, everything):
        raise ValueError(
            f"max_latents: expected at most {fitting:,}, so that no tensor has more than {max_numbers:,} numbers "
            f"(max_numbers) at {positions} positions with {everything:,} active latents, got {max_latents:,}. Give "
            "a smaller one or a shorter prompt."
        )
    return min(everything, fitting if max_latents is None else max_latents)


def _numbers_per_target(local: LocalReplacement) -> int:
    anatomy = local.anatomy
    return len(local.token_ids) * max(anatomy.d_model, anatomy.n_heads * anatomy.d_head)
