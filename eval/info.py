"""``sparsary info``: a description of a dictionary or an activation store, and checks of it."""

from dataclasses import dataclass
from pathlib import Path

from ..training.info import describe_files
from ..transcoders.load import NO_OPTIONS, CheckpointOptions
from .checkpoint import open_checkpoint, sanity_of
from .sanity import Sanity

DEFAULT_TOKENS = 4000


@dataclass(frozen=True)
class CheckpointInfo:
    """The description of a path: ``lines`` are pairs of a name and a value, ``problems`` one line for every damage found."""

    path: str
    lines: list[tuple[str, str]]
    problems: list[str]
    options: CheckpointOptions

    def sanity(self, tokens: int = DEFAULT_TOKENS) -> dict[str, Sanity]:
        """Run the language model on some text; return what each dictionary does to its activations, by the hook it writes.

        Raises:
            ValueError: If model, hook or text are not known or do not fit.
        """
        return sanity_of(open_checkpoint(self.path, self.options), tokens)


def info(path: str | Path, options: CheckpointOptions = NO_OPTIONS) -> CheckpointInfo:
    """Describe a checkpoint, a stack, another library's dictionary or an activation store, and verify its checksums.

    Raises:
        ValueError: If the path holds none of these, or a file is too damaged to be described.
    """
    return CheckpointInfo(str(path), *describe_files(str(path), options), options)
