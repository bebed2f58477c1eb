"""Rendering of HTML pages from written result files alone, so that old results can be rendered again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...sae.files import read_json, write_text
from .attribution_graph import render_graph
from .circuits import render_circuits
from .features import render_features
from .recipes import render_recipes
from .report import render_report
from .runs import render_runs
from .stack import render_stack

# Suffix of the page's own data file: graph.json has the format of another project and lacks some of it.
GRAPH_PAGE = "-page"


class ResultKind(NamedTuple):
    """A kind of result: the entries that identify it, the command that writes it, and its renderer."""

    entries: frozenset[str]
    command: str
    render: Callable[[Path, dict[str, Any]], str]


def render_file(path: str | Path) -> Path:
    """Render a result file as an HTML page next to it (written atomically).

    Args:
        path: ``report.json`` (of a dictionary or a stack), ``comparison.json``, ``circuits.json``, ``features.json`` or
            ``features.jsonl``, ``graph.json``; other names work too. Related files in the same folder are read as well:
            a run's ``metrics.jsonl``, the other file of features, a graph's ``graph-page.json``.

    Returns:
        The page's path: the same name, ending in ``.html``.

    Raises:
        ValueError: If the file is missing, damaged, or not a result that has a page.

    Example:
        >>> import json, tempfile
        >>> from sparsary import render
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "report.json")
        ...     _ = path.write_text(json.dumps({"report_version": 1, "kind": "sae", "fvu": 0.21}))
        ...     render(path).name
        'report.html'
    """
    source = _main_file(Path(path))
    found = read_json(source)
    kind = next((kind for kind in KINDS if isinstance(found, dict) and kind.entries <= found.keys()), None)
    if kind is None:
        names = "report.json, comparison.json, circuits.json, features.json, features.jsonl or graph.json"
        raise ValueError(f"{path}: expected the JSON of a command that writes a page ({names}), got other JSON.")
    try:
        text = kind.render(source, found)
    except (LookupError, TypeError, AttributeError) as error:
        message = f"{path}: expected what {kind.command} writes, got a file without some of it ({error!r}). Run it again."
        raise ValueError(message) from error
    page = source.with_name(source.stem.removesuffix(GRAPH_PAGE) + ".html")
    write_text(page, text)
    return page


def _main_file(path: Path) -> Path:
    """Return the JSON file that identifies the result: ``features.json`` for ``features.jsonl``."""
    return path.with_suffix(".json") if path.suffix == ".jsonl" else path


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file.

    Raises:
        ValueError: If the file does not exist, or a line is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected this file, found none.")
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: expected JSON, got invalid JSON ({error}).") from None


def _report(path: Path, report: dict[str, Any]) -> str:
    """Render a report, with the training curve if the run's log is next to it or in the checkpoint's folder."""
    folders = (path.parent, Path(str(report.get("checkpoint"))))
    logs = [folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()]
    return render_report(report, _curve(logs[0]) if logs else [])


def _curve(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, skipping one that a killed run left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _graph(path: Path, graph: dict[str, Any]) -> str:
    beside = path.with_name(f"{path.stem}{GRAPH_PAGE}.json")
    if not beside.is_file():
        raise ValueError(f"{path}: expected {beside.name} beside it, which holds the page's data. Recompute the graph.")
    return render_graph(read_json(beside))


# The first kind whose entries a file has wins.
KINDS = (
    ResultKind(frozenset({"stack_report_version"}), "sparsary eval", lambda path, found: render_stack(found)),
    ResultKind(frozenset({"report_version"}), "sparsary eval", _report),
    ResultKind(frozenset({"runs_version"}), "sparsary compare", lambda path, found: render_runs(found)),
    ResultKind(frozenset({"comparison_version"}), "sparsary compare", lambda path, found: render_recipes(found)),
    ResultKind(frozenset({"rows", "curves", "circuits"}), "sparsary circuits", lambda path, found: render_circuits(found)),
    ResultKind(
        frozenset({"schema_version", "n_latents", "hooks_in", "sampled_tokens"}),
        "sparsary features",
        lambda path, found: render_features(found, _lines(path.with_suffix(".jsonl"))),
    ),
    ResultKind(frozenset({"metadata", "qParams", "nodes", "links"}), "sparsary circuits --prompt", _graph),
    ResultKind(
        frozenset({"page_version", "nodes", "edges"}), "sparsary circuits --prompt", lambda path, found: render_graph(found)
    ),
)
