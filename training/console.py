"""Terminal output: tables and a progress bar. Only this file and the ``cli.py`` files print."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table whose columns are right-aligned, except for the first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*map(escape, row))
    # Without a terminal rich assumes 80 columns, and would cut off numbers.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_fields(fields: list[tuple[str, str]]) -> None:
    """Print pairs of a name and a value, one per line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in fields:
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)


@contextmanager
def show_progress(name: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Show a progress bar on a terminal, from the first progress report to the last.

    The context value is called with the total and returns a function to call with the number done.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal, transient=True)

    def start(total: int) -> Callable[[int], None]:
        task = bar.add_task(name, total=total)

        def update(done: int) -> None:
            bar.start()
            bar.update(task, completed=done)
            if done >= total:
                bar.stop()

        return update

    try:
        yield start
    finally:
        bar.stop()
