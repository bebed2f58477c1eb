"""Commands that evaluate, compare, convert and describe dictionaries."""

import typer

from .commands import circuits, compare, evaluate, features, files, probe, select

app = typer.Typer()
for group in (evaluate, features, probe, select, circuits, compare, files):
    app.add_typer(group.app)
