"""Run directory: its lock, the check of what it already holds, and the files saved in it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..sae import SparseDictionary
from ..sae.checkpoint import read_config
from ..sae.dictionary import CONFIG_FILE
from ..sae.files import read_text, remove_partial_files, write_text
from .activations.stream import ActivationStream
from .content import Content, model_problems, text_problems
from .divided import whole_dictionary
from .locks import LOCK_FILE, locked
from .phases import Phases, phase_starts
from .processes import Mesh, mesh
from .recipe import Recipe, check_recipe, differences, dump_recipe, parse_yaml
from .report import METRICS_FILE, WANDB_FOLDER, TrainingLog
from .shortfalls import ENTRY, Shortfall
from .state import STATE_FILE, TrainState, saved_step

RECIPE_FILE = "recipe.yaml"

log = logging.getLogger(__name__)


class Checkpoints:
    """Writer of training states and dictionaries to ``out_dir``."""

    def __init__(self, directory: Path, provenance: dict[str, Any], phases: Phases, ranks: Mesh | None = None):
        self.directory, self.ranks = directory, ranks or mesh()
        self.provenance = provenance
        self.phases = phases
        self.shortfalls: tuple[Shortfall, ...] = ()
        self._recorded: Content | None = None

    def save(
        self,
        state: TrainState,
        dictionary: SparseDictionary,
        optimizer: torch.optim.Optimizer,
        stream: ActivationStream,
        report: TrainingLog,
    ) -> None:
        """Save the training state, then the dictionary.

        If the process is killed in between, the resumed run saves the dictionary again at its end. Of several ranks the first
        writes, after all have compared their weights.

        Raises:
            ValueError: If the ranks' weights differ.
        """
        state.require_finite(self.directory)
        self._require_equal_weights(dictionary, state.step)
        if self.ranks.batch.rank:
            state.saved_step = state.step
            return
        state.save(self.directory, dictionary, self.phases, optimizer, stream, report.flush())
        self.save_dictionary(state, dictionary, stream)

    def save_dictionary(
        self, state: TrainState, dictionary: SparseDictionary, stream: ActivationStream, finished: bool = False
    ) -> None:
        """Write the loadable checkpoint.

        Its provenance records the training progress, whether the run is calibrated (``finished``), the number of rows left
        out or repaired, the shortfalls, and the content digests of model and text. All shards of the latents take part.
        """
        if self.ranks.batch.rank:
            return
        usage, dictionary = state.training_usage(), whole_dictionary(dictionary)
        if self.ranks.shards.rank:
            return
        dictionary.training_usage = usage
        reached: dict[str, Any] = {"training_tokens": state.tokens, "training_steps": state.step, "finished": finished}
        found = {"lengthened": state.lengthened, "skipped": dict(stream.skipped), "content": self._content(stream)}
        reached |= {key: value for key, value in found.items() if value}
        dictionary.save(self.directory, self.provenance | reached | {ENTRY: [found.entry() for found in self.shortfalls]})

    def _require_equal_weights(self, dictionary: SparseDictionary, step: int) -> None:
        ranks = self.ranks.batch
        if ranks.size == 1:
            return
        # Sums of the weights' bits, which wrap around.
        sums = [parameter.detach().contiguous().view(torch.int32).sum() for parameter in dictionary.parameters()]
        digests = torch.stack(ranks.gather(torch.stack(sums)))
        usual = digests.mode(0).values
        other = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, usual)]
        if other:
            raise ValueError(
                f"{self.directory}: expected equal weights on all ranks, got others on rank {', '.join(map(str, other))} at "
                f"step {step}. Its memory or its arithmetic is faulty, or its libraries differ. The state of the last save is "
                "kept; the same command continues."
            )

    def _content(self, stream: ActivationStream) -> Content | None:
        """Return the content of model and text, with the longest text record: a run resumed near its end reads less text."""
        content = stream.content()
        if self._recorded is None and (self.directory / CONFIG_FILE).exists():
            self._recorded = read_config(self.directory)["provenance"].get("content")
        before = (self._recorded or {}).get("text")
        if content is not None and before is not None and before["documents"] > content["text"]["documents"]:
            content = content | {"text": before}
        self._recorded = content
        return content


@contextmanager
def claimed(directory: Path, recipe: Recipe, content: Callable[[], Content] | None = None) -> Iterator[Recipe | None]:
    """Lock ``directory`` for a run of this recipe; yield the recipe of the saved state to resume, ``None`` if there is none.

    Args:
        content: Returns the content of the recipe's model, which must be the one the saved run was trained on.

    Raises:
        ValueError: If the directory holds another run or unrelated files, is in use, or is not writable.
    """
    with locked(directory, "out_dir"):
        remove_partial_files(directory)
        continued = require_same_run(directory, recipe, content)
        write_text(directory / RECIPE_FILE, dump_recipe(recipe))
        yield continued


def require_same_run(directory: Path, recipe: Recipe, content: Callable[[], Content] | None = None) -> Recipe | None:
    """Return the recipe of the saved state that a run of ``recipe`` would resume, ``None`` if it would start from scratch.

    A directory whose run never saved a state is taken over. More ``tokens`` than before lengthen the saved run.

    Raises:
        ValueError: If the directory holds another run, a run on another model or text, or unrelated files.
    """
    saved = directory / RECIPE_FILE
    if not directory.exists():
        return None
    if not (directory / STATE_FILE).exists():
        ours = (LOCK_FILE, METRICS_FILE, WANDB_FOLDER)
        if not saved.exists() and any(path.name not in ours for path in directory.iterdir()):
            raise ValueError(
                f"out_dir: {directory}: expected an empty directory or a run, got other files. Choose another out_dir."
            )
        return None
    old = check_recipe(parse_yaml(read_text(saved), str(saved)), str(saved))
    changed = run_changes(directory, old, recipe, content)
    if changed:
        raise ValueError(
            f"out_dir: {directory}: expected a run of this recipe, got another run; these keys differ:\n  "
            + "\n  ".join(changed)
            + "\nChoose another out_dir, delete this one, or revert the changes to continue it."
        )
    if old.tokens != recipe.tokens and recipe.phases:
        _require_same_phase(directory, old, recipe)
    return old


def _require_same_phase(directory: Path, old: Recipe, recipe: Recipe) -> None:
    """Raise ``ValueError`` if the state is past the start of a phase that begins later in the longer run."""
    step = saved_step(directory)
    # The state precedes step `step`, and a phase is entered at its first step.
    past = [sum(start < step for start in phase_starts(each)) for each in (old, recipe)]
    if past[0] != past[1]:
        raise ValueError(
            f"tokens: {directory} is at step {step}, in phase {past[0]}, which begins at step "
            f"{phase_starts(recipe)[past[0] - 1]} of {recipe.tokens:,} tokens. Train from scratch in another out_dir, or keep "
            f"tokens: {old.tokens}."
        )


def run_changes(directory: Path, old: Recipe, new: Recipe, current: Callable[[], Content] | None) -> list[str]:
    """Return one line for each reason why a saved run cannot be resumed with a recipe.

    Args:
        current: Returns the current content of the recipe's model and tokenizer; ``None`` compares names only.
    """
    keys = differences(old, new)
    if current is None or not (directory / CONFIG_FILE).exists():
        return keys
    provenance = read_config(directory)["provenance"]
    recorded = provenance.get("content")
    if recorded is None:
        if provenance.get("model") is not None:
            log.warning(
                "%s: this run was started by a version that recorded no hashes of model and text: a change of either under "
                "the same name is not detected.",
                directory,
            )
        return keys
    # Contents are compared instead: a revision may be pinned later, when the repository has changed.
    keys = [line for line in keys if not line.startswith(("model.revision:", "text.dataset_revision:"))]
    return model_problems(recorded, current()) + (text_problems(recorded, new.text) or []) + keys
