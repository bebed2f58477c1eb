"""Differences of two models' activations without a dictionary: their mean and principal directions, the floors of a diff."""

import torch
from jaxtyping import Float
from torch import Tensor

from ...training.activations.architecture import Architecture
from ...training.activations.model import LanguageModel

TOKENS_SHOWN = 10


class Differences:
    """Running mean and covariance of ``x_tuned - x_base``."""

    def __init__(self, width: int):
        self.tokens = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def update(self, base: Float[Tensor, "tokens d"], tuned: Float[Tensor, "tokens d"]) -> None:
        """Add tokens."""
        difference = (tuned - base).double().cpu()
        self.tokens += len(difference)
        self.sum += difference.sum(0)
        self.products += difference.T @ difference

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean difference."""
        return (self.sum / self.tokens).float()

    def principal(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Return the variance along each principal direction, largest first, and the directions as rows."""
        mean = self.sum / self.tokens
        covariance = self.products / self.tokens - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        return values.flip(0).clamp_min(0).float(), vectors.T.flip(0).float()


def promoted_tokens(
    model: LanguageModel, directions: Float[Tensor, "n d"], words: list[str]
) -> list[dict[str, list[dict[str, object]]]] | str:
    """Return the tokens whose logits each direction raises and lowers most through final norm and unembedding (logit lens).

    Returns:
        ``promoted`` and ``suppressed`` with the effect on the logit, or the reason why there is no logit lens.
    """
    try:
        anatomy = Architecture(model)
    except ValueError as error:
        return str(error)
    if anatomy.d_model != directions.shape[-1]:
        return f"the hook is {directions.shape[-1]} wide, the residual stream {anatomy.d_model}"
    readers = anatomy.final_norm.fold(anatomy.W_U).float()
    effects = directions.to(readers) @ readers.T
    # Some models' embeddings are padded beyond their tokenizer's last token.
    effects = (effects - effects.mean(-1, keepdim=True))[:, : len(words)]
    found = []
    for row in effects:
        sides = {}
        for name, signed in (("promoted", row), ("suppressed", -row)):
            best = signed.topk(min(TOKENS_SHOWN, len(words)))
            sides[name] = [{"token": words[i], "effect": float(f"{float(row[i]):.5g}")} for i in best.indices.tolist()]
        found.append(sides)
    return found
