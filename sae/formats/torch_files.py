"""Torch files in which a dictionary lies without a configuration that would say what it is: one in each file.

What they are is told by their keys, and where those are anybody's, by their shapes. Also how torch files are written.
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

# Where one of these lies, something else says what is in the folder.
CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", "conf.yaml")
# Published dictionaries are read only: others would not look for ours there.
INSTEAD = "Write saelens, which most tools read"


def torch_names(source: SourceFiles) -> list[str]:
    """The torch files right here, in the order of the numbers in them."""
    return [name for name in source.named(r"[^/]+") if name.endswith(TORCH_SUFFIXES)]


def values_of(source: SourceFiles, name: str) -> Mapping[str, Any]:
    """What a file holds; nothing if it cannot be read, of which whoever reads it will say why."""
    try:
        return source.values(name)
    except ValueError:
        return {}


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A state file that holds these tensors and nothing of what they may be views of."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in own.items()}
    with replacing(path) as temporary:
        torch.save(whole, temporary)


class TorchFiles(Format):
    """A folder of torch files, or one."""

    @abstractmethod
    def recognise(self, source: SourceFiles, name: str) -> str | None:
        """Why a file is of this format, or ``None``."""

    @abstractmethod
    def one(self, source: SourceFiles, name: str, options: ReadOptions) -> CanonicalSAE:
        """The dictionary of a file."""

    def names(self, source: SourceFiles) -> list[str]:
        """The files that may hold one."""
        return [] if any(source.has(name) for name in CONFIGS) else torch_names(source)

    def detect(self, source: SourceFiles) -> str | None:
        names = self.names(source)
        # Of a repository's many files none is fetched to see whether it might be something.
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
            raise ValueError(f"hook: expected one of {', '.join(names[:20])}, of {len(names)} files. Give hook=FILE.")
        read = {name: self.one(source, name, replace(options, hook=None)) for name in names}
        return {(n.provenance.get("hooks_out") or [Path(name).stem])[0]: n for name, n in read.items()}

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError(f"{self.name}: these files are read only. {INSTEAD}.")
