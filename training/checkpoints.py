"""The run's directory: who may write to it, and what is saved in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..sae import SparseDictionary
from ..sae.files import remove_partial_files, write_text
from .activations.stream import ActivationStream
from .locks import LOCK_FILE, locked
from .phases import Phases
from .recipe import Recipe, check_recipe, differences, dump_recipe, parse_yaml
from .report import METRICS_FILE, TrainingLog
from .state import STATE_FILE, TrainState

RECIPE_FILE = "recipe.yaml"


class Checkpoints:
    """Saves state and dictionary into ``out_dir``."""

    def __init__(self, directory: Path, provenance: dict[str, Any], phases: Phases):
        self.directory = directory
        self.provenance = provenance
        self.phases = phases

    def save(
        self,
        state: TrainState,
        dictionary: SparseDictionary,
        optimizer: torch.optim.Optimizer,
        stream: ActivationStream,
        report: TrainingLog,
    ) -> None:
        """State first, then the dictionary: a kill in between is mended by the resume, which saves again at the end."""
        state.require_finite(self.directory)
        state.save(self.directory, dictionary, self.phases, optimizer, stream, report.flush())
        self.save_dictionary(state, dictionary, stream)

    def save_dictionary(
        self, state: TrainState, dictionary: SparseDictionary, stream: ActivationStream, finished: bool = False
    ) -> None:
        """Write the checkpoint that others load.

        It says whether training and calibration are over, and how many bad rows were left out or mended, if any were.
        """
        dictionary.training_usage = state.training_usage
        reached: dict[str, Any] = {"training_tokens": state.tokens, "training_steps": state.step, "finished": finished}
        skipped = {"skipped": dict(stream.skipped)} if stream.skipped else {}
        dictionary.save(self.directory, self.provenance | reached | skipped)


@contextmanager
def claimed(directory: Path, recipe: Recipe) -> Iterator[bool]:
    """Hold ``directory`` for this recipe; the value says whether a saved state is there to continue.

    Raises:
        ValueError: If the directory holds another run, something else, or is in use or not writable.
    """
    with locked(directory, "out_dir"):
        remove_partial_files(directory)
        _require_same_run(directory, recipe)
        write_text(directory / RECIPE_FILE, dump_recipe(recipe))
        yield (directory / STATE_FILE).exists()


def _require_same_run(directory: Path, recipe: Recipe) -> None:
    saved = directory / RECIPE_FILE
    if saved.exists():
        old = check_recipe(parse_yaml(saved.read_text(encoding="utf-8"), str(saved)), str(saved))
        changed = differences(old, recipe)
        if changed:
            raise ValueError(
                f"out_dir: {directory} holds another run; these keys differ:\n  "
                + "\n  ".join(changed)
                + "\nChoose another out_dir, delete this one, or take back the changes to continue it."
            )
    elif any(path.name not in (LOCK_FILE, METRICS_FILE) for path in directory.iterdir()):
        raise ValueError(f"out_dir: {directory} is not empty and holds no run of sparsary. Choose another out_dir.")
