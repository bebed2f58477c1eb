"""The groups of metrics that make up a report, in its order."""

from .dark_groups import ErrorCost, ErrorSplit
from .downstream import SplicedModel
from .groups import MetricGroup
from .linear_error import LinearFloor
from .reconstruction import Reconstructed
from .redundancy import Redundancy

GROUPS: tuple[type[MetricGroup], ...] = (Reconstructed, LinearFloor, Redundancy, SplicedModel, ErrorSplit, ErrorCost)
