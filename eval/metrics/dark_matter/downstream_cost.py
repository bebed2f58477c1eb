"""Cost of each error part: the language model's loss with the linear or the nonlinear error added back.

For each part, the report gives the fraction of the cross-entropy increase that it recovers, alongside its fraction of the
error's variance and norm. The two loss fractions need not sum to 1, because the model is not linear. Intervals are bootstraps
over documents, because tokens within a document are dependent. Source: Engels, Riggs and Tegmark 2024, arXiv:2410.14670.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...bootstrap import ByDocument, Totals
from ...undefined import Undefined
from ..model_outputs import Predictions

PARTS = ("linear", "nonlinear")
SIZES = tuple(f"{figure} {part}".strip() for figure in ("square", "norm") for part in ("", *PARTS))
LOSSES = ("count", "ce clean", *(f"{figure} {name}" for figure in ("ce", "kl") for name in ("spliced", *PARTS)))

Statistic = Callable[[Totals], np.ndarray]


class Shares:
    """Per-document losses of the clean and spliced model and with an error part added back, and norms of the parts."""

    def __init__(self) -> None:
        # Sizes cover all replaced tokens, losses only counted predictions.
        self.sizes, self.losses = ByDocument(SIZES), ByDocument(LOSSES)

    def update_errors(
        self,
        linear: Float[Tensor, "tokens d_out"],
        nonlinear: Float[Tensor, "tokens d_out"],
        documents: Int[np.ndarray, " tokens"],
    ) -> None:
        parts = {"": linear + nonlinear, "linear": linear, "nonlinear": nonlinear}
        values: dict[str, np.ndarray] = {}
        for name, part in parts.items():
            square = part.double().pow(2).sum(-1).cpu().numpy()
            values |= {f"square {name}".strip(): square, f"norm {name}".strip(): np.sqrt(square)}
        self.sizes.update(documents, values)

    def update_losses(
        self,
        clean_loss: Float[Tensor, " predictions"],
        found: Mapping[str, Predictions],
        documents: Int[np.ndarray, " predictions"],
    ) -> None:
        """Add predictions with ``spliced`` reconstructions, and with the ``linear`` or ``nonlinear`` error added back."""
        values = {"count": torch.ones_like(clean_loss), "ce clean": clean_loss}
        for name in ("spliced", *PARTS):
            values |= {f"ce {name}": found[name].loss, f"kl {name}": found[name].kl}
        self.losses.update(documents, {name: value.double().cpu().numpy() for name, value in values.items()})

    def report(self) -> dict[str, Any]:
        """Return flat entries; all except the document count come with ``_low`` and ``_high``."""
        of_losses: dict[str, Statistic] = {}
        of_sizes: dict[str, Statistic] = {}
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            of_losses[f"ce_spliced_with_{part}_error"] = lambda s, part=part: s[f"ce {part}"] / s["count"]
            of_losses[f"ce_recovered_by_{part}_error"] = lambda s, part=part: (
                (s["ce spliced"] - s[f"ce {part}"]) / (s["ce spliced"] - s["ce clean"])
            )
            of_losses[f"kl_recovered_by_{part}_error"] = lambda s, part=part: 1 - s[f"kl {part}"] / s["kl spliced"]
            # With one part added back, the remaining error is the other part.
            of_sizes[f"variance_recovered_by_{part}_error"] = lambda s, other=other: 1 - s[f"square {other}"] / s["square"]
            of_sizes[f"error_norm_share_of_{part}"] = lambda s, part=part: s[f"norm {part}"] / s["norm"]
        entries: dict[str, Any] = {}
        for figures, statistics in ((self.losses, of_losses), (self.sizes, of_sizes)):
            entries |= _values(figures, statistics) | figures.intervals(statistics)
        return entries | {"share_documents": len(self.sizes.rows)}


def _values(figures: ByDocument, statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    """Return every statistic over all documents together."""
    table = np.stack([figures.rows[document] for document in sorted(figures.rows)]) if figures.rows else None
    if table is None:
        return dict.fromkeys(statistics, Undefined("no token was scored"))
    totals = dict(zip(figures.names, table.sum(0, keepdims=True).T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: float(statistic(totals)[0]) for name, statistic in statistics.items()}
    why = Undefined("there is no error, or it costs the model nothing, so that it has no shares")
    return {name: value if np.isfinite(value) else why for name, value in found.items()}
