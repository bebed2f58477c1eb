"""Marks and order of tests by ``slow.txt``, the list of slow ones. A plugin that ``conftest.py`` registers."""

import collections
import functools
import re
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
STALE = pytest.StashKey[list[str]]()


@functools.cache
def slow_entries(text):
    """Return the entries of ``slow.txt``, each with a pattern of the test ids it covers: a file, a test or one id."""
    lines = [line.removeprefix("long") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    entries = [line.split(maxsplit=1)[1].strip() for line in lines]
    return {entry: re.compile(re.escape(entry).replace(r"\*", ".*") + r"(::.*|\[.*)?") for entry in entries}


def long_entries(text):
    """Return those entries of ``slow.txt`` whose lines begin with ``long``."""
    return slow_entries("\n".join(line for line in text.splitlines() if line.startswith("long")))


def covered_by(entries):
    """Return a function that returns True for a test id that any of the entries covers."""
    patterns = collections.defaultdict(list)
    for entry, pattern in entries.items():
        patterns[entry.split("::")[0]].append(pattern)
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns.get(name.split("::")[0], ()))


def seconds_by_file(text):
    """Return the seconds of each file's lines in ``slow.txt``, less those that begin with ``long``."""
    seconds = collections.Counter()
    for line in text.splitlines():
        if line.strip() and not line.startswith(("#", "long")):
            number, entry = line.split(maxsplit=1)
            seconds[entry.split("::")[0].strip()] += float(number)
    return seconds


@functools.cache
def left_out(expression, text):
    """Return the files of which nothing is run where marks are selected by ``expression``: they need not be imported."""
    words = expression.split()
    parts = {part.strip() for part in expression.split(" and ")}
    if "or" in words or "(" in expression:
        return set()
    files = slow_entries(text) if "not slow" in parts else long_entries(text) if "not long" in parts else {}
    return {entry for entry in files if "::" not in entry}


def stale_entries(entries, ids):
    """Return the entries that match no test: their file is gone, or was collected in full without such a test."""
    collected = collections.defaultdict(list)
    for name in ids:
        collected[name.split("::")[0]].append(name)
    file_of = {entry: entry.split("::")[0] for entry in entries}
    gone = {file for file in set(file_of.values()) if not (SLOW.parents[1] / file).is_file()}
    known = {entry for entry, file in file_of.items() if any(map(entries[entry].fullmatch, collected.get(file, ())))}
    return [entry for entry, file in file_of.items() if file in gone or (file in collected and entry not in known)]


def pytest_ignore_collect(collection_path, config):
    # Files that were asked for by name are collected all the same.
    files = left_out(config.getoption("markexpr"), SLOW.read_text(encoding="utf-8"))
    path = collection_path.as_posix()
    return True if any(path.endswith(f"/{file}") for file in files) else None


# Runs before pytest selects by mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    text = SLOW.read_text(encoding="utf-8")
    # The longest files first, so that no worker begins one when the others end.
    seconds = seconds_by_file(text)
    items.sort(key=lambda item: -seconds[item.nodeid.split("::")[0]])
    entries = slow_entries(text)
    slow, long = covered_by(entries), covered_by(long_entries(text))
    for item in items:
        if slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
        if long(item.nodeid):
            item.add_marker(pytest.mark.long)
    # If single tests were requested, the others of their files are missing, but not stale.
    whole = not config.getoption("lf", False) and not any("::" in str(argument) for argument in config.args)
    # A test reports them, because workers of pytest-xdist have no other way to do so.
    config.stash[STALE] = stale_entries(entries, [item.nodeid for item in items]) if whole else []


@pytest.fixture
def stale_slow(pytestconfig):
    """Return the entries of ``slow.txt`` that match no collected test."""
    return pytestconfig.stash[STALE]
