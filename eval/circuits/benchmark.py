"""Circuit benchmark: run discovery methods on prompt pairs and evaluate the circuits on held-out pairs.

Half of a task's pairs are used to discover circuits, the other half to evaluate them. Each combination of task, unit set
(``family``) and method gives one flat row of ``circuits.json``; faithfulness curves and drawn circuits are stored alongside the
rows.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...sae.files import json_number, write_json
from ...sae.suggestions import require_choice
from ...training.activations.model import LanguageModel
from ...training.shortfalls import Shortfall, shortfall
from ...training.stages import stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import with_grids_members, with_model
from ..pages.render import render_file
from ..result import Report
from .compared_units import UNIT_SETS, n_spaces, open_dictionaries, open_model, spaces
from .feature_edges import feature_edges
from .heads.tables import head_tables
from .methods import METHODS, Method, UnitScores
from .methods.exact import ExactPatching
from .scoring.edge_files import edge_graph
from .scoring.faithfulness import (
    LEVELS,
    MEASURED_ON,
    SIZED_ON,
    FaithfulnessCurve,
    Trials,
    circuit_members,
    curve,
    growing_sizes,
    minimality,
    pair_interval,
    ranked,
    share_sizes,
    smallest_size,
    stability,
)
from .scoring.random_circuits import floor_curve
from .tasks import make_pairs
from .tasks.competence import competence, require_solved
from .trained_positions import prompt_fit
from .units.ablation import ABLATIONS, ablation_values
from .units.edges import EdgeSpace
from .units.nodes import NodeSpace
from .units.space import Space

SCHEMA_VERSION = 1
DEFAULT_TASKS = ("ioi",)
DEFAULT_METHODS = ("attribution", "relevance", "random")
DEFAULT_PAIRS = 100
# Units whose exact effect is measured to check a method's scores: half top-scoring, half random.
VERIFIED = 40
VERIFIED_PAIRS = 32
# Units of the circuit at the middle level: ablated one at a time for minimality, and drawn.
TAKEN_OUT = 20
DRAWN = 40
EDGES = 200
# Nodes in the console's table of direct effects.
SHOWN_NODES = 8
LEVEL = 0.8
PER_DECADE = 4

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CircuitSettings:
    """Settings of a circuit benchmark.

    Args:
        tasks: Names of ``TASKS``, or files of prompt pairs.
        methods: Names of ``METHODS``.
        ablation: Replacement for units outside a circuit, one of ``ABLATIONS``.
        corruption: Name of the corruption; by default that of each task.
        pairs: Number of prompt pairs per task: half for discovery, half for evaluation.
        seed: Seed of prompts, random dictionaries and resampling.
        edges: Also rank the edges between heads and MLPs.
        random_circuits: Number of random circuits per size, with as many units per hook as the circuit found: a floor of its
            curve. Each takes as long to evaluate as the circuit.
        heads: Also measure direct effects of heads and MLPs on the answer, and in multiple choice tasks attention to labels and
            the rank of the heads' queries, keys and values.
        units: Names of ``UNIT_SETS`` in which circuits are looked for; by default all that there are.

    Raises:
        ValueError: If a method, the ablation or a unit set is unknown, there are fewer than 4 pairs, or fewer than 0 random
            circuits.

    >>> import sparsary
    >>> sparsary.CircuitSettings(tasks=("ioi", "greater_than"), pairs=40).methods
    ('attribution', 'relevance', 'random')
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    methods: tuple[str, ...] = DEFAULT_METHODS
    ablation: str = "resample"
    corruption: str | None = None
    pairs: int = DEFAULT_PAIRS
    seed: int = 0
    edges: bool = False
    random_circuits: int = 0
    heads: bool = False
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = (("--method", self.methods, METHODS), ("--ablation", (self.ablation,), ABLATIONS))
        for name, asked, known in (*given, ("--units", self.units, UNIT_SETS)):
            for value in asked:
                require_choice(name, value, known)
        if self.pairs < 4:
            raise ValueError(
                f"--pairs: expected at least 4, half to discover circuits and half to evaluate them, got {self.pairs}."
            )
        if self.random_circuits < 0:
            raise ValueError(f"--random-circuits: expected 0 or more, got {self.random_circuits}.")


DEFAULT_SETTINGS = CircuitSettings()


def circuits(
    checkpoints: str | Path | Sequence[str | Path] = (),
    settings: CircuitSettings = DEFAULT_SETTINGS,
    out: str | Path | None = None,
    options: CheckpointOptions = NO_OPTIONS,
    model: str | Path | LanguageModel | Any = None,
    tokenizer: Any = None,
) -> Report:
    """Discover circuits on prompt pairs, evaluate them, and write ``circuits.json`` and ``circuits.html``.

    Methods rank units on half of the pairs; circuits are evaluated on the other half. Latents are compared with neurons, heads
    and MLPs, experts of a mixture, and random dictionaries of matched l0. With ``settings.edges``, edge scores are also
    written to ``edges/TASK-METHOD.json``, in the format of EAP-IG and MIB.

    Example::

        settings = sparsary.CircuitSettings(tasks=("ioi",), pairs=40)
        for row in sparsary.circuits("runs/topk", settings)["rows"]:
            print(row["family"], row["method"], row.get("cpr"), row.get("cmd"))

    Args:
        checkpoints: Dictionaries; without any, circuits are looked for among the units of ``model`` itself.
        out: Output directory, by default ``circuits`` in the first checkpoint's results directory.
        model: Language model in place of the one that the checkpoints name: a hub id or directory, or one in memory.
        tokenizer: Tokenizer of a model object, if it has none itself.

    Returns:
        The content of ``circuits.json``, with ``path`` and ``page_path``.

    Raises:
        ValueError: If the dictionaries belong to different models, a task, method or unit set is unknown, or prompts cannot be
            used.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    names = with_grids_members([str(checkpoint) for checkpoint in given])
    named = isinstance(model, str | Path)
    options = options.updated(model=str(model)) if named else with_model(options, model, tokenizer)
    if not names and out is None:
        raise ValueError("--out: required without a CHECKPOINT, whose folder results would be written to.")
    several = [open_dictionaries(name, options) for name in names]
    language_model = open_model(several, options)
    found: Row = {
        "schema_version": SCHEMA_VERSION,
        "model": language_model.id,
        "checkpoints": names,
        "hooks": {dictionaries.name: list(dictionaries.by_hook) for dictionaries in several},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()},
        "prompts": [],
        "shortfalls": [],
        "doubts": [],
        "rows": [],
        "curves": [],
        "circuits": [],
    }
    found |= {"head_effects": [], "head_ranks": []} if settings.heads else {}
    edge_files: dict[str, Row] = {}
    families_each = n_spaces(language_model, several, settings.units) + settings.edges
    n_steps = families_each * len(settings.tasks) * len(settings.methods)
    with stage("circuits", n_steps, "steps") as shown:
        for task in settings.tasks:
            work = _Task(language_model, task, settings)
            _tell(
                found,
                shortfall("--pairs", settings.pairs, work.n_pairs, "pairs", f"{task} has no more pairs; intervals are wider"),
            )
            for dictionaries in several:
                rows, doubts = prompt_fit(language_model, dictionaries, work.judged_on)
                found["prompts"] += rows
                _tell(found, doubts)
            sets = spaces(language_model, several, work.chosen_on.clean, settings.seed, settings.units)
            families: dict[str, Space] = {**sets}
            if settings.edges:
                families["edges"] = EdgeSpace(language_model)
            for family, space in families.items():
                for name in settings.methods:
                    shown.update(shown.done, f"{task}: {name} on {family}")
                    work.judge(family, space, name, found)
                    shown.update(shown.done + 1)
            edge_files |= work.edge_files
            if settings.heads:
                effects, ranks = head_tables(language_model, work.chosen_on, work.judged_on, settings.seed)
                found["head_effects"] += effects
                found["head_ranks"] += ranks
    directory = Path(out) if out is not None else several[0].opened.results / "circuits"
    directory.mkdir(parents=True, exist_ok=True)
    found |= {"edge_files": list(edge_files)} if edge_files else {}
    for name, graph in edge_files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_json(directory / name, graph)
    write_json(directory / "circuits.json", found, sealed=True)
    page = render_file(directory / "circuits.json")
    return Report(found | {"path": str(directory / "circuits.json"), "page_path": str(page)}, found["rows"])


def _tell(found: Row, shortfalls: Sequence[Shortfall]) -> None:
    """Log shortfalls and add them to the results."""
    for each in shortfalls:
        log.warning("%s.", each)
        found["shortfalls"].append(str(each))
        found["doubts"] += [str(each)] if each.doubtful else []


def best_rows(found: Row) -> tuple[list[str], list[list[str]]]:
    """Return a summary table: the header, and one row per task, unit set and method."""
    head = ["task", "family", "method", "cpr", "cmd", "nodes for 80 %", "of", "with exact"]
    rows = []
    for row in found["rows"]:
        if "refused" in row:
            figures = ["-"] * 5
        else:
            nodes = row[_nodes(LEVEL)]
            figures = [f"{row['cpr']:.3f}", f"{row['cmd']:.3f}", "never" if nodes is None else str(nodes), str(row["units"])]
            figures.append("-" if row["exact_pearson"] is None else f"{row['exact_pearson']:.3f}")
        rows.append([row["task"], row["family"], row["method"], *figures])
    return head, rows


def head_rows(found: Row) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield tables of the nodes with the largest direct effects, and of the ranks, if they were measured."""
    for task in dict.fromkeys(row["task"] for row in found.get("head_effects", ())):
        rows = [row for row in found["head_effects"] if row["task"] == task]
        rows = sorted(rows, key=lambda row: -abs(row["direct"]))[:SHOWN_NODES]
        keys = ("direct", "direct_share", "attention_right", "attention_others")
        figures = [["-" if row.get(key) is None else f"{row[key]:.3f}" for key in keys] for row in rows]
        head = ["node", "direct effect", "share", "right label", "other labels", "attends to"]
        yield (
            ["task", *head],
            [[task, row["node"], *of, row.get("attends", "-")] for row, of in zip(rows, figures, strict=True)],
        )
    if found.get("head_ranks"):
        head = ["task", "heads", "part", "rank for 95 %", "of", "accuracy", "options"]
        yield (
            head,
            [
                [
                    *(row["task"], ", ".join(row["heads"]), row["part"], str(row["rank_needed"]), str(row["ranks"][-1])),
                    *(f"{row['accuracy']:.3f}", str(row["options"])),
                ]
                for row in found["head_ranks"]
            ],
        )


class _Task:
    """Prompt pairs of one task, the model's competence on them, and the evaluation of circuits."""

    def __init__(self, model: LanguageModel, task: str, settings: CircuitSettings):
        pairs = make_pairs(task, model, settings.pairs, settings.seed, settings.corruption)
        half, self.n_pairs = len(pairs) // 2, len(pairs)
        self.task, self.settings = pairs.task, settings
        self.chosen_on, self.judged_on = pairs.take(slice(0, half)), pairs.take(slice(half, len(pairs)))
        self.competence = competence(model, self.judged_on)
        require_solved(self.competence)
        # Files to write alongside circuits.json, by relative path.
        self.edge_files: dict[str, Row] = {}

    def judge(self, family: str, space: Space, name: str, found: Row) -> None:
        """Discover circuits with one method in one unit set, evaluate them, and add the results to ``found``."""
        settings = self.settings
        method: Method = METHODS[name]()
        try:
            scores = method.discover(space, self.chosen_on)
        except ValueError as error:
            # Some methods support only heads, or only edges.
            row = {"task": self.task, "family": family, "method": name, "units": space.size, "refused": str(error)}
            found["rows"].append(row)
            return
        fill = ablation_values(space, settings.ablation, self.chosen_on, settings.seed)
        # Units that hurt the task belong to its circuit too; only CPR ranks by signed score.
        order, helping = ranked(scores, "absolute"), ranked(scores, "signed")
        shares = share_sizes(space.size)
        sizes = sorted({*growing_sizes(space.size, PER_DECADE), *shares})
        trials = Trials(space, self.judged_on, fill)
        along = curve(trials, order, sizes, complements=shares)
        row = self._about(family, space, name, scores, along)
        try:
            along.require_signal()
        except ValueError as error:
            found["rows"].append(row | {"refused": str(error)})
            return
        helped = curve(trials, helping, shares, complements=())
        row |= _areas(helped, along.at(shares))
        row |= self._sizes(trials, scores, order, along)
        row |= self._agreement(space, scores)
        found["rows"].append(row)
        drawn = _drawn(along) | (_floor(trials, order, sizes, settings) if settings.random_circuits else {})
        found["curves"].append({key: row[key] for key in ("task", "family", "method")} | drawn)
        size = row[_nodes(LEVEL)]
        if isinstance(space, EdgeSpace):
            kept = _mask(order[: size or 0], space.size)
            self.edge_files[f"edges/{self.task}-{name}.json"] = edge_graph(space, scores.values, kept)
        if size is not None and isinstance(space, NodeSpace) and family.endswith("errors as nodes"):
            about = {key: row[key] for key in ("task", "family", "method")}
            found["circuits"].append(about | self._circuit(space, scores, order[: min(size, DRAWN)]))

    def _about(self, family: str, space: Space, method: str, scores: UnitScores, along: FaithfulnessCurve) -> Row:
        return {
            "task": self.task,
            "corruption": self.judged_on.corruption,
            "metric": self.judged_on.metric,
            "family": family,
            "method": method,
            "ablation": self.settings.ablation,
            "units": space.size,
            "pairs": len(self.judged_on),
            "accuracy": self.competence.accuracy,
            "metric_clean": self.competence.clean,
            "metric_corrupted": self.competence.corrupted,
            "metric_empty": float(along.empty.mean()),
            # Below 1 if errors are always ablated.
            "faithfulness_all": _number(along.faithfulness()[-1]),
            "forwards": scores.cost.forwards,
            "backwards": scores.cost.backwards,
            "seconds": round(scores.cost.seconds, 3),
        }

    def _sizes(self, trials: Trials, scores: UnitScores, order: torch.Tensor, along: FaithfulnessCurve) -> Row:
        row: Row = {_nodes(level): smallest_size(trials, order, level, along, SIZED_ON) for level in LEVELS}
        size = row[_nodes(LEVEL)]
        held = ("faithfulness_80", "faithfulness_80_low", "faithfulness_80_high")
        row |= dict.fromkeys((*held, "completeness", "minimality", "stability"))
        if size is not None:
            at = curve(trials, order, [size]).of_pairs(MEASURED_ON)
            low, high = pair_interval(FaithfulnessCurve.faithfulness, at)
            row |= dict(zip(held, (_number(end[0]) for end in (at.faithfulness(), low, high)), strict=True))
            lost = minimality(trials, circuit_members(order, size), order[: min(size, TAKEN_OUT)], MEASURED_ON)
            row |= {"completeness": _number(at.completeness()[0]), "minimality": _number(np.median(lost))}
            if scores.per_pair is not None:
                row["stability"] = stability(scores, size, "absolute", seed=self.settings.seed)
        return row

    def _agreement(self, space: Space, scores: UnitScores) -> Row:
        """Return Pearson and Spearman correlations with exact effects, on the top-scoring units and on random others."""
        live = scores.values.nonzero().flatten()
        top = scores.values.abs().argsort(descending=True)[: VERIFIED // 2]
        generator = torch.Generator().manual_seed(self.settings.seed)
        others = live[torch.randperm(len(live), generator=generator)[: VERIFIED // 2]]
        units = torch.cat([top, others]).unique()
        few = self.chosen_on.take(slice(0, VERIFIED_PAIRS))
        truth = ExactPatching(units=units.tolist()).discover(space, few)
        a, b = scores.values[units].double().numpy(), truth.values[units].double().numpy()
        if len(units) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
            return {"exact_pearson": None, "exact_spearman": None}
        return {
            "exact_pearson": _number(np.corrcoef(a, b)[0, 1]),
            "exact_spearman": _number(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]),
        }

    def _circuit(self, space: NodeSpace, scores: UnitScores, units: torch.Tensor) -> Row:
        """Return the units of a circuit and the direct effects between them."""
        names = space.names()
        edges = feature_edges(space, self.chosen_on.take(slice(0, VERIFIED_PAIRS)), _mask(units, space.size))
        groups = space.group_of(units.tolist())
        return {
            "units": [
                {"name": names[unit], "group": group, "score": float(scores.values[unit])}
                for unit, group in zip(units.tolist(), groups, strict=True)
            ],
            "edges": [
                {"from": sender, "to": receiver, "weight": weight} for sender, receiver, weight in edges.describe(names)[:EDGES]
            ],
        }


def _mask(units: torch.Tensor, size: int) -> torch.Tensor:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[units] = True
    return kept


def _areas(signed: FaithfulnessCurve, absolute: FaithfulnessCurve) -> Row:
    row: Row = {}
    for name, along, statistic in (("cpr", signed, FaithfulnessCurve.cpr), ("cmd", absolute, FaithfulnessCurve.cmd)):
        low, high = pair_interval(statistic, along)
        row |= {name: _number(statistic(along)), f"{name}_low": _number(low), f"{name}_high": _number(high)}
    return row


def _drawn(along: FaithfulnessCurve) -> Row:
    low, high = pair_interval(FaithfulnessCurve.faithfulness, along)
    values = {"faithfulness": along.faithfulness(), "low": low, "high": high, "completeness": along.completeness()}
    return {"sizes": list(along.sizes)} | {name: [_number(value) for value in row] for name, row in values.items()}


def _floor(trials: Trials, order: torch.Tensor, sizes: Sequence[int], settings: CircuitSettings) -> Row:
    """Return the faithfulness of random circuits of equal counts per group by size: their mean, and the best of each size."""
    floor = floor_curve(trials, order, sizes, settings.random_circuits, settings.seed)
    return {"floor": [_number(value) for value in floor.mean], "floor_best": [_number(value) for value in floor.best]}


def _nodes(level: float) -> str:
    return f"nodes_{round(100 * level)}"


def _number(value: Any) -> float | None:
    number = json_number(float(value))
    return None if number is None else round(number, 6)
