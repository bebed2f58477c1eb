"""Results in a notebook: what each kind shows, that nothing in it becomes HTML, and that pages are embedded where they work."""

import json
import re

import pytest

from sparsary.eval.pages.notebook import EMBEDDED_BYTES, SHOWN
from sparsary.eval.result import Features, Report

EVIL = "</script><img src=x onerror=alert(1)>"
REPORT = {
    "report_version": 1,
    "kind": "sae",
    "encoder": '{"name": "topk", "k": 5}',
    "n_latents": 131,
    "d_in": 17,
    "hook": f"h.0:out{EVIL}",
    "tokens": 20_011,
    "fvu": 0.18524672,
    "fvu_low": 0.18,
    "fvu_high": 0.19,
    "l0_mean": 5.0,
    "doubts": [f"wrong hook {EVIL}"],
    "report_path": "runs/topk/report.html",
}
LATENT = {
    "latent": 0,
    "density": 0.1,
    "max_activation": 2.0,
    "top": [{"tokens": ["the", EVIL, "sat"], "activations": [0.0, 2.0, 0.5], "peak": 1, "document": 3}],
    "top_tokens": [{"token": EVIL, "share": 0.9}],
    "details": {},
    "explanation": None,
}
ABOUT = {"schema_version": 1, "n_latents": 7, "hooks_in": ["h.0:out"], "dead": 1, "tokens": 20_011}
CIRCUITS = {
    "model": "embedded",
    "checkpoints": ["runs/topk"],
    "rows": [
        {"task": "ioi", "family": "runs/topk: errors kept", "method": "attribution", "units": 96, "cpr": 0.91, "cmd": 0.1}
        | {"nodes_50": 4, "nodes_80": None, "exact_pearson": None},
        {"task": "ioi", "family": "neurons", "method": "attribution", "units": 128, "refused": "no signal"},
    ],
    "curves": [],
    "circuits": [],
}


def cells(html):
    """Return the texts of a table's cells, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def safe(html):
    return "<img" not in html and "<script" not in html


def test_a_report_shows_its_key_figures_and_doubts():
    html = Report(REPORT)._repr_html_()
    assert "<strong>topk SAE</strong>" in html
    assert "20,011 held-out tokens" in html
    tiles = dict(
        re.findall(r'<div class="note">(?:<abbr [^>]*>)?([\w ]+)(?:</abbr>)?</div><div class="value">(.*?)</div>', html)
    )
    assert tiles["fvu"] == "0.1852"
    assert tiles["KL"] == "not measured"
    assert "0.18\u20130.19" in html
    assert "wrong hook" in html
    assert "runs/topk/report.html" in html
    assert safe(html)


def test_features_show_latents_and_single_ones_are_found(tmp_path):
    records = [LATENT | {"latent": latent, "density": latent / 20} for latent in range(7)]
    file = tmp_path / "features.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    features = Features(ABOUT | {"page_path": str(tmp_path / "features.html")}, file)
    html = features._repr_html_()
    assert "<strong>7 latents</strong>" in html
    # Without latent 0, which never fires; five quantiles of the other six.
    assert re.findall(r"latent (\d+)</h3>", html) == ["1", "2", "4", "5", "6"]
    assert safe(html)
    some = features.records_of([3, 0])
    assert [record["latent"] for record in some] == [3, 0]
    assert re.findall(r"latent (\d+)</h3>", some._repr_html_()) == ["3", "0"]
    assert 'class="peak"' in some._repr_html_()
    assert features.records_of(6)[0]["density"] == 0.3
    with pytest.raises(ValueError, match="latents: expected 0 to 6, got 7"):
        features.records_of([7])
    assert Features(ABOUT)._repr_html_().count("<h3>") == 0


def test_circuits_are_a_table_with_the_page_below(tmp_path):
    page = tmp_path / "circuits.html"
    page.write_text(f'<!DOCTYPE html><nav class="pages"><a href="report.html">report</a></nav><p title="a">{EVIL}</p>')
    html = Report(CIRCUITS | {"page_path": str(page)})._repr_html_()
    head, *rows = cells(html)
    assert head == ["unit set", "method", "CPR", "CMD", "nodes 50%", "nodes 80%", "r exact", "of"]
    assert rows == [
        ["latents, errors kept", "attribution", "0.91", "0.1", "4", "never", "-", "96"],
        ["neurons", "attribution", "-", "-", "-", "-", "-", "128"],
    ]
    assert "<iframe" in html
    # Nothing lies beside the notebook.
    assert "report.html" not in html
    # The page is an attribute's text: it runs in a frame of its own.
    assert 'srcdoc="&lt;!DOCTYPE html&gt;' in html
    assert safe(html)
    page.write_text(" " * (EMBEDDED_BYTES + 1))
    assert "<iframe" not in Report(CIRCUITS | {"page_path": str(page)})._repr_html_()


def test_a_graph_shows_its_scores_and_the_page(tmp_path):
    data = {"prompt": "a b", "nodes": [1, 2], "edges": [3], "n_nodes_all": 5, "n_edges_all": 7, "kl_last": None}
    data |= {"replacement_score": 0.83, "completeness_score": 0.95, "latents_left_out": 0}
    (tmp_path / "graph-page.json").write_text(json.dumps(data))
    (tmp_path / "graph.html").write_text("<!DOCTYPE html>")
    paths = {"json_path": str(tmp_path / "graph.json"), "page_path": str(tmp_path / "graph.html")}
    html = Report({"replacement_score": 0.83} | paths)._repr_html_()
    assert '<div class="value">0.83</div>' in html
    assert '<div class="value">2 of 5</div>' in html
    assert "<iframe" in html


def test_probing_shows_kinds_of_factors():
    found = {"probing_version": 1, "n_latents": 96, "hook": "h.0:out", "encoder": '{"name": "topk", "k": 5}'}
    found |= {"factors_count": 9, "factors_latent_f1": 0.5, "factors_probe_f1": 0.8, "factors_role_count": 4}
    found |= {f"factors_role_{key}_f1": 0.1 for key in ("latent", "probe", "neuron", "dimension")}
    html = Report(found)._repr_html_()
    assert cells(html)[0][:3] == ["kind", "factors", "best latent"]
    assert cells(html)[1][:3] == ["role", "4", "0.1"]
    assert "a linear probe has 0.8" in html


def test_comparisons_are_tables():
    run = {"name": "runs/a", "report": {"l0_mean": 5.0, "fvu": 0.25}}
    head, row = cells(Report({"runs_version": 1, "runs": [run]})._repr_html_())
    assert dict(zip(head, row, strict=True))["fvu"] == "0.25"
    family = {"name": "topk", "figures": {"fvu": {"mean": 0.125}}}
    head, row = cells(Report({"comparison_version": 2, "families": [family]})._repr_html_())
    assert dict(zip(head, row, strict=True))["fvu"] == "0.125"


def test_a_stack_has_a_row_for_every_layer():
    layers = {f"layer_{key}": [0.25, 0.5] for key in ("fvu", "l0", "dead_fraction", "ce_spliced", "ce_mean", "kl_spliced")}
    totals = ("fvu_layer_mean", "l0_total", "ce_increase", "ce_recovered_mean", "ce_recovered_zero", "kl_spliced")
    found = {"stack_report_version": 1, "kind": "transcoder", "layers": 2, "n_latents": 9, "tokens": 5} | layers
    found |= dict.fromkeys((*totals, "top1_agreement", "dead_fraction", "ce_clean"), 0.5) | {"dead_window_tokens": 5}
    found |= {"layer_hooks": ["h.0.mlp:in -> h.0.mlp:out", "h.1.mlp:in -> h.1.mlp:out"]}
    rows = cells(Report(found)._repr_html_())
    assert rows[0][:2] == ["layer", "fvu"]
    assert [row[:2] for row in rows[1:]] == [["h.0.mlp", "0.25"], ["h.1.mlp", "0.5"]]


def test_other_results_are_their_scalars_and_long_tables_are_cut():
    html = Report({"fvu": 0.123456, "name": EVIL, "nested": {"a": 1}})._repr_html_()
    assert cells(html)[1:] == [["fvu", "0.1235"], ["name", "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;"]]
    many = Report({f"entry {number}": number for number in range(SHOWN + 3)})._repr_html_()
    assert len(cells(many)) == 1 + SHOWN
    assert "3 more rows" in many
