"""Files of a graph: the form that circuit-tracer's front end reads, and the page."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsary.eval.attribution_graphs.attention import CarriedEdge, ExplainedScore, GraphAttention
from sparsary.eval.attribution_graphs.attention_scores import ScorePlace
from sparsary.eval.attribution_graphs.edge_heads import HeadPart
from sparsary.eval.attribution_graphs.export import GraphLabels, as_json, cantor, write_graph
from sparsary.eval.attribution_graphs.graph import AttributionGraph, GraphNode, Target
from sparsary.eval.attribution_graphs.labels import LabelledWindow, Note
from sparsary.eval.attribution_graphs.levels import GraphLevel, LevelSearch
from sparsary.eval.attribution_graphs.local_replacement_model import Active
from sparsary.eval.attribution_graphs.page_data import page_data
from sparsary.eval.attribution_graphs.run import save_graph
from sparsary.eval.pages.attribution_graph import render_graph
from sparsary.eval.pages.render import render_file

GOLDEN = Path(__file__).parents[2] / "golden" / "attribution_graph.json"
EVIL = "</script><img src=x onerror=alert(1)>"


def small_graph():
    """Two layers, two positions; a latent each, one of them in the graph's upper layer twice as far up."""
    active = Active(
        torch.tensor([0, 1, 1]),
        torch.tensor([1, 1, 1]),
        torch.tensor([7, 3, 4]),
        torch.tensor([1.5, 0.5, 0.25]),
        torch.zeros(3),
    )
    # Latents 0 to 2, errors 3 to 6 (layer by layer), tokens 7 and 8, logits 9 and 10.
    adjacency = torch.zeros(11, 11)
    adjacency[0, 7], adjacency[0, 8] = 0.5, 1.0
    adjacency[1, 0], adjacency[1, 4], adjacency[1, 8] = 1.0, -0.5, 0.5
    adjacency[2, 8] = 0.001
    adjacency[9, 1], adjacency[9, 0], adjacency[9, 6] = 2.0, -1.0, 1.0
    adjacency[10, 1], adjacency[10, 2] = -1.0, 0.001
    constants = torch.zeros(11)
    return AttributionGraph(
        torch.tensor([5, 6]),
        2,
        active,
        (Target(8, None, 0.6, 0.6), Target(2, None, 0.3, 0.3)),
        adjacency,
        constants,
        torch.zeros(11),
        adjacency.sum(1),
        1,
        0,
        0.0,
    )


def labels():
    window = LabelledWindow(("a", " cat", EVIL), (0.0, 1.5, 0.75), 1)
    notes = {(0, 7): Note("animals", (window,), (" dog", EVIL), (" tree",), 1.5, 0.01), (1, 3): Note()}
    return GraphLabels("tiny", "runs/<b>", "a " + EVIL, ["a", EVIL], [" yes", " no"], notes)


def exported():
    graph = small_graph()
    return as_json(graph, graph.prune(), labels(), 0.8, 0.98)


def test_the_file_is_as_it_was_when_it_was_checked_against_circuit_tracer():
    """Values of one small graph; tests/parity/test_graph.py has circuit-tracer itself read such files."""
    assert json.loads(json.dumps(exported())) == json.loads(GOLDEN.read_text())["graph"]


def test_every_node_and_link_has_the_entries_the_front_end_reads():
    values = exported()
    assert set(values) == {"metadata", "qParams", "nodes", "links"}
    assert set(values["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    for key in ("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version"):
        assert key in values["metadata"]
    entries = "node_id feature layer ctx_idx feature_type token_prob is_target_logit run_idx reverse_ctx_idx jsNodeId clerp "
    assert all(set(node) == set((entries + "influence activation").split()) for node in values["nodes"])
    ids = [node["node_id"] for node in values["nodes"]]
    assert len(ids) == len(set(ids))
    assert all(set(link) == {"source", "target", "weight"} for link in values["links"])
    assert {link[end] for link in values["links"] for end in ("source", "target")} <= set(ids)
    kinds = [node["feature_type"] for node in values["nodes"]]
    assert kinds.count("embedding") == 2
    assert kinds.count("logit") == 2
    assert [node["is_target_logit"] for node in values["nodes"] if node["feature_type"] == "logit"] == [True, False]
    # The weakest latent is not worth a node.
    assert "1_4_1" not in ids
    assert ids[0] == "0_7_1"
    assert values["nodes"][0]["feature"] == cantor(0, 7) == 35
    weights = {(link["source"], link["target"]): link["weight"] for link in values["links"]}
    assert weights["1_3_1", "3_8_1"] == 2.0
    assert weights["0_7_1", "3_8_1"] == -1.0


def test_cantor_numbers_tell_all_pairs_apart():
    numbers = [cantor(layer, latent) for layer in range(12) for latent in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert cantor(3, 5) == 41


def test_files_of_latents_and_the_index_are_written_beside_it(tmp_path):
    values = exported()
    write_graph(tmp_path, values, labels().notes)
    assert json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"] == [values["metadata"]]
    latent = json.loads((tmp_path / "features" / "35.json").read_text())
    [example] = latent["examples_quantiles"][0]["examples"]
    assert example["tokens"] == ["a", " cat", EVIL]
    assert example["tokens_acts_list"] == [0.0, 1.5, 0.75]
    assert (latent["act_max"], latent["top_logits"]) == (1.5, [" dog", EVIL])


def test_a_graph_without_labels_is_saved_by_numbers(tmp_path):
    graph = replace(small_graph(), targets=(Target(8, 9, 0.6, 0.6), Target(2, None, 0.3, 0.3)))
    save_graph(graph, tmp_path)
    values = json.loads((tmp_path / "graph.json").read_text())
    assert values["metadata"]["prompt_tokens"] == ["5", "6"]
    assert any(node["clerp"] == 'Output "8 \u2212 9" (p=0.600)' for node in values["nodes"])
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "sparsary attribution graph" in page
    (tmp_path / "graph.html").unlink()
    for name in ("graph.json", "graph-page.json"):
        assert render_file(tmp_path / name) == tmp_path / "graph.html"
        assert (tmp_path / "graph.html").read_text(encoding="utf-8") == page
    (tmp_path / "graph-page.json").unlink()
    with pytest.raises(ValueError, match=r"graph.json: expected graph-page.json beside it"):
        render_file(tmp_path / "graph.json")


@pytest.fixture(scope="module")
def html():
    graph = small_graph()
    return render_graph(page_data(graph, graph.prune(), labels(), {"kl_last": 0.25}))


def test_the_page_says_how_much_is_shown(html):
    graph = small_graph()
    pruned = graph.prune()
    assert f"{int(pruned.nodes.sum())} of 11" in html
    assert f"{int(pruned.edges.sum())} of {int((graph.adjacency != 0).sum())}" in html
    assert "0.25" in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))
    assert data == json.loads(json.dumps(page_data(graph, pruned, labels(), {"kl_last": 0.25})))
    sizes = [edge[4] for edge in data["edges"]]
    assert sizes == sorted(sizes, reverse=True)
    left = replace(graph, n_left_out=12, left_out_share=0.125)
    assert "12 unexpanded latents" in render_graph(page_data(left, pruned, labels()))


def test_nothing_is_fetched_and_no_token_becomes_html(html):
    assert EVIL not in html
    assert "runs/<b>" not in html
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    graph = small_graph()
    assert render_graph(page_data(graph, graph.prune(), labels(), {"kl_last": 0.25})) == html


def small_attention():
    """The token before reaches the lower latent through a head, which asks for it."""
    edges = {pair: CarriedEdge(1.0, ()) for pair in map(tuple, small_graph().adjacency.nonzero().tolist())}
    edges[0, 7] = CarriedEdge(0.0, (HeadPart(0, 1, 0, 0.5),))
    terms = ((GraphNode("token", 1, index=6), GraphNode("token", 0, index=5), 3.0), (None, GraphNode("error", 0, 0), -0.5))
    return GraphAttention(edges, (ExplainedScore(ScorePlace(0, 1, 1, 0), 0.25, 0.75, 2.25, 50.0, terms, -0.25),))


def small_levels():
    coarse = GraphLevel(
        torch.tensor([0, 0, 1]), torch.tensor([0.9, 0.1]), torch.tensor([1.0, 0.25]), torch.tensor([True, False])
    )
    fine = GraphLevel(
        torch.tensor([0, 1, 2]),
        torch.tensor([0.5, 0.4, 0.1]),
        torch.tensor([0.75, 0.5, torch.nan]),
        torch.tensor([True, True, False]),
    )
    return LevelSearch((coarse, fine), torch.tensor([True, True, False]), 0.97, 11, 12)


def test_heads_scores_and_levels_are_in_the_file():
    graph = small_graph()
    values = as_json(graph, graph.prune(), labels(), 0.8, 0.98, small_attention(), small_levels())
    links = {(link["source"], link["target"]): link for link in values["links"]}
    assert links["E_5_0", "0_7_1"]["heads"] == [{"layer": 0, "head": 1, "key": 0, "weight": 0.5}]
    assert all({"direct", "heads"} <= set(link) for link in values["links"])
    [score] = values["attention_scores"]
    assert (score["layer"], score["head"], score["query"], score["key"], score["cap"]) == (0, 1, 1, 0, 50.0)
    assert score["terms"] == [{"query": "E_6_1", "key": "E_5_0", "value": 3.0}, {"query": None, "key": "0_-1_0", "value": -0.5}]
    found = values["levels"]
    assert (found["passes"], found["flat_passes"], found["circuit"]) == (11, 12, ["0_7_1", "1_3_1"])
    assert [[cluster["nodes"] for cluster in level] for level in found["levels"]] == [
        [["0_7_1", "1_3_1"], ["1_4_1"]],
        [["0_7_1"], ["1_3_1"], ["1_4_1"]],
    ]
    assert [cluster["effect"] for cluster in found["levels"][1]] == [0.75, 0.5, None]
    # The weakest latent is not shown, and neither is its cluster.
    assert values["qParams"]["supernodes"] == [["cluster 0", "0_7_1", "1_3_1"]]
    json.dumps(values, allow_nan=False)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = """
const found = {}, press = key => svg.dispatchEvent(new KeyboardEvent('keydown', {key}));
found.first = document.body.dataset.shown;
press('ArrowRight'); found.best = document.body.dataset.shown;
press('ArrowDown'); found.below = document.body.dataset.shown;
found.detail = $('detail').textContent;
found.drawn = wires.childElementCount;
press('Escape'); found.none = document.body.dataset.shown;
const before = view.k; press('+'); found.zoomed = view.k > before; press('0'); found.fitted = view.k === before;
$('search').value = 'animals'; search(); found.matches = [...matches].map(name);
found.images = document.images.length; found.wide = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify(found);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("width", [1300, 500])
def test_the_browser_walks_the_graph_by_keyboard(tmp_path, html, width):
    found = browsed(tmp_path, html, STEPS, width)
    assert found["first"] == found["none"] == ""
    assert found["best"].startswith("logit of")
    assert found["below"].startswith("latent 1/3")
    assert "Inputs" in found["detail"]
    assert found["drawn"] >= 4
    assert found["matches"] == [f"latent 0/7 \u00b7 \u201c{EVIL}\u201d 1"]
    assert (found["zoomed"], found["fitted"], found["images"], found["wide"]) == (True, True, 0, True)


LEVEL_STEPS = """
const found = {}, press = key => svg.dispatchEvent(new KeyboardEvent('keydown', {key})), text = () => $('detail').textContent;
found.overview = text();
const buttons = [...$('detail').querySelectorAll('.levels button')];
found.buttons = buttons.map(button => button.textContent);
buttons.find(button => button.textContent.startsWith('cluster 1: 1 latents, opened')).click();
found.marked = [...matches].map(node => node.layer + '/' + node.index); found.shown = document.body.dataset.shown;
select(nodes.find(node => node.kind === 'latent' && node.layer === 0));
found.latent = text();
found.images = document.images.length; found.wide = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify(found);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_browser_shows_heads_scores_and_levels(tmp_path):
    graph = small_graph()
    html = render_graph(page_data(graph, graph.prune(), labels(), None, small_attention(), small_levels()))
    found = browsed(tmp_path, html, LEVEL_STEPS, 1300)
    assert "circuit of 2 latents" in found["overview"]
    assert "11 passes, 12 without levels" in found["overview"]
    assert "Level of 2 clusters" in found["overview"]
    assert "Level of 3 clusters" in found["overview"]
    assert found["buttons"] == [
        "circuit of 2 latents",
        "cluster 0: 2 latents, opened",
        "cluster 1: 1 latents",
        "cluster 0: 1 latents, opened",
        "cluster 1: 1 latents, opened",
        "cluster 2: 1 latents",
    ]
    assert (found["marked"], found["shown"]) == (["1/3"], "cluster 1: 1 latents, opened")
    assert "through head 0.1 at \u201ca\u201d 0 +0.5" in found["latent"]
    assert f"head 0.1 \u00b7 \u201c{EVIL}\u201d 1 to \u201ca\u201d 0" in found["latent"]
    assert "score, before a soft cap at 50" in found["latent"]
    assert "query: constantkey: error of layer 0" in found["latent"]
    assert (found["images"], found["wide"]) == (0, True)


def browsed(tmp_path, html, steps, width):
    """Return the page's title, as its script sets it in a browser."""
    page = re.sub(r"<meta http-equiv.*?>", "", html).replace("</body>", f"<script>{steps}</script></body>")
    (tmp_path / "graph.html").write_text(page, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
    command = [CHROMIUM, *quiet.split(), f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", (tmp_path / "graph.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S).group(1).replace("&lt;", "<").replace("&gt;", ">")
    return json.loads(title.replace("&amp;", "&"))
