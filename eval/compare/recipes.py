"""Several recipes over one store, each with several seeds: trained, judged and set side by side."""

import json
import logging
import statistics
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...sae.checkpoint import read_config
from ...sae.dictionary import CONFIG_FILE
from ...sae.files import read_json, write_json
from ...training.checkpoints import RECIPE_FILE
from ...training.preflight import TrainingPlan, preflight
from ...training.recipe import Recipe, differences, load_recipe
from ...training.report import METRICS_FILE
from ...training.resolve_hooks import ResolvedRecipe, resolve_recipes
from ...training.run import run_harvest, train_recipe
from ...transcoders.load import RecipeValue
from ..checkpoint import Report
from ..pages.numbers import finite, show
from ..pages.recipes import COLUMNS, PER_TOKEN, is_oracle
from ..pages.render import render_file
from ..report.evaluate import Progress, evaluate, unseen
from .runs import REPORT_FILE

COMPARISON_VERSION = 1
# Shared by more than one recipe, it would be found by a directory's name, but is none itself.
BASE_FILE = "base.yaml"
# What the report says of a family, and not of a seed.
FAMILY_ENTRIES = ("kind", "encoder", "n_latents", "training_tokens")
COMMON_ENTRIES = ("model", "text", "tokens", "documents", "dead_window_tokens", "dark_matter_enough_tokens")

log = logging.getLogger(__name__)


def compare_recipes(
    recipes: Iterable[str | Path],
    overrides: Mapping[str, RecipeValue] | None = None,
    seeds: int = 3,
    out: str | Path = "runs/comparison",
    progress: Progress = unseen,
) -> Report:
    """Train and judge every recipe with seeds 0, 1, ...; write ``comparison.json`` and ``comparison.html`` into ``out``.

    ``recipes`` are files or directories of files. What is complete is not done again and what was interrupted goes on, so
    the same call may be repeated. Everything that can be checked is checked before the first run starts.

    Raises:
        ValueError: If the recipes do not share model, text, what they reconstruct and store (a null one aside), or one cannot
            be run.
    """
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}. Every recipe is trained once per seed.")
    loaded = load_families(recipes, overrides or {})
    # Together: the one store is to hold what each of them needs.
    families = dict(zip(loaded, resolve_recipes(list(loaded.values())), strict=True))
    require_comparable(families)
    runs = {name: [_seeded(member, out, name, seed) for seed in range(seeds)] for name, member in families.items()}
    pending = [(name, run) for name, members in runs.items() for run in members if not is_complete(run.recipe)]
    # Seeds of a recipe need the same.
    plans = {name: preflight(run) for name, run in dict(pending).items()}
    for name, run in [(name, run) for name, run in pending if run.recipe.harvest.store is not None][:1]:
        run_harvest(run, progress(run.recipe.harvest.tokens or 0), plans[name])
    for done, (name, run) in enumerate(pending):
        log.info("%s: run %d of %d", run.recipe.out_dir, done + 1, len(pending))
        _run(run, plans[name])
    live = {name for name, member in families.items() if member.recipe.harvest.store is None}
    comparison = collect_run_groups(
        {name: [Path(run.recipe.out_dir) for run in members] for name, members in runs.items()}, live
    )
    write_json(Path(out) / "comparison.json", comparison)
    return comparison | {"page_path": str(render_file(Path(out) / "comparison.json"))}


def load_families(recipes: Iterable[str | Path], overrides: Mapping[str, Any]) -> dict[str, Recipe]:
    """Recipes by the stem of their file; a directory stands for its ``*.yaml``, sorted, without ``base.yaml``.

    Raises:
        ValueError: If a recipe is wrong, two files have one name, or there are none.
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
                    f"{path}: expected file names that differ, got {paths[path.stem]} too, and runs are named by them. "
                    "Rename one."
                )
    if not paths:
        raise ValueError("compare: expected recipe files or directories of them, got none. Try: sparsary compare recipes")
    return {name: load_recipe(path, overrides) for name, path in paths.items()}


def require_comparable(families: Mapping[str, ResolvedRecipe]) -> None:
    """Raise ``ValueError`` with one line for every key in which a recipe would see other activations than the first.

    A recipe without a store, which streams from the model, is only held to model, text, what is reconstructed and what is
    left out. What is read may differ: a transcoder compares with an SAE of its output.
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
            "compare: expected recipes over one store, that differ in the dictionary and its training only, got\n  "
            + "\n  ".join(problems)
            + f"\nMake them equal, for all at once with {key}=VALUE on the command line, or compare them apart."
        )


def is_complete(recipe: Recipe) -> bool:
    """Whether the run in ``out_dir`` was trained to its end, and judged after that on ``eval_tokens`` tokens.

    Raises:
        ValueError: If another recipe was run there.
    """
    directory = Path(recipe.out_dir)
    if not (directory / RECIPE_FILE).exists():
        return False
    saved = load_recipe(directory / RECIPE_FILE)
    changed = differences(saved, recipe)
    if changed:
        raise ValueError(
            f"{directory}: expected an earlier run of this recipe, got another's; these keys differ:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --out, delete this directory, or take back the changes."
        )
    if saved.eval_tokens != recipe.eval_tokens or not all((directory / name).exists() for name in (CONFIG_FILE, REPORT_FILE)):
        return False
    trained = read_config(directory)["provenance"]["training_tokens"]
    return trained >= recipe.tokens and read_json(directory / REPORT_FILE).get("training_tokens") == trained


def collect_run_groups(directories: Mapping[str, list[Path]], live: Collection[str] = ()) -> dict[str, Any]:
    """The comparison of judged runs: for every family, each figure's mean and range over its directories, one per seed.

    ``live`` names the families that were trained on activations streamed from the model.

    Raises:
        ValueError: If a report is missing, or two were made on different numbers of tokens.
    """
    reports = {path: read_json(path / REPORT_FILE) for paths in directories.values() for path in paths}
    (first, reference), *others = reports.items()
    for path, report in others:
        if report.get("tokens") != reference.get("tokens"):
            raise ValueError(
                f"{path / REPORT_FILE}: tokens: expected {show(reference.get('tokens'))} as in {first / REPORT_FILE}, got "
                f"{show(report.get('tokens'))}; judged so, they do not compare. Delete the wrong one and repeat the command."
            )
    families = [
        summarize(name, [reports[path] | {"tokens_per_second": training_speed(path / METRICS_FILE)} for path in paths])
        | {"live": name in live, "directories": [str(path) for path in paths]}
        for name, paths in directories.items()
    ]
    return {
        "comparison_version": COMPARISON_VERSION,
        "spread": "minimum and maximum over seeds",
        **{key: reference.get(key) for key in COMMON_ENTRIES},
        # An SAE's one hook; of others what they predict.
        "hook": reference.get("hook") or ", ".join(reference.get("hooks_out") or ()) or None,
        "families": families,
        "best": best(families),
    }


def summarize(name: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One family: what its reports have in common, and mean, minimum and maximum of every figure.

    ``None`` and NaN count as undefined: they stay ``None`` among the values and are left out of the mean. A figure that no
    report has was not measured, and is absent.
    """
    figures = {}
    for key in (column.key for column in COLUMNS):
        values = [finite(report.get(key)) for report in reports]
        known = [value for value in values if value is not None]
        if any(key in report for report in reports):
            mean = statistics.fmean(known) if known else None
            figures[key] = {"mean": mean, "min": min(known, default=None), "max": max(known, default=None), "values": values}
    selections = sorted({report.get("selection", PER_TOKEN) for report in reports} - {PER_TOKEN})
    return {
        "name": name,
        **{key: reports[0].get(key) for key in FAMILY_ENTRIES},
        "selection": ", ".join(selections) or PER_TOKEN,
        "figures": figures,
    }


def best(families: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the families with the best mean of each figure that has a better end, equal ones together.

    Only who chooses latents token by token and is defined for every seed takes part; where all are equal, none is best.
    """
    winners: dict[str, list[str]] = {}
    for column in COLUMNS:
        entries = {
            family["name"]: family["figures"][column.key]
            for family in families
            if column.key in family["figures"] and not is_oracle(family)
        }
        means = {name: entry["mean"] for name, entry in entries.items() if None not in entry["values"]}
        if column.better is not None and len(set(means.values())) > 1:
            top = column.better(means.values())
            winners[column.key] = [name for name, mean in means.items() if mean == top]
    return winners


def training_speed(metrics: Path) -> float | None:
    """Tokens per second: the median over the lines of ``metrics.jsonl``, which a save or a slow start does not move."""
    if not metrics.exists():
        return None
    rates = [finite(json.loads(line).get("tokens_per_second")) for line in metrics.read_text(encoding="utf-8").splitlines()]
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def recipes_summary(comparison: dict[str, Any]) -> list[list[str]]:
    """The table for a terminal: a header and one row per family, of means; the best ones carry a star."""
    rows = [["mean over seeds", *(column.label for column in COLUMNS)]]
    for family in comparison["families"]:
        means = {key: family["figures"].get(key, {}).get("mean") for key in (column.key for column in COLUMNS)}
        marks = {key: "*" * (family["name"] in comparison["best"].get(key, ())) for key in means}
        note = f" ({family['selection']})" if is_oracle(family) else ""
        rows.append([family["name"] + note, *(_short(mean) + marks[key] for key, mean in means.items())])
    return rows


def _short(value: float | None) -> str:
    return show(value, digits=3) if value is None or value < 1000 else show(round(value))


def _inputs(recipe: Recipe, hook: str) -> dict[str, Any]:
    """Keys that decide which activations a dictionary is judged by and on how many, the store first."""
    values = recipe.model_dump(mode="json")
    harvest = {"store": recipe.harvest.store} | values["harvest"]
    if recipe.harvest.store is None:
        harvest = {key: harvest[key] for key in ("heldout", "exclude_special", "exclude_leading")}
    sections = {"harvest": harvest, "model": values["model"], "text": values["text"]}
    inputs = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inputs | {f"dictionary.{hook}": ", ".join(recipe.dictionary.hooks_out), "eval_tokens": recipe.eval_tokens}


def _seeded(member: ResolvedRecipe, out: str | Path, name: str, seed: int) -> ResolvedRecipe:
    return member.another_run(str(Path(out) / name / f"seed-{seed}"), seed)


def _run(run: ResolvedRecipe, plan: TrainingPlan) -> None:
    """Train and judge. An older report goes first: after an interruption it would pass for the new one."""
    recipe = run.recipe
    (Path(recipe.out_dir) / REPORT_FILE).unlink(missing_ok=True)
    try:
        train_recipe(run, plan=plan)
        evaluate(recipe.out_dir, tokens=recipe.eval_tokens)
    except ValueError as error:
        raise ValueError(f"{recipe.out_dir}: {error}") from None
