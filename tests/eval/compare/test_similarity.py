"""Dictionaries whose common and own latents are planted: what is matched, and what stitching calls novel."""

import json
import logging
import sys

import pytest
import torch

import sparsary
from sparsary import SAE
from sparsary.eval.compare import stitching
from sparsary.eval.compare.similarity import similarity_table
from sparsary.eval.compare.stitching import match_latents, random_cosines, stitch
from sparsary.sae.encoders.relu import ReLU

WIDTH, FEATURES = 12, 12


def planted(latents, angle=0.0, seed=0):
    """A dictionary of the features (orthonormal), which fire alone; turned by an angle towards another feature."""
    axes = torch.eye(WIDTH)[list(latents)]
    turned = axes * torch.cos(torch.tensor(angle)) + axes.roll(1, 1) * torch.sin(torch.tensor(angle))
    order = torch.randperm(len(axes), generator=torch.Generator().manual_seed(seed))
    dictionary = SAE(WIDTH, len(axes), ReLU())
    with torch.no_grad():
        dictionary.W_dec.copy_(turned[order])
        dictionary.W_enc.copy_(turned[order])
    return dictionary.eval()


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(1)
    return torch.rand(400, FEATURES, generator=draw) * (torch.rand(400, FEATURES, generator=draw) < 0.3)


def test_latents_are_matched_whatever_their_order(rows):
    a, b = planted(range(12)), planted(range(12), angle=0.3, seed=5)
    found = match_latents(a.W_dec, b.W_dec)
    assert found.cosines == pytest.approx(torch.tensor(0.3).cos().repeat(12).numpy(), abs=1e-6)
    ours, theirs = found.partners
    assert (a.W_dec[ours] * b.W_dec[theirs]).sum(-1).tolist() == pytest.approx(found.cosines.tolist())
    small = match_latents(planted(range(5)).W_dec, a.W_dec)
    assert (len(small.cosines), small.cosines.min()) == (5, pytest.approx(1.0))
    assert small.nearest_b.round(6).tolist().count(1.0) == 5
    # Two latents of one direction have one partner.
    twins = match_latents(torch.eye(WIDTH)[[0, 0, 1]], torch.eye(WIDTH)[[0, 1, 2]])
    assert sorted(twins.cosines.tolist()) == [0.0, 1.0, 1.0]
    assert twins.nearest_a.tolist() == [1.0, 1.0, 1.0]


def test_novel_latents_are_those_that_the_smaller_lacks(rows):
    small, large = planted(range(7)), planted(range(12), seed=3)
    found = stitch(small, large, rows)
    new = (large.W_dec.argmax(1) >= 7).numpy()
    assert (found.novel == new).all()
    assert (found.reconstruction == ~new).all()
    # A novel latent takes its feature's share of the error away; a known one adds its feature again.
    energy = rows.pow(2).sum(0)
    expected = torch.where(large.W_dec.argmax(1) >= 7, -1.0, 1.0) * energy[large.W_dec.argmax(1)] / energy[7:].sum()
    assert found.change == pytest.approx(expected.numpy(), abs=1e-5)
    assert (found.fvu_small > 0.1, found.fvu_large) == (True, pytest.approx(0.0, abs=1e-6))


def test_pairs_of_checkpoints(rows, tmp_path):
    names = []
    for name, dictionary in (("small", planted(range(7))), ("large", planted(range(12), seed=3)), ("seed", planted(range(7)))):
        dictionary.save(tmp_path / name, {"hook": "h.0:out"})
        names.append(str(tmp_path / name))
    found = sparsary.similarity(names, tmp_path / "out", activations=rows)
    by_pair = {(row["a"], row["b"]): row for row in found["rows"]}
    row = by_pair["small", "large"]
    assert (row["matched_cosine"], row["matched_share"], row["latents_a"], row["latents_b"]) == (1.0, 1.0, 7, 12)
    assert (row["novel_share"], row["reconstruction_share"]) == (
        pytest.approx(5 / 12, abs=1e-6),
        pytest.approx(7 / 12, abs=1e-6),
    )
    assert (row["stitched"], row["active"], row["cosine_auroc"]) == ("large into small", 12, 1.0)
    assert by_pair["large", "seed"]["stitched"] == "large into seed"
    same = by_pair["small", "seed"]
    assert (same["novel_share"], same["matched_cosine"]) == (0.0, 1.0)
    # The floor is that of as many random directions.
    assert row["random_cosine"] == pytest.approx(random_cosines(7, 12, WIDTH).mean(), abs=1e-6)
    assert 0.2 < row["random_cosine"] < 0.8
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["rows"] == found["rows"]
    head, table = similarity_table(found)
    assert len(table) == 3
    assert all(len(line) == len(head) for line in table)
    # Without text or activations there are cosines only, and a reason.
    bare = sparsary.similarity(names[:2], tokens=0)["rows"][0]
    assert (bare["novel_share"], bare["reasons"]) == (None, {"novel_share": "no tokens were asked for (--tokens)"})


def test_what_cannot_be_compared_is_told(tmp_path, monkeypatch):
    planted(range(7)).save(tmp_path / "a", {"hook": "h.0:out"})
    SAE(5, 7, ReLU()).save(tmp_path / "b", {"hook": "h.0:out"})
    with pytest.raises(ValueError, match=r"CHECKPOINT: expected two dictionaries or more to compare, got 1\."):
        sparsary.similarity([tmp_path / "a"])
    (row,) = sparsary.similarity([tmp_path / "a", tmp_path / "b"], tokens=0)["rows"]
    assert row["matched_cosine"] is None
    assert "width 12 and 5" in row["reasons"]["matched_cosine"]
    monkeypatch.setattr(stitching, "MATCHED_ENTRIES", 10)
    planted(range(7)).save(tmp_path / "c", {"hook": "h.0:out"})
    (row,) = sparsary.similarity([tmp_path / "a", tmp_path / "c"], tokens=0)["rows"]
    assert (row["matched_cosine"], row["random_cosine"], row["nearest_cosine_a"]) == (None, None, 1.0)
    assert "too many latents" in row["reasons"]["matched_cosine"]


def test_two_runs_on_a_model_are_stitched_on_its_text(tmp_path, monkeypatch, capsys):
    """Neighboring layers are compared by cosine, dictionaries of one hook by the model's activations too."""
    provenance = {"model": {"id": "embedded"}, "text": {"source": "embedded"}}
    for name, layer, seed, n in (("a", 1, 0, 40), ("b", 1, 1, 60), ("c", 2, 2, 40)):
        torch.manual_seed(seed)
        dictionary = SAE(128, n, sparsary.ENCODERS["topk"](k=4))
        dictionary.save(tmp_path / name, provenance | {"hook": f"transformer.h.{layer}:out"})
    paths = [str(tmp_path / name) for name in "abc"]
    monkeypatch.setattr(sys, "argv", ["sparsary", "similarity", *paths, "--tokens", "300", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert not ended.value.code
    rows = json.loads((tmp_path / "out" / "similarity.json").read_text())["rows"]
    assert [(row["a"], row["b"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert rows[0]["stitched"] == "b into a"
    assert rows[0]["novel_share"] + rows[0]["reconstruction_share"] == pytest.approx(1.0)
    assert all(
        row["reasons"]["novel_share"].startswith("stitching needs two dictionaries of the same hooks") for row in rows[1:]
    )
    assert "b into a" in capsys.readouterr().out
