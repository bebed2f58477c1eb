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
from .phases import Phases, phase_starts
from .recipe import Recipe, check_recipe, differences, dump_recipe, parse_yaml
from .report import METRICS_FILE, WANDB_FOLDER, TrainingLog
from .shortfalls import ENTRY, Shortfall
from .state import STATE_FILE, TrainState, saved_step

RECIPE_FILE = "recipe.yaml"


class Checkpoints:
    """Saves state and dictionary into ``out_dir``."""

    def __init__(self, directory: Path, provenance: dict[str, Any], phases: Phases):
        self.directory = directory
        self.provenance = provenance
        self.phases = phases
        self.shortfalls: tuple[Shortfall, ...] = ()

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
        self.save_dictionary(state, dictionary)

    def save_dictionary(self, state: TrainState, dictionary: SparseDictionary) -> None:
        """The checkpoint that others load."""
        counted: dict[str, Any] = {"training_tokens": state.tokens, "training_steps": state.step}
        if state.lengthened:
            counted["lengthened"] = state.lengthened
        dictionary.save(self.directory, self.provenance | counted | {ENTRY: [found.entry() for found in self.shortfalls]})


@contextmanager
def claimed(directory: Path, recipe: Recipe) -> Iterator[Recipe | None]:
    """Hold ``directory`` for this recipe; the value is the recipe of the saved state to continue, ``None`` if there is none.

    Raises:
        ValueError: If the directory holds another run, something else, or is in use or not writable.
    """
    with locked(directory, "out_dir"):
        remove_partial_files(directory)
        continued = require_same_run(directory, recipe)
        write_text(directory / RECIPE_FILE, dump_recipe(recipe))
        yield continued


def require_same_run(directory: Path, recipe: Recipe) -> Recipe | None:
    """Return the recipe of the state that a run of ``recipe`` would go on from, ``None`` if it would start anew.

    A run that never saved a step is nobody's: its directory is taken over. More ``tokens`` than before make a run longer.

    Raises:
        ValueError: If the directory holds another run, or something else.
    """
    saved = directory / RECIPE_FILE
    if not directory.exists():
        return None
    if not (directory / STATE_FILE).exists():
        ours = (LOCK_FILE, METRICS_FILE, WANDB_FOLDER)
        if not saved.exists() and any(path.name not in ours for path in directory.iterdir()):
            raise ValueError(f"out_dir: {directory} is not empty and holds no run of sparsary. Choose another out_dir.")
        return None
    old = check_recipe(parse_yaml(saved.read_text(encoding="utf-8"), str(saved)), str(saved))
    changed = differences(old, recipe)
    if changed:
        raise ValueError(
            f"out_dir: {directory} holds another run; these keys differ:\n  "
            + "\n  ".join(changed)
            + "\nChoose another out_dir, delete this one, or take back the changes to continue it."
        )
    if old.tokens != recipe.tokens and recipe.phases:
        _require_same_phase(directory, old, recipe)
    return old


def _require_same_phase(directory: Path, old: Recipe, recipe: Recipe) -> None:
    """Raise ``ValueError`` if the state is past the start of a phase that begins later in a longer run."""
    step = saved_step(directory)
    # The state is that before step `step`, which the phase is entered with.
    past = [sum(start < step for start in phase_starts(each)) for each in (old, recipe)]
    if past[0] != past[1]:
        raise ValueError(
            f"tokens: {directory} is at step {step}, in phase {past[0]}, which begins at step "
            f"{phase_starts(recipe)[past[0] - 1]} of {recipe.tokens:,} tokens. Train it anew in another out_dir, or keep "
            f"tokens: {old.tokens}."
        )
