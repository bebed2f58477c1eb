"""Command line of training: ``sparsary harvest`` and ``sparsary train``."""

import logging
import sys
from typing import Annotated, Any

import typer

from .console import print_fields, print_table

log = logging.getLogger(__name__)
app = typer.Typer()
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code from the language model's repository. It has your permissions on this machine: read it first.",
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="Recipe keys to override.")]


Processes = Annotated[
    int,
    typer.Option("--processes", help="Number of processes on this machine that share the work. Several nodes: use torchrun."),
]


def launch_again(processes: int) -> int:
    """Run this command in several processes and return the exit status."""
    from .launch import launch

    arguments, rest = [], iter(sys.argv[1:])
    for argument in rest:
        if argument == "--processes":
            next(rest, None)
        elif not argument.startswith("--processes="):
            arguments.append(argument)
    return launch(processes, arguments)


def recipe_overrides(arguments: list[str] | None, trust_remote_code: bool | None) -> dict[str, Any]:
    """Return a recipe's overrides from the command line's arguments and option."""
    from .recipe import parse_overrides

    overrides = parse_overrides(arguments or [])
    return overrides | ({"model.trust_remote_code": True} if trust_remote_code else {})


@app.command("harvest")
def _harvest(
    recipe: RecipePath,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = None,
    processes: Processes = 1,
) -> None:
    """Cache the activations that a recipe asks for; an interrupted harvest resumes, also with another number of processes."""
    if processes != 1:
        raise typer.Exit(launch_again(processes))
    log.info("harvest: loading recipe %s", recipe)
    from .run import harvest

    store = harvest(recipe, **recipe_overrides(overrides, trust_remote_code))
    print(f"{store.address}: {store.tokens('train'):,} training and {store.tokens('heldout'):,} held-out tokens")


@app.command("hooks")
def _hooks(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id, directory, or embedded.")],
    layer: Annotated[int | None, typer.Option("--layer", help="Only this block; counted from 0.")] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """List the hooks of a model: the names that recipes take, with widths and sites. Weights are not loaded."""
    log.info("hooks: loading the configuration of %s", model)
    from .recipe import ModelSection
    from .resolve_hooks import ModelOutline

    outline = ModelOutline(ModelSection(id=model, trust_remote_code=bool(trust_remote_code)))
    found = outline.hooks()
    if layer is not None and not any(each.layer == layer for each in found):
        raise ValueError(f"--layer: expected 0 to {found[-1].layer}, got {layer}.")
    shown = [each for each in found if layer in (None, each.layer)]
    print_table(
        ["hook", "layer", "width", "sites"],
        [
            [each.name, str(each.layer), "unknown" if each.width is None else str(each.width), ", ".join(each.sites)]
            for each in shown
        ],
    )
    middle = next((each for each in found if each.layer == found[-1].layer // 2 and "resid_post" in each.sites), None)
    if layer is None and middle is not None:
        print(
            f"To begin with, take the residual stream after a block in the middle: dictionary.hook: {middle.name}, or "
            f"dictionary.layer: {middle.layer} with dictionary.site: resid_post."
        )


@app.command("train")
def _train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print the plan and exit.")] = False,
    trust_remote_code: TrustRemoteCode = None,
    processes: Processes = 1,
) -> None:
    """Harvest if needed, then train, all members of a grid together; the same command resumes an interrupted run."""
    if processes != 1:
        raise typer.Exit(launch_again(processes))
    log.info("train: loading recipe %s", recipe)
    from .preflight import preflight_all
    from .recipe.grid import load_grid
    from .resolve_hooks import resolve_recipes
    from .run import train_all
    from .training_plan import grid_lines

    grid = load_grid(recipe, recipe_overrides(overrides, trust_remote_code))
    members = resolve_recipes(grid.recipes)
    plans = preflight_all(members)
    print_fields(grid_lines(grid, members, plans))
    if dry_run:
        return
    directories = train_all(members, plans=plans)
    trusted = " --trust-remote-code" if members[0].recipe.model.trust_remote_code else ""
    for directory in directories:
        print(f"{directory}: done. Evaluate it with: sparsary eval {directory}{trusted}")
