"""The studies behind the documentation can be started, and what they found is kept one record to a line."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
STUDIES = [path for path in sorted((ROOT / "docs" / "studies").glob("*.py")) if "argparse" in path.read_text(encoding="utf-8")]
RESULTS = sorted(path for folder in ("docs", "tests/bench", "tests/parity") for path in (ROOT / folder / "results").glob("*"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_how_it_is_run(path, monkeypatch, capsys):
    # As Python does for a script: they import results.py, which stands beside them.
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"python docs/studies/{path.name}" in said
    assert f"usage: {path.name}" in said


@pytest.fixture
def lines():
    return runpy.run_path(str(ROOT / "docs" / "studies" / "results.py"))["lines"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_results_are_kept_one_record_to_a_line(path, lines):
    text = path.read_text(encoding="utf-8")
    assert text == "\n".join(lines(json.loads(text))) + "\n", f"{path}: as it should be: python docs/studies/results.py {path}"


def test_lines_of_results_are_the_results(lines):
    rows = [{"a": number, "sizes": [1, 2.5], "label": "x" * 300} for number in range(3)]
    value = {"about": "all", "rows": rows, "by": {"seed 0": {"more": rows, "none": []}}}
    found = list(lines(value))
    assert json.loads("\n".join(found)) == value
    assert [json.loads(line.strip().rstrip(",")) for line in found if line.strip().startswith('{"a"')] == rows + rows
    assert len(found) == 18


def test_a_sampled_text_does_not_depend_on_who_left_the_batch_and_goes_on(monkeypatch, tmp_path):
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    study = runpy.run_path(str(ROOT / "docs" / "studies" / "sample_text.py"))
    sample, found = study["sample_batch"], []
    for leave_at in (0.01, 2.0):
        monkeypatch.setitem(sample.__wrapped__.__globals__, "LEAVE_AT", leave_at)
        found.append(sample(model, 1, torch.tensor([1, 2]), batch=11, context=20, temperature=1.0, seed=3))
    assert found[0] == found[1]
    assert len({len(document) for document in found[0]}) > 3
    assert all(len(document) <= 19 and not {1, 2} & set(document) for document in found[0])
    path = tmp_path / "text.jsonl"
    line = b'{"text": "a", "tokens": 2}\n'
    assert study["written_batches"](path, 2) == (0, 0)
    path.write_bytes(5 * line + b'{"text": "cut')
    assert study["written_batches"](path, 2) == (2, 8)
    assert path.read_bytes() == 4 * line


def test_heads_are_polysemantic_if_their_latents_are_about_several_things(monkeypatch):
    """Planted: four heads of one topic each, and one whose latents are about two."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "studies")
    study = runpy.run_path(str(ROOT / "docs" / "studies" / "heads.py"))
    described, judged = study["described"], study["judged"]
    draw = torch.Generator().manual_seed(0)
    topics = torch.eye(6).repeat_interleave(7, 1) + 0.05
    of_item = torch.tensor([[0] * 10, [1] * 10, [2] * 10, [3] * 10, [4] * 5 + [5] * 5])
    # Heads, latents, parts of the documents, tokens.
    counts = torch.poisson(9 * topics[of_item][:, :, None].expand(-1, -1, 10, -1), generator=draw)
    counts[0, 0, 3] = 0
    whole = described(counts.sum(2))
    heads = torch.arange(5).repeat_interleave(10).numpy()
    same = torch.eye(50, dtype=torch.bool).numpy()
    parts = {"contexts": described(counts)}
    found = judged(dict.fromkeys(("contexts", "predictions", "places"), whole), parts, heads, same, 0)
    average = found["average"]
    assert average["polysemantic"] == dict.fromkeys(study["JUDGED"], [False] * 4 + [True])
    assert min(average["of_random"].values()) > 0.99
    assert average["of_one_latent"] == {"contexts": 0.0}
    # A chain of latents that are alike by chance connects the two topics: single linkage is lenient.
    assert found["single"]["polysemantic"]["contexts"][:4] == [False] * 4
