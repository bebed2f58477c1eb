"""Commands ``compare``, ``similarity`` and ``diff``: several runs, dictionaries or models."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...training.cli import TrustRemoteCode, recipe_overrides
from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

log = logging.getLogger(__name__)
app = typer.Typer()


@app.command("compare")
def _compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... | RECIPE_OR_DIRECTORY... [key.sub=value ...]",
            help="Checkpoints or reports to compare; or recipe files, or directories of recipes (*.yaml except base.yaml), and "
            "keys to override in all of them.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Number of seeds to train each recipe with: 0, 1, ...")] = 3,
    out: Annotated[str, typer.Option(help="Output directory, also for runs (RECIPE/seed-N).")] = "runs/comparison",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to evaluate all runs on. Default: only runs without a report.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute all metrics; do not use eval_cache of runs.")] = False,
    trust_remote_code: TrustRemoteCode = None,
    against: Annotated[
        str | None, typer.Option(help="Recipe or run that others are compared with. Default: the first.")
    ] = None,
    match_l0: Annotated[
        float | None,
        typer.Option("--match-l0", min=0.001, help="Compare at this l0, interpolating sweeps over budgets (k or target_l0)."),
    ] = None,
) -> None:
    """Compare runs, or train and evaluate recipes over one store; write comparison.json and comparison.html."""
    log.info("compare: loading %s", ", ".join(arguments))
    from ..compare.run import compare, comparison_summary

    # Not an override if it exists as a path: names of grid members contain `=`.
    named = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    overrides = recipe_overrides([argument for argument in arguments if argument not in named], None)
    trusted = bool(trust_remote_code)
    comparison = compare(named, overrides, seeds, out, tokens, not no_cache, trusted, against, match_l0)
    for head, *rows in comparison_summary(comparison):
        print_table(head, rows)
        print()
    # Only recipes' figures, which are means over seeds, have a star at the best ones.
    print(("* best mean at the common l0\n" if "best" in comparison else "") + f"report: {comparison['page_path']}")


@app.command("similarity")
@reads_dictionaries
def _similarity(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Dictionaries of several seeds, widths or layers, or a stack.")
    ],
    out: Annotated[str | None, typer.Option(help="Output directory for similarity.json and page. Default: print only.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Held-out tokens for stitching; 0: directions only.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed of the floor of random directions.")] = 0,
    *,
    options: "CheckpointOptions",
) -> None:
    """Compare latents of dictionaries: matched cosines, and the latents of one that the other lacks (stitching)."""
    from ..compare.similarity import similarity, similarity_table

    found = similarity(checkpoints, out, tokens, seed=seed, options=options)
    print_table(*similarity_table(found))
    for row in found["rows"]:
        for name, reason in row["reasons"].items():
            print(f"{row['a']}, {row['b']}: no {name}: {reason}")
    if out is not None:
        print(f"results: {found['path']}\npage: {found['page_path']}")


@app.command("diff")
@reads_dictionaries
def _diff(
    checkpoint: Annotated[str, typer.Argument(help="A crosscoder of two models: a checkpoint directory.")],
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/diff.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to read. Default: the recipe's eval_tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the latents patched as a floor.")] = 0,
    difference_sae: Annotated[
        bool,
        typer.Option(
            "--difference-sae",
            help="Also train an SAE on the difference of the activations, by the crosscoder's recipe, as a floor.",
        ),
    ] = False,
    *,
    options: "CheckpointOptions",
) -> None:
    """Compare two models by their crosscoder: exclusive latents, latent scaling, KL closed; write diff.json and diff.html."""
    from ..diff.run import diff
    from ..diff.summary import diff_summary, diff_tables

    found = diff(checkpoint, out, tokens, seed, options, difference_sae)
    print_fields(diff_summary(found))
    for head, rows in diff_tables(found):
        print()
        print_table(head, rows)
    print(f"\nresults: {found['path']}\npage: {found['page_path']}")
