"""MLP transcoders of Dunefsky et al.: a tensors-only ``.pt`` file, converted from the published pickle.

``b_dec`` is the input bias, ``b_dec_out`` the output bias. Source: Dunefsky, Chlenski and Nanda 2024, arXiv:2406.11944, and
its code, transcoder_circuits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import TORCH_SUFFIXES, SourceFiles
from .origin import origin, reading_before_norm, with_origin

KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_dec_out")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
CONVERT = (
    "If you trust it, convert it in a separate process, with the authors' code on the path: "
    "d = torch.load(FILE, weights_only=False); torch.save({'state_dict': d['state_dict'], 'cfg': {'hook_point': "
    "d['cfg'].hook_point, 'out_hook_point': d['cfg'].out_hook_point, 'model_name': d['cfg'].model_name}}, NEW)."
)


class Dunefsky(Format):
    name = "dunefsky"
    title = "transcoder_circuits"

    def detect(self, source: SourceFiles) -> str | None:
        files = _files_of(source)
        if source.remote or len(files) != 1:
            return None
        try:
            keys = source.headers(files[0]).keys()
        except ValueError:
            # Unreadable files are reported when they are read.
            return None
        return f"{files[0]} with b_dec_out" if "b_dec_out" in keys else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        files = _files_of(source)
        if len(files) != 1:
            raise ValueError(f"{source}: expected one file of tensors, got {', '.join(files) or 'none'}. Name the file.")
        where = source.path(files[0])
        try:
            values = source.values(files[0])
        except ValueError as error:
            raise ValueError(f"{error} {CONVERT}" if "pickled" in str(error) else str(error)) from None
        n = _dictionary(where, {key: value for key, value in values.items() if isinstance(value, Tensor)})
        config: dict[str, Any] = {key.removeprefix("cfg."): value for key, value in values.items() if key.startswith("cfg.")}
        model = options.model or config.get("model_name")
        n, reads = reading_before_norm(n, config.get("hook_point"), model)
        provenance, warnings = origin(self.name, config, model, [reads], [config.get("out_hook_point")], options)
        return with_origin(n, provenance, warnings, "W_enc transposed", "b_dec is the input bias, b_dec_out the output's")

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError("dunefsky: read-only format: its files are pickled objects. Use --to circuit_tracer or saelens.")


def _files_of(source: SourceFiles) -> list[str]:
    """Return the files in this folder (not in subfolders) that may contain tensors."""
    return [name for name in source.files if "/" not in name and name.endswith(SUFFIXES)]


def _dictionary(where: object, tensors: Mapping[str, Tensor]) -> CanonicalSAE:
    """Build the transcoder from its tensors.

    Raises:
        ValueError: If a tensor is missing, unknown, or has an inconsistent shape.
    """
    require_keys(where, tensors, KEYS)
    unknown = sorted(set(tensors) - set(KEYS))
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(KEYS)}, got also {', '.join(unknown)}.")
    latents, d_in, d_out = (tensors[name].numel() for name in ("b_enc", "b_dec", "b_dec_out"))
    sizes = {"W_enc": (d_in, latents), "W_dec": (latents, d_out), "b_enc": (latents,), "b_dec": (d_in,), "b_dec_out": (d_out,)}
    for name, size in sizes.items():
        require_shape(where, name, tuple(tensors[name].shape), size)
    return CanonicalSAE(
        kind="transcoder",
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_out=tensors["b_dec_out"],
        b_in=tensors["b_dec"],
        gate=ActivationFn("relu"),
    )
