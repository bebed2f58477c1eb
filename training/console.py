"""Terminal output: tables, fields and log lines. Only this file and the ``cli.py`` files print."""

import logging
import re
import sys
from itertools import takewhile
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Write log lines to the current ``sys.stderr``, which a progress bar replaces to keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table: names to the left, figures to the right.

    A table too wide for the terminal is printed in parts below each other, each with the columns that name the rows.
    """
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    names = _naming_columns(rows)
    for number, part in enumerate(table_parts(head, rows, console.width)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for index in part:
            named = index < names
            table.add_column(escape(head[index]), justify="left" if named else "right", overflow="fold", no_wrap=not named)
        for row in rows:
            table.add_row(*(escape(row[index]) for index in part))
        if number:
            console.print()
        console.print(table)


def table_parts(head: list[str], rows: list[list[str]], width: int) -> list[list[int]]:
    """Divide a table's columns into parts that fit into ``width``; each part begins with the columns that name the rows.

    >>> table_parts(["run", "fvu", "cross-entropy"], [["topk", "0.1", "1.605"]], 20)
    [[0, 1], [0, 2]]
    """
    # Two spaces between columns.
    widths = [max(map(len, cells)) + 2 for cells in zip(head, *rows, strict=True)]
    if sum(widths) - 2 <= width:
        return [list(range(len(head)))]
    names = _naming_columns(rows)
    room = width + 2 - sum(widths[:names])
    parts: list[list[int]] = []
    left = 0
    for index in range(names, len(head)):
        if not parts or widths[index] > left:
            parts.append(list(range(names)))
            left = room
        parts[-1].append(index)
        left -= widths[index]
    return parts or [list(range(len(head)))]


def _naming_columns(rows: list[list[str]]) -> int:
    """Return the number of columns at the left that hold no figures; at least 1."""
    figure = re.compile(r"[-+]?\d[\d.,]*(e[-+]\d+)?[%*]?")
    shown = takewhile(lambda cells: not any(map(figure.fullmatch, cells)), list(zip(*rows, strict=True))[1:])
    return 1 + sum(1 for _ in shown)


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
