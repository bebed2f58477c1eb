"""Commands that evaluate, compare, convert and describe dictionaries."""

import typer

from .commands import circuits, compare, evaluate, features, files, probe, steer

app = typer.Typer()
for group in (evaluate, features, probe, circuits, steer, compare, files):
    app.add_typer(group.app)
