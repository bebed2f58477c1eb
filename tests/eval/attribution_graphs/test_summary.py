"""The attribution graph's figures on the terminal."""

import re

import pytest

import sparsary
from sparsary.eval.attribution_graphs import run
from sparsary.eval.attribution_graphs.summary import graph_summary, graph_tables
from sparsary.training.console import print_fields, print_table

FACTS = {
    "positions": 11,
    "n_nodes": 123,
    "n_edges": 4567,
    "n_nodes_all": 12345,
    "n_edges_all": 234567,
    "latents_left_out": 12,
    "left_out_share": 0.012345678901234567,
    "replacement_score": 0.7123456789012345,
    "completeness_score": 0.9123456789012345,
    "error_shares": [0.1234567890123456, 1.234567890123456e-05],
    "kl_last": 0.0123456789012345,
    "kl_mean": 0.2345678901234567,
    "top1_last": True,
    "top1_share": 0.9090909090909091,
    **{f"{kind}_spearman_{place}": 0.9876543210987654 for kind in ("direct", "total") for place in ("norms", "patterns")},
    "direct_spearman_model": 0.5432109876543211,
    "total_spearman_model": None,
}


def test_the_command_prints_tables_and_short_numbers(monkeypatch, capsys):
    def graph(checkpoint, prompt, out, options, attention, levels):
        assert (checkpoint, prompt, attention, levels) == ("runs/stack", "A prompt", True, (4, 16))
        levels = {"circuit_size": 9, "circuit_faithfulness": 0.91234567, "circuit_passes": 120, "circuit_flat_passes": 1000}
        return FACTS | levels | {"json_path": "graph/graph.json", "page_path": "graph/graph.html"}

    monkeypatch.setattr(run, "attribution_graph", graph)
    monkeypatch.setattr("sys.argv", [*"sparsary circuits runs/stack --attention --levels 4,16 --prompt".split(), "A prompt"])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in (
        r"nodes +123 shown of 12,345",
        r"scores +replacement 0\.7123   completeness 0\.9123",
        r"same top token: yes at the last, 90\.9% of all",
        r"circuit +9 latents at faithfulness 0\.9123   120 passes, 1,000 without levels",
        r"left out +12 latents, with 1\.23% of the influence",
        r"layer +error influence \(share\)\n0 +0\.1235\n1 +1\.235e-05\n",
        r"measured +patterns and norms frozen +patterns frozen +nothing frozen\n",
        r"direct +0\.9877 +0\.9877 +0\.5432\n",
        r"total +0\.9877 +0\.9877 +undefined\n",
        r"results: graph/graph\.json\npage: graph/graph\.html\n",
    ):
        assert re.search(words, printed), words
    assert not re.search(r"\d\.\d{7}|[{}]", printed)


def test_markup_in_a_value_is_printed_as_it_is(capsys):
    print_fields([("[bold]", "[/x] y")])
    print_table(["a"], [["[red]"]])
    assert capsys.readouterr().out.split() == ["[bold]", "[/x]", "y", "a", "[red]"]


def test_nothing_left_out_is_not_mentioned():
    assert [name for name, _ in graph_summary(FACTS | {"latents_left_out": 0})][-1] == "replacement model"
    assert [head[0] for head, _ in graph_tables(FACTS)] == ["layer", "effect: Spearman, predicted and measured"]
