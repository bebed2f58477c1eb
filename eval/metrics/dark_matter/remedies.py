"""Remedies for nonlinear error: better inference, an earlier layer's reconstruction, and a second dictionary of the error.

Source: Engels, Riggs and Tegmark 2024, arXiv:2410.14670, who find little gain from the first, and more from the second.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ....sae import SparseCode, SparseDictionary
from ....sae.pursuit import gradient_pursuit
from ....sae.suggestions import require_choice
from .decomposition import DarkMatter
from .regression import RIDGE, Regression, r2

PARTS = ("error", "linear", "nonlinear")


@torch.no_grad()
def pursued(dictionary: SparseDictionary, y: Float[Tensor, "tokens d_out"], code: SparseCode) -> SparseCode:
    """Return the gradient-pursuit code of targets, with as many steps per token as ``code`` has active latents.

    Decoder directions and bias are the dictionary's own. A token's l0 does not exceed that of ``code``.

    Raises:
        ValueError: If the output depends on the input other than through the latents.
    """
    norms = dictionary.atoms.norm(dim=-1).clamp_min(torch.finfo(dictionary.atoms.dtype).tiny)
    aim = y.to(norms.dtype) / dictionary.out_scale - dictionary.bypass()
    found = gradient_pursuit(aim, dictionary.atoms / norms[:, None], code.l0())
    return SparseCode(found.latents, found.values / norms[found.latents], found.starts)


class HeldOut:
    """Regression fitted on some tokens and scored on others."""

    def __init__(self, n_inputs: int, n_targets: int, device: torch.device | str = "cpu", ridge: float = RIDGE):
        self.fitted, self.scored = Regression(n_inputs, n_targets, device), Regression(n_inputs, n_targets, device)
        self.ridge = ridge

    def residual(self) -> Float[Tensor, " n_targets"] | None:
        """Return the squared residual on the scored tokens, or ``None`` if there were too few tokens to fit on."""
        if self.fitted.tokens <= self.fitted.columns or self.scored.tokens == 0:
            return None
        return self.scored.squared_residual(self.fitted.solve(self.ridge))

    def r2(self, targets: slice = slice(None)) -> float | None:
        """Return the joint R2 of several targets."""
        left = self.residual()
        return None if left is None else r2(float(left[targets].sum()), float(self.scored.deviation()[targets].sum()))


class EarlierLayer:
    """Regressions of the error and its parts on an earlier layer's activation, reconstruction, and linear and nonlinear error.

    The remedy is to add the prediction from the earlier reconstruction: it costs no latents of this layer.
    """

    SOURCES = ("activation", "reconstruction", "linear", "nonlinear")

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu"):
        self.d_out = d_out
        self.regressions = {source: HeldOut(d_in, len(PARTS) * d_out, device) for source in self.SOURCES}

    def update(self, scored: bool, parts: dict[str, Tensor], earlier: dict[str, Tensor]) -> None:
        """Add a batch: ``parts`` of the error and the ``earlier`` layer's tensors, by name. Fit before scoring."""
        targets = torch.cat([parts[part] for part in PARTS], dim=1)
        for source, regression in self.regressions.items():
            (regression.scored if scored else regression.fitted).update(earlier[source], targets)

    def report(self, spread: float) -> dict[str, float | None]:
        """Return R2 by part and source, and fvu after the remedy; ``spread`` is the scored targets' squared deviation."""
        entries: dict[str, float | None] = {}
        for source, regression in self.regressions.items():
            for number, part in enumerate(PARTS):
                columns = slice(number * self.d_out, (number + 1) * self.d_out)
                entries[f"earlier_r2_of_{part}_from_{source}"] = regression.r2(columns)
        left = self.regressions["reconstruction"].residual()
        for part, name in (("error", "fvu_total"), ("nonlinear", "fvu_nonlinear")):
            number = PARTS.index(part)
            known = left is not None and spread > 0
            columns = slice(number * self.d_out, (number + 1) * self.d_out)
            entries[f"earlier_{name}"] = float(left[columns].sum()) / spread if known and left is not None else None
        return entries


class ErrorParts:
    """Iterable over one part of an SAE's error on given activations, as training data for another dictionary.

    It can be iterated again, with the same result, if ``activations`` can.
    """

    def __init__(self, activations: Iterable[Tensor], dictionary: SparseDictionary, matter: DarkMatter, part: str):
        require_choice("part", part, PARTS)
        self.activations, self.dictionary, self.matter, self.part = activations, dictionary, matter, part

    def __iter__(self) -> Iterator[Tensor]:
        for x in self.activations:
            with torch.no_grad():
                part = parts_of(x, x, self.dictionary(x), self.matter)[self.part].float()
            yield part


def parts_of(x: Tensor, y: Tensor, y_hat: Tensor, matter: DarkMatter) -> dict[str, Tensor]:
    """Return the error and its linear and nonlinear parts, in float64."""
    error, linear = y.double() - y_hat.double(), matter.linear_error(x)
    return {"error": error, "linear": linear, "nonlinear": error - linear}
