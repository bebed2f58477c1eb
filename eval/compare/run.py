"""Comparison as the command has it: of runs that exist, or of recipes that are trained and evaluated for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...transcoders.load import CheckpointOptions, RecipeValue
from ..checkpoint import Report
from ..report.evaluate import Progress, unseen
from .families import differences_summary
from .recipes import compare_recipes, recipes_summary
from .runs import compare_runs, runs_among, runs_summary


def compare(
    sources: Sequence[str | Path],
    overrides: Mapping[str, RecipeValue] | None = None,
    seeds: int = 3,
    out: str | Path = "runs/comparison",
    tokens: int | None = None,
    cache: bool = True,
    progress: Progress = unseen,
    trust_remote_code: bool = False,
    against: str | None = None,
    match_l0: float | None = None,
) -> Report:
    """Compare runs, or train and compare recipes; write ``comparison.json`` and ``comparison.html``, return the former.

    Args:
        sources: Checkpoints or reports; or recipe files, or directories of them (their ``*.yaml`` without ``base.yaml``).
        overrides: Keys to override in all recipes.
        seeds: Train every recipe with seeds 0, 1, ..., this many.
        out: Where the comparison goes, and recipes' runs (``RECIPE/seed-N``).
        tokens: Evaluate all runs on this many held-out tokens; without it, those that have no report yet.
        cache: Take what was measured of a run before from its ``eval_cache``.
        trust_remote_code: Run Python code that a language model's repository brings.
        against: The recipe, run, or group of runs that differ in the seed only, with which all others are compared; by
            default the first.
        match_l0: Compare at this l0: figures are interpolated along every sweep over budgets (recipes, or runs, that differ
            in the encoder's ``k``, ``target_l0`` or ``sparsity`` only).

    Raises:
        ValueError: If runs and recipes are mixed, or one of them cannot be compared with the others.
    """
    runs = runs_among(sources)
    if runs is None:
        if tokens is not None or not cache:
            raise ValueError("compare: --tokens and --no-cache: expected runs, got recipes. Override eval_tokens=N instead.")
        allowed = {"model.trust_remote_code": True} if trust_remote_code else {}
        return compare_recipes(sources, {**(overrides or {}), **allowed}, seeds, out, progress, against, match_l0)
    if overrides:
        raise ValueError(f"{next(iter(overrides))}: expected no recipe keys with runs, which are trained already.")
    options = CheckpointOptions(trust_remote_code=trust_remote_code)
    return compare_runs(runs, out, tokens, cache, progress, options, against, match_l0)


def comparison_summary(comparison: Report) -> list[list[list[str]]]:
    """The tables for a terminal: a header and one row for each run or recipe; then one for each difference, if there are."""
    table = runs_summary(comparison) if "runs" in comparison else recipes_summary(comparison)
    tested = differences_summary(comparison)
    return [table, tested] if len(tested) > 1 else [table]
