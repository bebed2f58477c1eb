"""Use of a dictionary on a sample, and its figures before and after training on the same held-out tokens."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.metrics import RunningFvu
from ..activations.stream import ActivationBatch, ActivationStream
from ..recipe import Recipe

log = logging.getLogger(__name__)
# Held-out tokens on which a dictionary is judged before and after its training.
JUDGED_TOKENS = 16_384
# Tokens encoded at once.
ROWS = 2048


def judged_on(stream: ActivationStream, recipe: Recipe) -> tuple[ActivationBatch, str]:
    """Return the activations that a dictionary is judged on before and after training, and what they are."""
    tokens = min(JUDGED_TOKENS, recipe.eval_tokens)
    heldout = stream.heldout(tokens)
    return (stream.start_sample(tokens), "training") if heldout is None else (heldout, "held-out")


def after_training(
    dictionary: SparseDictionary, record: dict[str, Any], stream: ActivationStream, recipe: Recipe
) -> dict[str, Any]:
    """Return the record of a start with the figures of the trained dictionary on the same tokens."""
    training = dictionary.training
    record = record | {"after": figures(dictionary.eval(), judged_on(stream, recipe)[0])}
    dictionary.train(training)
    log.info("%s: after training: %s", recipe.out_dir, told(record, "after"))
    return record


def told(record: dict[str, Any], when: str) -> str:
    """Return the figures of a record at one time, as text."""
    fvu, l0 = record[when]["fvu"], record[when]["l0"]
    return f"fvu {fvu:.4g}, l0 {l0:.4g} on {record['judged_tokens']:,} {record['judged_on']} tokens."


@torch.no_grad()
def figures(dictionary: SparseDictionary, batch: ActivationBatch) -> dict[str, float]:
    """Return fvu and l0 of a dictionary in eval mode."""
    running, active = RunningFvu(dictionary.d_out, dictionary.device), 0
    for x, y in _pieces(batch, dictionary.device):
        code = dictionary.encode(x)
        active += int((code.values != 0).sum())
        running.update(y, dictionary.decode(code, x))
    return {"fvu": float(running.value()), "l0": active / len(batch.x)}


def _pieces(batch: ActivationBatch, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    targets = batch.x if batch.target is None else batch.target
    for x, y in zip(batch.x.split(ROWS), targets.split(ROWS), strict=True):
        yield x.to(device), y.to(device)


@dataclass(frozen=True)
class Usage:
    """Use of a dictionary's latents on a sample: firing counts, mean l0, and a typical smallest active value."""

    firings: Int[Tensor, " n_latents"]
    tokens: int
    smallest: float

    @property
    def l0(self) -> float:
        return float(self.firings.sum()) / max(self.tokens, 1)

    @staticmethod
    @torch.no_grad()
    def of(dictionary: SparseDictionary, x: Float[Tensor, "tokens d_in"]) -> "Usage":
        """Return the usage of a dictionary in eval mode."""
        firings, smallest = torch.zeros(dictionary.n_latents, dtype=torch.long), []
        for rows in x.split(ROWS):
            code = dictionary.code_of(dictionary.normalised(rows))
            firings += code.firings(dictionary.n_latents).cpu()
            active = code.values[code.values > 0]
            # A tenth of the active values are below.
            smallest += [float(active.kthvalue(max(1, len(active) // 10)).values)] if len(active) else []
        return Usage(firings, len(x), sum(smallest) / max(len(smallest), 1))


@dataclass(frozen=True)
class SampleRows:
    """Rows of a sample in pieces, which can be passed over several times."""

    x: Float[Tensor, "tokens d_in"]

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_in"]]:
        return iter(self.x.split(ROWS))
