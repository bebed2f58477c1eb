"""Benchmark of a cross-layer transcoder's training step, relative to its encoder products alone."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .training_time import seconds_per_step


@dataclass(frozen=True)
class CrossLayerShape:
    """Sizes of the transcoder; ``n_latents`` and ``k`` are those of each layer. ``steps`` are timed after as many others."""

    layers: int
    d: int
    n_latents: int
    k: int
    batch_tokens: int
    steps: int


SHAPES = {
    "small": CrossLayerShape(4, 128, 1024, 16, 2048, 8),
    "large": CrossLayerShape(6, 512, 4096, 16, 2048, 2),
}
QUICK = {"small": CrossLayerShape(2, 16, 32, 4, 64, 4)}


def bench_cross_layer(rounds: int = 5, shapes: dict[str, CrossLayerShape] = SHAPES) -> dict[str, Any]:
    """Measure seconds per training step of a TopK cross-layer transcoder and of its encoder products, in turn, and their ratio.

    Seconds are medians over rounds; the ratio is the median of the per-round ratios.
    """
    return {
        "threads": torch.get_num_threads(),
        "shapes": {name: asdict(shape) | _measure(shape, rounds) for name, shape in shapes.items()},
    }


def _measure(shape: CrossLayerShape, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    width = shape.layers * shape.d
    # Variance proportional to 1 / rank, as in real activations.
    scales = torch.arange(1, shape.d + 1).float().rsqrt().repeat(shape.layers)
    batches = [
        (
            torch.randn(shape.batch_tokens, width, generator=generator) * scales,
            torch.randn(shape.batch_tokens, width, generator=generator) * scales,
        )
        for _ in range(2)
    ]
    steps, products = [], []
    for _ in range(rounds):
        products.append(_products(shape, batches[0][0]))
        steps.append(seconds_per_step(_recipe(shape), batches))
    ratios = [step / product for step, product in zip(steps, products, strict=True)]
    medians = {"seconds_step": statistics.median(steps), "seconds_products": statistics.median(products)}
    return medians | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def _products(shape: CrossLayerShape, x: Tensor) -> float:
    """Return the seconds of the encoder products of all layers, into memory that is there already."""
    weights = torch.randn(shape.n_latents, shape.d, generator=torch.Generator().manual_seed(1))
    inputs = [part.contiguous() for part in x.split(shape.d, dim=1)]
    scores = torch.empty(shape.batch_tokens, shape.n_latents)
    seconds = []
    for _ in range(1 + max(3, shape.steps)):
        started = time.perf_counter()
        for part in inputs:
            torch.mm(part, weights.T, out=scores)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _recipe(shape: CrossLayerShape) -> dict[str, Any]:
    hooks_in, hooks_out = ([f"layer{i}.mlp:{side}" for i in range(shape.layers)] for side in ("in", "out"))
    return {
        "harvest": {"hooks": [*hooks_in, *hooks_out]},
        "dictionary": {
            "kind": "cross_layer_transcoder",
            "hook_in": hooks_in,
            "hook_out": hooks_out,
            "n_latents": shape.n_latents,
            "encoder": {"name": "topk", "k": shape.k},
        },
        "tokens": 2 * shape.steps * shape.batch_tokens,
        "batch_tokens": shape.batch_tokens,
        "log_every": shape.steps,
    }
