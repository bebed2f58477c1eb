"""Edge scores of a model as files for MIB's circuit track: a graph with a score for every edge, for each task and method.

A submission is a folder for each method, ``DIR/METHOD``, with ``TASK_MODEL/importances.json`` in it; models and tasks have
MIB's names there. Its evaluation takes the highest scores at each size, so no edge is marked as kept.

Source: Mueller et al. 2025, arXiv:2504.13151.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ...sae.files import write_json
from ...training.activations.model import LanguageModel, load_model
from ...training.recipe import ModelSection
from ...training.stages import stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..result import Report
from .benchmark import DEFAULT_SETTINGS, CircuitSettings
from .compared_units import open_dictionaries, open_model
from .methods import METHODS
from .scoring.edge_files import edge_graph
from .tasks import make_pairs
from .tasks.competence import competence, require_solved
from .units.edges import EdgeSpace

FILE = "importances.json"
# MIB's names of models, by hub id.
MODELS = {
    "openai-community/gpt2": "gpt2",
    "gpt2": "gpt2",
    "Qwen/Qwen2.5-0.5B": "qwen2.5",
    "google/gemma-2-2b": "gemma2",
    "meta-llama/Llama-3.1-8B": "llama3",
}


def mib_submission(
    checkpoints: str | Path | Sequence[str | Path],
    path: str | Path,
    settings: CircuitSettings = DEFAULT_SETTINGS,
    model: str | Path | LanguageModel | None = None,
    options: CheckpointOptions = NO_OPTIONS,
) -> Report:
    """Score the edges between heads and MLPs on all pairs of each task, and write them for MIB's circuit track.

    Example::

        settings = sparsary.CircuitSettings(tasks=("ioi",), methods=("integrated_inputs",), pairs=200)
        sparsary.mib_submission((), "submission", settings, model="openai-community/gpt2")

    Args:
        checkpoints: Dictionaries of the model; none are needed with ``model``.
        path: A folder, or a file ``.json`` for one task and one method.

    Returns:
        ``rows``, one per file: task, method, number of edges, ``file``.

    Raises:
        ValueError: If there is no model, the model does not solve a task, or a method does not score edges.
    """
    path, count = Path(path), len(settings.tasks) * len(settings.methods)
    if path.suffix == ".json" and count > 1:
        raise ValueError(f"--mib: expected a folder for {count} combinations of tasks and methods, got the file {path}.")
    language_model = _model(checkpoints, model, options)
    space, rows = EdgeSpace(language_model), []
    with stage("circuits", count, "steps") as shown:
        for task in settings.tasks:
            pairs = make_pairs(task, language_model, settings.pairs, settings.seed, settings.corruption)
            require_solved(competence(language_model, pairs))
            for name in settings.methods:
                shown.update(shown.done, f"{task}: {name} on edges")
                try:
                    scores = METHODS[name]().discover(space, pairs).values
                except ValueError as error:
                    raise ValueError(f"--mib: {error}") from None
                if scores.isnan().any():
                    raise ValueError(f"--mib: expected a method that scores every edge, got {name}. Try attribution.")
                told = f"{_task_name(pairs.task)}_{MODELS.get(language_model.id, Path(language_model.id).name)}"
                file = path if path.suffix == ".json" else path / name / told / FILE
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, edge_graph(space, scores, torch.zeros(space.size, dtype=torch.bool)))
                rows.append({"task": pairs.task, "method": name, "edges": space.size, "file": str(file)})
                shown.update(shown.done + 1)
    return Report({"model": language_model.id, "path": str(path), "rows": rows}, rows)


def _model(
    checkpoints: str | Path | Sequence[str | Path], model: str | Path | LanguageModel | None, options: CheckpointOptions
) -> LanguageModel:
    """Return the model: the given one, or that of the checkpoints."""
    if isinstance(model, LanguageModel):
        return model
    if model is not None:
        return load_model(ModelSection(id=str(model), trust_remote_code=options.trust_remote_code))
    given = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    if not given:
        raise ValueError("--mib: expected CHECKPOINT or --model MODEL, got neither. Give --model openai-community/gpt2.")
    return open_model([open_dictionaries(str(name), options) for name in given])


def _task_name(task: str) -> str:
    """Return a task's name in names of folders, where an underscore comes before the model; a file's is its stem."""
    return Path(task).stem.replace("_", "-")
