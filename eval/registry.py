"""The groups of metrics that make up a report, in its order."""

from .dark_groups import ErrorCost, ErrorSplit
from .downstream import SplicedModel
from .groups import MetricGroup
from .linear_error import LinearFloor
from .reconstruction import Reconstructed

GROUPS: tuple[type[MetricGroup], ...] = (Reconstructed, LinearFloor, SplicedModel, ErrorSplit, ErrorCost)
