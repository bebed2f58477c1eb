"""Run directory: its lock, the check of what it already holds, and the files saved in it."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..sae import SparseDictionary
from ..sae.checkpoint_files import CONFIG_FILE, read_config, write_dictionary_files
from ..sae.files import read_text, remove_partial_files, write_text
from ..sae.training_usage import TrainingUsage
from .activations.stream import ActivationStream
from .activations.vector_files import vector_problems
from .content import Content, model_problems, text_problems
from .locks import locked
from .phases import Phases, phase_starts
from .processes import Mesh, mesh
from .recipe import Recipe, check_recipe, differences, dump_recipe, parse_yaml
from .report import METRICS_FILE, WANDB_FOLDER, TrainingLog
from .shortfalls import ENTRY, Shortfall
from .snapshot import Snapshot
from .state import STATE_FILE, StateContents, TrainState, saved_budget, saved_step

RECIPE_FILE = "recipe.yaml"

log = logging.getLogger(__name__)


class Checkpoints:
    """Training states and dictionaries of a run, written to ``out_dir`` while training continues.

    A save copies all tensors and leaves the writing to ``writer``; the next one waits for it. Errors of writing are raised by
    the next call of any method but ``close``.

    Args:
        writer: Thread that writes the copies. ``None`` writes during the save, as does a copy that does not fit in memory.
    """

    def __init__(
        self,
        directory: Path,
        provenance: dict[str, Any],
        phases: Phases,
        ranks: Mesh | None = None,
        writer: Executor | None = None,
    ):
        self.directory, self.ranks = directory, ranks or mesh()
        self.provenance = provenance
        self.phases = phases
        self.writer = writer
        self.shortfalls: tuple[Shortfall, ...] = ()
        self._snapshot = Snapshot()
        self._writing: Future[None] | None = None
        self._recorded: Content | None = None

    def save(
        self,
        state: TrainState,
        dictionary: SparseDictionary,
        optimizer: torch.optim.Optimizer,
        stream: ActivationStream,
        report: TrainingLog,
    ) -> None:
        """Save the training state, then its dictionary. ``state.saved_step`` follows when the state is written.

        If the process is killed in between, the resumed run saves the dictionary again at its end. Of several ranks the first
        writes, after all have compared their weights.

        Raises:
            ValueError: If the ranks' weights differ.
            WriteError: If the previous save failed.
        """
        self.require_finite(state)
        self.wait()
        self._require_equal_weights(dictionary, state.step)
        if self.ranks.batch.rank:
            state.saved_step = state.step
            return
        # All shards of the latents take part; the first has the whole tensors, and writes them.
        contents = state.contents(dictionary, self.phases, optimizer, stream, report.flush())
        dictionary.training_usage = usage = state.training_usage()
        if self.ranks.shards.rank:
            state.saved_step = state.step
            return
        config = dictionary.config(self._provenance_of(state, stream, finished=False))
        config["dictionary"]["n_latents"] = dictionary.n_latents * self.ranks.shards.size
        if self.writer is None or not self._snapshot.fits(contents.tensors):
            self._write(state, contents, config, usage)
        else:
            contents = replace(contents, tensors=self._snapshot.take(contents.tensors))
            self._writing = self.writer.submit(self._write, state, contents, config, usage)

    def _write(self, state: TrainState, contents: StateContents, config: dict[str, Any], usage: TrainingUsage) -> None:
        self._snapshot.wait()
        contents.write(self.directory)
        state.saved_step = contents.counters["step"]
        write_dictionary_files(self.directory, contents.dictionary_tensors, config, usage)

    def wait(self) -> None:
        """Wait until the last save is written.

        Raises:
            WriteError: If it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def require_written(self) -> None:
        """Raise the error of the last save, if it has failed already."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def require_finite(self, state: TrainState) -> None:
        """Raise ``NotFinite`` if the loss was not finite in any step so far."""
        if not bool(state.finite):
            # The message says which step is saved.
            self.wait()
            state.require_finite(self.directory)

    def close(self) -> None:
        """Wait until the last save is written, or has failed: another error has ended the run."""
        with suppress(Exception):
            self.wait()

    def save_finished(self, state: TrainState, dictionary: SparseDictionary, stream: ActivationStream) -> None:
        """Write the loadable checkpoint of a whole, calibrated dictionary, on the first rank."""
        self.wait()
        if self.ranks.batch.rank:
            return
        # All shards of the latents take part.
        usage = state.training_usage()
        if self.ranks.shards.rank:
            return
        dictionary.training_usage = usage
        dictionary.save(self.directory, self._provenance_of(state, stream, finished=True))

    def _provenance_of(self, state: TrainState, stream: ActivationStream, finished: bool) -> dict[str, Any]:
        """Return the provenance of a dictionary.

        Besides the recipe it records the training progress, whether the run is calibrated (``finished``), the number of rows
        left out or repaired, the shortfalls, and the content digests of model and text.
        """
        reached: dict[str, Any] = {"training_tokens": state.tokens, "training_steps": state.step, "finished": finished}
        found = {"lengthened": state.lengthened, "skipped": dict(stream.skipped), "content": self._content(stream)}
        found |= {"start": state.start}
        reached |= {key: value for key, value in found.items() if value}
        return self.provenance | reached | {ENTRY: [found.entry() for found in self.shortfalls]}

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
        # Hidden files are those of other ranks, which look at the folder at the same time: locks, partial files, probes.
        ours = (RECIPE_FILE, METRICS_FILE, WANDB_FOLDER)
        if not saved.exists() and any(path.name not in ours and path.name[0] != "." for path in directory.iterdir()):
            raise ValueError(
                f"out_dir: {directory}: expected an empty directory or a run, got other files. Choose another out_dir."
            )
        return None
    old = _recipe_of(read_text(saved), str(saved))
    if (budget := saved_budget(directory)) is not None:
        # A kill may have come between a longer run's recipe and its first state.
        old = old.model_copy(update={"tokens": budget})
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


@lru_cache(maxsize=64)
def _recipe_of(text: str, where: str) -> Recipe:
    """Return the recipe of a saved run; a run is checked by its plan and again when it starts, and YAML takes a while."""
    return check_recipe(parse_yaml(text, where), where)


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
    if new.harvest.files:
        return vector_problems(recorded, current()) + keys
    return model_problems(recorded, current()) + (text_problems(recorded, new.text) or []) + keys
