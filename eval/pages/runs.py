"""Runs side by side as one self-contained HTML page: Pareto plots, and tables that can be sorted and filtered.

The script in it is the page's own, a few lines; nothing is fetched. The fragment of the address holds what is shown, so that
a view can be passed on: ``#q=topk l0<40&sort=fvu``.
"""

from html import escape
from typing import Any

from matplotlib.axes import Axes

from .charts import COLORS, NOTES, Column, look, seed_spread, swatch
from .document import document, encoder_parts
from .glossary import EXPLANATIONS
from .numbers import UNDEFINED, UNMEASURED, finite, show
from .plots import INK, figure_element, plain_log_ticks
from .recipes import CSS

Run = dict[str, Any]
COLUMNS = (
    Column("l0", "l0_mean", None),
    Column("fvu", "fvu", min),
    Column("ce increase", "ce_increase", min),
    Column("ce recovered", "ce_recovered_mean", max),
    Column("KL", "kl_spliced", min),
    Column("same top token", "top1_agreement", max),
    Column("dead", "dead_fraction", min),
    Column("dense", "dense_fraction", min),
    Column("nearest atom", "decoder_max_cosine_mean", None),
    Column("linear error", "linear_error_share", min),
)
SIZE = (430 / 72, 330 / 72)


def render_runs(comparison: dict[str, Any]) -> str:
    """One page of what ``collect_runs`` returned. Equal input gives equal bytes."""
    runs: list[Run] = comparison["runs"]
    order = sorted(range(len(runs)), key=lambda index: _rank(runs[index]))
    families = list(dict.fromkeys(family_of(run) for run in runs))
    shared = [_shared(runs, key) for key in ("model", "hook", "text", "tokens")]
    body = BODY.format(
        heading=f"{len(runs)} runs",
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in shared),
        warning="".join(_warning(key, values) for key, values in comparison["different"].items()),
        head="".join(
            f'<th scope="col" data-key="{column.key}"><button type="button">{escape(column.label)}</button></th>'
            for column in COLUMNS
        ),
        rows="".join(_row(runs[index], index, families, comparison["pareto"]) for index in order),
        plots="".join(
            figure_element(title, note, lambda ax, key=key: against_l0(ax, runs, families, comparison, key), SIZE, COLORS)
            for key, title, note in PLOTS
        ),
        columns="".join(f'<th scope="col">{escape(run["name"])}</th>' for run in runs),
        entries="".join(_entries(section, list(texts), runs) for section, texts in EXPLANATIONS.items()),
        notes="".join(
            f"<div><dt>{escape(column.label)}</dt><dd><code>{column.key}</code> {escape(_explanation(column.key))}</dd></div>"
            for column in COLUMNS
        ),
    )
    return document(f"sparsary comparison \u00b7 {len(runs)} runs", body, CSS + MORE_CSS, COLORS, SCRIPT)


def family_of(run: Run) -> str:
    """Runs that differ in a budget or a seed only, and are drawn alike."""
    report = run["report"]
    words = [encoder_parts(report.get("encoder"))[0], report.get("kind"), f"{show(report.get('n_latents'))} latents"]
    return " ".join(str(word) for word in words if word)


def against_l0(ax: Axes, runs: list[Run], families: list[str], comparison: dict[str, Any], key: str) -> str | None:
    """One point per run with its interval, a line through those of a family, and the Pareto front."""
    points = {
        index: (x, y)
        for index, run in enumerate(runs)
        if (x := finite(run["report"].get("l0_mean"))) is not None and (y := finite(run["report"].get(key))) is not None
    }
    if not points:
        return None
    for number, family in enumerate(families):
        color, marker = look(number)
        own = sorted((index for index in points if family_of(runs[index]) == family), key=lambda index: points[index])
        if own:
            ax.plot(*zip(*(points[index] for index in own), strict=True), color=color, linewidth=1, alpha=0.45)
        for place, index in enumerate(own):
            x, y = points[index]
            low, high = (finite(runs[index]["report"].get(f"{key}_{end}")) for end in ("low", "high"))
            if low is not None and high is not None:
                (line,) = ax.plot([x, x], [low, high], color=color, linewidth=1.4)
                line.set_gid(f"interval-{key}-{index}")
            dot = ax.scatter([x], [y], s=34, marker=marker, color=color, zorder=3, label=family if place == 0 else None)
            dot.set_gid(f"point-{key}-{index}")
    by_name = {run["name"]: index for index, run in enumerate(runs)}
    front = [points[by_name[name]] for name in comparison["pareto"][key]]
    ax.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, linestyle=":", label="Pareto front")
    for values, axis, name in (
        ([x for x, _ in points.values()], ax.xaxis, "x"),
        (_tall(points, runs, key), ax.yaxis, "y"),
    ):
        if seed_spread(values) > 4:
            getattr(ax, f"set_{name}scale")("log")
            plain_log_ticks(axis, seed_spread(values))
    ax.set(xlabel="l0", ylabel=_explained_label(key))
    ax.grid(visible=True)
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.3)
    words = ", ".join(
        f"{runs[index]['name']} {show(y, digits=3)} at l0 {show(x, digits=3)}" for index, (x, y) in points.items()
    )
    return f"{key} against l0: {words}. Not beaten in both: {', '.join(comparison['pareto'][key])}."


def _tall(points: dict[int, tuple[float, float]], runs: list[Run], key: str) -> list[float]:
    """Everything that is drawn along the second axis."""
    ends = (finite(runs[index]["report"].get(f"{key}_{end}")) for index in points for end in ("low", "high"))
    return [y for _, y in points.values()] + [end for end in ends if end is not None]


def _explained_label(key: str) -> str:
    return {"ce_increase": "ce increase, nats per token"}.get(key, key)


def _rank(run: Run) -> tuple[int, float]:
    """The best first: by what it costs the model, and behind those where that is not known by fvu."""
    costs = [finite(run["report"].get(key)) for key in ("ce_increase", "fvu")]
    return next(((place, cost) for place, cost in enumerate(costs) if cost is not None), (len(costs), 0.0))


def _shared(runs: list[Run], key: str) -> tuple[str, str]:
    values = list(dict.fromkeys(show(run["report"].get(key)) for run in runs))
    name = {"tokens": "evaluated on"}.get(key, key)
    return name, values[0] + " tokens" * (key == "tokens") if len(values) == 1 else f"{len(values)} different ones"


def _warning(key: str, values: dict[str, list[str]]) -> str:
    groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
    return f'<p class="warning">Not the same <code>{escape(key)}</code>: figures do not compare across. {escape(groups)}.</p>'


def _row(run: Run, index: int, families: list[str], fronts: dict[str, list[str]]) -> str:
    report = run["report"]
    name, arguments = encoder_parts(report.get("encoder"))
    words = [f"{name} {report.get('kind') or ''}".strip(), arguments, f"{show(report.get('n_latents'))} latents"]
    words += [f"{show(report['training_tokens'])} tokens"] if report.get("training_tokens") else []
    badge = ""
    if report.get("selection", "per token") != "per token":
        badge = f' <span class="badge">{escape(str(report["selection"]))}</span>'
    words = " \u00b7 ".join(word for word in words if word)
    cells = "".join(_cell(run, column.key, run["name"] in fronts.get(column.key, ())) for column in COLUMNS)
    return (
        f'<tr data-run="{index}"><th scope="row">{swatch(families.index(family_of(run)), False)}'
        f"<strong>{escape(run['name'])}</strong>{badge}"
        f'<div class="note">{escape(words)}</div></th>{cells}</tr>'
    )


def _cell(run: Run, key: str, on_front: bool) -> str:
    report = run["report"]
    value = finite(report.get(key))
    if value is None:
        reason = escape(run["reasons"].get(key, ""), quote=True)
        return f'<td data-value=""><span class="none" title="{reason}">{UNDEFINED if key in report else UNMEASURED}</span></td>'
    low, high = (finite(report.get(f"{key}_{end}")) for end in ("low", "high"))
    shown = show(value, digits=4)
    shown = f'<b class="best" title="on the Pareto front">{shown}</b>' if on_front else shown
    interval = "" if low is None or high is None else f"{show(low, digits=3)} to {show(high, digits=3)}"
    return f'<td data-value="{value!r}">{shown}<div class="note">{interval}</div></td>'


def _entries(section: str, keys: list[str], runs: list[Run]) -> str:
    """A section of the long table: every entry that is a number in some report."""
    rows = []
    for key in keys:
        values = [run["report"].get(key, UNMEASURED) for run in runs]
        if any(finite(value) is not None for value in values):
            cells = "".join(f"<td>{escape(show(value, digits=5))}</td>" for value in values)
            rows.append(f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>')
    head = f'<tr class="group"><th colspan="{len(runs) + 1}" scope="rowgroup">{escape(section)}</th></tr>'
    return f"<tbody>{head}{''.join(rows)}</tbody>" if rows else ""


def _explanation(key: str) -> str:
    return NOTES.get(key) or next(entries[key] for entries in EXPLANATIONS.values() if key in entries)


PLOTS = (
    ("fvu", "Reconstruction against sparsity", "Down and left is better. Bars: 95 % intervals over documents."),
    ("ce_increase", "Cost to the model against sparsity", "Down and left is better. Bars: 95 % intervals over documents."),
)
MORE_CSS = """
.find{display:flex;gap:10px;align-items:baseline;flex-wrap:wrap;padding-top:12px;margin:0 0 8px}
.find input{flex:1 1 260px;font:inherit;
padding:6px 9px;border:1px solid var(--rule);border-radius:6px;background:var(--page);color:var(--ink)}
.scroll thead button{all:unset;cursor:pointer;white-space:nowrap}
.scroll thead button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" \\2191"} th[aria-sort=descending] button::after{content:" \\2193"}
.warning{border-left:3px solid var(--warn);padding:4px 10px;margin:0 0 12px;font-size:13.5px;overflow-wrap:anywhere}
.scroll.all{margin-top:16px;padding-top:12px} [hidden]{display:none!important}
details summary{cursor:pointer;font-weight:600;font-size:15px;margin-bottom:8px}
.scroll .group th{padding-top:16px} .best{margin-right:0}
"""
BODY = """<header>
<p class="over">sparsary comparison</p>
<h1>{heading}</h1>
<dl>{facts}</dl>
</header>
{warning}<section class="entries scroll" aria-label="Runs">
<div class="find"><label for="find">Show</label>
<input id="find" type="search" placeholder="words, or l0&lt;40, fvu&gt;0.1" aria-describedby="shown">
<span id="shown" class="note" role="status"></span></div>
<table id="runs"><thead><tr><th scope="col" data-key="name"><button type="button">run</button></th>{head}</tr></thead>
<tbody>{rows}</tbody></table>
<p class="note">Small: 95 % intervals over documents. Shaded: on the Pareto front of its column against l0. A click on a column
sorts by it.</p>
</section>
<section class="plots" aria-label="Plots">{plots}</section>
<section class="entries scroll all" aria-label="All entries"><details><summary>Every figure of every run</summary>
<table><thead><tr><th scope="col">entry</th>{columns}</tr></thead>{entries}</table></details>
</section>
<section class="entries" aria-label="Columns">
<h2>What the columns say</h2>
<dl class="columns">{notes}</dl>
</section>
<footer><p>Intervals are about other documents of the same text, not about other seeds: two runs may differ by more than their
intervals and still be one recipe. Dead shares compare only over equal windows of tokens.</p></footer>
"""
SCRIPT = r"""
"use strict";
const table = document.getElementById("runs"), body = table.tBodies[0], find = document.getElementById("find");
const heads = [...table.tHead.rows[0].cells], keys = heads.map(head => head.dataset.key);
const names = new Map(heads.flatMap((head, at) =>
  [[head.dataset.key, at], [head.textContent.trim().toLowerCase().replaceAll(" ", "_"), at]]));
const value = (row, at) => at ? row.cells[at].dataset.value : row.cells[0].textContent.toLowerCase();
function sortBy(key, down) {
  const at = keys.indexOf(key);
  if (at < 0) return;
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => at ? a - b : a.localeCompare(b, undefined, {numeric: true});
  // What has no value stays at the end, whichever way.
  [...body.rows].map(row => [value(row, at), row]).sort(([a], [b]) =>
    (a === "") - (b === "") || (down ? -1 : 1) * order(a, b)).forEach(([, row]) => body.append(row));
}
function matches(row, word) {
  const limit = /^(\w+)([<>])(-?[\d.]+(?:e-?\d+)?)$/.exec(word);
  if (!limit || !names.get(limit[1])) return row.textContent.toLowerCase().includes(word);
  const held = row.cells[names.get(limit[1])].dataset.value;
  return held !== "" && (limit[2] === "<" ? +held < +limit[3] : +held > +limit[3]);
}
function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const gone = new Set();
  for (const row of body.rows) {
    row.hidden = !words.every(word => matches(row, word));
    if (row.hidden) gone.add(row.dataset.run);
  }
  for (const mark of document.querySelectorAll('svg [id^="point-"], svg [id^="interval-"]'))
    mark.style.display = gone.has(mark.id.split("-").pop()) ? "none" : "";
  document.getElementById("shown").textContent = gone.size ? `${body.rows.length - gone.size} of ${body.rows.length}` : "";
}
function remember() {
  const sorted = heads.find(head => head.hasAttribute("aria-sort")), view = new URLSearchParams();
  if (find.value) view.set("q", find.value);
  if (sorted) view.set("sort", (sorted.getAttribute("aria-sort") === "descending" ? "-" : "") + sorted.dataset.key);
  history.replaceState(null, "", "#" + view);
}
heads.forEach(head => head.firstElementChild.addEventListener("click", () => {
  sortBy(head.dataset.key, head.getAttribute("aria-sort") === "ascending");
  remember();
}));
find.addEventListener("input", () => { filter(); remember(); });
const view = new URLSearchParams(location.hash.slice(1)), by = view.get("sort") || "";
find.value = view.get("q") || "";
if (by) sortBy(by.replace(/^-/, ""), by.startsWith("-"));
filter();
"""
