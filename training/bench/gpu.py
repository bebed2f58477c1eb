"""Benchmark of the TopK training step on a CUDA GPU, in bf16 autocast, relative to its encoder matrix product."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ...sae import SAE
from ...sae.encoders.topk import TopK
from ..activations.stream import ActivationBatch
from ..fused_adam import build_optimizer
from ..objective import AuxSettings, LatentUsage, Objective
from ..phases import Phases
from ..recipe import check_recipe
from .worker import BATCHES, random_activations

WARMUP_STEPS = 5


def bench_gpu_step(
    tokens: int = 8192, d: int = 4096, n_latents: int = 131072, k: int = 64, steps: int = 30, optimizer: str = "auto"
) -> dict[str, Any]:
    """Measure the speed of the TopK training step, absolute and relative to the encoder product in bf16, in alternation.

    A step is forward, backward, projection, clipping, Adam, and decoder normalization; ``optimizer`` is the recipe key.
    Weights and moments are float32. Seconds are medians of CUDA event times; the share is the median over pairs.
    ``peak_bytes`` includes the product's output buffer (``tokens * n_latents`` values in bf16) and the bf16 weights.

    Raises:
        ValueError: If there is no CUDA GPU, or too little GPU memory.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "bench gpu: needs a CUDA GPU, and torch finds none. Install a CUDA build of torch on a machine with one."
        )
    try:
        return _measure(tokens, d, n_latents, k, steps, optimizer)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties().total_memory
        raise ValueError(
            f"bench gpu: {tokens}x{d}x{n_latents}x{k} does not fit into {total >> 30} GB. Lower n_latents."
        ) from None


def _measure(tokens: int, d: int, n_latents: int, k: int, steps: int, optimizer: str) -> dict[str, Any]:
    device = torch.device("cuda")
    step = _step(tokens, d, n_latents, k, optimizer, device)
    x, W = (torch.randn(rows, d, dtype=torch.bfloat16, device=device) for rows in (tokens, n_latents))
    out = torch.empty(tokens, n_latents, dtype=torch.bfloat16, device=device)
    for _ in range(WARMUP_STEPS):
        torch.mm(x, W.T, out=out)
        step()
    torch.cuda.reset_peak_memory_stats()
    # Events are read after the loop, so that nothing synchronizes within it.
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(steps)]
    for before, between, after in marks:
        before.record()
        torch.mm(x, W.T, out=out)
        between.record()
        step()
        after.record()
    torch.cuda.synchronize()
    product = [before.elapsed_time(between) / 1000 for before, between, _ in marks]
    whole = [between.elapsed_time(after) / 1000 for _, between, after in marks]
    return {
        "device": torch.cuda.get_device_name(),
        "tokens": tokens,
        "d": d,
        "n_latents": n_latents,
        "k": k,
        "optimizer": optimizer,
        "tokens_per_second": tokens / statistics.median(whole),
        "step_seconds": statistics.median(whole),
        "product_seconds": statistics.median(product),
        "share_of_product_speed": statistics.median(p / s for p, s in zip(product, whole, strict=True)),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _step(tokens: int, d: int, n_latents: int, k: int, optimizer: str, device: torch.device) -> Callable[[], None]:
    """Return a function that runs one training step."""
    encoder = {"name": "topk", "k": k}
    values = {
        "harvest": {"hooks": ["activations:out"]},
        "dictionary": {"hook": "activations:out", "n_latents": n_latents, "encoder": encoder},
        "tokens": tokens,
        "batch_tokens": tokens,
        "optimizer": optimizer,
        "out_dir": "nowhere",
    }
    recipe = check_recipe(values, "bench gpu")
    torch.manual_seed(0)
    with device:
        dictionary = SAE(d, n_latents, TopK(k))
    update = build_optimizer(dictionary, Phases(dictionary, recipe), recipe)
    objective = Objective(dictionary, torch.tensor(float(d)), AuxSettings(recipe.auxk_weight, max(1, d // 2))).to(device)
    dictionary.train()
    # No latent is dead, so AuxK is skipped.
    dead = torch.zeros(n_latents, dtype=torch.bool, device=device)
    usage = LatentUsage(dead, torch.full((n_latents,), k / n_latents, dtype=torch.float64, device=device))
    generator = torch.Generator().manual_seed(0)
    batches = [ActivationBatch(random_activations(tokens, d, generator).to(device)) for _ in range(BATCHES)]

    def step() -> None:
        batches.append(batches.pop(0))
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = objective(batches[0], usage)
        loss.backward()
        update.step()
        update.zero_grad()

    return step
