"""Names of latents by cosine: planted towers, the floor, the unembedding, features, file layouts, and errors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsary
from sparsary.eval.name.named_vectors import NamedVectors, read_named_vectors
from sparsary.eval.name.nearest import nearest_names, random_directions
from sparsary.eval.name.run import names_summary, names_table
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_json


@pytest.fixture(scope="module")
def towers(load_beside):
    return load_beside("../docs/studies/two_towers")


@pytest.fixture(scope="module")
def planted(towers, tmp_path_factory):
    """Images, words, and the checkpoint of an SAE with the concepts as its latents, named."""
    folder = tmp_path_factory.mktemp("towers")
    run = towers.planted_sae(folder, towers.write_towers(folder))
    sparsary.features(run)
    return folder, run, sparsary.name(run, folder / "words.safetensors")


def test_planted_concepts_get_their_words_and_random_directions_stay_below_the_floor(planted, towers):
    _, _, found = planted
    right = [row["name"] == f"concept {row['latent']}" for row in found["latents"][: towers.CONCEPTS]]
    assert np.mean(right) >= 0.95
    assert all(row["above_floor"] and row["margin"] > 0.2 for row in found["latents"][: towers.CONCEPTS])
    # Directions outside of the words' span are named, too, and the floor says what that is worth.
    assert sum(row["above_floor"] for row in found["latents"][towers.CONCEPTS :]) <= 1
    assert 0.2 < found["floor_cosine"] < 0.8 < found["median_cosine"]
    assert found["latents"][0]["floor_share"] == 0
    head, rows = names_table(found)
    assert all(len(row) == len(head) for row in rows)
    assert "90 of" in dict(names_summary(found))["vectors"]


def test_features_get_the_names_and_stay_whole(planted):
    _, run, found = planted
    records = [json.loads(line) for line in (run / "features" / "features.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == [row["name"] for row in found["latents"]]
    assert records[3]["name_cosine"] == found["latents"][3]["cosine"]
    assert {"examples", "label", "density"} <= records[3].keys()
    page = (run / "features" / "features.html").read_text(encoding="utf-8")
    assert "concept 3" in page
    # Rendering checks the digest of the records.
    assert sparsary.render(run / "features" / "features.json").is_file()
    assert "concept 3" in found.html
    assert "../features/features.html#3" in found.html
    assert sparsary.render(found["path"]).read_text(encoding="utf-8") == found.html


def test_text_features_show_names_where_explanations_would_be(tmp_path, embedded_model):
    hook = "transformer.h.2:out"
    torch.manual_seed(0)
    sae = SAE(128, 23, ENCODERS["topk"](k=3))
    about = {"hook": hook, "hooks_in": [hook], "hooks_out": [hook], "model": {"id": "embedded", "device": "cpu"}}
    run = tmp_path / "run"
    ids = [embedded_model.tokenizer.get_vocab()[word] for word in ("boy", "dogs", "1589"[:2])]
    with torch.no_grad():
        # Directions that write single tokens: rows of the centered unembedding behind the final norm.
        from sparsary.training.activations.architecture import Architecture

        architecture = Architecture(embedded_model)
        readers = architecture.final_norm.fold(architecture.W_U).float()
        sae.W_dec[:3] = torch.nn.functional.normalize((readers - readers.mean(0))[ids], dim=-1)
    sae.save(run, about | {"text": {"source": "embedded", "context_length": 32}, "harvest": {"heldout": 0.05}})
    sparsary.features(run, tokens=300)
    found = sparsary.name(run)
    assert [row["name"] for row in found["latents"][:3]] == ["boy", "dogs", "15"]
    assert found["latents"][0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert all(row["above_floor"] for row in found["latents"][:3])
    assert found["source"] == "unembedding of embedded"
    assert found["center"] is True
    record = found["features"] and json.loads((run / "features" / "features.jsonl").read_text().splitlines()[0])
    assert (record["latent"], record["name"]) == (0, "boy")
    about = read_json(run / "features" / "features.json")
    assert sparsary.Features(about, run / "features" / "features.jsonl").records_of(0)[0]["name"] == "boy"


def test_margins_are_to_another_word_and_zero_directions_have_none():
    words = NamedVectors(["a", " A", "b"], torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), "test")
    found = nearest_names(torch.tensor([[1.0, 0.0], [0, 0], [0.1, 1]]), words)
    assert found.best.tolist() == [0, -1, 2]
    assert found.second.tolist()[0] == 2
    assert found.margin[0] == pytest.approx(1)
    assert found.cosine[1] == 0
    drawn = random_directions(torch.tensor([[3.0, 0, 0], [0, 4, 0]]), 500, 0)
    # Of the directions' plane, whatever their lengths are.
    assert drawn[:, 2].abs().max() == 0
    assert drawn.square().mean(0)[:2].tolist() == pytest.approx([0.5, 0.5], rel=0.2)


@pytest.mark.parametrize("layout", ["metadata", "json", "txt", "npy"])
def test_every_layout_is_read(tmp_path, layout):
    vectors, names = torch.arange(12.0).view(3, 4), ["cat", "dog", "owl"]
    path = tmp_path / ("w.npy" if layout == "npy" else "w.safetensors")
    if layout == "npy":
        np.save(path, vectors.numpy())
    else:
        save_file(
            {"any" if layout == "txt" else "vectors": vectors},
            path,
            {"names": json.dumps(names)} if layout == "metadata" else None,
        )
    if layout == "json":
        (tmp_path / "w.json").write_text(json.dumps(names))
    elif layout in ("txt", "npy"):
        (tmp_path / "w.txt").write_text("\n".join(names) + "\n")
    found = read_named_vectors(path)
    assert (list(found.names), found.vectors.tolist()) == (names, vectors.tolist())


def test_mistakes_are_one_line(planted, tmp_path):
    folder, run, _ = planted
    save_file({"vectors": torch.eye(40)}, tmp_path / "bare.safetensors")
    save_file({"vectors": torch.eye(40)}, tmp_path / "few.safetensors", {"names": json.dumps(["a"])})
    save_file({"vectors": torch.eye(7)}, tmp_path / "narrow.safetensors", {"names": json.dumps(list("abcdefg"))})
    for path, words in (
        (tmp_path / "none.npy", "does not exist"),
        (folder / "rows.jsonl", "--vectors: expected a matrix of safetensors or .npy"),
        (tmp_path / "bare.safetensors", "expected its names, found none. Write bare.txt"),
        (tmp_path / "few.safetensors", "expected a name for each of 40 vectors, got 1"),
        (tmp_path / "narrow.safetensors", "expected width 40, the dictionary's d_out, got 7"),
        (None, "--vectors: expected a file, because this dictionary is of vectors from files"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            sparsary.name(run, path, out=tmp_path / "out")
        assert "\n" not in str(error.value)
