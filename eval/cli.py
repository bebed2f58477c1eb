"""Commands that evaluate, compare, convert and describe dictionaries."""

import typer

from .commands import circuits, compare, evaluate, features, files, name, probe, select, steer

app = typer.Typer()
for group in (evaluate, features, name, probe, select, steer, circuits, compare, files):
    app.add_typer(group.app)
