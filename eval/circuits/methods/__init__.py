"""Methods of discovery by name. A new one is a file here, a line in ``METHODS`` and a test on a model with a known circuit."""

from .attribution import AttributionPatching
from .scores import Method, Scores

METHODS: dict[str, type[Method]] = {
    "attribution": AttributionPatching,
}

__all__ = ["METHODS", "Method", "Scores"]
