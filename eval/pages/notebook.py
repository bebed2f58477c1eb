"""Results as HTML for the output of a notebook cell: key figures, a table or example latents, and pages that fit in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ...sae.files import read_json, read_text
from . import attribution_graph, circuits, probing, recipes, report, runs, stack
from .circuit_plots import family_labels
from .document import ENVIRONMENT, TEMPLATES, encoder_label, encoder_parts, kind_label
from .examples import ExampleLatent, example_of, is_gapped, records_at_quantiles
from .links import NAVIGATION
from .numbers import UNDEFINED, show
from .tables import Column, FigureTile

Found = Mapping[str, Any]
# Rows of a table, and entries of a result without a form of its own.
SHOWN = 40
# Pages above this size are linked and not embedded: every display of one is stored in the notebook.
EMBEDDED_BYTES = 3_000_000
EMBEDDED_HEIGHT = 900


class CellOutput(NamedTuple):
    """Parts of a result's output: a heading, and those of tiles, table, example latents and embedded page that it has."""

    heading: str
    shape: str = ""
    tiles: Sequence[FigureTile] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    examples: Sequence[ExampleLatent] = ()
    embedded: bool = False


def cell_html(found: Found) -> str:
    """Return a result, as a command returns it, as HTML whose colors follow the notebook's."""
    form = next((form for entries, form in FORMS if entries <= found.keys()), _scalars)
    path = found.get("page_path") or found.get("report_path")
    return _rendered(form(found), None if path is None else Path(path), found.get("doubts") or ())


def latents_html(records: Iterable[dict[str, Any]]) -> str:
    """Return records of ``features.jsonl`` as HTML: the figures of every latent, and its strongest contexts."""
    examples = [example_of(record) for record in records]
    count = len(examples)
    return _rendered(CellOutput(f"{count} latent{'s' * (count != 1)}", examples=examples))


def _rendered(output: CellOutput, page: Path | None = None, doubts: Iterable[str] = ()) -> str:
    embedded = output.embedded and page is not None and page.is_file() and page.stat().st_size <= EMBEDDED_BYTES
    return ENVIRONMENT.get_template("notebook.html").render(
        output=output._replace(rows=output.rows[:SHOWN]),
        left_out=max(0, len(output.rows) - SHOWN),
        doubts="; ".join(doubts),
        gapped=is_gapped(token.text for example in output.examples for tokens in example.contexts for token in tokens),
        page=page,
        # Its links lead to files beside it, which are not beside the notebook.
        content=NAVIGATION.sub("", read_text(page)) if embedded and page is not None else "",
        height=EMBEDDED_HEIGHT,
        # A file of this package, which cannot close its element.
        style=Markup((TEMPLATES / "notebook.css").read_text(encoding="utf-8")),
    )


def _report(found: Found) -> CellOutput:
    name, arguments = encoder_parts(found.get("encoder"))
    shape = f"{show(found.get('d_in'))} \u2192 {show(found.get('n_latents'))} latents"
    words = (shape, arguments, found.get("hook"), f"{show(found.get('tokens'))} held-out tokens")
    heading = f"{name} {kind_label(found.get('kind'))}".strip()
    return CellOutput(heading, " \u00b7 ".join(filter(None, words)), report.report_tiles(dict(found)))


def _stack(found: Found) -> CellOutput:
    columns = [column for column in stack.stack_columns(dict(found)) if column.key in LAYER_FIGURES]
    rows = [
        [stack.short(hook), *(show(found[column.key][number], digits=3) for column in columns)]
        for number, hook in enumerate(found["layer_hooks"])
    ]
    shape = f"{show(found['n_latents'])} latents \u00b7 {show(found['tokens'])} held-out tokens"
    places = stack.places_word(dict(found))
    heading = f"{found['kind']}, {found['layers']} {places}"
    return CellOutput(heading, shape, stack.stack_tiles(dict(found)), [places[:-1], *_labels(columns)], rows)


LAYER_FIGURES = ("layer_fvu", "layer_l0", "layer_dead_fraction", "layer_ce_spliced", "layer_ce_mean", "layer_kl_spliced")


def _features(found: Found) -> CellOutput:
    records = Path(found["page_path"]).with_name("features.jsonl") if found.get("page_path") else Path()
    shape = f"{show(found['dead'])} fired nowhere \u00b7 {show(found['tokens'])} held-out tokens"
    examples = [example_of(record) for record in records_at_quantiles(records)] if records.is_file() else []
    return CellOutput(f"{show(found['n_latents'])} latents", shape, examples=examples)


def _circuits(found: Found) -> CellOutput:
    labels = family_labels(dict(found))
    columns = [column for column in circuits.COLUMNS if column.key in CIRCUIT_FIGURES]
    tasks = list(dict.fromkeys(row["task"] for row in found["rows"]))
    rows = []
    for row in found["rows"]:
        figures = [_figure(row, column.key) for column in columns]
        task = [row["task"]] if len(tasks) > 1 else []
        rows.append([*task, labels[row["family"]], row["method"], *figures, show(row.get("units"))])
    head = [*(["task"] if len(tasks) > 1 else []), "unit set", "method", *_labels(columns), "of"]
    return CellOutput(f"Circuits of {found['model']}", ", ".join(tasks), head=head, rows=rows, embedded=True)


CIRCUIT_FIGURES = ("cpr", "cmd", "nodes_50", "nodes_80", "exact_pearson")


def _figure(row: Found, key: str) -> str:
    return show(row.get(key), "never" if key.startswith("nodes_") and "refused" not in row else "-", 3)


def _graph(found: Found) -> CellOutput:
    source = Path(found["json_path"])
    data = source.with_name(f"{source.stem}-page.json")
    graph = read_json(data) if data.is_file() else {}
    tiles = attribution_graph.graph_tiles(graph) if graph else ()
    return CellOutput("attribution graph", str(graph.get("prompt", "")), tiles, embedded=True)


def _runs(found: Found) -> CellOutput:
    entries = [(run["name"], run["report"]) for run in found["runs"]]
    rows = [[name, *(show(entry.get(column.key), digits=3) for column in runs.COLUMNS)] for name, entry in entries]
    return CellOutput(f"{len(entries)} runs", head=["run", *_labels(runs.COLUMNS)], rows=rows)


def _recipes(found: Found) -> CellOutput:
    rows = []
    for family in found["families"]:
        means = ((family["figures"].get(column.key) or {}).get("mean") for column in recipes.COLUMNS)
        rows.append([family["name"], *(show(mean, UNDEFINED, 3) for mean in means)])
    return CellOutput(f"{len(rows)} run groups", head=["mean over seeds", *_labels(recipes.COLUMNS)], rows=rows)


def _probing(found: Found) -> CellOutput:
    shape = " \u00b7 ".join(filter(None, (encoder_label(found.get("encoder")), found.get("hook"))))
    table = probing.factor_families(dict(found))
    rows = [[label, *(cell.text for cell in cells)] for label, cells in table["rows"]]
    heading = f"Probing of {show(found['n_latents'])} latents"
    return CellOutput(heading, shape, probing.probing_tiles(dict(found)), ["kind", *_labels(table["columns"])], rows)


def _scalars(found: Found) -> CellOutput:
    shown = [(key, value) for key, value in found.items() if type(value) in (int, float, str)]
    return CellOutput("", head=["entry", "value"], rows=[[key, show(value)[:120]] for key, value in shown])


def _labels(columns: Iterable[Column]) -> list[str]:
    return [column.label for column in columns]


# The first form whose entries a result has wins.
FORMS: tuple[tuple[frozenset[str], Callable[[Found], CellOutput]], ...] = (
    (frozenset({"stack_report_version"}), _stack),
    (frozenset({"report_version", "n_latents"}), _report),
    (frozenset({"runs_version"}), _runs),
    (frozenset({"comparison_version"}), _recipes),
    (frozenset({"rows", "curves", "circuits"}), _circuits),
    (frozenset({"schema_version", "n_latents", "hooks_in", "dead"}), _features),
    (frozenset({"replacement_score", "json_path"}), _graph),
    (frozenset({"probing_version"}), _probing),
)
