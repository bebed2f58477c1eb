"""Benchmark of training several dictionaries on one activation stream, relative to training one."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .training_time import seconds_per_step


@dataclass(frozen=True)
class GridShape:
    """Sizes of a grid benchmark; ``steps`` are timed after as many warm-up steps."""

    d: int
    n_latents: int
    k: int
    batch_tokens: int
    steps: int


SHAPES = {
    "tiny": GridShape(64, 256, 8, 512, 100),
    "small": GridShape(128, 1024, 16, 2048, 30),
    "large": GridShape(768, 4096, 32, 2048, 2),
}


def bench_grid(members: int = 8, rounds: int = 5, shapes: dict[str, GridShape] = SHAPES) -> dict[str, Any]:
    """Measure seconds per step of one dictionary and of ``members`` together, and their ratio, for every shape.

    The two alternate, so that background load affects both. Seconds are medians over rounds; the ratio is the median of the
    per-round ratios. The time covers reading, steps, and logging, but neither start-up nor saving.
    """
    return {
        "members": members,
        "threads": torch.get_num_threads(),
        "shapes": {name: asdict(shape) | _measure(shape, members, rounds) for name, shape in shapes.items()},
    }


def _measure(shape: GridShape, members: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    # Variance proportional to 1 / rank, as in real activations.
    scales = torch.arange(1, shape.d + 1).float().rsqrt()
    batches = [torch.randn(shape.batch_tokens, shape.d, generator=generator) * scales for _ in range(4)]
    one, together = [], []
    for _ in range(rounds):
        one.append(seconds_per_step(_recipe(shape, 1), batches))
        together.append(seconds_per_step(_recipe(shape, members), batches))
    ratios = [b / a for a, b in zip(one, together, strict=True)]
    medians = {"seconds_one": statistics.median(one), "seconds_all": statistics.median(together)}
    return medians | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def _recipe(shape: GridShape, members: int) -> dict[str, Any]:
    encoder = {"name": "topk", "k": shape.k}
    return {
        "harvest": {"hooks": ["bench:out"]},
        "dictionary": {"hook": "bench:out", "n_latents": shape.n_latents, "encoder": encoder},
        "tokens": 2 * shape.steps * shape.batch_tokens,
        "batch_tokens": shape.batch_tokens,
        "log_every": shape.steps,
        "grid": {"seed": list(range(members))},
    }
