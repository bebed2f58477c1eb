"""Command ``sparsary bench truth``, added to the benchmarks of training."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from ...training.bench.cli import BenchJson, app
from ...training.console import print_table

log = logging.getLogger(__name__)


@app.command("truth")
def _bench_truth(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="Recipe keys of all runs: lr=1e-3.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="synth_sae_bench_small, synth_sae_bench_16k, flat, correlated, hierarchical_04, ...; or a synthetic model of "
            "SAELens: a directory or a hub repository id."
        ),
    ] = "synth_sae_bench_small",
    family: Annotated[list[str] | None, typer.Option("--family", help="Encoder to train; repeatable.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="KEYS", help="Train with these recipe keys too; repeatable."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1024, help="Training samples. Default: the protocol's.")] = None,
    n_latents: Annotated[int | None, typer.Option("--n-latents", min=1, help="Latents. Default: the protocol's.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Latents per token. Default: the protocol's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 3,
    scored: Annotated[int, typer.Option(min=2048, help="Fresh samples to score each dictionary on.")] = 20_480,
    out: Annotated[str | None, typer.Option(help="Keep the runs here, and continue them. Default: they are removed.")] = None,
    json: BenchJson = None,
) -> None:
    """Train encoders on data whose features are known, and score their recovery: F1, MCC, FVU, with tests over seeds."""
    log.info("bench truth: loading torch")
    from dataclasses import replace

    from ...sae import ENCODERS
    from ...sae.files import write_json
    from ...sae.suggestions import require_choice
    from ...training.recipe import parse_overrides
    from ...training.stages import stage
    from .truth import Arm, bench_truth, truth_set, truth_tables

    chosen = truth_set(data)
    given = {"samples": samples, "n_latents": n_latents, "k": k}
    chosen = replace(chosen, **{key: value for key, value in given.items() if value is not None})
    shared = parse_overrides(overrides or [])
    variants = [{}, *(parse_overrides(keys.split()) for keys in variant or [])]
    families = [require_choice("--family", name, tuple(ENCODERS)) for name in family or ["batch_topk", "matryoshka"]]
    arms = [Arm(name, {**shared, **keys}) for name in families for keys in variants]
    with stage("bench truth", len(arms) * seeds, "runs") as shown:
        report = bench_truth(chosen, arms, seeds, scored, None if out is None else Path(out), shown.update)
    for title, head, rows in truth_tables(report):
        print(f"\n{title}")
        print_table(head, rows)
    if json is not None:
        write_json(Path(json), report)
