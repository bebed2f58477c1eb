"""Methods of discovery by name. A new one is a file here, a line in ``METHODS`` and a test on a model with a known circuit."""

from .attribution import AttributionPatching
from .baselines import ActivationMagnitude, RandomScores
from .exact import ExactPatching
from .integrated import IntegratedActivations, IntegratedInputs
from .relevance import RelevancePatching
from .scores import Method, Scores

METHODS: dict[str, type[Method]] = {
    "attribution": AttributionPatching,
    "exact": ExactPatching,
    "integrated_activations": IntegratedActivations,
    "integrated_inputs": IntegratedInputs,
    "magnitude": ActivationMagnitude,
    "random": RandomScores,
    "relevance": RelevancePatching,
}

__all__ = ["METHODS", "Method", "Scores"]
