"""Terminal output: tables, fields and log lines. Only this file and the ``cli.py`` files print."""

import logging
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Write log lines to the current ``sys.stderr``, which a progress bar replaces to keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table whose columns are right-aligned, except for the first."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def print_fields(fields: list[tuple[str, str]]) -> None:
    """Print pairs of a name and a value, one per line."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in fields:
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(value))
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    # Without a terminal rich assumes 80 columns, and would cut off numbers.
    return Console(width=None if sys.stdout.isatty() else 200)
