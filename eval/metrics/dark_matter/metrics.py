"""Metrics: linear and nonlinear reconstruction error, its cost to the model, and predictors of its norm."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...undefined import Undefined
from ..base import DictionaryOutputs, MetricGroup, Setting
from ..model_outputs import Predictions
from .decomposition import AuthorsSplit, DarkMatter, FitOptions, LinearFit
from .downstream_cost import Shares
from .error_norms import NormRegressions
from .regression import RIDGE, needed_tokens

NORM_TARGETS = ("err_norm", "reconstruction_norm", "input_norm")
NORM_SCALARS = ("input_norm", "l0", "loss")
# Entries repeated for the regression on the target, if the target is not the input.
ON_TARGET = (
    "fvu_nonlinear",
    "linear_error_share",
    "linear_error_share_rescaled",
    "err_vec_r2",
    "err_vec_r2_mean_dim",
    "err_norm_r2",
)


class ErrorSplit(MetricGroup):
    """Decomposition of the error by a linear map from the input, fitted on one half of the documents and scored on the other.

    If the input is not the target, as for a transcoder, the error is also regressed on the target. Options: ``bias``, ``ridge``
    (a number, or several to choose among by document), and ``authors``, which adds the published protocol.
    """

    name = "linear_error"
    version = 2
    reads_model = False

    def __init__(self, setting: Setting):
        dictionary, options = setting.dictionary, setting.options
        self.fit_options = FitOptions(options.get("bias", True), options.get("ridge", RIDGE))
        widths = (dictionary.d_in, dictionary.d_out)
        self.reads_target = setting.reads_target
        self.on_input = LinearFit(*widths, setting.device, self.fit_options)
        self.on_target = None if self.reads_target else LinearFit(widths[1], widths[1], setting.device, self.fit_options)
        self.authors = AuthorsSplit(*widths, setting.device) if options.get("authors") else None

    @cached_property
    def scored(self) -> tuple[DarkMatter, DarkMatter | None]:
        on_target = None if self.on_target is None else DarkMatter(self.on_target, on_target=True)
        return DarkMatter(self.on_input, self.reads_target), on_target

    def fit(self, piece: DictionaryOutputs) -> None:
        documents = None if piece.passage is None else torch.from_numpy(piece.passage.documents).long().to(piece.x.device)
        error = piece.y - piece.y_hat
        self.on_input.update(piece.x, error, documents)
        if self.on_target is not None:
            self.on_target.update(piece.y, error, documents)
        if self.authors is not None:
            self.authors.update(piece.x, piece.y, piece.y_hat)

    def score(self, piece: DictionaryOutputs) -> None:
        on_input, on_target = self.scored
        on_input.update(piece.x, piece.y, piece.y_hat)
        if on_target is not None:
            on_target.update(piece.y, piece.y, piece.y_hat)
        if self.authors is not None:
            self.authors.update(piece.x, piece.y, piece.y_hat)

    def report(self) -> dict[str, Any]:
        on_input, on_target = self.scored
        entries = with_reasons(on_input.report())
        if on_target is not None:
            second = with_reasons(on_target.report())
            entries |= {f"{key}_on_target": second[key] for key in ON_TARGET}
        return entries | ({} if self.authors is None else self.authors.report())


class ErrorCost(MetricGroup):
    """Cost of each error part to the model, and R2 of the error's norm from several predictors."""

    name = "error_cost"
    version = 1
    reads_model = True

    def __init__(self, setting: Setting):
        assert setting.model is not None
        self.setting = setting
        dictionary, options = setting.dictionary, setting.options
        fit_options = FitOptions(options.get("bias", True), options.get("ridge", RIDGE))
        self.fitted = LinearFit(dictionary.d_in, dictionary.d_out, setting.device, fit_options)
        module: Any = setting.model.module
        vocabulary = module.get_input_embeddings().weight.shape[0]
        self.norms = NormRegressions(dictionary.d_in, vocabulary, NORM_TARGETS, NORM_SCALARS, setting.device, fit_options.bias)
        self.shares = Shares()

    @cached_property
    def scored(self) -> DarkMatter:
        return DarkMatter(self.fitted)

    def fit(self, piece: DictionaryOutputs) -> None:
        assert piece.passage is not None
        documents = torch.from_numpy(piece.passage.documents).long().to(piece.x.device)
        self.fitted.update(piece.x, piece.y - piece.y_hat, documents)
        self.norms.fit(*norm_facts(piece))

    def score(self, piece: DictionaryOutputs) -> None:
        passage = piece.passage
        assert passage is not None
        self.norms.score(*norm_facts(piece))
        linear = self.scored.linear_error(piece.x)
        nonlinear = piece.y.double() - piece.y_hat.double() - linear
        self.shares.update_errors(linear, nonlinear, passage.documents)
        found = with_parts_back(self.setting, piece, {"linear": linear, "nonlinear": nonlinear})
        self.shares.update_losses(passage.clean_loss, found, passage.prediction_documents)

    def report(self) -> dict[str, Any]:
        entries = self.shares.report()
        if self.fitted.tokens <= self.fitted.columns:
            why = Undefined(
                f"the linear error needs more than {self.fitted.columns} tokens to fit on, and at least "
                f"{needed_tokens(self.fitted.columns)} to be worth it, got {self.fitted.tokens}"
            )
            entries = {key: value if key == "share_documents" else why for key, value in entries.items()}
        return entries | self.norms.report()


def norm_facts(piece: DictionaryOutputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs of ``NormRegressions`` at the rows where the model's loss is counted."""
    passage = piece.passage
    assert passage is not None
    rows = passage.predicting
    x, y, y_hat = piece.x[rows].double(), piece.y[rows].double(), piece.y_hat[rows].double()
    targets = torch.stack([part.pow(2).sum(-1) for part in (y - y_hat, y_hat, x)], dim=1)
    l0 = piece.code.l0()[rows].double()
    return x, passage.token_ids[rows], targets, torch.stack([x.norm(dim=-1), l0, passage.clean_loss.double()], dim=1)


def with_parts_back(setting: Setting, piece: DictionaryOutputs, parts: Mapping[str, Tensor]) -> dict[str, Predictions]:
    """Return predictions with ``spliced`` reconstructions, and with each of ``parts`` of the error added back to them."""
    model, hook, passage = setting.model, setting.hook_out, piece.passage
    assert model is not None
    assert hook is not None
    assert passage is not None
    y_hat, kept = piece.y_hat.double(), passage.piece.kept
    rows = {name: y_hat + part for name, part in parts.items()}

    def put(here: Tensor) -> AbstractContextManager[Any]:
        return model.replacing(hook, lambda y: y.masked_scatter(kept.unsqueeze(-1), here.to(y.dtype)))

    return {"spliced": piece.spliced} | {name: passage.predictions(lambda here=here: put(here)) for name, here in rows.items()}


def with_reasons(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with each ``None`` replaced by ``Undefined``, giving the notes as the reason."""
    notes = " ".join(entries["dark_matter_notes"])
    return {key: Undefined(notes) if value is None and notes else value for key, value in entries.items()}
