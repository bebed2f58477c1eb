"""Base class for formats that keep each dictionary in one torch file without a configuration file.

Such files are recognized by their keys and, where the keys are ambiguous, by shapes. Also contains the torch-file writer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replacing
from .base import Format, Read, ReadOptions
from .canonical import CanonicalCrossLayer, CanonicalSAE
from .files import TORCH_SUFFIXES, SourceFiles

# A folder with one of these files belongs to a format with a configuration.
CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", "conf.yaml")
# Formats of published releases are read-only: no tool looks for other dictionaries in them.
INSTEAD = "Use --to saelens, which most tools read"


def torch_names(source: SourceFiles) -> list[str]:
    """Return the torch files in this folder (not in subfolders), in natural order."""
    return [name for name in source.named(r"[^/]+") if name.endswith(TORCH_SUFFIXES)]


def values_of(source: SourceFiles, name: str) -> Mapping[str, Any]:
    """Return the values in a file, or an empty dict if it cannot be read (reading it later raises the error)."""
    try:
        return source.values(name)
    except ValueError:
        return {}


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a torch file; views are copied first, so that their base tensors are not saved."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in own.items()}
    with replacing(path) as temporary:
        torch.save(whole, temporary)


class TorchFiles(Format):
    """Format of a folder of torch files, or of a single one."""

    @abstractmethod
    def recognise(self, source: SourceFiles, name: str) -> str | None:
        """Return the evidence that a file has this format, or ``None``."""

    @abstractmethod
    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        """Read the dictionary in a file."""

    def names(self, source: SourceFiles) -> list[str]:
        """Return the files that may contain a dictionary."""
        return [] if any(source.has(name) for name in CONFIGS) else torch_names(source)

    def detect(self, source: SourceFiles) -> str | None:
        names = self.names(source)
        # With several remote files, none is downloaded just to detect its format.
        if not names or (source.remote and len(names) > 1):
            return None
        words = self.recognise(source, names[0])
        return f"{names[0]} with {words}" if words else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        names = self.names(source) or torch_names(source)
        if not names:
            raise ValueError(f"{source}: expected a torch file ({', '.join(TORCH_SUFFIXES)}), found none.")
        if len(names) == 1:
            return self.one(source, names[0], options)
        picked = [name for name in names if options.hook in (name, Path(name).stem)]
        if picked:
            return {str(options.hook): self.one(source, picked[0], replace(options, hook=None))}
        if source.remote:
            raise ValueError(
                f"hook: expected one of {', '.join(names[:20])}, of {len(names)} files. Give hook=FILE, or --hook FILE."
            )
        read = {name: self.one(source, name, replace(options, hook=None)) for name in names}
        return {(n.provenance.get("hooks_out") or [Path(name).stem])[0]: n for name, n in read.items()}

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError(f"{self.name}: read-only format. {INSTEAD}.")
