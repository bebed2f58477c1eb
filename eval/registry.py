"""The groups of metrics that make up a report, in its order."""

from .downstream import SplicedModel
from .groups import MetricGroup
from .linear_error import LinearError, LinearFloor
from .reconstruction import Reconstructed

GROUPS: tuple[type[MetricGroup], ...] = (Reconstructed, LinearFloor, SplicedModel, LinearError)
