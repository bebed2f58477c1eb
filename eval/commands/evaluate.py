"""Commands ``eval`` and ``render``: metrics of dictionaries on held-out text, and pages of results."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...training.console import print_fields
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

log = logging.getLogger(__name__)
app = typer.Typer()


@app.command("eval")
@reads_dictionaries
def _eval(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, directories of them (spliced in together), or hub ids. Those of one model share its passes.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Output directory; several checkpoints get a folder each. Default: the checkpoint's own."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to evaluate on. Default: the recipe's eval_tokens.")
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option("--oracle", help="Select latents of a gradient SAE by the gradient of the evaluated loss; needs --out."),
    ] = False,
    pursuit: Annotated[
        str | None, typer.Option(help="Encode by pursuit: matching_pursuit, orthogonal_..., gradient_pursuit.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Latents per token, with --pursuit or if not in the files.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute all metrics; do not use eval_cache.")] = False,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Fit the linear map of the error without a bias.")] = False,
    ridge: Annotated[
        list[float] | None,
        typer.Option(help="Ridge of that map, relative to its input's mean square; repeatable (chosen by cross-validation)."),
    ] = None,
    authors: Annotated[
        bool, typer.Option("--authors", help="Also decompose the error as in the scripts of arXiv:2410.14670: authors_*.")
    ] = False,
    *,
    options: "CheckpointOptions",
) -> None:
    """Evaluate dictionaries on held-out documents; write report.json and report.html."""
    from ..checkpoint import folders, with_grids_members
    from ..report.evaluate import InferenceMode, evaluate_all
    from ..report.summary import report_summary

    checkpoints = with_grids_members(checkpoints)
    outs = folders(checkpoints, out)
    fitted: dict[str, Any] = {"bias": False} if no_bias else {}
    fitted |= {"ridge": ridge[0] if len(ridge) == 1 else ridge} if ridge else {}
    options = options if pursuit is not None else replace(options, k=k)
    metric_options = {"linear_error": fitted | ({"authors": True} if authors else {}), "error_cost": fitted}
    mode = InferenceMode(oracle, pursuit, k if pursuit is not None else None)
    reports = evaluate_all(checkpoints, outs, tokens, mode, not no_cache, options, metric_options)
    for report in reports:
        print_fields(report_summary(report))
        print(f"report: {report['report_path']}")


@app.command("render")
def _render(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="JSON output of a command: report.json, circuits.json, comparison.json, ..."),
    ],
) -> None:
    """Render pages from their JSON files, for example after an update of sparsary."""
    log.info("render: loading %s", ", ".join(files))
    from ..pages.render import render_file

    for file in files:
        print(f"page: {render_file(file)}")
