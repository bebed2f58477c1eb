"""Comparison of recipes: train each with several seeds over one activation store, evaluate the runs, and compare."""

import json
import logging
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...sae.checkpoint_files import CONFIG_FILE, read_config
from ...sae.files import read_json, write_json
from ...sae.suggestions import require_choice
from ...training.checkpoints import RECIPE_FILE, run_changes
from ...training.content import Content
from ...training.preflight import preflight
from ...training.recipe import Recipe, load_recipe
from ...training.report import METRICS_FILE, check_log
from ...training.resolve_hooks import ResolvedRecipe, resolve_recipes
from ...training.run import run_harvest, train_recipe
from ...training.training_plan import TrainingPlan
from ...transcoders.load import CheckpointOptions, RecipeValue
from ..pages.differences import off_target_words
from ..pages.numbers import finite, show
from ..pages.recipes import COLUMNS, is_oracle
from ..pages.render import render_file
from ..report.evaluate import evaluate
from ..result import Report
from .families import compared
from .groups import Point, RunGroup
from .runs import REPORT_FILE, is_stale

# 2: intervals over seeds and documents, differences with verdicts; none is best away from the common l0.
COMPARISON_VERSION = 2
# Shared base of the recipes in a directory, not a recipe itself.
BASE_FILE = "base.yaml"
COMMON_ENTRIES = ("model", "text", "tokens", "documents", "dead_window_tokens", "dark_matter_enough_tokens")

log = logging.getLogger(__name__)


def compare_recipes(
    recipes: Iterable[str | Path],
    overrides: Mapping[str, RecipeValue] | None = None,
    seeds: int = 3,
    out: str | Path = "runs/comparison",
    against: str | None = None,
    match_l0: float | None = None,
) -> Report:
    """Train and evaluate every recipe with seeds 0, 1, ...; write ``comparison.json`` and ``comparison.html`` into ``out``.

    Complete runs are skipped and interrupted ones resumed, so the call can be repeated. All inputs are validated before the
    first run starts.

    Args:
        recipes: Files or directories of files.
        against: The recipe that others are compared with; by default the first.
        match_l0: Compare sweeps over budgets at this l0.

    Raises:
        ValueError: If the recipes do not share model, text, reconstructed hook and store (unless the store is null), or one
            cannot be run.
    """
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}. Every recipe is trained once per seed.")
    loaded = load_families(recipes, overrides or {})
    # Resolved together, because the shared store must hold the activations of all recipes.
    families = dict(zip(loaded, resolve_recipes(list(loaded.values())), strict=True))
    require_comparable(families)
    if against is not None and match_l0 is None:
        require_choice("--against", against, list(families))
    runs = {name: [_seeded(member, out, name, seed) for seed in range(seeds)] for name, member in families.items()}
    pending = [(name, run) for name, members in runs.items() for run in members if not is_complete(run.recipe, run.content)]
    # One plan per recipe: its seeds need the same resources.
    plans = {name: preflight(run) for name, run in dict(pending).items()}
    for name, run in [(name, run) for name, run in pending if run.recipe.harvest.store is not None][:1]:
        run_harvest(run, plans[name])
    for done, (name, run) in enumerate(pending):
        log.info("%s: run %d of %d", run.recipe.out_dir, done + 1, len(pending))
        _run(run, plans[name])
    live = {name for name, member in families.items() if member.recipe.harvest.store is None}
    comparison = collect_run_groups(
        {name: [Path(run.recipe.out_dir) for run in members] for name, members in runs.items()}, live, against, match_l0
    )
    write_json(Path(out) / "comparison.json", comparison, sealed=True)
    return Report(comparison | {"page_path": str(render_file(Path(out) / "comparison.json"))}, comparison.get("families"))


def load_families(recipes: Iterable[str | Path], overrides: Mapping[str, Any]) -> dict[str, Recipe]:
    """Load recipes by the stem of their file; a directory stands for its ``*.yaml``, sorted, without ``base.yaml``.

    Raises:
        ValueError: If a recipe is invalid, two files have the same stem, or there are none.
    """
    taken = [key for key in ("out_dir", "seed") if key in overrides]
    if taken:
        raise ValueError(f"{taken[0]}: compare sets it for every run. Give --out for the directory, --seeds for the seeds.")
    paths: dict[str, Path] = {}
    for given in map(Path, recipes):
        found = [path for path in given.glob("*.yaml") if path.name != BASE_FILE] if given.is_dir() else [given]
        files = sorted(found, key=lambda path: path.stem)
        if not files:
            raise ValueError(f"{given}: expected a directory with recipes (*.yaml), found none in it.")
        for path in files:
            if paths.setdefault(path.stem, path).resolve() != path.resolve():
                raise ValueError(
                    f"{path}: expected distinct file names, as runs are named after them, got {paths[path.stem]} too. "
                    "Rename one."
                )
    if not paths:
        raise ValueError("compare: expected recipe files or directories of them, got none. Try: sparsary compare recipes")
    return {name: load_recipe(path, overrides) for name, path in paths.items()}


def require_comparable(families: Mapping[str, ResolvedRecipe]) -> None:
    """Raise ``ValueError`` with one line for every key in which a recipe's activations would differ from the first one's.

    A recipe without a store, which streams from the model, needs to match only in model, text, reconstructed hook and token
    filters. Input hooks may differ: a transcoder compares with an SAE of its output.
    """
    recipes = {name: member.recipe for name, member in families.items()}
    first = next((name for name, recipe in recipes.items() if recipe.harvest.store is not None), next(iter(recipes)))
    hook = "hook" if all(recipe.dictionary.kind == "sae" for recipe in recipes.values()) else "hook_out"
    expected = _inputs(recipes[first], hook)
    problems = [
        f"{key}: {expected[key]!r} in {first}, {value!r} in {name}"
        for name, recipe in recipes.items()
        for key, value in _inputs(recipe, hook).items()
        if key in expected and value != expected[key]
    ]
    if problems:
        key = problems[0].split(":")[0]
        raise ValueError(
            "compare: expected recipes over one store that differ only in the dictionary and its training, got\n  "
            + "\n  ".join(problems)
            + f"\nMake them equal, for all recipes with {key}=VALUE on the command line, or compare them separately."
        )


def is_complete(recipe: Recipe, content: Callable[[], Content] | None = None) -> bool:
    """Return True if the run in ``out_dir`` was trained to its end and then evaluated on ``eval_tokens`` tokens.

    Args:
        content: Returns the current content of the recipe's model.

    Raises:
        ValueError: If another recipe was run there, or this one on a model or text that has changed.
    """
    directory = Path(recipe.out_dir)
    if not (directory / RECIPE_FILE).exists():
        return False
    saved = load_recipe(directory / RECIPE_FILE)
    changed = run_changes(directory, saved, recipe, content)
    if changed:
        raise ValueError(
            f"{directory}: expected an earlier run of this recipe, got another run; these keys differ:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --out, delete this directory, or revert the changes."
        )
    if saved.eval_tokens != recipe.eval_tokens or not all((directory / name).exists() for name in (CONFIG_FILE, REPORT_FILE)):
        return False
    trained = read_config(directory)["provenance"]["training_tokens"]
    judged = read_json(directory / REPORT_FILE).get("training_tokens")
    return trained >= recipe.tokens and judged == trained and not is_stale(directory)


def collect_run_groups(
    directories: Mapping[str, list[Path]],
    live: Collection[str] = (),
    against: str | None = None,
    match_l0: float | None = None,
) -> dict[str, Any]:
    """Return the comparison of evaluated runs: for every family, each figure's mean and range over its seeds.

    Args:
        directories: Run directories of each family, one per seed.
        live: Families trained on activations streamed from the model.
        against: As in ``compare_recipes``, and so is ``match_l0``.

    Raises:
        ValueError: If a report is missing, two cover different numbers of tokens, or ``compared`` raises it.
    """
    reports = {path: read_json(path / REPORT_FILE) for paths in directories.values() for path in paths}
    (first, reference), *others = reports.items()
    for path, report in others:
        if report.get("tokens") != reference.get("tokens"):
            raise ValueError(
                f"{path / REPORT_FILE}: tokens: expected {show(reference.get('tokens'))} as in {first / REPORT_FILE}, got "
                f"{show(report.get('tokens'))}. Figures on different numbers of tokens are not comparable: delete one "
                "report and repeat the command."
            )
    groups = [
        RunGroup(name, tuple(_point(path, seed, reports[path]) for seed, path in enumerate(paths)))
        for name, paths in directories.items()
    ]
    found = compared(groups, COLUMNS, against, match_l0)
    for family in found["families"]:
        members = family["between"] or [family["name"]]
        family |= {
            "live": any(name in live for name in members),
            "directories": [str(path) for name in members for path in directories[name]],
        }
    return {
        "comparison_version": COMPARISON_VERSION,
        "spread": "minimum and maximum over seeds",
        **{key: reference.get(key) for key in COMMON_ENTRIES},
        # The hook of an SAE, the output hooks of other kinds.
        "hook": reference.get("hook") or ", ".join(reference.get("hooks_out") or ()) or None,
        **found,
    }


def _point(path: Path, seed: int, report: Report) -> Point:
    check_log(path)
    return Point(((path, 1.0),), report | {"tokens_per_second": training_speed(path / METRICS_FILE)}, seed)


def training_speed(metrics: Path) -> float | None:
    """Return tokens per second: the median over the lines of ``metrics.jsonl``, which is robust to saves and a slow start."""
    if not metrics.exists():
        return None
    rates = [finite(json.loads(line).get("tokens_per_second")) for line in metrics.read_text(encoding="utf-8").splitlines()]
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def recipes_summary(comparison: dict[str, Any]) -> list[list[str]]:
    """Return the table for a terminal: a header and one row of means per family; a star marks the best ones."""
    rows = [["mean over seeds", *(column.label for column in COLUMNS)]]
    for family in comparison["families"]:
        means = {key: family["figures"].get(key, {}).get("mean") for key in (column.key for column in COLUMNS)}
        marks = {key: "*" * (family["name"] in comparison["best"].get(key, ())) for key in means}
        words = family["selection"] if is_oracle(family) else off_target_words(family)
        note = f" ({words})" if words else ""
        rows.append([family["name"] + note, *(_short(mean) + marks[key] for key, mean in means.items())])
    return rows


def _short(value: float | None) -> str:
    return show(value, digits=3) if value is None or value < 1000 else show(round(value))


def _inputs(recipe: Recipe, hook: str) -> dict[str, Any]:
    """Return the keys that determine the activations and the number of tokens used for evaluation, the store first."""
    values = recipe.model_dump(mode="json")
    harvest = {"store": recipe.harvest.store} | values["harvest"]
    if recipe.harvest.store is None:
        harvest = {key: harvest[key] for key in ("heldout", "exclude_special", "exclude_leading", "exclude")}
    sections = {"harvest": harvest, "model": values["model"], "text": values["text"]}
    inputs = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inputs | {f"dictionary.{hook}": ", ".join(recipe.dictionary.hooks_out), "eval_tokens": recipe.eval_tokens}


def _seeded(member: ResolvedRecipe, out: str | Path, name: str, seed: int) -> ResolvedRecipe:
    return member.another_run(str(Path(out) / name / f"seed-{seed}"), seed)


def _run(run: ResolvedRecipe, plan: TrainingPlan) -> None:
    """Train and evaluate; the old report is deleted first, so that it cannot pass for the new one after an interruption."""
    recipe = run.recipe
    (Path(recipe.out_dir) / REPORT_FILE).unlink(missing_ok=True)
    try:
        train_recipe(run, plan=plan)
        options = CheckpointOptions(trust_remote_code=recipe.model.trust_remote_code)
        evaluate(recipe.out_dir, tokens=recipe.eval_tokens, options=options)
    except ValueError as error:
        raise ValueError(f"{recipe.out_dir}: {error}") from None
