"""OpenAI's autoencoders: a state file with ``pre_bias``, ``latent_bias``, and the name of the activation function.

TopK autoencoders normalize each token and undo it on the output; ReLU autoencoders do not. Only the activation's name tells
the two apart. Source: the code of Gao et al. 2024, arXiv:2406.04093.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalSAE
from .files import SourceFiles
from .origin import originated
from .torch_files import TorchFiles, values_of

BIASES = ("pre_bias", "latent_bias")
MATRICES = ("encoder.weight", "decoder.weight", "decoder.linear.weight")
# Training statistics, and numbers that some versions store as tensors.
STATISTICS = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation.k",
    "activation_state_dict.k",
)
POST = {"ReLU": "topk", "Identity": "topk_raw"}


class OpenAI(TorchFiles):
    name = "openai"
    title = "OpenAI's autoencoders"

    def recognise(self, source: SourceFiles, name: str) -> str | None:
        return f"keys {' and '.join(BIASES)}" if set(BIASES) <= values_of(source, name).keys() else None

    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        where, values = source.path(name), source.values(name)
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        require_keys(where, tensors, BIASES)
        if not {"encoder.weight", "decoder.weight"} & tensors.keys():
            require_keys(where, tensors, ("encoder.weight", "decoder.weight"))
        width, latents = (len(tensors[key].reshape(-1)) for key in BIASES)
        for key, size in zip(BIASES, (width, latents), strict=True):
            require_shape(where, key, tuple(tensors[key].shape), (size,))
        # Tied autoencoders store one matrix, as encoder.weight or decoder.weight; some also have decoder.linear.weight.
        W_enc = tensors["encoder.weight"] if "encoder.weight" in tensors else tensors["decoder.weight"].T
        W_dec = tensors["decoder.weight"].T if "decoder.weight" in tensors else W_enc
        tied = "decoder.linear.weight" in tensors
        absent = [] if tied else [key for key in ("encoder.weight", "decoder.weight") if key not in tensors]
        unknown = sorted(set(tensors) - {*BIASES, *STATISTICS, *MATRICES})
        if unknown:
            raise ValueError(f"{where}: expected {', '.join((*BIASES, *MATRICES))}, got also {', '.join(unknown)}.")
        require_shape(where, "encoder.weight", tuple(W_enc.shape), (latents, width))
        require_shape(where, "decoder.weight", tuple(W_dec.T.shape), (width, latents))
        if tied:
            require_shape(where, "decoder.linear.weight", tuple(tensors["decoder.linear.weight"].shape), (latents, width))
        kind, gate = _chosen(where, values, options)
        row_norm = "layer_norm" if kind == "TopK" else None
        n = CanonicalSAE(
            kind="sae",
            W_enc=W_enc,
            b_enc=tensors["latent_bias"],
            W_dec=W_dec,
            b_out=tensors["pre_bias"],
            gate=gate,
            b_in=tensors["pre_bias"],
            row_norm=row_norm,
            # A file with a missing matrix looks the same as a tied one.
            warnings=tuple(f"there is no {key}: taken for tied, one matrix for both sides" for key in absent),
            done=("pre_bias is b_dec, latent_bias b_enc", *(("TopK: each token normalised",) if row_norm else ())),
        )
        config = {"file": name} | {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        return originated(n, self.name, config, options)


def _chosen(where: object, values: Mapping[str, Any], options: ReadOptions) -> tuple[str, ActivationFn]:
    """Return the activation's name and function.

    Raises:
        ValueError: If it is not one of the published ones.
    """
    name = values.get("activation", "ReLU")
    if name == "ReLU":
        return name, ActivationFn("relu")
    if name != "TopK":
        raise ValueError(f"{where}: activation: expected ReLU or TopK, got {name!r}. It cannot be loaded.")
    # k is in the activation's own state dict (flattened by the reader) or next to it.
    k = next((values[key] for key in ("activation_state_dict.k", "activation.k") if key in values), None)
    k = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
    post = next((values[key] for key in ("activation_state_dict.postact_fn", "activation.postact_fn") if key in values), "ReLU")
    if not isinstance(post, str) or post not in POST:
        raise ValueError(f"{where}: postact_fn: expected one of {', '.join(POST)}, got {post!r}. It cannot be loaded.")
    return name, ActivationFn(POST[post], k=k if options.k is None else options.k)
