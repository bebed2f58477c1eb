"""Surprisal scoring: how much less a language model is surprised by a latent's contexts if it has read the explanation.

Every window's loss is taken behind the explanation and behind a neutral one. The score is the AUROC of the difference between
windows in which the latent fires and windows in which it does not: 0.5 is chance. The model only continues text, so a base
model will do; it must give losses, as local models do.

Source: surprisal scoring of Paulo et al. 2024, arXiv:2410.13928.
"""

import numpy as np

from .llm_client import Chat
from .scores import activation_auroc
from .windows import ActivatingWindow

NEUTRAL = "anything at all"


def surprisal(
    text: str, positive: list[ActivatingWindow], negative: list[ActivatingWindow], scorer: Chat
) -> tuple[float, dict[str, float | int]] | str:
    """Return the score of an explanation with its details, or the reason why there is none.

    Args:
        text: The explanation.
        positive: Windows in which the latent fires.
        negative: Windows in which it does not.
    """
    gains = []
    for windows in (positive, negative):
        found = [_gain(text, window.text(), scorer) for window in windows]
        known = [gain for gain in found if gain is not None]
        if not known:
            return "the scorer gives no losses of text, as chat endpoints do not: give a local --explainer, without --address"
        gains.append(np.array(known))
    with_it, without = gains
    details: dict[str, float | int] = {
        "gain": float(with_it.mean()),
        "gain_without": float(without.mean()),
        "positives": len(with_it),
        "negatives": len(without),
    }
    return activation_auroc(with_it, without), details


def _gain(explanation: str, text: str, scorer: Chat) -> float | None:
    """Return by how many nats per token the explanation lowers the loss of a text, against a neutral one."""
    losses = [scorer.loss(f"A text that is about {about}:\n", text) for about in (NEUTRAL, explanation)]
    before, after = losses
    return None if before is None or after is None else before - after
