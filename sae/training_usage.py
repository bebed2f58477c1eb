"""How long each latent had been silent when training ended: ``usage.safetensors`` beside a dictionary's weights.

The file holds one tensor, ``silent_for`` (int64, one entry per latent): tokens trained on since the latent last fired. Its
header's metadata, and ``training_usage`` in ``dictionary.json``, hold ``dead_after_tokens`` and ``tokens``. Weights do not
depend on it: readers that do not know the file pass it over, and a checkpoint without it has no usage.
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
    """Tokens since each latent last fired, as training left it. Latents were chosen as in training, not by thresholds.

    >>> usage = TrainingUsage(torch.tensor([0, 500, 3000]), dead_after_tokens=1000, tokens=3000)
    >>> usage.dead.tolist(), usage.window_tokens, round(usage.dead_fraction, 3)
    ([False, False, True], 1000, 0.333)

    Args:
        silent_for: Tokens since each latent last fired, counted in whole batches.
        dead_after_tokens: A latent silent for so many tokens was dead to the run.
        tokens: Tokens trained on.
    """

    silent_for: Int[Tensor, " n_latents"]
    dead_after_tokens: int
    tokens: int

    @property
    def window_tokens(self) -> int:
        """The window of ``dead``: ``dead_after_tokens``, or the whole training where that was shorter."""
        return max(1, min(self.dead_after_tokens, self.tokens))

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Latents that were silent on the last ``window_tokens`` tokens of the training."""
        return self.silent_for >= self.window_tokens

    @property
    def dead_fraction(self) -> float:
        """Share of latents that were silent on the last ``window_tokens`` tokens of the training."""
        return float(self.dead.double().mean())

    @property
    def about(self) -> dict[str, int]:
        """What ``dictionary.json`` says of it."""
        return {"dead_after_tokens": self.dead_after_tokens, "tokens": self.tokens}

    def save(self, directory: Path) -> None:
        """Write ``usage.safetensors``, whole or not at all."""
        metadata = {key: str(value) for key, value in self.about.items()}
        write_tensors(directory / USAGE_FILE, {"silent_for": self.silent_for.long()}, metadata)


def load_training_usage(directory: Path, about: Mapping[str, int] | None, n_latents: int) -> TrainingUsage | None:
    """Return the usage that belongs to a checkpoint; ``None``, with a warning, where it should be there and is not.

    Args:
        directory: The checkpoint's.
        about: ``training_usage`` of its ``dictionary.json``; ``None`` of a checkpoint that was saved without.
        n_latents: Of the dictionary.
    """
    if about is None:
        return None
    path = directory / USAGE_FILE
    try:
        tensors, metadata = read_tensors(path)
        silent_for = tensors["silent_for"]
        written = {key: int(metadata[key]) for key in ("dead_after_tokens", "tokens")}
    except (ValueError, KeyError) as error:
        log.warning("%s: the latents' silence in training is not known (%s). Nothing else depends on it.", path, error)
        return None
    if silent_for.shape != (n_latents,) or silent_for.dtype != torch.long or written != dict(about):
        log.warning("%s: of another state of this training than the weights: a save was interrupted. Left aside.", path)
        return None
    return TrainingUsage(silent_for, **written)
