"""Printing of a comparison of circuits, for ``sparsary circuits --compare``."""

from collections.abc import Sequence

from ....training.console import print_table
from ....transcoders.load import CheckpointOptions
from ..benchmark import CircuitSettings
from .run import compare_circuits
from .summary import comparison_tables


def compare_and_print(
    checkpoints: Sequence[str],
    settings: CircuitSettings,
    models: Sequence[str],
    repairs: Sequence[tuple[str, str]],
    out: str | None,
    options: CheckpointOptions,
) -> None:
    """Compare circuits and print the tables of what they share, what changed, and what was repaired."""
    found = compare_circuits(checkpoints, settings, models, repairs, out, options)
    for head, rows in comparison_tables(found):
        print_table(head, rows)
        print()
    print(f"results: {found['path']}")
    print(f"page: {found['page_path']}")
