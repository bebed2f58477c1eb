"""The dark-matter regression as a group of metrics: which part of the error is linear in what is read."""

from functools import cached_property
from typing import Any, ClassVar

from .dark_matter import AffineFloor, DarkMatter, LinearFit
from .groups import MetricGroup, Setting, View


class LinearError(MetricGroup):
    """Half of the documents fit a linear map from what is read to the error, the other half is scored."""

    name = "linear_error"
    version = 1
    reads_model = False
    explanations: ClassVar = {
        "Error, linear and nonlinear": {
            "fvu_total": "fvu on the tokens that score the regression: linear and nonlinear error together.",
            "fvu_nonlinear": "What is left of fvu_total once a linear map of what is read, fitted on other data, has "
            "predicted the error. Low alone is no merit, an empty dictionary has none: read it beside fvu_total.",
            "linear_error_share": "1 - fvu_nonlinear / fvu_total: share of the squared error that is linear in the activation.",
            "fvu_rescaled": "fvu_total after the best single factor on the reconstruction; what that takes off is shrinkage.",
            "err_vec_r2_mean_dim": "R\u00b2 of the linear prediction of the error, per dimension, then averaged.",
            "err_norm_r2": "R\u00b2 of the linear prediction of the squared error norm.",
            "dark_matter_noise_floor": "About the linear_error_share of an error unrelated to the activation: the map fits "
            "noise.",
            "dark_matter_fit_tokens": "Tokens the linear map was fitted on.",
            "dark_matter_score_tokens": "Tokens it was scored on.",
            "dark_matter_enough_tokens": "Whether the fit had ten tokens per coefficient. If not, the linear share is "
            "understated.",
        }
    }

    def __init__(self, setting: Setting):
        dictionary = setting.dictionary
        self.fitted = LinearFit(dictionary.d_in, dictionary.d_out, setting.device)

    @cached_property
    def scored(self) -> DarkMatter:
        return DarkMatter(self.fitted)

    def fit(self, piece: View) -> None:
        self.fitted.update(piece.x, piece.y - piece.y_hat)

    def score(self, piece: View) -> None:
        self.scored.update(piece.x, piece.y, piece.y_hat)

    def report(self) -> dict[str, Any]:
        return self.scored.report()


class LinearFloor(MetricGroup):
    """What the best affine map from what is read to the target leaves; only where these are two things."""

    name = "linear_floor"
    version = 1
    reads_model = False
    explanations: ClassVar = {
        "Reconstruction": {
            "fvu_affine": "The fvu of the best affine map from what a transcoder reads to the target, fitted on other "
            "documents: the floor to beat. With few tokens for the fit (see dark_matter_enough_tokens) it comes out too high.",
        }
    }

    def __init__(self, setting: Setting):
        dictionary = setting.dictionary
        self.fitted = None if setting.reads_target else LinearFit(dictionary.d_in, dictionary.d_out, setting.device)

    @cached_property
    def scored(self) -> AffineFloor | None:
        return None if self.fitted is None else AffineFloor(self.fitted)

    def fit(self, piece: View) -> None:
        if self.fitted is not None:
            self.fitted.update(piece.x, piece.y)

    def score(self, piece: View) -> None:
        if self.scored is not None:
            self.scored.update(piece.x, piece.y)

    def report(self) -> dict[str, Any]:
        return {} if self.scored is None else self.scored.report()
