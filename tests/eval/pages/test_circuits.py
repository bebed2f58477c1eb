"""The page of a circuit benchmark: what it shows, what it leaves alone, and in a real browser what it lets one choose."""

import copy
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from sparsary.eval.pages.circuit_drawing import layout, ordered_groups
from sparsary.eval.pages.circuit_glossary import circuit_markdown, explanation
from sparsary.eval.pages.circuit_plots import family_labels, panel
from sparsary.eval.pages.circuits import COLUMNS, render_circuits
from sparsary.eval.pages.numbers import show_interval

EVIL = "</script><img src=x onerror=alert(1)>"
CHECKPOINT = "runs/circuits/topk/seed-0"
HOOKS = [f"transformer.h.{layer}:out" for layer in range(4)]
# Family -> units, size at which faithfulness is half, and where it ends.
FAMILIES = {
    f"{CHECKPOINT}: errors as nodes": (2052, 14, 1.0),
    f"{CHECKPOINT}: errors kept": (2048, 9, 1.0),
    f"{CHECKPOINT}: errors ablated": (2048, 22, 0.86),
    f"{CHECKPOINT}: random, errors kept": (2048, 240, 1.0),
    f"{CHECKPOINT}: random, errors ablated": (2048, 700, 0.31),
    "neurons": (512, 90, 1.0),
    "MLP neurons": (2048, 160, 1.0),
    "components": (20, 4, 1.0),
}
METHODS = {"attribution": 1.0, "relevance": 0.8, "random": 30.0}


def sample(tasks=("ioi", "greater-than")):
    """What circuits.json may hold, made up; the same every time."""
    rng = np.random.default_rng(0)
    found = {
        "schema_version": 1,
        "model": "embedded",
        "checkpoints": [CHECKPOINT],
        "hooks": {CHECKPOINT: HOOKS},
        "tasks": list(tasks),
        "methods": list(METHODS),
        "ablation": "resample",
        "corruption": None,
        "pairs": 100,
        "seed": 0,
        "rows": [],
        "curves": [],
        "circuits": [],
    }
    for task in tasks:
        for family, shape in FAMILIES.items():
            for method, slower in METHODS.items():
                add(found, task, family, method, shape, slower, rng)
    return found


def add(found, task, family, method, shape, slower, rng):
    units, half, end = shape
    about = {"task": task, "family": family, "method": method}
    row = about | {"corruption": "names", "metric": "logit_diff", "ablation": "resample", "units": units, "pairs": 100}
    row |= {
        "accuracy": 0.97,
        "metric_clean": 3.412,
        "metric_corrupted": -3.207,
        "metric_empty": -0.118,
        "faithfulness_all": end,
    }
    row |= {"forwards": 8 if method != "random" else 0, "backwards": 4 if method != "random" else 0, "seconds": 0.412}
    if task == "greater-than" and "random, errors ablated" in family:
        found["rows"].append(row | {"refused": "faithfulness: expected a task that the model performs, got noise."})
        return
    sizes = sorted({0, *(round(size) for size in np.geomspace(1, units, 4 * math.ceil(math.log10(units)) + 1))})
    x = np.array(sizes) / min(half * slower, units / 3)
    over = 0.12 * np.exp(-((np.log(np.maximum(x, 1e-3)) - 1.2) ** 2)) * (end == 1.0)
    values = end * x**1.6 / (1 + x**1.6) / (x[-1] ** 1.6 / (1 + x[-1] ** 1.6)) + over + rng.normal(0, 0.012, len(x)) * (x > 0)
    wide = (0.03 + 0.12 * x / (1 + x**2)) * (x > 0)
    reached = {
        level: next((size for size, v in zip(sizes, values, strict=True) if v >= level), None) for level in (0.5, 0.8, 0.9)
    }
    cpr = float(np.trapezoid(values, np.array(sizes) / units))
    row |= {"cpr": cpr, "cpr_low": cpr - 0.03, "cpr_high": cpr + 0.04}
    row |= {"cmd": abs(1 - cpr) + 0.01, "cmd_low": abs(1 - cpr), "cmd_high": abs(1 - cpr) + 0.03}
    row |= {f"nodes_{round(100 * level)}": size for level, size in reached.items()}
    known = reached[0.8] is not None
    row |= {"faithfulness_80": 0.79 if known else None}
    row |= {"completeness": 0.11 if known else None, "minimality": 0.021 if known else None}
    row |= {"stability": 0.83 if known and method == "attribution" else None}
    row |= {"exact_pearson": min(0.96, 0.86 / slower), "exact_spearman": min(0.93, 0.82 / slower)}
    found["rows"].append(row)
    curve = {"faithfulness": values, "low": values - wide, "high": values + wide, "completeness": 1 - values}
    found["curves"].append(about | {"sizes": sizes} | {key: [round(float(v), 6) for v in row] for key, row in curve.items()})
    if known and family.endswith("errors as nodes"):
        found["circuits"].append(about | circuit(rng))


def circuit(rng):
    units = [{"name": f"{hook}/{rng.integers(512)}", "group": hook} for hook in HOOKS for _ in range(9)]
    units = list({unit["name"]: unit for unit in units}.values())
    units += [{"name": f"{hook}/error", "group": hook} for hook in HOOKS[1:]]
    scores = sorted(rng.exponential(0.3, len(units)), reverse=True)
    units = [unit | {"score": float(score)} for unit, score in zip(units, scores, strict=True)]
    units[-1]["score"] = -0.2
    at = {unit["name"]: HOOKS.index(unit["group"]) for unit in units}
    pairs = [(a, b) for a in at for b in at if at[a] < at[b]]
    chosen = [pairs[i] for i in rng.choice(len(pairs), 150, replace=False)]
    chosen += [(name, "metric") for name in at if at[name] > 1]
    edges = [{"from": a, "to": b, "weight": float(rng.normal() ** 3 / 4)} for a, b in chosen]
    return {"units": units, "edges": edges}


@pytest.fixture(scope="module")
def found():
    return sample()


def without_curves(found):
    """The same without what takes long to draw."""
    return copy.deepcopy(found) | {"curves": []}


@pytest.fixture(scope="module")
def html(found):
    """Drawn for one method, so that fast tests stay fast."""
    return render_circuits(found | {"curves": [entry for entry in found["curves"] if entry["method"] == "attribution"]})


@pytest.fixture(scope="module")
def viewed(found):
    """Drawn for one task and the method that a browser is to show."""
    curves = [entry for entry in found["curves"] if (entry["task"], entry["method"]) == ("ioi", "relevance")]
    return render_circuits(found | {"curves": curves})


@pytest.fixture(scope="module")
def whole(found):
    return render_circuits(found)


def parts(html, pattern):
    return re.findall(pattern, html, flags=re.DOTALL)


def table(html, task):
    """Family and method -> cells of the table of a task."""
    (own,) = parts(html, rf'aria-label="{task}: figures">(.*?)</table>')
    found = {}
    for row in parts(own, r"<tr data-family.*?</tr>"):
        family, method = (
            re.search(r"<strong.*?>(.*?)</strong>", row).group(1),
            re.search(r'class="method">(.*?)<', row).group(1),
        )
        found[family, method] = parts(row, r"<td(?! class=\"method\").*?</td>")
    return found


def test_every_row_key_has_an_explanation_and_every_column_a_key(found):
    keys = {key for row in found["rows"] for key in row}
    assert keys - {"refused"}
    for key in keys | {column.key for column in COLUMNS} | {"auc"}:
        assert explanation(key).endswith("."), key
    with pytest.raises(KeyError, match="nodes_85"):
        explanation("nodes_85")
    assert "Low end" in explanation("cpr_low")


def test_the_documentation_has_the_page_s_texts(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "circuits.md").read_text()
    assert circuit_markdown() in text


def test_heading_and_key_figures(html):
    assert "<h1>Circuits of embedded</h1>" in html
    assert "2 tasks \u00b7 8 unit sets \u00b7 3 methods" in html
    assert "4 hooks: transformer.h.0:out" in html
    tiles = parts(html, r'<div class="tile" data-key="(\w+)">.*?<div class="value">(.*?)</div><div class="note">(.*?)</div>')
    assert len(tiles) == 12
    assert tiles[0][:2] == ("accuracy", "0.97")
    assert tiles[4] == ("nodes_80", "7", "nodes: components, attribution")


def test_cells_show_figures_intervals_and_what_is_missing(found, html):
    cells = dict(
        zip((column.key for column in COLUMNS), table(html, "ioi")["latents, errors ablated", "relevance"], strict=True)
    )
    row = next(row for row in found["rows"] if row["family"].endswith(": errors ablated") and row["method"] == "relevance")
    assert f'data-value="{row["cpr"]!r}"' in cells["cpr"]
    assert show_interval(row["cpr_low"], row["cpr_high"]) in cells["cpr"]
    assert row["nodes_90"] is None
    assert "never" in cells["nodes_90"]
    assert 'data-value=""' in cells["nodes_90"]
    assert "does not score pair by pair" in cells["stability"]
    assert "+4 back" in cells["forwards"]


def test_the_best_of_a_column_is_marked_once_per_task_and_equals_are_not(found, html):
    for task in ("ioi", "greater-than"):
        own = [row for row in found["rows"] if row["task"] == task and "cpr" in row]
        names = family_labels(found)
        for at, key, better in ((0, "cpr", max), (1, "cmd", min), (3, "nodes_80", min)):
            best = better(row[key] for row in own if row[key] is not None)
            expected = {(names[row["family"]], row["method"]) for row in own if row[key] == best}
            marked = {name for name, cells in table(html, task).items() if len(cells) > 1 and 'class="best"' in cells[at]}
            assert marked == expected
        # What is not a merit of the family, and what is 0.83 wherever it is known.
        assert not any('class="best"' in "".join(cells[5:8]) for cells in table(html, task).values() if len(cells) > 1)


def test_a_refused_row_says_why_and_its_curve_is_absent(html):
    cells = table(html, "greater-than")["random features, errors ablated", "random"]
    assert len(cells) == 1
    assert "performs, got noise." in cells[0]
    lines = parts(html, r'id="(line-faithfulness-greater.than-attribution-\d)"')
    assert lines == [f"line-faithfulness-greater.than-attribution-{index}" for index in range(8) if index != 4]


def test_plots_have_a_line_for_every_family_and_method(html):
    for key in ("faithfulness", "completeness"):
        assert len(set(parts(html, rf'id="line-{key}-ioi-attribution-(\d)"'))) == 8
    assert len(set(parts(html, r'id="band-faithfulness-ioi-attribution-(\d)"'))) == 8
    assert len(parts(html, r'<p class="none">not measured</p>')) == 2 * 2 * 2
    assert "components 0 at 0, " in html
    ids = parts(html, r' id="([^"]*)"')
    assert len(ids) == len(set(ids))


def test_values_far_off_are_cut_and_the_caption_says_so(found):
    changed = copy.deepcopy(found) | {"curves": copy.deepcopy(found["curves"][:1])}
    families = list(family_labels(found))
    assert "are cut off" not in panel(changed, "ioi", "attribution", "faithfulness", families).note
    changed["curves"][0]["faithfulness"][5] = 90.0
    card = panel(changed, "ioi", "attribution", "faithfulness", families)
    assert "are cut off" in card.note
    ticks = [float(tick) for tick in parts(str(card.drawing), r">(\d\.\d+)</text>")]
    assert 1.5 <= max(ticks) <= 1.75


def test_curves_may_hold_nothing():
    one = sample(("ioi",))
    one["curves"] = [entry | {"faithfulness": [None] * len(entry["sizes"])} for entry in one["curves"][:1]]
    html = render_circuits(one)
    assert html.count('<p class="none">not measured</p>') == 5
    one["rows"], one["curves"], one["circuits"] = [], [], []
    assert "Nothing was measured." in render_circuits(one)


def test_families_are_named_by_what_tells_checkpoints_apart():
    rows = [{"family": f"runs/a/{name}/seed-0: {kind}"} for name in ("topk", "pursuit") for kind in ("errors kept",)]
    rows += [{"family": "runs/a/topk/seed-0: random, errors kept"}, {"family": "neurons"}]
    checkpoints = ["runs/a/topk/seed-0", "runs/a/pursuit/seed-0"]
    labels = family_labels({"checkpoints": checkpoints, "rows": rows})
    assert list(labels.values()) == [
        "topk: latents, errors kept",
        "pursuit: latents, errors kept",
        "topk: random features, errors kept",
        "neurons",
    ]
    assert list(family_labels({"checkpoints": checkpoints[:1], "rows": rows[:1]}).values()) == ["latents, errors kept"]


def test_a_circuit_is_drawn_from_the_bottom_up_and_nothing_overlaps(found):
    drawn = found["circuits"][0]
    backwards = drawn | {"units": drawn["units"][::-1]}
    assert ordered_groups(backwards, HOOKS) == HOOKS
    assert ordered_groups({"units": [{"group": "h.10"}, {"group": "h.9"}]}, []) == ["h.9", "h.10"]
    places, height = layout(backwards, HOOKS)
    heights = [np.mean([places[unit["name"]].y for unit in drawn["units"] if unit["group"] == hook]) for hook in HOOKS]
    assert heights == sorted(heights, reverse=True)
    assert all(11 <= place.y <= height - 11 and 132 + 23 <= place.x <= 960 - 23 for place in places.values())


@pytest.mark.parametrize("n", [1, 14, 15, 40, 97])
def test_nodes_of_one_row_do_not_overlap(n):
    crowded = {"units": [{"name": f"h/{i}", "group": "h"} for i in range(n)], "edges": []}
    places = list(layout(crowded, ["h"])[0].values())
    for i, a in enumerate(places):
        assert all(abs(a.x - b.x) >= 46 or abs(a.y - b.y) >= 22 for b in places[:i])
        assert 132 + 23 <= a.x <= 960 - 23


def test_connected_nodes_stand_above_each_other():
    units = [{"name": f"h.{row}/{i}", "group": f"h.{row}"} for row in range(2) for i in range(5)]
    edges = [{"from": f"h.0/{i}", "to": f"h.1/{4 - i}", "weight": -1.0} for i in range(5)]
    places, _ = layout({"units": units, "edges": edges}, ["h.0", "h.1"])
    assert all(places[edge["from"]].x == pytest.approx(places[edge["to"]].x) for edge in edges)


def test_the_drawing_holds_every_unit_and_edge(found, html):
    drawn = found["circuits"][0]
    figure = parts(html, r'<figure class="circuit".*?</figure>')[0]
    assert figure.count('<g class="node ') == len(drawn["units"]) + 1
    assert figure.count('<path class="edge') == len(drawn["edges"])
    assert figure.count(" weak") == len(drawn["edges"]) - 60
    assert figure.count("<polygon") == 2 * 3
    strongest = max(drawn["edges"], key=lambda edge: abs(edge["weight"]))
    first = re.search(r'<path class="edge (\w+)".*?data-from="(.*?)" data-to="(.*?)"', figure)
    assert first.groups() == ("plus" if strongest["weight"] > 0 else "minus", strongest["from"], strongest["to"])
    assert 'data-name="metric" data-score=""' in figure
    assert "All of the 28 units" in figure


def test_areas_under_roc_have_a_table_where_rows_have_them(found, html):
    assert "Ground-truth circuits" not in html
    changed = without_curves(found)
    for index, row in enumerate(changed["rows"]):
        row["auc"] = 0.5 + index / 1000
    (own,) = parts(render_circuits(changed), r'aria-label="AUC by task">(.*?)</table>')
    assert own.count("<tr data-family") == 24
    assert own.count('class="best"') == 2


def test_equal_input_gives_equal_bytes_and_no_name_becomes_html():
    one = sample(("ioi",))
    one["curves"] = one["curves"][:1]
    text = json.dumps(one).replace(CHECKPOINT, EVIL).replace('"ioi"', json.dumps(EVIL)).replace("/error", "/" + EVIL)
    evil = json.loads(text)
    html = render_circuits(evil)
    assert html == render_circuits(json.loads(text))
    assert "<img" not in html
    # Nodes show the beginning of a name.
    assert "&lt;/scri\u2026" in html
    assert "</scri\u2026" not in html
    assert not parts(html, r"(src|href)\s*=\s*[\"']?(https?:|//)")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def browse(directory, html, fragment="", steps="", *arguments):
    """The document after ``steps`` of JavaScript, and what the browser's console said."""
    if steps:
        # A second script, which the page's own policy would not let run.
        html = re.sub(r"<meta http-equiv.*?>", "", html)
        html = html.replace("</body>", f"<script>document.title = JSON.stringify((() => {{ {steps} }})());</script></body>")
    file = directory / "circuits.html"
    file.write_text(html, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=2000"
    profile = f"--user-data-dir={directory / 'profile'}"
    command = [CHROMIUM, *quiet.split(), *more.split(), profile, "--dump-dom", *arguments, file.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def said(dom):
    text = re.search(r"<title>(.*?)</title>", dom, flags=re.DOTALL).group(1)
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def rows_shown(dom, task):
    own = re.search(rf'aria-label="{task}: figures">(.*?)</table>', dom, flags=re.DOTALL).group(1)
    rows = re.findall(r'<tr data-family="(\d)"([^>]*)>.*?class="method">(.*?)<', own, flags=re.DOTALL)
    return [(int(family), method) for family, attributes, method in rows if "hidden" not in attributes]


@needs_browser
def test_browser_restores_a_view(tmp_path, found, viewed):
    dom = browse(tmp_path, viewed, "#method=relevance&off=0.3&q=relevance+cpr%3E0.9&sort=-cpr")
    own = [row for row in found["rows"] if row["task"] == "ioi" and row["method"] == "relevance" and row["cpr"] > 0.9]
    families = list(FAMILIES)
    expected = [families.index(row["family"]) for row in sorted(own, key=lambda row: -row["cpr"])]
    assert rows_shown(dom, "ioi") == [(index, "relevance") for index in expected if index not in (0, 3)]
    assert len(rows_shown(dom, "ioi")) > 1
    shown = re.findall(r'<div(?: class="plots")? data-method="(\w+)"( hidden="")?>', dom)
    assert {method for method, hidden in shown if not hidden} == {"relevance"}
    assert len(shown) == 12
    lines = re.findall(r'<g id="line-faithfulness-ioi-relevance-(\d)"([^>]*)>', dom)
    assert [number for number, attributes in lines if "none" in attributes] == ["0", "3"]


@needs_browser
def test_browser_choosing_and_pointing(tmp_path, found, viewed):
    steps = """
    const found = {}, figure = all("figure.circuit")[0], nodes = all(".node", figure), edges = all(".edge", figure);
    radios[1].click(); found.view = location.hash; radios[0].click(); found.first = location.hash;
    chips[5].click(); found.off = location.hash;
    all('th[data-key="nodes_80"] button')[0].click();
    found.sorted = all('th[aria-sort="ascending"]').length;
    const table = all("table.sortable")[0], heads = [...table.tHead.rows[0].cells];
    const at = heads.findIndex(head => head.dataset.key === "nodes_80");
    const ends = () => [...table.tBodies[0].rows].slice(-1).concat(table.tBodies[0].rows[0])
      .map(row => row.cells[at].dataset.value);
    found.up80 = ends();
    all('th[data-key="nodes_80"] button')[0].click();
    found.down80 = ends();
    const node = nodes.find(n => n.dataset.row === "1" && edges.some(e => e.dataset.from === n.dataset.name));
    node.focus(); found.name = node.dataset.name;
    found.said = figure.querySelector(".detail").textContent;
    found.edges = all(".edge.on", figure).length;
    node.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp"}));
    found.up = document.activeElement.dataset.row;
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}));
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
    found.right = document.activeElement.dataset.row;
    found.stops = nodes.filter(n => n.getAttribute("tabindex") === "0").length;
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
    found.after = figure.querySelector(".detail").textContent.slice(0, 15);
    const slider = figure.querySelector("input"); slider.value = 7; slider.dispatchEvent(new Event("input"));
    found.drawn = all(".edge:not(.weak)", figure).length;
    return found;
    """
    result = said(browse(tmp_path, viewed, "", steps))
    edges = found["circuits"][0]["edges"]
    own = [edge for edge in edges if result["name"] in (edge["from"], edge["to"])]
    assert result["view"] == "#method=relevance"
    assert result["first"] == ""
    assert result["off"] == "#off=5"
    assert result["sorted"] == 2
    sizes = [row["nodes_80"] for row in found["rows"] if row["task"] == "ioi" and row.get("nodes_80")]
    # What has no value is at the end both ways.
    assert result["up80"] == ["", f"{float(min(sizes))!r}"]
    assert result["down80"] == ["", f"{float(max(sizes))!r}"]
    assert result["edges"] == len(own)
    assert result["said"].startswith(f"{result['name']}score ")
    strongest = max((edge for edge in own if edge["from"] == result["name"]), key=lambda edge: abs(edge["weight"]))
    assert f"strongest edges out{strongest['to']}" in result["said"]
    assert (result["up"], result["right"], result["stops"]) == ("2", "1", 1)
    assert result["after"] == "Point at a node"
    assert result["drawn"] == 7


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (420, "dark"), (1300, "light")])
def test_browser_needs_no_sideways_scrolling(tmp_path, whole, width, scheme):
    steps = "return [innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).color];"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    window, needed, ink = said(browse(tmp_path, whole, "", steps, f"--window-size={width},900", preferred))
    assert needed <= window <= max(500, width)
    assert ink == {"light": "rgb(31, 41, 55)", "dark": "rgb(229, 231, 235)"}[scheme]
