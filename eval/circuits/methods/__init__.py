"""Discovery methods by name. A new one needs a file here, a line in ``METHODS`` and a test on a model with a known circuit."""

from .attribution import AttributionPatching
from .baselines import ActivationMagnitude, RandomScores
from .certified import Certified
from .discrete_codes import DiscreteCodes, MeanDifference
from .edge_pruning import EdgePruning
from .exact import ExactPatching
from .flow import FlowRoutes
from .frequency import ActivationFrequency
from .integrated import IntegratedActivations, IntegratedInputs
from .method import Method, UnitScores
from .query import QueryCircuits
from .relevance import RelevancePatching

METHODS: dict[str, type[Method]] = {
    "attribution": AttributionPatching,
    "certified": Certified,
    "discrete_codes": DiscreteCodes,
    "edge_pruning": EdgePruning,
    "exact": ExactPatching,
    "flow": FlowRoutes,
    "frequency": ActivationFrequency,
    "integrated_activations": IntegratedActivations,
    "integrated_inputs": IntegratedInputs,
    "magnitude": ActivationMagnitude,
    "mean_difference": MeanDifference,
    "query": QueryCircuits,
    "random": RandomScores,
    "relevance": RelevancePatching,
}

__all__ = ["METHODS", "Method", "UnitScores"]
