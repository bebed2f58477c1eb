"""Which part of the error costs the model how much: the loss with the linear or the nonlinear part put back.

Per part, the share of the cross-entropy increase it takes back, beside its share of the error's variance and norm. The two
shares of the loss need not add up to 1: the model is not linear. Intervals are bootstraps over documents, whose tokens hang
together. Source: Engels, Riggs and Tegmark 2024, arXiv:2410.14670.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .groups import Predictions

DRAWS = 2000
LEVEL = 0.95
PARTS = ("linear", "nonlinear")

Sums = Mapping[str, np.ndarray]


class ByDocument:
    """Sums over tokens of named figures, kept by document."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.sums: dict[str, np.ndarray] = {}

    def update(self, figures: Mapping[str, Float[Tensor, " tokens"]], documents: Int[np.ndarray, " tokens"]) -> None:
        numbers, inverse = np.unique(documents, return_inverse=True)
        for number in numbers.tolist():
            self.rows.setdefault(number, len(self.rows))
        places = np.array([self.rows[number] for number in numbers.tolist()], dtype=np.int64)[inverse]
        for name, figure in figures.items():
            held = self.sums.get(name, np.zeros(0))
            held = np.concatenate([held, np.zeros(len(self.rows) - len(held))])
            self.sums[name] = held + np.bincount(places, figure.double().cpu().numpy(), len(self.rows))

    def totals(self) -> dict[str, np.ndarray]:
        """One number per name."""
        return {name: np.array([values.sum()]) for name, values in self.sums.items()}

    def resampled(self, draws: int = DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
        """The same sums over documents drawn with replacement, so many times."""
        count, random = len(self.rows), np.random.default_rng(seed)
        if not count:
            return {}
        table = np.stack([np.pad(values, (0, count - len(values))) for values in self.sums.values()], axis=1)
        # One draw at a time: the counts of all would be as many as draws times documents.
        sums = np.stack([random.multinomial(count, np.full(count, 1 / count)) @ table for _ in range(draws)])
        return dict(zip(self.sums, sums.T, strict=True))


def estimate(figures: ByDocument, statistics: Mapping[str, Callable[[Sums], np.ndarray]]) -> dict[str, float | None]:
    """Every statistic and, as ``_low`` and ``_high``, its 95 % interval over documents.

    A statistic is computed from sums, elementwise; what is not finite is ``None``, and so is the interval of one document.
    """
    totals, resampled = figures.totals(), figures.resampled()
    entries: dict[str, float | None] = {}
    for name, statistic in statistics.items():
        value = low = high = None
        with np.errstate(divide="ignore", invalid="ignore"):
            if totals:
                found = float(statistic(totals)[0])
                value = found if np.isfinite(found) else None
            if len(figures.rows) > 1 and value is not None:
                drawn = statistic(resampled)
                drawn = drawn[np.isfinite(drawn)]
                tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
                low, high = (float(end) for end in np.quantile(drawn, tails)) if len(drawn) else (None, None)
        entries |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return entries


class Shares:
    """Losses and norms of the clean model, of one on reconstructions, and of that with a part of the error put back."""

    def __init__(self) -> None:
        self.figures = ByDocument()
        self.predictions = 0

    def update_errors(
        self,
        linear: Float[Tensor, "tokens d_out"],
        nonlinear: Float[Tensor, "tokens d_out"],
        documents: Int[np.ndarray, " tokens"],
    ) -> None:
        parts = {"": linear + nonlinear, "linear": linear, "nonlinear": nonlinear}
        squares = {name: part.double().pow(2).sum(-1) for name, part in parts.items()}
        self.figures.update({f"square {name}": square for name, square in squares.items()}, documents)
        self.figures.update({f"norm {name}": square.sqrt() for name, square in squares.items()}, documents)

    def update_losses(
        self,
        clean_loss: Float[Tensor, " predictions"],
        found: Mapping[str, Predictions],
        documents: Int[np.ndarray, " predictions"],
    ) -> None:
        """``found``: the model on ``spliced`` reconstructions, and with the ``linear`` or ``nonlinear`` error added back."""
        figures = {"ce clean": clean_loss, "predictions": torch.ones_like(clean_loss)}
        for name in ("spliced", *PARTS):
            figures |= {f"ce {name}": found[name].loss, f"kl {name}": found[name].kl}
        self.figures.update(figures, documents)
        self.predictions += clean_loss.shape[0]

    def report(self) -> dict[str, Any]:
        """Flat entries; every one but counts has ``_low`` and ``_high`` beside it."""
        statistics: dict[str, Callable[[Sums], np.ndarray]] = {}
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            statistics[f"ce_spliced_with_{part}_error"] = lambda s, part=part: s[f"ce {part}"] / s["predictions"]
            statistics[f"ce_recovered_by_{part}_error"] = lambda s, part=part: (
                (s["ce spliced"] - s[f"ce {part}"]) / (s["ce spliced"] - s["ce clean"])
            )
            statistics[f"kl_recovered_by_{part}_error"] = lambda s, part=part: 1 - s[f"kl {part}"] / s["kl spliced"]
            # With one part put back, the error is the other.
            statistics[f"variance_recovered_by_{part}_error"] = lambda s, other=other: 1 - s[f"square {other}"] / s["square "]
            statistics[f"error_norm_share_of_{part}"] = lambda s, part=part: s[f"norm {part}"] / s["norm "]
        known = {name: statistic for name, statistic in statistics.items() if self.predictions or name[:2] not in ("ce", "kl")}
        known = known if "norm " in self.figures.sums else {}
        undefined = {f"{name}{end}": None for name in statistics if name not in known for end in ("", "_low", "_high")}
        return undefined | estimate(self.figures, known) | {"share_documents": len(self.figures.rows)}
