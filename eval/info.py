"""Description and integrity checks of a dictionary or activation store (``sparsary info``)."""

from dataclasses import dataclass
from pathlib import Path

from ..training.info import describe_files
from ..transcoders.load import NO_OPTIONS, CheckpointOptions
from .checkpoint import open_checkpoint, sanity_of
from .sanity import Sanity

DEFAULT_TOKENS = 4000


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint or store: ``lines`` are (name, value) pairs, ``problems`` has one line per damage found.

    Returned by ``info``::

        found = info("runs/my-sae")
        for name, value in found.lines:
            print(f"{name}: {value}")
        found.sanity(tokens=2000)["transformer.h.8:out"].fvu
    """

    path: str
    lines: list[tuple[str, str]]
    problems: list[str]
    options: CheckpointOptions

    def sanity(self, tokens: int = DEFAULT_TOKENS) -> dict[str, Sanity]:
        """Run the language model on about ``tokens`` tokens of text; check each dictionary on its activations, by hook written.

        Raises:
            ValueError: If the model, hook or text is unknown, or does not fit the dictionary.
        """
        return sanity_of(open_checkpoint(self.path, self.options), tokens)


def info(path: str | Path, options: CheckpointOptions = NO_OPTIONS) -> CheckpointInfo:
    """Describe a checkpoint, a stack, another library's dictionary or an activation store, and verify its checksums.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE, info
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(folder, {})
    ...     info(folder).problems
    []

    Raises:
        ValueError: If the path holds none of these, or a file is too damaged to be described.
    """
    return CheckpointInfo(str(path), *describe_files(str(path), options), options)
