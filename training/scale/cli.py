"""Command line of predictions: ``sparsary plan``."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..cli import Overrides, RecipePath, recipe_overrides
from ..console import print_fields, print_table

log = logging.getLogger(__name__)
app = typer.Typer()
GIGA, TERA = 1e9, 1e12


@app.command("plan")
def _plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option("--devices", help="Number of GPUs, or of processes on a CPU.")] = 1,
    memory: Annotated[float | None, typer.Option("--memory", help="GB of a device.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s of a device's memory.")] = None,
    flops: Annotated[float | None, typer.Option("--flops", help="TFLOP/s of a device's matrix products.")] = None,
    link: Annotated[float | None, typer.Option("--link", help="GB/s between devices of a node, in one direction.")] = None,
    node_link: Annotated[float | None, typer.Option("--node-link", help="GB/s between nodes, for each device.")] = None,
    latency: Annotated[float | None, typer.Option("--latency", help="Microseconds until a message arrives.")] = None,
    devices_per_node: Annotated[int, typer.Option("--devices-per-node", help="Devices of one node.")] = 8,
    d_model: Annotated[int | None, typer.Option("--d-model", help="Width of a model that cannot be loaded.")] = None,
    parameters: Annotated[float | None, typer.Option("--parameters", help="Parameters of that model: 8e9.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of that model.")] = None,
    l0: Annotated[float | None, typer.Option("--l0", help="Latents per token, for encoders without k or target_l0.")] = None,
    json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the prediction here as well.")] = None,
) -> None:
    """Predict step time, memory, tokens per day and disk of a run, and the best mesh of its devices.

    Costs are measured on this machine by a short probe, unless --memory, --bandwidth and --flops describe another.
    """
    log.info("plan: loading recipe %s", recipe)
    from ...sae.files import write_json
    from ..recipe.grid import load_grid
    from .plan import Device, plan_run
    from .prediction import HEAD, fields_of, plan_as_json, require_fit, table_of
    from .sizes import Given

    grid = load_grid(recipe, recipe_overrides(overrides, None))
    device = Device(
        memory=_times(memory, GIGA),
        bandwidth=_times(bandwidth, GIGA),
        flops=_times(flops, TERA),
        link=_times(link, GIGA),
        node_link=_times(node_link, GIGA),
        latency=_times(latency, 1e-6),
        per_node=devices_per_node,
    )
    given = Given(d_model, None if parameters is None else round(parameters), layers, l0)
    found = plan_run(grid.recipes, devices, device, given)
    print_fields([("recipe", recipe), *fields_of(found)])
    print_table(HEAD, table_of(found))
    if json is not None:
        write_json(Path(json), plan_as_json(found))
    require_fit(found)


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
