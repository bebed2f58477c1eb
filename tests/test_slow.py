"""The list of slow tests: what its lines stand for, and that lines which stand for nothing are found."""

from pathlib import Path

import pytest

IDS = ["tests/test_cli.py::test_a", "tests/test_cli.py::test_b[topk-1]", "tests/test_cli.py::test_b[relu-1]"]


@pytest.fixture
def reading(pytestconfig):
    """The plugin that reads the list."""
    return pytestconfig.pluginmanager.get_plugin("selection")


@pytest.mark.parametrize(
    ("entry", "matched"),
    [
        ("tests/test_cli.py", IDS),
        ("tests/test_cli.py::test_a", IDS[:1]),
        ("tests/test_cli.py::test_b", IDS[1:]),
        ("tests/test_cli.py::test_b[relu-1]", IDS[2:]),
        ("tests/test_cli.py::test_b[topk-*]", IDS[1:2]),
        ("tests/test_cli.py::test_", []),
    ],
)
def test_a_line_is_a_file_a_test_or_an_id(reading, entry, matched):
    entries = reading.slow_entries(f"# seconds, tests\n 3.2 {entry}\n")
    assert [name for name in IDS if entries[entry].fullmatch(name)] == matched
    assert reading.stale_entries(entries, IDS) == ([] if matched else [entry])


def test_lines_of_files_that_are_gone_are_stale_and_of_files_not_collected_are_not(reading):
    entries = reading.slow_entries("1 tests/no_such_file.py\n1 tests/test_slow.py::test_that_is_not_here")
    assert reading.stale_entries(entries, IDS) == ["tests/no_such_file.py"]


def test_lines_that_begin_with_long_are_those_make_test_leaves_out(reading):
    text = "# long ago\n 3.2 tests/test_cli.py::test_a\nlong 40 tests/test_cli.py::test_b[topk-*]\n"
    assert list(reading.slow_entries(text)) == ["tests/test_cli.py::test_a", "tests/test_cli.py::test_b[topk-*]"]
    entries = reading.long_entries(text)
    assert [name for name in IDS if reading.covered_by(entries)(name)] == IDS[1:2]
    assert not reading.covered_by({})(IDS[0])


def test_the_longest_files_come_first(reading):
    lines = (
        "# seconds",
        " 3.5 tests/test_a.py::test_a",
        " 1 tests/test_a.py::test_b[x]",
        "long 40 tests/test_b.py",
        " 2 tests/test_b.py",
    )
    text = "\n".join(lines)
    assert reading.seconds_by_file(text) == {"tests/test_a.py": 4.5, "tests/test_b.py": 2}


@pytest.mark.parametrize(
    ("expression", "files"),
    [
        ("not slow and not gpu", {"tests/test_a.py", "tests/test_b.py"}),
        ("not gpu and not long", {"tests/test_b.py"}),
        ("not gpu", set()),
        ("slow or not slow", set()),
        ("not (slow and gpu)", set()),
        ("", set()),
    ],
)
def test_files_of_which_nothing_is_run_are_not_imported(reading, expression, files):
    text = " 3.5 tests/test_a.py\n 1 tests/test_c.py::test_b[x]\nlong 40 tests/test_b.py\n"
    assert reading.left_out(expression, text) == files


def test_every_line_matches_a_test(stale_slow):
    assert not stale_slow, "tests/slow.txt: these lines match no test. Remove or correct them."


def test_the_marks_are_set_by_the_list_alone():
    # The words are put together here so that this file does not find itself; selection.py sets the marks.
    paths = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__).with_name("selection.py")]
    marks = "mark." + "slow", "mark." + "long"
    assert [str(path) for path in paths if any(mark in path.read_text(encoding="utf-8") for mark in marks)] == []
