"""Metrics of an evaluation report, in the order in which they appear there."""

from .affine_baseline import LinearFloor
from .base import MetricGroup
from .dark_matter.metrics import ErrorCost, ErrorSplit
from .downstream import SplicedModel
from .native_sparsity import NativeSparsity
from .prefixes import Prefixes
from .reconstruction import Reconstructed
from .redundancy import Redundancy
from .text_used import TextUsed

GROUPS: tuple[type[MetricGroup], ...] = (
    TextUsed,
    Reconstructed,
    LinearFloor,
    Redundancy,
    Prefixes,
    SplicedModel,
    NativeSparsity,
    ErrorSplit,
    ErrorCost,
)
