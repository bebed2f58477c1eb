"""The groups of metrics that make up a report, in its order."""

from .affine_baseline import LinearFloor
from .base import MetricGroup
from .dark_matter.metrics import ErrorCost, ErrorSplit
from .downstream import SplicedModel
from .reconstruction import Reconstructed
from .redundancy import Redundancy

GROUPS: tuple[type[MetricGroup], ...] = (Reconstructed, LinearFloor, Redundancy, SplicedModel, ErrorSplit, ErrorCost)
