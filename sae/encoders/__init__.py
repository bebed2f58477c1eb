"""ENCODERS: encoder classes by recipe name. To add one, add a module to this folder and a line below.

LOADED_ENCODERS reproduce the selection rules of published dictionaries from other libraries; recipes do not offer them.

>>> from sparsary import ENCODERS
>>> sorted(ENCODERS)[:3]
['batch_topk', 'feature_choice', 'gated']
>>> encoder_spec(ENCODERS["topk"](k=4))
{'name': 'topk', 'k': 4}
"""

from typing import Any

from ..encoder import Encoder
from .batch_topk import BatchTopK
from .feature_choice import FeatureChoice
from .gated import Gated
from .gradient_topk import GradientTopK
from .group_max import GroupMax
from .jumprelu import JumpReLU
from .lista import Lista
from .matching_pursuit import MatchingPursuit
from .matryoshka import Matryoshka
from .multi_topk import MultiTopK
from .mutual_choice import MutualChoice
from .relu import ReLU
from .residual_pursuit import ResidualPursuit
from .signed_topk import SignedTopK
from .threshold import Threshold
from .topk import TopK

ENCODERS: dict[str, type[Encoder]] = {
    "topk": TopK,
    "mutual_choice": MutualChoice,
    "feature_choice": FeatureChoice,
    "gradient_topk": GradientTopK,
    "matching_pursuit": MatchingPursuit,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "lista": Lista,
    "multi_topk": MultiTopK,
    "signed_topk": SignedTopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
}

LOADED_ENCODERS: dict[str, type[Encoder]] = {
    "threshold": Threshold,
    "group_max": GroupMax,
    "residual_pursuit": ResidualPursuit,
}


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """Return ``{"name": ..., **arguments}``, an encoder's entry in recipes, from which ``build_encoder`` rebuilds it."""
    names = {cls: name for name, cls in (ENCODERS | LOADED_ENCODERS).items()}
    return {"name": names[type(encoder)], **encoder.arguments()}


def build_encoder(spec: dict[str, Any]) -> Encoder:
    """Return the encoder described by a spec, as written in recipes and ``dictionary.json``.

    Raises:
        ValueError: If the name or an argument is unknown, or an argument is missing.
    """
    arguments = dict(spec)
    name = arguments.pop("name", None)
    known = ENCODERS | LOADED_ENCODERS
    if name not in known:
        raise ValueError(f"encoder.name: expected one of {', '.join(known)}, got {name!r}.")
    expected = known[name].parameters_of()
    unknown = [key for key in arguments if key not in expected]
    missing = [key for key, p in expected.items() if p.default is p.empty and key not in arguments]
    if unknown or missing:
        raise ValueError(f"encoder: {name} takes {', '.join(expected)}; unknown {unknown}, missing {missing}.")
    return known[name](**arguments)
