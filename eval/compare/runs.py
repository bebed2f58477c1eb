"""Comparison of existing runs, given as checkpoints or reports of any origin; ``eval.compare.recipes`` trains its own."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...sae.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from ...sae.files import read_json, sha256, write_json
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import stack_folders
from ..checkpoint import short_names
from ..pages.numbers import finite, show
from ..pages.recipes import PER_TOKEN
from ..pages.render import render_file
from ..pages.runs import COLUMNS
from ..report.evaluate import evaluate_all
from ..result import Report
from .families import compared
from .groups import Point, RunGroup

RUNS_VERSION = 1
REPORT_FILE = "report.json"
# Runs that differ in one of these were evaluated on different things.
SHARED = ("model", "text", "hook", "tokens", "selection")
AGAINST_L0 = ("fvu", "ce_increase")


def runs_among(arguments: Sequence[str | Path]) -> list[Path] | None:
    """Return the runs that the arguments name, or ``None`` if none of them is a run, that is, if they are recipes.

    A directory of several runs that is not a run itself stands for these runs.

    Raises:
        ValueError: If some are runs and others are not.
    """
    found = [_runs(Path(argument)) for argument in arguments]
    others = [argument for argument, runs in zip(arguments, found, strict=True) if not runs]
    if len(others) == len(arguments):
        return None
    if others:
        raise ValueError(
            f"{others[0]}: expected a directory with {CONFIG_FILE} or {REPORT_FILE}, as the other arguments are, got "
            "neither. Give only runs, or only recipes."
        )
    return list(dict.fromkeys(run for runs in found for run in runs))


def _runs(path: Path) -> list[Path]:
    if any((path / name).exists() for name in (CONFIG_FILE, REPORT_FILE)) and not _is_stack(path):
        return [path]
    return stack_folders(path) if path.is_dir() else []


def _is_stack(path: Path) -> bool:
    """Return True if a report covers several checkpoints below its directory."""
    return not (path / CONFIG_FILE).exists() and bool(stack_folders(path))


def compare_runs(
    runs: Sequence[Path],
    out: str | Path = "runs/comparison",
    tokens: int | None = None,
    cache: bool = True,
    options: CheckpointOptions = NO_OPTIONS,
    against: str | None = None,
    match_l0: float | None = None,
) -> Report:
    """Compare existing runs; write ``comparison.json`` and ``comparison.html`` into ``out``.

    Checkpoints without a report, or with one of other weights, are evaluated first, those of one model and text together; with
    ``tokens``, all are evaluated on that many. Runs may differ in anything: the page lists differences that limit the
    comparison.

    Args:
        against: The run, or group of runs that differ only in the seed, that others are compared with.
        match_l0: Interpolate sweeps over budgets to this l0.

    Raises:
        ValueError: If there are fewer than two runs, a report is of another kind, or a checkpoint cannot be evaluated.
    """
    if len(runs) < 2:
        raise ValueError(f"compare: expected at least two runs, got {len(runs)}. For one alone: sparsary eval {runs[0]}")
    wanted = [run for run in runs if tokens is not None or not (run / REPORT_FILE).exists() or is_stale(run)]
    bare = [run for run in wanted if not (run / CONFIG_FILE).exists()]
    if bare:
        raise ValueError(f"{bare[0]}: --tokens: expected a checkpoint to evaluate, got only a report. Omit --tokens.")
    if wanted:
        evaluate_all(wanted, tokens=tokens, cache=cache, options=options)
    comparison = collect_runs(runs, against, match_l0)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "comparison.json", comparison, sealed=True)
    return Report(comparison | {"page_path": str(render_file(Path(out) / "comparison.json"))}, comparison["runs"])


def is_stale(run: Path) -> bool:
    """Return True if a run's weights differ from those that its report covers."""
    judged = read_json(run / REPORT_FILE).get("weights_sha256")
    return judged is not None and (run / WEIGHTS_FILE).exists() and sha256(run / WEIGHTS_FILE) != judged


def collect_runs(runs: Sequence[Path], against: str | None = None, match_l0: float | None = None) -> dict[str, Any]:
    """Return the comparison of evaluated runs: their scalar entries, the settings in which they differ, and the Pareto fronts.

    Runs whose recipes differ only in the seed form one family; differences are tested as in a comparison of recipes.
    """
    names = short_names([str(run) for run in runs])
    found = []
    for name, run in zip(names, runs, strict=True):
        report = read_json(run / REPORT_FILE)
        if not isinstance(report, dict) or "fvu" not in report:
            raise ValueError(
                f"{run / REPORT_FILE}: fvu: expected the report of one dictionary, found none. Give the checkpoints of a "
                "stack one by one; a cross-layer one cannot be compared here."
            )
        scalars = {key: value for key, value in report.items() if value is None or isinstance(value, str | int | float)}
        found.append({"name": name, "directory": str(run), "report": scalars, "reasons": report.get("reasons") or {}})
    about = compared(reseeded(found), COLUMNS, against, match_l0)
    return {
        "runs_version": RUNS_VERSION,
        "runs": found,
        "different": {key: values for key in SHARED if len(values := _by_value(found, key)) > 1},
        "pareto": {key: pareto(found, key) for key in AGAINST_L0},
        **{key: value for key, value in about.items() if key != "best"},
    }


def reseeded(runs: Sequence[Mapping[str, Any]]) -> list[RunGroup]:
    """Group runs whose recipes differ only in the seed, ordered by seed; every other run is a group of its own."""
    together: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        digest = run["report"].get("recipe_digest")
        together.setdefault(run["name"] if digest is None else f"{digest} {run['report'].get('selection')}", []).append(run)
    groups = []
    for members in together.values():
        seeds = [run["report"].get("seed") for run in members]
        if len(set(seeds)) < len(seeds):
            # A repeated or continued run is not an independent sample.
            groups += [RunGroup(run["name"], (_point(run),)) for run in members]
            continue
        ordered = sorted(members, key=lambda run: (run["report"].get("seed") is None, run["report"].get("seed") or 0))
        groups.append(RunGroup(_common_name([run["name"] for run in ordered]), tuple(_point(run) for run in ordered)))
    return groups


def _point(run: Mapping[str, Any]) -> Point:
    # Older reports have no `selection`.
    report = {"selection": PER_TOKEN} | run["report"]
    return Point(((Path(run["directory"]), 1.0),), report, report.get("seed"))


def _common_name(names: Sequence[str]) -> str:
    """Return the common prefix of run names: ``topk-seed-0`` and ``topk-seed-1`` give ``topk (2 seeds)``."""
    if len(names) == 1:
        return names[0]
    begins = {re.sub(r"[-_. ]*(seed)?[-_. ]*[0-9]*$", "", name) for name in names}
    return f"{begins.pop() if len(begins) == 1 else names[0]} ({len(names)} seeds)"


def _by_value(runs: list[dict[str, Any]], key: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for run in runs:
        values.setdefault(show(run["report"].get(key)), []).append(run["name"])
    return values


def pareto(runs: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the names of the runs on the Pareto front of l0 and this figure (lower is better in both), ordered by l0."""
    points = [(finite(run["report"].get("l0_mean")), finite(run["report"].get(key)), run["name"]) for run in runs]
    known = sorted((x, y, name) for x, y, name in points if x is not None and y is not None)
    front: list[str] = []
    lowest = float("inf")
    for _, y, name in known:
        if y < lowest:
            front.append(name)
            lowest = y
    return front


def runs_summary(comparison: dict[str, Any]) -> list[list[str]]:
    """Return the table for a terminal: a header and one row per run."""
    rows = [["run", *(column.label for column in COLUMNS)]]
    for run in comparison["runs"]:
        report = run["report"]
        rows.append([run["name"], *(show(report.get(column.key), "-", digits=3) for column in COLUMNS)])
    return rows
