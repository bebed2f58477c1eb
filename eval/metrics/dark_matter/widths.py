"""Error decomposition of several dictionaries at one hook, in shared passes of the model, and its scaling with width.

``evaluate_widths`` reads one half of the held-out documents twice, first to fit the linear maps, then to fit everything that
needs the error parts; the other half is scored. The scaling law, ``fvu = c + a W^m`` with ``m < 0``, is that of Engels, Riggs
and Tegmark 2024, arXiv:2410.14670.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ....sae import SparseDictionary
from ....training.text import Cursor
from ...heldout import EvalData
from ...undefined import settled
from ..base import DictionaryOutputs, Setting
from ..model_outputs import ModelOutputs
from .decomposition import USUAL, DarkMatter, FitOptions, LinearFit
from .downstream_cost import Shares
from .error_norms import NormRegressions
from .metrics import NORM_SCALARS, with_parts_back
from .remedies import PARTS, EarlierLayer, parts_of, pursued
from .scaling import Scaling

PART_NORM_TARGETS = (
    "err_norm",
    "linear_norm",
    "nonlinear_norm",
    "reconstruction_norm",
    "reconstruction_and_nonlinear_norm",
    "input_norm",
)
# A steeper power vanishes within one octave: with few widths, the fit would be a constant and one point.
STEEPEST = -6.0


@dataclass(frozen=True)
class Judged:
    """Results of ``evaluate_widths``: entries by dictionary, matrices across dictionaries, and the fitted maps for further use.

    ``scored_from`` is the start of the half of the text that no map was fitted on.
    """

    reports: dict[str, dict[str, Any]]
    scaling: dict[str, Any]
    maps: dict[str, DarkMatter]
    scored_from: Cursor


class _One:
    """State of one dictionary over the three passes."""

    def __init__(self, setting: Setting, vocabulary: int, earlier: "_One | None", options: FitOptions):
        dictionary, device = setting.dictionary, setting.device
        widths = (dictionary.d_in, dictionary.d_out)
        self.setting, self.earlier = setting, earlier
        self.fit, self.pursued_fit = LinearFit(*widths, device, options), LinearFit(*widths, device, options)
        self.matter: DarkMatter | None = None
        self.pursued_matter: DarkMatter | None = None
        self.pursued_l0, self.pursued_tokens = 0, 0
        self.norms = NormRegressions(widths[0], vocabulary, PART_NORM_TARGETS, NORM_SCALARS, device, options.bias)
        self.shares = Shares()
        self.layer = None if earlier is None else EarlierLayer(earlier.setting.dictionary.d_out, widths[1], device)

    def first(self, view: DictionaryOutputs, documents: Tensor, pursue: bool) -> None:
        self.fit.update(view.x, view.y - view.y_hat, documents)
        if pursue:
            self.pursued_fit.update(view.x, view.y - self.pursued_hat(view)[0], documents)

    def solve(self) -> None:
        self.matter = DarkMatter(self.fit, self.setting.reads_target)
        if self.pursued_fit.tokens:
            self.pursued_matter = DarkMatter(self.pursued_fit, self.setting.reads_target)

    def pursued_hat(self, view: DictionaryOutputs) -> tuple[Tensor, Tensor]:
        code = pursued(self.setting.dictionary, view.y, view.code)
        return self.setting.dictionary.decode(code, view.x), code.l0()

    def parts(self, view: DictionaryOutputs) -> dict[str, Tensor]:
        assert self.matter is not None
        return parts_of(view.x, view.y, view.y_hat, self.matter)

    def second(self, view: DictionaryOutputs, earlier: DictionaryOutputs | None, scored: bool) -> tuple[Tensor, Tensor]:
        """Process norms and the earlier layer in the second or third pass; return norms of the error and its nonlinear part."""
        assert view.passage is not None
        parts = self.parts(view)
        x, y_hat, rows = view.x.double(), view.y_hat.double(), view.passage.predicting
        vectors = (*(parts[part] for part in PARTS), y_hat, y_hat + parts["nonlinear"], x)
        targets = torch.stack([vector.pow(2).sum(-1) for vector in vectors], dim=1)
        loss = view.passage.clean_loss.double()
        scalars = torch.stack([x.norm(dim=-1)[rows], view.code.l0()[rows].double(), loss], dim=1)
        take = self.norms.score if scored else self.norms.fit
        take(view.x[rows], view.passage.token_ids[rows], targets[rows], scalars)
        if self.layer is not None and self.earlier is not None and earlier is not None:
            there = self.earlier.parts(earlier)
            found = {"activation": earlier.y, "reconstruction": earlier.y_hat} | {part: there[part] for part in PARTS[1:]}
            self.layer.update(scored, parts, found)
        return parts["error"].norm(dim=-1), parts["nonlinear"].norm(dim=-1)

    def score(self, view: DictionaryOutputs, splice: bool) -> None:
        assert self.matter is not None
        self.matter.update(view.x, view.y, view.y_hat)
        if self.pursued_matter is not None:
            y_hat, l0 = self.pursued_hat(view)
            self.pursued_matter.update(view.x, view.y, y_hat)
            self.pursued_l0, self.pursued_tokens = self.pursued_l0 + int(l0.sum()), self.pursued_tokens + len(l0)
        assert view.passage is not None
        parts = self.parts(view)
        self.shares.update_errors(parts["linear"], parts["nonlinear"], view.passage.documents)
        if splice:
            found = with_parts_back(self.setting, view, {part: parts[part] for part in PARTS[1:]})
            self.shares.update_losses(view.passage.clean_loss, found, view.passage.prediction_documents)

    def report(self) -> dict[str, Any]:
        assert self.matter is not None
        entries = self.matter.report() | self.norms.report() | self.shares.report()
        if self.pursued_matter is not None:
            there = self.pursued_matter.report()
            entries |= {f"pursued_{key}": there[key] for key in ("fvu_total", "fvu_nonlinear", "linear_error_share")}
            entries["pursued_l0"] = self.pursued_l0 / self.pursued_tokens if self.pursued_tokens else None
        if self.layer is not None:
            entries |= self.layer.report(float(self.matter.y.squared_deviation()))
        return settled(entries)[0]


@torch.no_grad()
def evaluate_widths(
    where: EvalData,
    hooks: tuple[str, str],
    dictionaries: Mapping[str, SparseDictionary],
    tokens: int,
    earlier: tuple[SparseDictionary, tuple[str, str]] | None = None,
    options: FitOptions = USUAL,
    pursue: bool = True,
    splice: bool = True,
) -> Judged:
    """Evaluate the errors of dictionaries at the same ``hooks`` (input, output), and how they relate to each other.

    Args:
        earlier: A dictionary of an earlier layer, with its hooks.
        pursue: Include gradient pursuit, which is slow: it runs on every token.
        splice: Include the model's losses, which are slow: three model passes per dictionary.

    Raises:
        ValueError: If there are not enough held-out documents for both halves.
    """
    model: Any = where.model
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    before = None
    if earlier is not None:
        setting = Setting(earlier[0].to(model.device), model.device, model=model, hook_in=earlier[1][0], hook_out=earlier[1][1])
        before = _One(setting, vocabulary, None, options)
    ones = {
        name: _One(
            Setting(dictionary.to(model.device), model.device, model=model, hook_in=hooks[0], hook_out=hooks[1]),
            vocabulary,
            before,
            options,
        )
        for name, dictionary in dictionaries.items()
    }
    every = tuple(dict.fromkeys((*(earlier[1] if earlier is not None else ()), *hooks)))
    scaling = Scaling(list(ones), model.device)
    halves = where.halves(tokens)
    for piece in halves.fit():
        passage = ModelOutputs(where.model, piece, every, with_logits=False)
        documents = torch.from_numpy(passage.documents).long().to(model.device)
        if before is not None:
            before.first(DictionaryOutputs(before.setting, passage), documents, pursue=False)
        for one in ones.values():
            one.first(DictionaryOutputs(one.setting, passage), documents, pursue)
    for one in (*ones.values(), *([] if before is None else [before])):
        one.solve()
    for piece in halves.fit():
        scaling.fit(*_across(ones, before, ModelOutputs(where.model, piece, every, with_logits=True), False)[:2])
    for piece in halves.score():
        errors, nonlinear, views = _across(ones, before, ModelOutputs(where.model, piece, every, with_logits=True), True)
        scaling.score(errors, nonlinear)
        for one, view in zip(ones.values(), views, strict=True):
            one.score(view, splice)
    maps = {name: one.matter for name, one in ones.items() if one.matter is not None}
    return Judged({name: one.report() for name, one in ones.items()}, scaling.report(), maps, halves.scored_from)


def _across(
    ones: Mapping[str, _One], before: _One | None, passage: ModelOutputs, scored: bool
) -> tuple[Tensor, Tensor, list[DictionaryOutputs]]:
    """Return norms of all errors and of their nonlinear parts, one column per dictionary, and the dictionaries' outputs."""
    earlier = None if before is None else DictionaryOutputs(before.setting, passage)
    views = [DictionaryOutputs(one.setting, passage) for one in ones.values()]
    norms = [one.second(view, earlier, scored) for one, view in zip(ones.values(), views, strict=True)]
    return torch.stack([norm for norm, _ in norms], dim=1), torch.stack([norm for _, norm in norms], dim=1), views


@dataclass(frozen=True)
class WidthLaw:
    """Scaling law ``fvu = c + a W^m``: ``c`` remains at any width ``W``, ``a W^m`` is due to missing latents."""

    c: float
    a: float
    m: float

    def absent(self, width: int | float) -> float:
        """Return the part of fvu that wider dictionaries would remove."""
        return self.a * width**self.m

    def absent_share(self, width: int | float) -> float:
        """Return that part as a fraction of the predicted fvu."""
        return self.absent(width) / (self.c + self.absent(width))

    def __call__(self, width: int | float) -> float:
        return self.c + self.absent(width)


def fit_width_law(widths: Sequence[int | float], fvus: Sequence[int | float]) -> WidthLaw:
    """Fit the law by least squares on relative errors, with ``c`` and ``a`` at least 0 and ``m`` between -6 and -0.01.

    Raises:
        ValueError: If there are fewer than four distinct widths (any three points fit exactly), or an fvu is not positive.
    """
    if len(set(widths)) < 4 or len(widths) != len(fvus):
        raise ValueError(f"widths: expected at least 4 distinct widths, and an fvu for each, got {len(set(widths))}.")
    scale, values = np.asarray(widths, dtype=np.float64) / min(widths), np.asarray(fvus, dtype=np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"fvus: expected numbers above 0, got {list(fvus)}.")

    def solved(m: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(scale), scale**m], axis=1) / values[:, None]
        return nnls(columns, np.ones_like(values))

    # Not convex in m: search a coarse grid, then a finer one around its best point.
    grid = -np.geomspace(0.01, -STEEPEST, 200)
    best = int(np.argmin([solved(m)[1] for m in grid]))
    finer = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 200)
    m = float(finer[np.argmin([solved(m)[1] for m in finer])])
    (c, a), _ = solved(m)
    return WidthLaw(float(c), float(a) * min(widths) ** -m, m)
