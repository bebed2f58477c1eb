"""The commands that train: ``sparsary harvest`` and ``sparsary train``."""

from typing import Annotated

import typer

from .console import print_fields, show_progress

app = typer.Typer()
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="Recipe keys to override.")]


@app.command("harvest")
def _harvest(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Store the activations a recipe asks for; an interrupted harvest goes on."""
    from .recipe import parse_overrides
    from .run import harvest

    with show_progress("harvest") as progress:
        store = harvest(recipe, progress, **parse_overrides(overrides or []))
    print(f"{store.directory}: {store.tokens('train'):,} training and {store.tokens('heldout'):,} held-out tokens")


@app.command("train")
def _train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan, then stop.")] = False,
) -> None:
    """Harvest if need be, then train, all members of a grid side by side; the same command continues an interrupted run."""
    from .preflight import grid_lines, preflight_all
    from .recipe import parse_overrides
    from .recipe.grid import load_grid
    from .resolve_hooks import resolve_recipes
    from .run import train_all

    grid = load_grid(recipe, parse_overrides(overrides or []))
    members = resolve_recipes(grid.recipes)
    plans = preflight_all(members)
    print_fields(grid_lines(grid, members, plans))
    if dry_run:
        return
    with show_progress("harvest") as progress:
        directories = train_all(members, progress=progress(members[0].recipe.harvest.tokens or 0), plans=plans)
    for directory in directories:
        print(f"{directory}: done. Judge it with: sparsary eval {directory}")
