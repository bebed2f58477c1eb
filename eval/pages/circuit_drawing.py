"""Layout of a circuit drawing: units in rows by hook, the first at the bottom, and the edges between them.

The page's script shows the details of a node on hover or keyboard focus; without scripts, title elements do.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...sae.files import natural_order
from .drawn_latents import DrawnLatent
from .numbers import show

Row = dict[str, Any]
# In CSS pixels at full width.
WIDTH, GUTTER, NODE_WIDTH, NODE_HEIGHT = 960, 132, 62, 34
STEP, LINE, BETWEEN = 68, 54, 76
PER_LINE = (WIDTH - GUTTER) // STEP - 1
SWEEPS = 8
# Number of edges drawn initially, and number of edges listed per node and direction.
SHOWN, LISTED = 60, 5
LONGEST_LABEL, LONGEST_TOKEN = 6, 9
# Outline of an error node: a hexagon of the nodes' size.
HEXAGON = " ".join(
    f"{x:g},{y:g}"
    for x, y in (
        *((-NODE_WIDTH / 2, 0), (7 - NODE_WIDTH / 2, -NODE_HEIGHT / 2), (NODE_WIDTH / 2 - 7, -NODE_HEIGHT / 2)),
        *((NODE_WIDTH / 2, 0), (NODE_WIDTH / 2 - 7, NODE_HEIGHT / 2), (7 - NODE_WIDTH / 2, NODE_HEIGHT / 2)),
    )
)
UNKNOWN = DrawnLatent([], "")
# Receiver of the edges that lead directly to the metric.
METRIC = "metric"


class Place(NamedTuple):
    """Center of a node, and the number of its row, counted from the bottom."""

    x: float
    y: float
    row: int


class DrawnEdge(NamedTuple):
    """An edge between two units: its curve, width, opacity, and weight as text."""

    sender: str
    receiver: str
    weight: str
    sign: str
    weak: bool
    path: str
    thick: str
    strength: str


class DrawnNode(NamedTuple):
    """A unit: position, style, and its strongest edges in and out as names and weights; ``corners`` is set for error nodes.

    Latents whose features are known have the tokens they fire on, the first of them as ``token``, and an address.
    """

    name: str
    label: str
    score: str
    words: str
    kind: str
    x: str
    y: str
    row: int
    corners: str
    opacity: str
    into: list[tuple[str, str]]
    out: list[tuple[str, str]]
    token: str = ""
    tokens: str = ""
    href: str = ""


class HookLabel(NamedTuple):
    """Label of a row: its shortened and its full name."""

    text: str
    group: str
    y: str


class CircuitDrawing(NamedTuple):
    """Contents of a circuit's figure, with edges in descending order of weight."""

    title: str
    note: str
    words: str
    identifier: str
    height: str
    labels: list[HookLabel]
    edges: list[DrawnEdge]
    nodes: list[DrawnNode]
    shown: int
    width: int = WIDTH
    node_width: int = NODE_WIDTH
    node_height: int = NODE_HEIGHT


def ordered_groups(circuit: Row, hooks: Sequence[str]) -> list[str]:
    """Return the groups of units in the order of ``hooks``; unlisted groups follow in natural order, the metric comes last."""
    known = {hook: place for place, hook in enumerate(hooks)}
    groups = dict.fromkeys(unit["group"] for unit in circuit["units"])
    return sorted(groups, key=lambda group: (group == METRIC, known.get(group, len(known)), natural_order(group)))


def layout(circuit: Row, groups: list[str]) -> tuple[dict[str, Place], float]:
    """Return the place of every unit by name, and the total height.

    Within a row, connected units are placed near each other; rows of many units take several lines.
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
            # Neighbors are placed on different lines, which leaves room for their edges.
            places[name] = Place(left + index * step, y + (index % n_lines) * LINE, number)
        y += (n_lines - 1) * LINE + NODE_HEIGHT / 2
    height = y + 8
    return {name: Place(at.x, height - at.y, at.row) for name, at in places.items()}, height


def with_metric(circuit: Row) -> Row:
    """Return the circuit with the metric added as a unit if any edge leads to it."""
    if all(edge["to"] != METRIC for edge in circuit["edges"]):
        return circuit
    return circuit | {"units": [*circuit["units"], {"name": METRIC, "group": METRIC, "score": None}]}


def draw_circuit(
    circuit: Row, hooks: Sequence[str], identifier: str, title: str, note: str, latents: Mapping[str, DrawnLatent]
) -> CircuitDrawing:
    """Lay out a circuit: node positions, edge curves, and the texts of the drawing and its table.

    ``latents`` says of units, by name, what is known of them.
    """
    circuit = with_metric(circuit)
    groups = ordered_groups(circuit, hooks)
    places, height = layout(circuit, groups)
    edges = sorted(circuit["edges"], key=lambda edge: -abs(edge["weight"]))
    edges = [edge for edge in edges if edge["from"] in places and edge["to"] in places]
    largest = max((abs(edge["weight"]) for edge in edges), default=0) or 1.0
    strongest = max((abs(unit["score"] or 0) for unit in circuit["units"]), default=0) or 1.0
    return CircuitDrawing(
        title,
        note,
        f"{title}: {len(places)} nodes in {len(groups)} rows, {len(edges)} edges. Listed in the table below.",
        identifier,
        f"{height:.0f}",
        [_label(group, number, places) for number, group in enumerate(groups) if group != METRIC],
        [_edge(edge, rank, places, largest) for rank, edge in enumerate(edges)],
        [_node(unit, places, strongest, edges, latents.get(unit["name"], UNKNOWN)) for unit in circuit["units"]],
        min(SHOWN, len(edges)),
    )


def short_name(unit: Row) -> str:
    """Return the text in the node: the latent's number, or the end of another unit's name."""
    end = str(unit["name"]).removeprefix(f"{unit['group']}/")
    return end if len(end) <= LONGEST_LABEL + 1 else end[:LONGEST_LABEL] + "\u2026"


def _short_token(token: str) -> str:
    text = token.strip() or token.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")
    if not any(map(str.isalnum, text)):
        return f"\u201c{text[: LONGEST_TOKEN - 2]}\u201d"
    return text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "\u2026"


def is_error(unit: Row) -> bool:
    """Return True if the unit is an error node."""
    return re.search(r"/error(@\d+)?$", unit["name"]) is not None


def _untangled(circuit: Row, groups: list[str]) -> list[list[str]]:
    """Return the units of every row, sorted by the mean position of their neighbors (barycenter heuristic)."""
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


def _label(group: str, number: int, places: dict[str, Place]) -> HookLabel:
    ys = [at.y for at in places.values() if at.row == number]
    words = re.sub(r"^transformer\.|^model\.", "", group)
    words = words if len(words) <= 20 else f"\u2026{words[-19:]}"
    return HookLabel(words, group, f"{(min(ys) + max(ys)) / 2 + 4:.1f}")


def _edge(edge: Row, rank: int, places: dict[str, Place], largest: float) -> DrawnEdge:
    start, end, share = places[edge["from"]], places[edge["to"]], abs(edge["weight"]) / largest
    y0, y1 = start.y - NODE_HEIGHT / 2, end.y + NODE_HEIGHT / 2
    bend = max(24.0, (y0 - y1) / 2)
    return DrawnEdge(
        edge["from"],
        edge["to"],
        signed(edge["weight"]),
        "plus" if edge["weight"] >= 0 else "minus",
        rank >= SHOWN,
        f"M{start.x:.1f} {y0:.1f}C{start.x:.1f} {y0 - bend:.1f} {end.x:.1f} {y1 + bend:.1f} {end.x:.1f} {y1:.1f}",
        f"{0.6 + 4.4 * math.sqrt(share):.2f}",
        f"{0.22 + 0.6 * share:.2f}",
    )


def _node(unit: Row, places: dict[str, Place], strongest: float, edges: list[Row], latent: DrawnLatent) -> DrawnNode:
    at, score, name = places[unit["name"]], unit["score"], unit["name"]
    said = "" if score is None else signed(score)
    kind = "output" if score is None else "plus" if score >= 0 else "minus"
    into, out = (
        [(edge[other], signed(edge["weight"])) for edge in edges if edge[own] == name][:LISTED]
        for own, other in (("to", "from"), ("from", "to"))
    )
    return DrawnNode(
        name,
        short_name(unit),
        said,
        f"{name}, score {said}" if said else name,
        f"{kind} error" if is_error(unit) else kind,
        f"{at.x:.1f}",
        f"{at.y:.1f}",
        at.row,
        HEXAGON if is_error(unit) else "",
        f"{0.08 + 0.42 * abs(score or 0) / strongest:.2f}",
        into,
        out,
        _short_token(latent.tokens[0]) if latent.tokens else "",
        " \u00b7 ".join(token.strip() or token for token in latent.tokens),
        latent.href,
    )


def signed(value: float) -> str:
    """Format a number with its sign, to three digits."""
    return ("+" if value >= 0 else "\u2212") + show(abs(float(value)), digits=3)
