"""Rendering of HTML pages from written result files alone, so that old results can be rendered again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from ...sae.files import read_json, require_crc32, write_text
from .attribution_graph import render_graph
from .circuit_comparison import render_circuit_comparison
from .circuits import render_circuits
from .diff import render_diff
from .drawn_latents import drawn_latents
from .examples import about_records, example_latents, features_files
from .features import render_features
from .links import enter_in_others, found_page, page_links, run_directories, with_links
from .names import render_names
from .probing import render_probing
from .recipes import render_recipes
from .report import render_report
from .runs import render_runs
from .select import render_select
from .similarity import render_similarity
from .stack import render_stack
from .steer import render_steer
from .vectors import render_vectors

# Entry of probing.json: CRC-32 of factors.jsonl.
FACTORS_DIGEST = "factors_crc32"
# Classes of the concept bottleneck beside probing.json, and the entry with their CRC-32.
CLASSES_FILE, CLASSES_DIGEST = "bottleneck.jsonl", "bottleneck_crc32"
# Suffix of the page's own data file: graph.json has the format of another project and lacks some of it.
GRAPH_PAGE = "-page"


class ResultKind(NamedTuple):
    """A kind of result: the entries that identify it, the command that writes it, the page's label, and its renderer.

    The renderer's first argument is the path of the JSON file, which names the page too.
    """

    entries: frozenset[str]
    command: str
    label: str
    render: Callable[[Path, dict[str, Any]], str]


def render_file(path: str | Path) -> Path:
    """Render a result file as an HTML page next to it (written atomically).

    Args:
        path: ``report.json`` (of a dictionary or a stack), ``comparison.json``, ``circuits.json``, ``circuit_comparison.json``,
            ``features.json`` or ``features.jsonl``, ``graph.json``, ``probing.json``, ``diff.json``,
            ``steer.json``, ``names.json``, ``select.json``, ``similarity.json``; other names work too.
            Related files of the run are read as well: its ``metrics.jsonl``, the files of features, a graph's
            ``graph-page.json``, probing's ``factors.jsonl``.

    The page links to the other pages of the run, which are made to link to it; a report beside new features is rendered again
    to show example latents.

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
        names = (
            "report.json, comparison.json, circuits.json, circuit_comparison.json, features.json, features.jsonl, graph.json, "
            "probing.json, diff.json, names.json, select.json, steer.json, similarity.json"
        )
        raise ValueError(f"{path}: expected the JSON of a command that writes a page ({names}), got other JSON.")
    try:
        text = kind.render(source, found)
    except (LookupError, TypeError, AttributeError) as error:
        message = f"{path}: expected what {kind.command} writes, got a file without some of it ({error!r}). Run it again."
        raise ValueError(message) from error
    page = source.with_name(source.stem.removesuffix(GRAPH_PAGE) + ".html")
    about = _graph_data(source) if kind.label == "graph" else found
    write_text(page, with_links(text, kind.label, page, about))
    enter_in_others(kind.label, page, about)
    if kind.label == "features":
        _refresh_report(page, found)
    return page


def _refresh_report(features: Path, about: dict[str, Any]) -> None:
    """Render the report of the features' dictionary again, now that there are latents to show."""
    for link in page_links("features", features, about):
        report = (features.parent / unquote(link.href)).with_suffix(".json")
        if link.label == "report" and report.is_file() and "n_latents" in read_json(report):
            render_file(report)


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
    """Render a report, with the training curve and example latents if their files are next to it or in the checkpoint."""
    folders = run_directories(path, report)
    logs = [folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()]
    files = features_files(folders, report.get("n_latents"))
    return render_report(report, _curve(logs[0]) if logs else [], example_latents(files, path) if files else [])


def _curve(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, skipping one that a killed run left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _graph_data(path: Path) -> dict[str, Any]:
    """Return the content of ``graph-page.json``, which is ``path`` or beside it."""
    beside = path if path.stem.endswith(GRAPH_PAGE) else path.with_name(f"{path.stem}{GRAPH_PAGE}.json")
    if not beside.is_file():
        raise ValueError(f"{path}: expected {beside.name} beside it, which holds the page's data. Recompute the graph.")
    return read_json(beside)


def _features(path: Path, found: dict[str, Any]) -> str:
    """Render the records of latents beside their description."""
    records = path.with_suffix(".jsonl")
    if records.is_file():
        about_records(records)
    return render_features(found, _lines(records))


def _probing(path: Path, found: dict[str, Any]) -> str:
    """Render probing results, with the rows of every factor if their file is there."""
    rows = path.with_name("factors.jsonl")
    if rows.is_file():
        require_crc32(rows, found.get(FACTORS_DIGEST), path.name)
    classes = path.with_name(CLASSES_FILE)
    if classes.is_file() and CLASSES_DIGEST in found:
        require_crc32(classes, found[CLASSES_DIGEST], path.name)
    concepts = list(_lines(classes)) if classes.is_file() and CLASSES_DIGEST in found else []
    features = found_page(str(found.get("checkpoint")), "features", path)
    return render_probing(found, list(_lines(rows)) if rows.is_file() else [], features, concepts)


def _names(path: Path, found: dict[str, Any]) -> str:
    """Render names of latents, which link to the checkpoint's page of features."""
    return render_names(found, found_page(str(found.get("checkpoint")), "features", path))


def _select(path: Path, found: dict[str, Any]) -> str:
    """Render a selection; its latents link to the checkpoint's page of features."""
    return render_select(found, found_page(str(found.get("checkpoint")), "features", path))


def _steer(path: Path, found: dict[str, Any]) -> str:
    """Render contrast steering, with links of its latents to the features page of the checkpoint."""
    return render_steer(found, found_page(str(found.get("checkpoint")), "features", path))


def _circuits(path: Path, found: dict[str, Any]) -> str:
    """Render circuits, with the top tokens of their latents from the files of features of the checkpoints."""
    return render_circuits(found, drawn_latents(path, found))


def _reports(path: Path) -> Callable[[str], str | None]:
    """Return the function from a run's directory to the address of its report."""
    return lambda directory: found_page(directory, "report", path)


# The first kind whose entries a file has wins.
KINDS = (
    ResultKind(frozenset({"stack_report_version"}), "sparsary eval", "report", lambda path, found: render_stack(found)),
    ResultKind(frozenset({"report_version"}), "sparsary eval", "report", _report),
    ResultKind(
        frozenset({"runs_version"}),
        "sparsary compare",
        "comparison",
        lambda path, found: render_runs(found, _reports(path)),
    ),
    ResultKind(
        frozenset({"comparison_version"}),
        "sparsary compare",
        "comparison",
        lambda path, found: render_recipes(found, _reports(path)),
    ),
    ResultKind(
        frozenset({"circuit_comparison_version"}),
        "sparsary circuits --compare",
        "circuit comparison",
        lambda path, found: render_circuit_comparison(found),
    ),
    ResultKind(frozenset({"rows", "curves", "circuits"}), "sparsary circuits", "circuits", _circuits),
    ResultKind(
        frozenset({"schema_version", "n_latents", "hooks_in", "sampled_tokens"}),
        "sparsary features",
        "features",
        _features,
    ),
    ResultKind(
        frozenset({"vectors_schema_version", "n_latents"}),
        "sparsary features",
        "features",
        lambda path, found: render_vectors(found, _lines(path.with_suffix(".jsonl"))),
    ),
    ResultKind(
        frozenset({"metadata", "qParams", "nodes", "links"}),
        "sparsary circuits --prompt",
        "graph",
        lambda path, found: render_graph(_graph_data(path)),
    ),
    ResultKind(
        frozenset({"page_version", "nodes", "edges"}),
        "sparsary circuits --prompt",
        "graph",
        lambda path, found: render_graph(found),
    ),
    ResultKind(frozenset({"diff_version"}), "sparsary diff", "diff", lambda path, found: render_diff(found)),
    ResultKind(
        frozenset({"similarity_version"}),
        "sparsary similarity",
        "similarity",
        lambda path, found: render_similarity(found, _reports(path)),
    ),
    ResultKind(frozenset({"steer_version"}), "sparsary steer", "steer", _steer),
    ResultKind(frozenset({"names_version"}), "sparsary name", "names", _names),
    ResultKind(frozenset({"select_version"}), "sparsary select", "select", _select),
    ResultKind(frozenset({"probing_version"}), "sparsary probe", "probing", _probing),
)
