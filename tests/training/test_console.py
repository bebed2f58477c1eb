"""Tables in the terminal: nothing is cut, however narrow it is."""

import pytest
from rich.console import Console

from sparsary.training import console
from sparsary.training.console import print_table, table_parts

HEAD = ["task", "unit set", "CPR", "nodes for 80 %", "with exact"]
ROWS = [["ioi", "latents, errors kept", "1.004", "48", "-0.9"], ["ioi", "neurons", "0.631", "never", "0.994"]]


@pytest.mark.parametrize("width", [200, 80, 60, 48])
def test_a_table_too_wide_comes_in_parts_and_no_word_is_cut(monkeypatch, capsys, width):
    monkeypatch.setattr(console, "_console", lambda: Console(width=width))
    print_table(HEAD, ROWS)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for cell in (*HEAD[2:], *(cell for row in ROWS for cell in row)):
        assert cell in printed
    # Every part says which rows it shows.
    assert printed.count("latents, errors kept") == len(table_parts(HEAD, ROWS, width))


def test_a_table_that_fits_stays_whole():
    assert table_parts(HEAD, ROWS, 66) == [[0, 1, 2, 3, 4]]
    assert table_parts(HEAD, ROWS, 50) == [[0, 1, 2, 3], [0, 1, 4]]
    assert table_parts(["run"], [["a" * 90]], 80) == [[0]]
