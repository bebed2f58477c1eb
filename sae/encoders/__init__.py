"""ENCODERS: every variant by its recipe name. A new one is a file beside this and a line here."""

from typing import Any

from ..encoder import Encoder
from .batch_topk import BatchTopK
from .feature_choice import FeatureChoice
from .gated import Gated
from .gradient_topk import GradientTopK
from .jumprelu import JumpReLU
from .matching_pursuit import MatchingPursuit
from .matryoshka import Matryoshka
from .mutual_choice import MutualChoice
from .relu import ReLU
from .topk import TopK

ENCODERS: dict[str, type[Encoder]] = {
    "topk": TopK,
    "mutual_choice": MutualChoice,
    "feature_choice": FeatureChoice,
    "gradient_topk": GradientTopK,
    "matching_pursuit": MatchingPursuit,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """``{"name": ..., **arguments}``: what a recipe holds, and what ``build_encoder`` rebuilds."""
    names = {cls: name for name, cls in ENCODERS.items()}
    return {"name": names[type(encoder)], **encoder.arguments()}


def build_encoder(spec: dict[str, Any]) -> Encoder:
    """The encoder of a spec as recipes and ``dictionary.json`` write it.

    Raises:
        ValueError: If the name or an argument is unknown, or an argument is missing.
    """
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if name not in ENCODERS:
        raise ValueError(f"encoder.name: expected one of {', '.join(ENCODERS)}, got {name!r}.")
    expected = ENCODERS[name].parameters_of()
    unknown = [key for key in arguments if key not in expected]
    missing = [key for key, p in expected.items() if p.default is p.empty and key not in arguments]
    if unknown or missing:
        raise ValueError(f"encoder: {name} takes {', '.join(expected)}; unknown {unknown}, missing {missing}.")
    return ENCODERS[name](**arguments)
