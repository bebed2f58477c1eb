"""A result's page from its written files alone, so that old results can be rendered again."""

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

# What the page of a graph shows beyond graph.json, which is in another project's form.
GRAPH_PAGE = "-page"


class ResultKind(NamedTuple):
    """A kind of result: entries by which it is known, the command that writes it, and how its page is made."""

    entries: frozenset[str]
    command: str
    render: Callable[[Path, dict[str, Any]], str]


def render_file(path: str | Path) -> Path:
    """Render the page of a written result beside it, whole or not at all.

    Args:
        path: ``report.json`` (of a dictionary or a stack), ``comparison.json``, ``circuits.json``, ``features.json`` or
            ``features.jsonl``, ``graph.json``; or the same under another name. What lies beside it is read too: a run's
            ``metrics.jsonl``, the other file of features, a graph's ``graph-page.json``.

    Returns:
        The page's path: the same name, ending in ``.html``.

    Raises:
        ValueError: If the file is missing or damaged, or no result that has a page.
    """
    source = _main_file(Path(path))
    found = read_json(source)
    kind = next((kind for kind in KINDS if isinstance(found, dict) and kind.entries <= found.keys()), None)
    if kind is None:
        names = "report.json, comparison.json, circuits.json, features.json, features.jsonl or graph.json"
        raise ValueError(
            f"{path}: expected a result that has a page ({names}), got other JSON. Give a file that a command wrote."
        )
    try:
        text = kind.render(source, found)
    except (LookupError, TypeError, AttributeError) as error:
        message = f"{path}: expected what {kind.command} writes, got a file without some of it ({error!r}). Run it again."
        raise ValueError(message) from error
    page = source.with_name(source.stem.removesuffix(GRAPH_PAGE) + ".html")
    write_text(page, text)
    return page


def _main_file(path: Path) -> Path:
    """The file that says what the result is; of two that belong together, the one with a page's facts."""
    return path.with_suffix(".json") if path.suffix == ".jsonl" else path


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines.

    Raises:
        ValueError: If there is no such file, or a line is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected this file, found nothing there.")
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: expected JSON, got something else ({error}).") from None


def _report(path: Path, report: dict[str, Any]) -> str:
    """With the training curve where the run's log lies beside the report, or where the report says the run is."""
    folders = (path.parent, Path(str(report.get("checkpoint"))))
    logs = [folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()]
    return render_report(report, _curve(logs[0]) if logs else [])


def _curve(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; a line that a killed run left half-written is no reason to have no page."""
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
        raise ValueError(f"{path}: expected {beside.name} beside it, which holds what the page shows. Make the graph again.")
    return render_graph(read_json(beside))


# The first kind whose entries a file has is its kind.
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
