"""Format: how one library keeps its dictionaries. One subclass per library, in the files beside this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .canonical import CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles

# One dictionary, a cross-layer one, or several by the hook they write.
Read = CanonicalSAE | CanonicalCrossLayer | dict[str, CanonicalSAE]


@dataclass(frozen=True)
class ReadOptions:
    """What the files may leave open, said by whoever loads them.

    ``hook`` picks one of several dictionaries, and names the hook where the files do not. ``scale`` is the input scale of a
    checkpoint from the middle of a training, ``k`` and ``threshold`` what its gate lacks, ``model`` the language model's id.
    ``subtract_b_dec`` says whether the output bias is subtracted from the input where versions of a library differ in it.
    """

    hook: str | None = None
    scale: float | None = None
    k: int | None = None
    threshold: float | None = None
    model: str | None = None
    subtract_b_dec: bool | None = None


class Format(ABC):
    """One library's files. Reading touches nothing but the source; writing refuses what the format cannot hold."""

    name: ClassVar[str]
    # What people call it.
    title: ClassVar[str]

    @abstractmethod
    def detect(self, source: SourceFiles) -> str | None:
        """Why these files are of this format: names of files first, then keys, then shapes. ``None`` if they are not.

        The name of a repository or folder proves nothing.
        """

    @abstractmethod
    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        """What the files hold.

        Raises:
            ValueError: If something is missing, unknown or contradictory. Nothing is guessed.
        """

    @abstractmethod
    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        """Write a dictionary as this library reads it.

        Raises:
            ValueError: If the format cannot hold it; with the reason, and a format that can.
        """


class SetFormat(Format):
    """A library that keeps the dictionaries of all layers in one folder."""

    @abstractmethod
    def write_set(self, members: Mapping[str, CanonicalSAE], directory: Path) -> None:
        """Write dictionaries, given by the hooks they write, as this library reads them.

        Raises:
            ValueError: If the format cannot hold them; with the reason.
        """


def require_keys(where: object, found: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming what is missing, and what there is."""
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(
            f"{where}: expected {', '.join(needed)}; {', '.join(missing)} missing among {', '.join(sorted(found))}."
        )


def require_shape(where: object, name: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless a shape is as expected; ``None`` is any size."""
    fits = len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
    if not fits:
        wanted = ", ".join("any" if side is None else str(side) for side in expected)
        raise ValueError(f"{where}: {name}: expected shape ({wanted}), got {tuple(shape)}.")
