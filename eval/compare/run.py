"""Comparison of existing runs, or of recipes that are trained and evaluated for it (``sparsary compare``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...transcoders.load import CheckpointOptions, RecipeValue
from ..result import Report
from .families import differences_summary
from .fronts import areas_summary
from .recipes import compare_recipes, recipes_summary
from .runs import compare_runs, runs_among, runs_summary


def compare(
    sources: Sequence[str | Path],
    overrides: Mapping[str, RecipeValue] | None = None,
    seeds: int = 3,
    out: str | Path = "runs/comparison",
    tokens: int | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    against: str | None = None,
    match_l0: float | None = None,
) -> Report:
    """Compare runs, or train and compare recipes; write ``comparison.json`` and ``comparison.html``, return the former.

    Example::

        comparison = compare(["runs/topk", "runs/jumprelu"], tokens=100_000)
        print(comparison["pareto"]["fvu"])
        compare(["topk.yaml", "relu.yaml"], {"tokens": 1_000_000}, seeds=3)

    Args:
        sources: Checkpoints or reports; or recipe files, or directories of them (their ``*.yaml`` without ``base.yaml``).
        overrides: Keys to override in all recipes.
        seeds: Train every recipe with seeds 0, 1, ..., this many.
        out: Directory for the comparison and the recipes' runs (``RECIPE/seed-N``).
        tokens: Evaluate all runs on this many held-out tokens; by default only runs without a report are evaluated.
        cache: Reuse earlier results from the runs' ``eval_cache``.
        trust_remote_code: Run Python code that a language model's repository brings.
        against: The reference that all others are compared with: a recipe, a run, or a group of runs that differ only in the
            seed. Default: the first.
        match_l0: Compare at this l0: figures are interpolated along every sweep over budgets (recipes, or runs, that differ
            only in the encoder's ``k``, ``target_l0`` or ``sparsity``).

    Raises:
        ValueError: If runs and recipes are mixed, or one of them cannot be compared with the others.
    """
    runs = runs_among(sources)
    if runs is None:
        if tokens is not None or not cache:
            raise ValueError("compare: --tokens and --no-cache: expected runs, got recipes. Override eval_tokens=N instead.")
        allowed = {"model.trust_remote_code": True} if trust_remote_code else {}
        return compare_recipes(sources, {**(overrides or {}), **allowed}, seeds, out, against, match_l0)
    if overrides:
        raise ValueError(f"{next(iter(overrides))}: expected no recipe keys with runs, because they are already trained.")
    options = CheckpointOptions(trust_remote_code=trust_remote_code)
    return compare_runs(runs, out, tokens, cache, options, against, match_l0)


def comparison_summary(comparison: Report) -> list[list[list[str]]]:
    """Return the tables for a terminal, each with a header: one of runs or recipes, then those of differences and areas."""
    table = runs_summary(comparison) if "runs" in comparison else recipes_summary(comparison)
    return [table, *(rows for rows in (differences_summary(comparison), areas_summary(comparison)) if len(rows) > 1)]
