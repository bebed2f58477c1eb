"""Published sets of SAEs without a library: one torch file per dictionary and a naming convention.

Covers Goodfire's SAEs, those of the distilled DeepSeek-R1, Qwen Scope, and the attention-output SAEs of Kissane et al. 2024
(arXiv:2406.17759). The layer is given only by the file name, and Qwen Scope's k only by the repository name. Source: the
headers of the released files, and other loaders of them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalSAE
from .files import SourceFiles
from .origin import originated
from .torch_files import TorchFiles, torch_names, values_of

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
GOODFIRE = tuple(name.replace(".", "_linear.") for name in LINEAR)
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")


class Linear(TorchFiles):
    """ReLU SAE stored as two linear layers, without an input bias, on the output of a block."""

    keys = LINEAR
    # Pattern of the layer number in a file name.
    layer = r"(?:^|[^A-Za-z])(?:l|layer)[-_.]?(\d+)(?!\d)"

    def recognise(self, source: SourceFiles, name: str) -> str | None:
        found = {key for key, value in values_of(source, name).items() if isinstance(value, Tensor)}
        return f"keys {', '.join(self.keys)}" if found == set(self.keys) else None

    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        where, tensors = source.path(name), source.tensors(name)
        require_keys(where, tensors, self.keys)
        W_enc, b_enc, W_dec, b_dec = (tensors[key] for key in self.keys)
        latents, width = _sizes(where, b_enc, b_dec)
        require_shape(where, self.keys[0], tuple(W_enc.shape), (latents, width))
        require_shape(where, self.keys[2], tuple(W_dec.shape), (width, latents))
        n = CanonicalSAE("sae", W_enc, b_enc, W_dec.T, b_dec, ActivationFn("relu"), done=(f"{self.keys[2]} transposed",))
        return originated(n, self.name, {"file": name}, options, hook=block_output(self.layer, name))


class Goodfire(Linear):
    name = "goodfire"
    title = "Goodfire's"
    keys = GOODFIRE


class DeepSeekR1(Linear):
    name = "deepseek_r1"
    title = "the DeepSeek-R1 set"

    def names(self, source: SourceFiles) -> list[str]:
        # Files with these names are dictionary_learning's AutoEncoderNew, which has the same keys and function.
        return [name for name in super().names(source) if not re.fullmatch(r"ae(_\d+)?\.pt", name)]


class QwenScope(TorchFiles):
    """TopK SAEs with latents first in ``W_enc`` and last in ``W_dec``, the reverse of these names' usual meaning."""

    name = "qwen_scope"
    title = "Qwen Scope"
    file = r"layer(\d+)\.sae\.pt"
    # k is given only by the repository or folder name.
    k = r"L0_(\d+)(?!\d)"

    def detect(self, source: SourceFiles) -> str | None:
        named = [name for name in self.names(source) if re.fullmatch(self.file, name)]
        if source.remote and len(named) > 1:
            return f"{named[0]} and {len(named) - 1} more"
        return super().detect(source)

    def recognise(self, source: SourceFiles, name: str) -> str | None:
        tensors = {key: value for key, value in values_of(source, name).items() if isinstance(value, Tensor)}
        if tensors.keys() != set(PLAIN) or any(tensors[key].ndim != 1 for key in ("b_enc", "b_dec")):
            return None
        latents, width = len(tensors["b_enc"]), len(tensors["b_dec"])
        if tuple(tensors["W_enc"].shape) != (latents, width):
            return None
        # A square matrix does not reveal its orientation.
        return "W_enc with latents first" if latents != width or re.fullmatch(self.file, name) else None

    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        where, tensors = source.path(name), source.tensors(name)
        require_keys(where, tensors, PLAIN)
        W_enc, b_enc, W_dec, b_dec = (tensors[key] for key in PLAIN)
        latents, width = _sizes(where, b_enc, b_dec)
        require_shape(where, "W_enc, latents first in these files", tuple(W_enc.shape), (latents, width))
        require_shape(where, "W_dec, latents last in these files", tuple(W_dec.shape), (width, latents))
        k, warnings = options.k, ()
        said = re.search(self.k, str(source))
        if k is None and said is not None:
            k, warnings = int(said.group(1)), (f"k {said.group(1)} is from the name {source}: no file says it",)
        if k is None:
            raise ValueError(
                f"{where}: k: expected the number of latents per token, which no file says. Give it: k=NUMBER, or --k NUMBER."
            )
        n = CanonicalSAE(
            "sae",
            W_enc,
            b_enc,
            W_dec.T,
            b_dec,
            ActivationFn("topk", k=k),
            done=("W_dec transposed; W_enc has latents first already",),
            warnings=warnings,
        )
        return originated(n, self.name, {"file": name}, options, hook=block_output(self.file, name))


class HookZ(TorchFiles):
    """ReLU SAEs on concatenated attention head outputs, with ``b_dec`` subtracted from inputs."""

    name = "hook_z"
    title = "the hook_z set"

    def names(self, source: SourceFiles) -> list[str]:
        return [name for name in torch_names(source) if source.has(config_name(name))]

    def detect(self, source: SourceFiles) -> str | None:
        # Matching file names justify opening the configuration, which is small.
        names = self.names(source)
        return self.recognise(source, names[0]) if names else None

    def recognise(self, source: SourceFiles, name: str) -> str | None:
        cfg = source.json(config_name(name))
        found = isinstance(cfg, dict) and {"act_size", "dict_size"} <= cfg.keys()
        return f"{config_name(name)} with act_size and dict_size" if found else None

    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        where, tensors, cfg = source.path(name), source.tensors(name), source.config(config_name(name))
        require_keys(where, tensors, PLAIN)
        W_enc, b_enc, W_dec, b_dec = (tensors[key] for key in PLAIN)
        latents, width = _sizes(where, b_enc, b_dec)
        for key, size in (("act_size", width), ("dict_size", latents)):
            if cfg.get(key, size) != size:
                raise ValueError(f"{where}: {key}: expected {size}, as in the weights, got {cfg[key]!r} in the configuration.")
        require_shape(where, "W_enc", tuple(W_enc.shape), (width, latents))
        require_shape(where, "W_dec", tuple(W_dec.shape), (latents, width))
        extra = sorted(set(tensors) - set(PLAIN))
        words = ("W_enc transposed", *((f"{', '.join(extra)} of training left out",) if extra else ()))
        n = CanonicalSAE("sae", W_enc.T, b_enc, W_dec, b_dec, ActivationFn("relu"), b_in=b_dec, done=words)
        return originated(n, self.name, cfg, options, hook=_hook_name(cfg), model=cfg.get("model_name"))


def config_name(name: str) -> str:
    return f"{Path(name).stem}_cfg.json"


def _hook_name(cfg: Mapping[str, Any]) -> str | None:
    """Return the TransformerLens name of the hook."""
    name = cfg.get("act_name")
    if isinstance(name, str):
        return name
    return f"blocks.{cfg['layer']}.attn.hook_z" if isinstance(cfg.get("layer"), int) else None


def block_output(pattern: str, name: str) -> str | None:
    """Return the TransformerLens hook of the block output whose number is in a file name, or ``None``."""
    found = re.search(pattern, Path(name).name)
    return None if found is None else f"blocks.{found.group(1)}.hook_resid_post"


def _sizes(where: object, b_enc: Tensor, b_dec: Tensor) -> tuple[int, int]:
    """Return the numbers of latents and inputs, taken from the biases, whose shapes are unambiguous."""
    require_shape(where, "the encoder's bias", tuple(b_enc.shape), (None,))
    require_shape(where, "the decoder's bias", tuple(b_dec.shape), (None,))
    return len(b_enc), len(b_dec)
