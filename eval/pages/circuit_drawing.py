"""A circuit as a drawing: units in rows by hook, the first at the bottom, and what passes from one to another.

The page's script shows what is known of a node that is pointed at or reached by keys; without it titles do.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from ...sae.files import natural_order
from .numbers import show

Row = dict[str, Any]
# All in CSS pixels at full width.
WIDTH, GUTTER, NODE_WIDTH, NODE_HEIGHT = 960, 132, 46, 22
STEP, LINE, BETWEEN = 52, 42, 76
PER_LINE = (WIDTH - GUTTER) // STEP - 1
SWEEPS = 8
# Edges drawn at first, and how many of its edges are listed for a node.
SHOWN, LISTED = 60, 5
LONGEST_LABEL = 6
# The receiver of what passes directly to the metric.
METRIC = "metric"


class Place(NamedTuple):
    """The middle of a node, and which row it is in, the first at the bottom."""

    x: float
    y: float
    row: int


def ordered_groups(circuit: Row, hooks: Sequence[str]) -> list[str]:
    """Groups of the circuit's units as the model runs through them; those whose hook is not listed by the numbers in them."""
    known = {hook: place for place, hook in enumerate(hooks)}
    groups = dict.fromkeys(unit["group"] for unit in circuit["units"])
    return sorted(groups, key=lambda group: (group == METRIC, known.get(group, len(known)), natural_order(group)))


def layout(circuit: Row, groups: list[str]) -> tuple[dict[str, Place], float]:
    """Name -> place of every unit, and the height of it all.

    Within a row units stand near those they are connected with; rows of many units take several lines.
    """
    rows = _untangled(circuit, groups)
    places, y = {}, 0.0
    for number, names in enumerate(rows):
        n_lines = max(1, math.ceil(len(names) / PER_LINE))
        room = WIDTH - GUTTER - NODE_WIDTH - 2
        step = min(room / max(len(names) - 1, 1), 1.6 * STEP)
        left = (WIDTH + GUTTER - step * (len(names) - 1)) / 2
        y += NODE_HEIGHT / 2 + (BETWEEN if number else 8)
        for index, name in enumerate(names):
            # Neighbours on different lines: each has room, and its edges a way past the others.
            places[name] = Place(left + index * step, y + (index % n_lines) * LINE, number)
        y += (n_lines - 1) * LINE + NODE_HEIGHT / 2
    height = y + 8
    return {name: Place(at.x, height - at.y, at.row) for name, at in places.items()}, height


def with_metric(circuit: Row) -> Row:
    """The circuit with the metric as a unit above the others, where edges lead to it."""
    if all(edge["to"] != METRIC for edge in circuit["edges"]):
        return circuit
    return circuit | {"units": [*circuit["units"], {"name": METRIC, "group": METRIC, "score": None}]}


def draw(circuit: Row, hooks: Sequence[str], identifier: str, title: str, note: str) -> str:
    """The figure: drawing, slider for edges, room for what is known of a node, and all of it as a table."""
    circuit = with_metric(circuit)
    groups = ordered_groups(circuit, hooks)
    places, height = layout(circuit, groups)
    edges = sorted(circuit["edges"], key=lambda edge: -abs(edge["weight"]))
    edges = [edge for edge in edges if edge["from"] in places and edge["to"] in places]
    largest = max((abs(edge["weight"]) for edge in edges), default=0) or 1.0
    strongest = max((abs(unit["score"] or 0) for unit in circuit["units"]), default=0) or 1.0
    lines = "".join(_edge(edge, rank, places, largest) for rank, edge in enumerate(edges))
    nodes = "".join(_node(unit, places, strongest, first=index == 0) for index, unit in enumerate(circuit["units"]))
    return FIGURE.format(
        title=escape(title),
        note=escape(note),
        identifier=identifier,
        words=escape(f"{title}: {len(places)} nodes in {len(groups)} rows, {len(edges)} edges. Listed in the table below."),
        view=f"0 0 {WIDTH} {height:.0f}",
        labels="".join(_label(group, number, places) for number, group in enumerate(groups) if group != METRIC),
        edges=lines,
        nodes=nodes,
        n_edges=len(edges),
        shown=min(SHOWN, len(edges)),
        rows="".join(_table_row(unit, edges) for unit in circuit["units"]),
    )


def short_name(unit: Row) -> str:
    """What stands in the node: the latent's number, or the end of another unit's name."""
    end = str(unit["name"]).removeprefix(f"{unit['group']}/")
    return end if len(end) <= LONGEST_LABEL + 1 else end[:LONGEST_LABEL] + "\u2026"


def is_error(unit: Row) -> bool:
    """Whether the unit is what a dictionary leaves unexplained."""
    return re.search(r"/error(@\d+)?$", unit["name"]) is not None


def _untangled(circuit: Row, groups: list[str]) -> list[list[str]]:
    """Units of every row, each near the mean place of its neighbours (the barycentre heuristic)."""
    rows = [[unit["name"] for unit in circuit["units"] if unit["group"] == group] for group in groups]
    at = {name: _share(index, row) for row in rows for index, name in enumerate(row)}
    near: dict[str, list[tuple[str, float]]] = {name: [] for name in at}
    for edge in circuit["edges"]:
        if edge["from"] in at and edge["to"] in at:
            near[edge["from"]].append((edge["to"], abs(edge["weight"])))
            near[edge["to"]].append((edge["from"], abs(edge["weight"])))
    for sweep in range(SWEEPS):
        for row in rows[:: 1 if sweep % 2 == 0 else -1]:
            row.sort(key=lambda name: _mean_place(name, near, at))
            at |= {name: _share(index, row) for index, name in enumerate(row)}
    return rows


def _share(index: int, row: list[str]) -> float:
    return (index + 0.5) / len(row)


def _mean_place(name: str, near: dict[str, list[tuple[str, float]]], at: dict[str, float]) -> float:
    total = sum(weight for _, weight in near[name])
    return sum(at[other] * weight for other, weight in near[name]) / total if total else at[name]


def _label(group: str, number: int, places: dict[str, Place]) -> str:
    ys = [at.y for at in places.values() if at.row == number]
    words = re.sub(r"^transformer\.|^model\.", "", group)
    words = words if len(words) <= 20 else f"\u2026{words[-19:]}"
    return (
        f'<text class="hook" x="0" y="{(min(ys) + max(ys)) / 2 + 4:.1f}">{escape(words)}<title>{escape(group)}</title></text>'
    )


def _edge(edge: Row, rank: int, places: dict[str, Place], largest: float) -> str:
    start, end, share = places[edge["from"]], places[edge["to"]], abs(edge["weight"]) / largest
    y0, y1 = start.y - NODE_HEIGHT / 2, end.y + NODE_HEIGHT / 2
    bend = max(24.0, (y0 - y1) / 2)
    path = f"M{start.x:.1f} {y0:.1f}C{start.x:.1f} {y0 - bend:.1f} {end.x:.1f} {y1 + bend:.1f} {end.x:.1f} {y1:.1f}"
    words = f"{edge['from']} \u2192 {edge['to']}: {signed(edge['weight'])}"
    sign = "plus" if edge["weight"] >= 0 else "minus"
    hidden = " weak" if rank >= SHOWN else ""
    return (
        f'<path class="edge {sign}{hidden}" d="{path}" style="stroke-width:{0.6 + 4.4 * math.sqrt(share):.2f};'
        f'--strength:{0.22 + 0.6 * share:.2f}" data-from="{escape(edge["from"])}" data-to="{escape(edge["to"])}" '
        f'data-weight="{signed(edge["weight"])}"><title>{escape(words)}</title></path>'
    )


def _node(unit: Row, places: dict[str, Place], strongest: float, first: bool) -> str:
    at, score = places[unit["name"]], unit["score"]
    said = "" if score is None else signed(score)
    left, top, w, h = -NODE_WIDTH / 2, -NODE_HEIGHT / 2, NODE_WIDTH, NODE_HEIGHT
    if is_error(unit):
        corners = ((left, 0), (left + 7, top), (-left - 7, top), (-left, 0), (-left - 7, -top), (left + 7, -top))
        shape = '<polygon class="{}" points="' + " ".join(f"{x:g},{y:g}" for x, y in corners) + '"{}/>'
    else:
        shape = f'<rect class="{{}}" x="{left:g}" y="{top:g}" width="{w:g}" height="{h:g}" rx="6"{{}}/>'
    kind = " output" if score is None else " plus" if score >= 0 else " minus"
    kind += " error" * is_error(unit)
    words = f"{unit['name']}, score {said}" if said else unit["name"]
    fill = f' style="fill-opacity:{0.08 + 0.42 * abs(score or 0) / strongest:.2f}"'
    return (
        f'<g class="node{kind}" transform="translate({at.x:.1f} {at.y:.1f})" role="button" '
        f'tabindex="{0 if first else -1}" aria-label="{escape(words)}" data-name="{escape(unit["name"])}" '
        f'data-score="{said}" data-row="{at.row}" data-x="{at.x:.1f}"><title>{escape(words)}</title>'
        f"{shape.format('back', '')}{shape.format('mark', fill)}"
        f'<text y="4">{escape(short_name(unit))}</text></g>'
    )


def _table_row(unit: Row, edges: list[Row]) -> str:
    sides = []
    for own, other in (("to", "from"), ("from", "to")):
        strongest = [edge for edge in edges if edge[own] == unit["name"]][:LISTED]
        sides.append("<br>".join(f"{escape(edge[other])} {signed(edge['weight'])}" for edge in strongest) or "none drawn")
    return (
        f'<tr><th scope="row">{escape(unit["name"])}</th><td>{"" if unit["score"] is None else signed(unit["score"])}</td>'
        f"<td>{sides[0]}</td><td>{sides[1]}</td></tr>"
    )


def signed(value: float) -> str:
    """A number with its sign, to three digits."""
    return ("+" if value >= 0 else "\u2212") + show(abs(float(value)), digits=3)


FIGURE = """<figure class="circuit" aria-label="{title}"><h2>{title}</h2>
<p class="controls"><label for="edges-{identifier}">Strongest edges</label>
<input type="range" id="edges-{identifier}" min="0" max="{n_edges}" value="{shown}">
<output for="edges-{identifier}">{shown} of {n_edges}</output>
<span class="key"><i class="plus"></i>raises the metric <i class="minus"></i>lowers it
<i class="dashed"></i>dictionary error</span></p>
<div class="pair"><div class="canvas"><svg role="group" aria-label="{words}" viewBox="{view}">
<g class="hooks">{labels}</g><g class="edges">{edges}</g><g class="nodes">{nodes}</g></svg></div>
<aside class="detail" aria-live="polite"><p class="note">Point at a node, or reach the drawing by Tab and move by arrow keys:
its score and strongest edges show here.</p></aside></div>
<figcaption>{note}</figcaption>
<details><summary>As a table</summary><div class="scroll"><table><thead><tr><th scope="col">unit</th><th scope="col">score</th>
<th scope="col">strongest edges in</th><th scope="col">strongest edges out</th></tr></thead><tbody>{rows}</tbody></table></div>
</details></figure>
"""
