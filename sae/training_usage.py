"""Latent usage at the end of training: ``usage.safetensors`` next to a dictionary's weights.

The file holds one tensor, ``silent_for`` (int64, one entry per latent): tokens trained on since the latent last fired. The
file's metadata, and ``training_usage`` in ``dictionary.json``, hold ``dead_after_tokens`` and ``tokens``. Weights do not depend
on it: readers that do not know the file ignore it, and a checkpoint without it has no usage.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .files import read_tensors, write_tensors

USAGE_FILE = "usage.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingUsage:
    """Tokens since each latent last fired in training, under the training-time selection rather than eval thresholds.

    >>> usage = TrainingUsage(torch.tensor([0, 500, 3000]), dead_after_tokens=1000, tokens=3000)
    >>> usage.dead.tolist(), usage.window_tokens, round(usage.dead_fraction, 3)
    ([False, False, True], 1000, 0.333)

    Args:
        silent_for: Tokens since each latent last fired, counted in whole batches.
        dead_after_tokens: Number of silent tokens after which the run counted a latent as dead.
        tokens: Tokens trained on.
    """

    silent_for: Int[Tensor, " n_latents"]
    dead_after_tokens: int
    tokens: int

    @property
    def window_tokens(self) -> int:
        """Window of ``dead``: ``dead_after_tokens``, or the whole training run if shorter."""
        return max(1, min(self.dead_after_tokens, self.tokens))

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Mask of latents that were silent on the last ``window_tokens`` tokens of training."""
        return self.silent_for >= self.window_tokens

    @property
    def dead_fraction(self) -> float:
        """Fraction of latents that were silent on the last ``window_tokens`` tokens of training."""
        return float(self.dead.double().mean())

    @property
    def about(self) -> dict[str, int]:
        """Entry of ``dictionary.json`` that describes the usage."""
        return {"dead_after_tokens": self.dead_after_tokens, "tokens": self.tokens}

    def save(self, directory: Path) -> None:
        """Write ``usage.safetensors`` atomically."""
        metadata = {key: str(value) for key, value in self.about.items()}
        write_tensors(directory / USAGE_FILE, {"silent_for": self.silent_for.long()}, metadata, sealed=True)


def load_training_usage(directory: Path, about: Mapping[str, int] | None, n_latents: int) -> TrainingUsage | None:
    """Return a checkpoint's usage, or ``None``; logs a warning if it should exist but is missing or does not match.

    Args:
        directory: Checkpoint directory.
        about: ``training_usage`` in its ``dictionary.json``; ``None`` if it was saved without usage.
        n_latents: Latents of the dictionary.
    """
    if about is None:
        return None
    path = directory / USAGE_FILE
    try:
        tensors, metadata = read_tensors(path)
        silent_for = tensors["silent_for"]
        written = {key: int(metadata[key]) for key in ("dead_after_tokens", "tokens")}
    except (ValueError, KeyError) as error:
        log.warning("%s: dead latents in training are not known (%s). No other figure is affected.", path, error)
        return None
    if silent_for.shape != (n_latents,) or silent_for.dtype != torch.long or written != dict(about):
        log.warning("%s: saved at another step than the weights: a save was interrupted. The file is ignored.", path)
        return None
    return TrainingUsage(silent_for, **written)
