"""Feature absorption: a label's main latents do not fire where other latents aligned with its probe direction do."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

# SAEBench 0.6: feature_absorption.py.
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
SHARE = 0.4
MOST_ABSORBERS = 3
ROWS_AT_ONCE = 1024


class Absorbed(NamedTuple):
    """Absorption per row: the absorbed fraction, and a mask of rows fully absorbed by one latent."""

    fraction: Float[np.ndarray, " rows"]
    full: np.ndarray  # (rows,) bool


def absorbed(
    x: Float[np.ndarray, "rows d"],
    codes: sparse.csr_array,
    writes: Float[np.ndarray, "n_latents d"],
    direction: Float[np.ndarray, " d"],
    main: Int[np.ndarray, " some"],
) -> Absorbed:
    """Measure absorption on rows that the probe classifies correctly.

    A latent contributes its value times the projection of its decoder direction on the probe's. ``fraction`` is the share
    of up to three other latents (cosine at least 0.1) in their and the main latents' contributions; it is 0 where they make up
    less than 0.4 of the row's projection or the main latents account for all of it. ``full``: no main latent fires, and one
    latent contributes at least 0.4. Source: Chanin et al. 2024, arXiv:2409.14507, in SAEBench's form.

    Args:
        x: Activations; SAEBench leaves the dictionary's bias in, the ``less_bias`` variants subtract it.
        writes: Decoder directions in raw activation units.
        direction: Probe weights.
        main: Latents found for the label.
    """
    unit = direction / max(float(np.linalg.norm(direction)), 1e-12)
    along = writes @ unit
    cosines = along / np.maximum(np.linalg.norm(writes, axis=-1), 1e-12)
    others = cosines >= FRACTION_COSINE
    others[main] = False
    fraction, full = np.zeros(len(x)), np.zeros(len(x), dtype=bool)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        code = codes[rows].toarray()
        parts = code * along
        whole = x[rows] @ unit
        own = parts[:, main].sum(-1)
        rest = np.where(others, np.maximum(parts, 0), 0)
        rest = np.sort(rest, axis=-1)[:, -MOST_ABSORBERS:].sum(-1)
        safe = np.where(whole > 0, whole, 1.0)
        taken = np.minimum(rest, whole - own)
        share = np.where(own <= 0, 1.0, taken / np.where(own > 0, taken + own, 1.0))
        counts = (whole > 0) & (own < whole) & (rest / safe >= SHARE)
        fraction[rows] = np.where(counts, np.clip(share, 0, 1), 0)
        top = parts.argmax(-1)
        here = np.arange(len(parts))
        silent = (code[:, main] < 1e-8).all(-1)
        full[rows] = silent & (whole > 0) & (cosines[top] >= FULL_COSINE) & (parts[here, top] / safe >= SHARE)
    return Absorbed(fraction, full)
