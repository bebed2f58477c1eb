"""A circuit benchmark as one self-contained HTML page: curves, a table by family and method, and the circuits drawn.

The fragment of the address holds what is shown, so that a view can be passed on: ``#method=attribution&q=latents&sort=-cpr``.
"""

from html import escape
from typing import Any

from .charts import COLORS, Column
from .circuit_drawing import draw
from .circuit_glossary import EXPLANATIONS, explanation
from .circuit_plots import LEVEL, PANELS, family_labels, panel, sample
from .circuits_script import CSS, SCRIPT
from .document import document
from .numbers import UNDEFINED, UNMEASURED, UNRECORDED, finite, show

Row = dict[str, Any]


COLUMNS = (
    Column("CPR", "cpr", max),
    Column("CMD", "cmd", min),
    Column("nodes 50 %", "nodes_50", min),
    Column("nodes 80 %", "nodes_80", min),
    Column("nodes 90 %", "nodes_90", min),
    # Circuits of nearly all units leave nothing out, and few large units are each needed: no merit of the family.
    Column("completeness", "completeness", None),
    Column("minimality", "minimality", None),
    Column("stability", "stability", max),
    Column("r exact", "exact_pearson", max),
    Column("all kept", "faithfulness_all", None),
    # Scores drawn at random cost nothing: no merit.
    Column("passes", "forwards", None),
    Column("seconds", "seconds", None),
)
AUC = Column("AUC", "auc", max)
# Why a figure may be null.
REASONS = {
    "completeness": f"no circuit has faithfulness {LEVEL:g}",
    "minimality": f"no circuit has faithfulness {LEVEL:g}",
    "stability": f"no circuit has faithfulness {LEVEL:g}, or the method does not score pair by pair",
    "exact_pearson": "too few units differ in score or in effect",
}


def render_circuits(found: Row) -> str:
    """The page of what ``circuits.json`` holds. Equal input gives equal bytes."""
    rows: list[Row] = found["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    labels = family_labels(found)
    body = BODY.format(
        heading=escape(f"Circuits of {found['model']}"),
        shape=f"{_count(len(tasks), 'task')} \u00b7 {_count(len(labels), 'family of nodes', 'families of nodes')} \u00b7 "
        f"{_count(len(methods), 'method')}",
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in _facts(found).items()),
        dictionaries=_dictionaries(found),
        ways="".join(f'<a href="#task-{index}">{escape(task)}</a> ' for index, task in enumerate(tasks)),
        methods="".join(
            f'<label><input type="radio" name="method" value="{escape(method)}"{" checked" * (index == 0)}>'
            f"{escape(method)}</label>"
            for index, method in enumerate(methods)
        ),
        families="".join(
            f'<button type="button" aria-pressed="true" data-family="{index}" title="{escape(family)}">{sample(index)}'
            f"{escape(label)}</button>"
            for index, (family, label) in enumerate(labels.items())
        ),
        sections="".join(_section(found, task, index, methods, labels) for index, task in enumerate(tasks)) or NOTHING,
        known=_known(rows, tasks, labels),
        notes="".join(_notes(section, entries) for section, entries in EXPLANATIONS.items()),
    )
    return document(f"sparsary circuits \u00b7 {found['model']}", body, CSS, COLORS, SCRIPT)


def _facts(found: Row) -> dict[str, str]:
    return {
        "tasks": ", ".join(found["tasks"]),
        "ablation": show(found.get("ablation"), UNRECORDED),
        "corruption": show(found.get("corruption"), "the task's own"),
        "pairs": f"{show(found.get('pairs'), UNRECORDED)}, half to choose circuits, half to judge them",
        "seed": show(found.get("seed"), UNRECORDED),
    }


def _dictionaries(found: Row) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_count(len(hooks), 'hook')}: {escape(', '.join(hooks))}</dd></div>"
        for name, hooks in found["hooks"].items()
    )


def _section(found: Row, task: str, index: int, methods: list[str], labels: dict[str, str]) -> str:
    rows = [row for row in found["rows"] if row["task"] == task]
    families = list(labels)
    return SECTION.format(
        index=index,
        task=escape(task),
        tiles="".join(_tile(*tile) for tile in _tiles(rows, labels)),
        plots="".join(
            f'<div class="plots" data-method="{escape(method)}">'
            + "".join(panel(found, task, method, key, families) for key in PANELS)
            + "</div>"
            for method in methods
        ),
        table=_table(rows, task, labels),
        circuits=_circuits(found, task, index, methods, labels),
    )


def _tiles(rows: list[Row], labels: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Key, label, value and note of each key figure."""
    first = rows[0]
    metric = show(first.get("metric"), UNRECORDED)
    tiles = [
        ("accuracy", "accuracy", show(first.get("accuracy"), UNMEASURED, 3), "of clean prompts answered right"),
        ("metric_clean", "clean", show(first.get("metric_clean"), UNMEASURED, 3), f"{metric}, mean over pairs"),
        (
            "metric_corrupted",
            "corrupted",
            show(first.get("metric_corrupted"), UNMEASURED, 3),
            f"{metric}; corruption: {show(first.get('corruption'), UNRECORDED)}",
        ),
        ("pairs", "pairs", show(first.get("pairs"), UNMEASURED), "to judge circuits; others chose them"),
    ]
    for key, label, better in (("nodes_80", "smallest circuit of 0.8", min), ("cpr", "best CPR", max)):
        known = [(value, row) for row in rows if (value := finite(row.get(key))) is not None]
        value, note = UNDEFINED, "no circuit has it"
        if known:
            best, row = better(known, key=lambda pair: pair[0])
            value = show(int(best) if key == "nodes_80" else best, digits=3)
            note = f"{'nodes: ' * (key == 'nodes_80')}{labels[row['family']]}, {row['method']}"
        tiles.append((key, label, value, note))
    return tiles


def _tile(key: str, label: str, value: str, note: str) -> str:
    return (
        f'<div class="tile" data-key="{key}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _table(rows: list[Row], task: str, labels: dict[str, str]) -> str:
    best = {column.key: _best(rows, column) for column in COLUMNS}
    head = "".join(
        f'<th scope="col" data-key="{column.key}" title="{escape(explanation(column.key))}">'
        f'<button type="button">{escape(column.label)}</button></th>'
        for column in COLUMNS
    )
    body = "".join(_table_row(row, labels, best) for row in rows)
    return TABLE.format(task=escape(task), head=head, rows=body)


def _table_row(row: Row, labels: dict[str, str], best: dict[str, float | None]) -> str:
    if "refused" in row:
        cells = f'<td class="refused" colspan="{len(COLUMNS)}">{escape(row["refused"])}</td>'
    else:
        cells = "".join(_cell(row, column.key, best[column.key]) for column in COLUMNS)
    units = _count(row["units"], "unit") if "units" in row else ""
    return (
        f'<tr data-family="{list(labels).index(row["family"])}"><th scope="row">{_named(row["family"], labels)}'
        f'<div class="note">{units}</div></th><td class="method">{escape(row["method"])}</td>{cells}</tr>'
    )


def _named(family: str, labels: dict[str, str]) -> str:
    return f'{sample(list(labels).index(family))}<strong title="{escape(family)}">{escape(labels[family])}</strong>'


def _cell(row: Row, key: str, best: float | None) -> str:
    value = finite(row.get(key))
    if value is None:
        nothing = UNMEASURED if key not in row else "never" if key.startswith("nodes_") else "none"
        reason = f' title="{escape(REASONS[key])}"' if key in row and key in REASONS else ""
        return f'<td data-value=""><span class="none"{reason}>{nothing}</span></td>'
    shown = show(row[key], digits=3)
    shown = f'<b class="best" title="best of this task">{shown}</b>' if value == best else shown
    return f'<td data-value="{value!r}">{shown}<div class="note">{escape(_beside(row, key, value))}</div></td>'


def _beside(row: Row, key: str, value: float) -> str:
    """What stands below a figure in small print."""
    low, high = (finite(row.get(f"{key}_{end}")) for end in ("low", "high"))
    if low is not None and high is not None:
        return " to ".join(show(end, digits=3 if abs(end) >= 0.1 else 2) for end in (low, high))
    if key.startswith("nodes_") and row.get("units"):
        share = 100 * value / row["units"]
        return f"{share:.0f} %" if share >= 10 else f"{show(share, digits=2)} %"
    if key == "faithfulness_all":
        return f"empty {show(row.get('metric_empty'), UNMEASURED, 3)}"
    if key == "exact_pearson":
        return f"rank {show(row.get('exact_spearman'), digits=2)}"
    return f"+ {show(row.get('backwards'))} back" if key == "forwards" else ""


def _best(rows: list[Row], column: Column) -> float | None:
    values = [value for row in rows if (value := finite(row.get(column.key))) is not None]
    # Where all are equal none is better.
    return column.better(values) if column.better is not None and len(set(values)) > 1 else None


def _circuits(found: Row, task: str, index: int, methods: list[str], labels: dict[str, str]) -> str:
    """The circuits of each method, or that there is none."""
    parts = []
    for method in methods:
        own = [entry for entry in found["circuits"] if (entry["task"], entry["method"]) == (task, method)]
        figures = [
            _circuit(found, entry, f"{index}-{methods.index(method)}-{number}", labels) for number, entry in enumerate(own)
        ]
        nothing = f'<p class="none">{escape(task)}, {escape(method)}: no circuit to draw.</p>'
        parts.append(f'<div data-method="{escape(method)}">{"".join(figures) or nothing}</div>')
    return "".join(parts)


def _circuit(found: Row, entry: Row, identifier: str, labels: dict[str, str]) -> str:
    hooks = next((own for name, own in found["hooks"].items() if entry["family"].startswith(f"{name}: ")), [])
    sizes = [
        row.get("nodes_80") for row in found["rows"] if all(row[key] == entry[key] for key in ("task", "family", "method"))
    ]
    size, drawn = next(iter(sizes), None), len(entry["units"])
    which = f"The {drawn} of largest score" if size is not None and size > drawn else "All"
    note = (
        f"{which} of the {show(size, 'unrecorded')} units that have faithfulness {LEVEL:g}; rows are hooks, the first at the "
        f"bottom; shade: score. Lines: {explanation('weight').removeprefix('Edge: ')}"
    )
    title = f"Circuit \u00b7 {entry['task']} \u00b7 {entry['method']} \u00b7 {labels.get(entry['family'], entry['family'])}"
    return draw(entry, hooks, identifier, title, note)


def _known(rows: list[Row], tasks: list[str], labels: dict[str, str]) -> str:
    """How well scores find units that are known to do the task, where rows say so."""
    known = {(row["family"], row["method"], row["task"]): row for row in rows if "auc" in row}
    if not known:
        return ""
    shown = [task for task in tasks if any(place[2] == task for place in known)]
    best = {task: _best([row for place, row in known.items() if place[2] == task], AUC) for task in shown}
    lines = []
    for family, method in dict.fromkeys(place[:2] for place in known):
        cells = "".join(_cell(known.get((family, method, task), {}), "auc", best[task]) for task in shown)
        lines.append(
            f'<tr data-family="{list(labels).index(family)}"><th scope="row">{_named(family, labels)}</th>'
            f'<td class="method">{escape(method)}</td>{cells}</tr>'
        )
    head = "".join(
        f'<th scope="col" data-key="auc_{index}"><button type="button">{escape(task)}</button></th>'
        for index, task in enumerate(shown)
    )
    return KNOWN.format(head=head, rows="".join(lines), note=escape(explanation("auc")))


def _notes(section: str, entries: dict[str, str]) -> str:
    labels: dict[str, str] = {column.key: column.label for column in (*COLUMNS, AUC)}
    shown = "".join(
        f"<div><dt>{escape(labels.get(key, key.replace('_', ' ')))}</dt><dd><code>{key}</code> {escape(text)}</dd></div>"
        for key, text in entries.items()
    )
    return f'<h3>{escape(section)}</h3><dl class="columns">{shown}</dl>'


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


NOTHING = '<p class="none">Nothing was measured.</p>'
BODY = """<header>
<p class="over">sparsary circuits</p>
<h1>{heading}</h1>
<p class="shape">{shape}</p>
<dl>{facts}</dl>
<dl class="dictionaries">{dictionaries}</dl>
</header>
<form class="entries bar" aria-label="What is shown">
<div class="line"><span class="label" id="ways">Task</span><nav aria-labelledby="ways">{ways}</nav>
<fieldset><legend>Plots by</legend>{methods}</fieldset>
<span class="find"><label for="find">Rows</label><input id="find" type="search" placeholder="words, or cpr&gt;0.9"
aria-describedby="shown"><span id="shown" class="note" role="status"></span></span></div>
<div class="line families" role="group" aria-label="Families, in plots and tables">{families}</div>
</form>
{sections}{known}<section class="entries" aria-label="Explanations">
<h2>What the figures say</h2>
{notes}</section>
<footer><p>Intervals are about other pairs of the same task, not about other seeds of dictionaries. A family whose errors are
always kept begins with what errors carry, which random features, of large errors, have most of: read its faithfulness beside
that of the family whose errors are ablated. Sizes compare between families as counts of nodes, not as shares of them.</p>
</footer>
"""
SECTION = """<section class="task" id="task-{index}" aria-label="{task}">
<h2>{task}</h2>
<div class="tiles">{tiles}</div>
{plots}
{table}
{circuits}
</section>
"""
TABLE = """<div class="entries scroll" role="region" tabindex="0" aria-label="{task}: figures">
<table class="figures"><thead><tr><th scope="col" data-key="family"><button type="button">family</button></th>
<th scope="col" class="method" data-key="method"><button type="button">method</button></th>{head}</tr></thead>
<tbody>{rows}</tbody></table>
<p class="note">Shaded: the best of its column in this task. Small print: 95 % intervals over pairs, shares of all units, rank
correlation, the metric with every unit ablated, backward passes. A click on a column sorts by it.</p></div>
"""
KNOWN = """<section class="task" aria-label="Known circuits"><h2>Known circuits: AUC by task</h2>
<div class="entries scroll" role="region" tabindex="0" aria-label="AUC by task">
<table class="figures"><thead><tr><th scope="col" data-key="family"><button type="button">family</button></th>
<th scope="col" class="method" data-key="method"><button type="button">method</button></th>{head}</tr></thead>
<tbody>{rows}</tbody></table>
<p class="note">{note}</p></div></section>
"""
