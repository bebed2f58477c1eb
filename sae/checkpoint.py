"""Checkpoint of a dictionary: ``dictionary.safetensors`` and ``dictionary.json``, nothing executable.

The JSON holds the format version, the constructor's arguments, the provenance, and a checksum. The tensor file's header holds
the same values: if a save is killed between the two renames, an older JSON lies next to newer weights, and the header's copy is
used.
Trained dictionaries also have ``usage.safetensors``, which records how long each latent had been silent.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from .dictionary import SparseDictionary
from .encoders import build_encoder
from .files import read_tensors, require_finite
from .training_usage import load_training_usage

# kind in dictionary.json -> its class, imported on first use: loading must not depend on earlier imports, and this layer
# imports none above it.
KINDS = {
    "sae": "sae.autoencoder:SAE",
    "transcoder": "transcoders.transcoder:Transcoder",
    "cross_layer_transcoder": "transcoders.cross_layer:CrossLayerTranscoder",
    "crosscoder": "transcoders.crosscoder:Crosscoder",
}


def kind_class(kind: object) -> type[SparseDictionary]:
    """Return the class of a kind in ``KINDS``.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"dictionary.kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    module, name = KINDS[str(kind)].split(":")
    return getattr(import_module(f"..{module}", __package__), name)


def build_dictionary(arguments: dict[str, Any]) -> SparseDictionary:
    """Return a dictionary with newly initialized weights from the result of ``SparseDictionary.arguments``."""
    arguments = dict(arguments)
    cls = kind_class(arguments.pop("kind", None))
    return cls(encoder=build_encoder(arguments.pop("encoder")), **arguments)


def load_dictionary(directory: str | Path, device: str | torch.device = "cpu") -> SparseDictionary:
    """Load a saved dictionary of any kind, in eval mode.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(folder)
    ...     load_dictionary(folder).n_latents
    7

    Raises:
        ValueError: If a file is missing or damaged, or a tensor is missing, unexpected, of the wrong shape, or not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    tensors, _ = read_tensors(path)
    try:
        with torch.device("meta"):
            dictionary = build_dictionary(config["dictionary"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: dictionary: expected the constructor's arguments ({error}).") from None
    expected = dictionary.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{path}: expected tensors {sorted(expected)}; missing {missing}, not expected {extra}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{path}: {name}: expected {expected[name].dtype} {tuple(expected[name].shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}."
            )
    require_finite(path, tensors)
    dictionary.load_state_dict(tensors, assign=True)
    dictionary.provenance = config.get("provenance") or {}
    dictionary.training_usage = load_training_usage(directory, config.get("training_usage"), dictionary.n_latents)
    return dictionary.to(device).eval()
