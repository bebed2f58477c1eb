"""Export of a steering vector for vLLM-Lens, as safetensors.

The tensor and the metadata are the arguments of ``vllm_lens.SteeringVector`` (github.com/UKGovernmentBEIS/vllm-lens):
``activations`` of shape ``(1, width)``, ``layer_indices``, ``scale`` and ``norm_match``. vLLM-Lens adds ``scale * activations``
to the residual stream behind a layer, as the raised latents are added here. The format is safetensors and not GGUF, which other
tools take, because it needs no further package and loads without running code.
"""

import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ...sae.files import replacing
from ...training.activations.sites import hooks_with_sites
from ..probing.subject import ProbeTarget

EXPORT_FORMAT = "vllm-lens"
SUFFIX = ".safetensors"


def require_exportable(subject: ProbeTarget, path: Path) -> int:
    """Return the layer whose output the hook is.

    Raises:
        ValueError: If it is no layer's output, or the file has another suffix.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"--export: expected a file ending in {SUFFIX}, got {path}.")
    try:
        found = hooks_with_sites(subject.model.module)
    except ValueError:
        found = {}
    # The input of a layer is the output of the one before.
    for hook, (layer, sites) in found.items():
        if hook == subject.hook and "resid_post" in sites:
            return layer
        if hook == subject.hook and "resid_pre" in sites and layer > 0:
            return layer - 1
    raise ValueError(
        f"--export: expected a dictionary of the residual stream behind a layer, which is where {EXPORT_FORMAT} adds vectors, "
        f"got one of {subject.hook}. Leave --export out."
    )


def export_vector(
    path: Path, direction: Float[Tensor, " d"], strength: float, subject: ProbeTarget, layer: int, about: dict[str, Any]
) -> dict[str, Any]:
    """Write the vector of strength 1 with its scale, and return the metadata."""
    described = {
        "format": EXPORT_FORMAT,
        "layer_indices": [layer],
        "scale": strength,
        "norm_match": False,
        "model": subject.model.id,
        "hook": subject.hook,
        "layer": layer,
        "strength": strength,
        "norm": float(f"{float(direction.norm()):.6g}"),
        "latents": [row["latent"] for row in about["latents"] if row["role"] == "raised"],
        "checkpoint": about["checkpoint"],
        "positions": "all",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Values of safetensors metadata are strings.
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    with replacing(path) as temporary:
        save_file({"activations": direction[None].cpu().contiguous()}, temporary, words)
    return {"path": str(path)} | described
