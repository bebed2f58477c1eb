"""Base class of checkpoint formats; each library's format is a subclass in a module of this folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .canonical import CanonicalCrosscoder, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles

# One dictionary, a cross-layer transcoder, a crosscoder, or several dictionaries keyed by output hook.
Read = CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder | dict[str, CanonicalSAE]


@dataclass(frozen=True)
class ReadOptions:
    """Settings from the caller that files of other libraries may lack.

    ``hook`` selects one of several dictionaries, and names the hook if the files do not. ``scale`` is the input scale of a
    checkpoint saved mid-training, ``k`` and ``threshold`` complete its activation function, ``model`` is the language model's
    id. ``subtract_b_dec``: subtract the output bias from the input; set it where versions of a library differ.
    """

    hook: str | None = None
    scale: float | None = None
    k: int | None = None
    threshold: float | None = None
    model: str | None = None
    subtract_b_dec: bool | None = None


class Format(ABC):
    """Checkpoint format of one library. Reading opens only the source; writing refuses what the format cannot hold."""

    name: ClassVar[str]
    # Name used in messages.
    title: ClassVar[str]

    @abstractmethod
    def detect(self, source: SourceFiles) -> str | None:
        """Return the evidence that the files have this format (file names, then keys, then shapes), or ``None``.

        Repository and folder names are not evidence.
        """

    @abstractmethod
    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        """Read the dictionaries in the files.

        Raises:
            ValueError: If something is missing, unknown, or contradictory; missing values are never guessed.
        """

    @abstractmethod
    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        """Write a dictionary in this format.

        Raises:
            ValueError: If the format cannot hold it; the message names the reason and a format that can.
        """


class SetFormat(Format):
    """Format that keeps the dictionaries of all layers in one folder."""

    @abstractmethod
    def write_set(self, members: Mapping[str, CanonicalSAE], directory: Path) -> None:
        """Write dictionaries, keyed by output hook, in this format.

        Raises:
            ValueError: If the format cannot hold them; the message names the reason.
        """


def require_keys(where: object, found: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if keys are missing; the message lists the missing and the present keys."""
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(
            f"{where}: expected {', '.join(needed)}; {', '.join(missing)} missing among {', '.join(sorted(found))}."
        )


def require_shape(where: object, name: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless a shape matches; ``None`` in ``expected`` allows any size."""
    fits = len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
    if not fits:
        wanted = ", ".join("any" if side is None else str(side) for side in expected)
        raise ValueError(f"{where}: {name}: expected shape ({wanted}), got {tuple(shape)}.")
