"""Command that compares circuits: tasks of one model, and one or more tasks of two checkpoints of a model."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from ....sae.files import write_json
from ....sae.suggestions import require_choice
from ....training.activations.model import LanguageModel, load_model
from ....training.shortfalls import shortfall
from ....training.stages import stage
from ....transcoders.load import NO_OPTIONS, CheckpointOptions
from ...checkpoint import with_grids_members
from ...pages.render import render_file
from ...result import Report
from ..benchmark import DEFAULT_SETTINGS, CircuitSettings
from ..compared_units import OF_MODEL, ComparedCheckpoint, named_model, open_dictionaries, open_model, unit_sets
from ..methods import METHODS
from ..tasks import make_pairs
from ..tasks.competence import Competence, competence
from ..tasks.pairs import PromptPairs
from ..units.edges import EdgeSpace
from ..units.nodes import NodeSpace
from ..units.space import Space
from .checkpoints import changed_units, require_same_architecture
from .overlaps import cross_rows, difference_rows, equal_size, overlap_rows, shared_rows
from .repair import repair, require_answers_in_common
from .scored_task import ScoredTask, score_task

SCHEMA_VERSION = 1
# Random circuits that the best and the mean of are reported.
RANDOM_CIRCUITS = 10
FILE = "circuit_comparison.json"
# Unit sets that are compared.
COMPARED = ("components", "mlp_neurons", "experts", "latents")

Row = dict[str, Any]

log = logging.getLogger(__name__)


def compare_circuits(
    checkpoints: str | Path | Sequence[str | Path] = (),
    settings: CircuitSettings = DEFAULT_SETTINGS,
    models: Sequence[str | Path | LanguageModel] = (),
    repairs: Sequence[tuple[str, str]] = (),
    out: str | Path | None = None,
    options: CheckpointOptions = NO_OPTIONS,
) -> Report:
    """Compare circuits of tasks, or of two checkpoints of a model; write ``circuit_comparison.json`` and its page.

    Units are heads and MLPs, neurons of the MLPs, experts of a mixture, and latents of ``checkpoints``. Half of the pairs score
    the units; on the other half every circuit is run on every task. Methods without scores of single pairs are refused.

    Example::

        settings = sparsary.CircuitSettings(tasks=("agreement_pp", "greater_than"), methods=("attribution",))
        for row in sparsary.compare_circuits(settings=settings, models=["embedded"], out="runs/compared")["overlaps"]:
            print(row["family"], row["a"], row["b"], row["at"], row.get("jaccard"), row.get("p_holm"))

    Args:
        checkpoints: Dictionaries whose latents are compared too; without any, ``models`` are required.
        models: A model, or a base model and one that was trained from it; default: that of the checkpoints.
        repairs: Two tasks A and B each: units of A that B lacks do in B's runs what they do in A's.
        out: Output directory, by default ``circuits`` in the first checkpoint's results directory.

    Returns:
        The content of ``circuit_comparison.json``, with ``path`` and ``page_path``.

    Raises:
        ValueError: If there are fewer than two circuits, the models differ in layers, widths or tokenizer, or a task is
            unknown or not solved by any model.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    names = with_grids_members([str(checkpoint) for checkpoint in given])
    _require_comparable(settings, names, models, repairs, out)
    several = [open_dictionaries(name, options) for name in names]
    loaded = _loaded(models, several, options)
    for other in loaded[1:]:
        require_same_architecture(loaded[0], other)
    found: Row = {
        "circuit_comparison_version": SCHEMA_VERSION,
        "models": [model.id for model in loaded],
        "checkpoints": names,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()},
        "random_circuits": settings.random_circuits or RANDOM_CIRCUITS,
        # A command without checkpoints needs it again.
        "out": None if names or out is None else str(out),
        "repairs_asked": [list(one) for one in repairs],
        "competence": [],
        "doubts": [],
        "tasks_scored": [],
        "overlaps": [],
        "cross": [],
        "differences": [],
        "shared": [],
        "changed": [],
        "repairs": [],
        "refused": [],
    }
    prompts = [_prompts(task, loaded, settings, found) for task in settings.tasks]
    _name_apart(prompts, settings.tasks)
    _note_answers(prompts, found)
    by_task = dict(zip(settings.tasks, prompts, strict=True))
    for a, b in repairs:
        require_answers_in_common(by_task[a].pairs, by_task[b].pairs)
    families = _families(loaded, several, settings)
    with stage("circuits", len(families) * len(settings.methods), "steps") as shown:
        for family, spaces in families.items():
            for method in settings.methods:
                shown.update(shown.done, f"{method} on {family}")
                _compare(family, method, spaces, loaded, prompts, settings, repairs, found)
                shown.update(shown.done + 1)
    if not found["overlaps"] and not found["changed"]:
        raise ValueError(f"--compare: expected two circuits, got none: {'; '.join(r['refused'] for r in found['refused'])}")
    for doubt in found["doubts"]:
        log.warning("%s.", doubt)
    directory = Path(out) if out is not None else several[0].opened.results / "circuits"
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FILE, found, sealed=True)
    page = render_file(directory / FILE)
    return Report(found | {"path": str(directory / FILE), "page_path": str(page)}, found["overlaps"])


def _require_comparable(
    settings: CircuitSettings,
    checkpoints: list[str],
    models: Sequence[str | Path | LanguageModel],
    repairs: Sequence[tuple[str, str]],
    out: str | Path | None,
) -> None:
    if not checkpoints and not models:
        raise ValueError("--compare: expected CHECKPOINTs or --model MODEL, got neither. Give --model embedded, for example.")
    if len(models) > 2:
        raise ValueError(f"--model: expected one model, or a base model and a tuned one, got {len(models)}.")
    if len(set(settings.tasks)) < len(settings.tasks):
        raise ValueError(f"--task: expected different tasks, got {', '.join(settings.tasks)}.")
    if len(settings.tasks) * max(1, len(models)) < 2:
        raise ValueError(
            f"--compare: expected two circuits or more, got one ({settings.tasks[0]} of one model). Give another --task, or "
            "another --model."
        )
    if not checkpoints and out is None:
        raise ValueError("--out: required with --compare and no CHECKPOINT, whose folder results would be written to.")
    for two in repairs:
        for task in two:
            require_choice("--repair", task, settings.tasks, ", the tasks compared (--task)")
        if two[0] == two[1]:
            raise ValueError(f"--repair: expected two different tasks, got {two[0]} twice.")


def _loaded(
    models: Sequence[str | Path | LanguageModel], several: list[ComparedCheckpoint], options: CheckpointOptions
) -> list[LanguageModel]:
    if not models:
        return [open_model(several)]
    about = several[0].model.model_dump(exclude={"id"}) if several else None
    return [
        model if isinstance(model, LanguageModel) else load_model(named_model(str(model), options, about)) for model in models
    ]


class _Prompts:
    """Pairs of a task, in halves, and each model's competence on them."""

    def __init__(self, pairs: PromptPairs, models: Sequence[LanguageModel]):
        half = len(pairs) // 2
        self.task, self.pairs = pairs.task, pairs
        self.chosen_on, self.judged_on = pairs.take(slice(0, half)), pairs.take(slice(half, len(pairs)))
        self.competence: list[Competence] = [competence(model, self.judged_on) for model in models]


def _prompts(task: str, models: list[LanguageModel], settings: CircuitSettings, found: Row) -> _Prompts:
    """Make a task's pairs in the language of the first model; both models read the same tokens.

    Raises:
        ValueError: If no model does the task.
    """
    pairs = make_pairs(task, models[0], settings.pairs, settings.seed, settings.corruption)
    prompts = _Prompts(pairs, models)
    short = shortfall("--pairs", settings.pairs, len(pairs), "pairs", f"{task} has no more pairs; intervals are wider")
    found["doubts"] += [str(each) for each in short]
    for model, able in zip(models, prompts.competence, strict=True):
        entry = {"task": pairs.task, "model": model.id, "accuracy": able.accuracy, "chance": able.chance}
        found["competence"].append(entry | {"at_chance": able.at_chance, "metric": able.clean, "difference": able.difference})
        if able.at_chance:
            found["doubts"].append(f"{model.id} is at chance on this task, so that a circuit of it explains little: {able}")
    if all(able.noise for able in prompts.competence):
        prompts.competence[0].require_signal()
    return prompts


def _name_apart(prompts: list[_Prompts], tasks: Sequence[str]) -> None:
    """Name tasks by their files where two files name the same task."""
    names = [one.task for one in prompts]
    for one, given in zip(prompts, tasks, strict=True):
        if names.count(one.task) > 1:
            one.task = str(given)


def _note_answers(prompts: list[_Prompts], found: Row) -> None:
    """Note tasks whose answers and foils have no token in common: circuits cannot share how the answer is written."""
    tokens = {
        one.task: {token for questions in one.pairs.questions for q in questions for token in (*q.answers, *q.foils)}
        for one in prompts
    }
    for a, b in combinations(tokens, 2):
        if not tokens[a] & tokens[b]:
            found["doubts"].append(
                f"{a} and {b} ask for different tokens: units that write the answer cannot be shared, and low "
                "cross-faithfulness says nothing about the rest"
            )


def _families(
    models: list[LanguageModel], several: list[ComparedCheckpoint], settings: CircuitSettings
) -> dict[str, list[Space]]:
    """Return every unit set's space in each model; sets that a model lacks are left out unless they were asked for."""
    for name in settings.units:
        require_choice("--units", name, COMPARED, ", which --compare takes")
    asked = settings.units or COMPARED
    own = [unit_sets(model, several, settings.units)[1] for model in models]
    found: dict[str, list[Space]] = {
        family: [NodeSpace(model, parts[family]) for model, parts in zip(models, own, strict=True)]
        for family in (OF_MODEL[name] for name in COMPARED if name in OF_MODEL and name in asked)
        if all(family in parts for parts in own)
    }
    for dictionaries in several if "latents" in asked else ():
        found[f"{dictionaries.name}: latents"] = [NodeSpace(model, dictionaries.parts("node")) for model in models]
    if settings.edges:
        found["edges"] = [EdgeSpace(model) for model in models]
    return found


def _compare(
    family: str,
    method: str,
    spaces: list[Space],
    models: list[LanguageModel],
    prompts: list[_Prompts],
    settings: CircuitSettings,
    repairs: Sequence[tuple[str, str]],
    found: Row,
) -> None:
    """Score all tasks in one unit set, compare them, and add the results to ``found``."""
    about, n_random, seed = {"family": family, "method": method}, found["random_circuits"], settings.seed
    scored: list[list[ScoredTask]] = []
    try:
        for number, task in enumerate(prompts):
            scored.append(
                [
                    score_task(
                        f"{task.task}, {_side(index)}" if len(models) > 1 else task.task,
                        model.id,
                        space,
                        task.chosen_on,
                        task.judged_on,
                        METHODS[method](),
                        settings.ablation,
                        seed,
                        number,
                    )
                    for index, (model, space) in enumerate(zip(models, spaces, strict=True))
                ]
            )
    except ValueError as error:
        # Some methods support only heads, or only edges, or do not score single pairs.
        found["refused"].append(about | {"refused": str(error)})
        return
    tasks = [one for each in scored for one in each]
    found["tasks_scored"] += [
        about
        | {"name": one.name, "task": one.task, "model": one.model, "units": one.space.size, "pairs": len(one.per_pair)}
        | {"nodes_80": one.size, "equal_size": equal_size(tasks), "refused": one.refused}
        for one in tasks
    ]
    tables = {
        "overlaps": overlap_rows(tasks, seed),
        "cross": cross_rows(tasks, n_random, seed),
        "differences": difference_rows(tasks),
        "shared": shared_rows(tasks),
    }
    if len(models) > 1:
        tables["changed"] = [changed_units(base, tuned, n_random, settings.ablation, seed) for base, tuned in scored]
    by_task = {name: each[-1] for name, each in zip(settings.tasks, scored, strict=True)}
    tables["repairs"] = [repair(by_task[a], by_task[b], equal_size(tasks), n_random, seed) for a, b in repairs]
    for table, rows in tables.items():
        found[table] += [about | row for row in rows]


def _side(index: int) -> str:
    return ("base", "tuned")[index]
