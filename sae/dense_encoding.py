"""Dense codes of the encoders without a budget: rectified, gated and thresholded pre-activations, with their gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dense_code import DenseCode, DenseInputs, Owed, PreActivationGrad, add_columns_, kept_scores, mask_
from .kept_memory import kept_memory
from .sparse_grad import SparseGrad, ledger_of
from .threshold_window import Window, columns_of, count_above


@dataclass(frozen=True)
class Positive:
    """Code of ``relu``, and the sum of each latent's values, through which penalties reach the encoder without a matrix."""

    code: DenseCode
    mass: Float[Tensor, " n_latents"]


def positive(inputs: DenseInputs) -> Positive:
    """Return the code that keeps every positive pre-activation."""
    owed = Owed()
    token, matrix, mass, fired = _Positive.apply(*inputs.differentiable, owed, ledger_of(inputs.W))  # pyright: ignore[reportGeneralTypeIssues]
    return Positive(DenseCode(matrix, fired, token, owed), mass)


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, shift: Tensor | None, owed: Owed, ledger: SparseGrad | None
    ) -> tuple[Tensor, ...]:
        matrix = kept_scores(x, W, b).relu_()
        fired = count_above(matrix, 0.0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fired)
        ctx.save_for_backward(x, W, matrix)
        ctx.owed, ctx.ledger = owed, ledger
        return matrix.new_zeros(()), matrix, matrix.sum(0), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (_, to_matrix, to_mass, _), matrix, source = grads, ctx.saved_tensors[2], PreActivationGrad(ctx)
        for some, gradient in source.tiles():
            ctx.owed.add_(some, gradient, beta=0)
            add_columns_(gradient, some, to_matrix, to_mass)
            source.take(some, mask_(gradient, matrix[:, some]))
        ctx.owed.factors.clear()
        return *source.results(), None, None


@dataclass(frozen=True)
class GatedPositive:
    """Codes of a gated encoder: its magnitudes and its gate, and the sum of each gate's values."""

    code: DenseCode
    gate: DenseCode
    gate_mass: Float[Tensor, " n_latents"]


def gated_positive(
    inputs: DenseInputs, r_mag: Float[Tensor, " n_latents"], b_mag: Float[Tensor, " n_latents"]
) -> GatedPositive:
    """Return the gate ``relu(W x + b)`` and, where it is open, ``relu(exp(r_mag) W x + b_mag)``."""
    owed = Owed(), Owed()
    found = _Gated.apply(*inputs.differentiable, r_mag, b_mag, *owed, ledger_of(inputs.W))
    token, token_of_gate, matrix, gate, gate_mass, fired, opened = found  # pyright: ignore[reportGeneralTypeIssues]
    return GatedPositive(DenseCode(matrix, fired, token, owed[0]), DenseCode(gate, opened, token_of_gate, owed[1]), gate_mass)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        shift: Tensor | None,
        r_mag: Tensor,
        b_mag: Tensor,
        owed: Owed,
        owed_by_gate: Owed,
        ledger: SparseGrad | None,
    ) -> tuple[Tensor, ...]:
        gate, scale = kept_scores(x, W, b).relu_(), r_mag.exp()
        matrix = kept_memory.take(len(x), len(W), W)
        torch.addcmul(b_mag if b is None else b_mag - scale * b, gate, scale, out=matrix)
        mask_(matrix.relu_(), gate)
        fired, opened = count_above(matrix, 0.0), count_above(gate, 0.0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fired, opened)
        ctx.save_for_backward(x, W, matrix, gate, scale, torch.zeros_like(scale) if b is None else b)
        ctx.owed, ctx.owed_by_gate, ctx.ledger = owed, owed_by_gate, ledger
        zero = matrix.new_zeros(())
        return zero, zero.clone(), matrix, gate, gate.sum(0), fired, opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, _, to_matrix, to_gate, to_mass, _, _ = grads
        matrix, gate, scale, b = ctx.saved_tensors[2:]
        source, to_b_mag, along = PreActivationGrad(ctx), torch.empty_like(scale), torch.empty_like(scale)
        for some, gradient in source.tiles():
            ctx.owed.add_(some, gradient, beta=0)
            add_columns_(gradient, some, to_matrix, None)
            mask_(gradient, matrix[:, some])
            to_b_mag[some] = gradient.sum(0)
            # Memory of another tile.
            room = kept_memory.take(len(gradient), gradient.shape[1], gradient)
            along[some] = torch.mul(gradient, gate[:, some], out=room).sum(0)
            gradient *= scale[some]
            ctx.owed_by_gate.add_(some, gradient)
            add_columns_(gradient, some, to_gate, to_mass)
            source.take(some, mask_(gradient, gate[:, some]))
        ctx.owed.factors.clear()
        ctx.owed_by_gate.factors.clear()
        # Magnitudes do not depend on the gate's bias.
        to_r_mag, biased = scale * (along - b * to_b_mag), -scale * to_b_mag
        return *source.results(biased), to_r_mag, to_b_mag, None, None, None


def jumped(inputs: DenseInputs, scores: Float[Tensor, "tokens n_latents"], near: Window) -> DenseCode:
    """Return the code that keeps pre-activations above their thresholds; ``scores`` are its memory.

    ``fired`` of the code is differentiable in the thresholds.
    """
    owed = Owed()
    token, matrix, fired = _Jumped.apply(  # pyright: ignore[reportGeneralTypeIssues]
        *inputs.differentiable, near.theta, [scores], near, owed, ledger_of(inputs.W)
    )
    return DenseCode(matrix, fired, token, owed)


class _Jumped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        shift: Tensor | None,
        theta: Tensor,
        scores: list[Tensor],
        near: Window,
        owed: Owed,
        ledger: SparseGrad | None,
    ) -> tuple[Tensor, ...]:
        matrix, fired = scores[0], torch.empty_like(theta)
        for some in columns_of(matrix):
            room = kept_memory.take(len(matrix), some.stop - some.start, matrix)
            fires = torch.gt(matrix[:, some], theta[some], out=room)
            fired[some] = fires.sum(0)
            matrix[:, some] *= fires
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W, matrix)
        ctx.near, ctx.owed, ctx.ledger = near, owed, ledger
        return matrix.new_zeros(()), matrix, fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, to_matrix, to_fired = grads
        matrix, source, near = ctx.saved_tensors[2], PreActivationGrad(ctx), ctx.near
        sums = torch.empty_like(near.counts)
        for some, gradient in source.tiles():
            ctx.owed.add_(some, gradient, beta=0)
            add_columns_(gradient, some, to_matrix, None)
            sums[some] = near.sums(gradient, some)
            # Thresholds are positive, so that a value above one is too.
            source.take(some, mask_(gradient, matrix[:, some]))
        ctx.owed.factors.clear()
        return *source.results(), near.to_theta(sums, to_fired), None, None, None, None
