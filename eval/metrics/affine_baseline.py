"""Metric: variance of the target explained by the best affine map of the inputs."""

from functools import cached_property
from typing import Any

from .base import DictionaryOutputs, MetricGroup, Setting
from .dark_matter.decomposition import AffineFloor, LinearFit


class LinearFloor(MetricGroup):
    """FVU of the best affine map from input to target, reported only if the two differ (not for SAEs)."""

    name = "linear_floor"
    version = 1
    reads_model = False

    def __init__(self, setting: Setting):
        dictionary = setting.dictionary
        self.fitted = None if setting.reads_target else LinearFit(dictionary.d_in, dictionary.d_out, setting.device)

    @cached_property
    def scored(self) -> AffineFloor | None:
        return None if self.fitted is None else AffineFloor(self.fitted)

    def fit(self, piece: DictionaryOutputs) -> None:
        if self.fitted is not None:
            self.fitted.update(piece.x, piece.y)

    def score(self, piece: DictionaryOutputs) -> None:
        if self.scored is not None:
            self.scored.update(piece.x, piece.y)

    def report(self) -> dict[str, Any]:
        return {} if self.scored is None else self.scored.report()
