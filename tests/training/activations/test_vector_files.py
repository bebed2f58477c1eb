"""Vectors from files in place of a model's activations: reading, division, training, continuing, judging, features."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsary
from sparsary.training.activations.vector_files import VectorFiles, vector_problems
from sparsary.training.recipe import HarvestSection
from sparsary.transcoders.load import CheckpointOptions

N, D = 700, 12


@pytest.fixture(scope="module")
def table():
    """Rows near one of five directions, whose number is the label."""
    draw = np.random.default_rng(0)
    directions, label = draw.normal(size=(5, D)), draw.integers(0, 5, N)
    x = directions[label] * draw.uniform(2, 3, (N, 1)) + 0.05 * draw.normal(size=(N, D))
    return x.astype(np.float32), label


@pytest.fixture
def files(tmp_path, table):
    x, label = table
    np.save(tmp_path / "part-2.npy", x[:300])
    np.save(tmp_path / "part-10.npy", x[300:].astype(np.float64))
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"label": f"kind {k}", "text": f"row {i}"}) for i, k in enumerate(label))
    )
    return tmp_path


def recipe(files, **more):
    values = {
        "harvest": {"files": [str(files / "*.npy")], "rows": str(files / "rows.jsonl"), "heldout": 0.2},
        "dictionary": {"n_latents": 10, "encoder": {"name": "topk", "k": 1}},
        "tokens": 6400,
        "batch_tokens": 64,
        "dead_after_tokens": 1280,
        "eval_tokens": 100,
        "out_dir": str(files / "run"),
    }
    return values | more


def test_rows_are_divided_and_shuffled_once_for_all(files, table):
    vectors = VectorFiles(HarvestSection(files=(str(files / "*.npy"),), heldout=0.2))
    assert (vectors.rows, vectors.width, vectors.training_rows, vectors.heldout_rows) == (N, D, 560, 140)
    held, numbers = vectors.heldout()
    torch.testing.assert_close(held, torch.from_numpy(table[0][numbers]))
    train = torch.cat(list(vectors))
    # Every row is in exactly one part, in another order than in the files.
    together = torch.cat([train, held])
    assert torch.equal(together.sort(0).values, torch.from_numpy(table[0]).sort(0).values)
    assert not torch.equal(train[:50], torch.from_numpy(table[0])[:50])
    again = VectorFiles(HarvestSection(files=(str(files / "*.npy"),), heldout=0.2))
    assert torch.equal(torch.cat(list(again)), train)
    assert torch.equal(again.heldout(7)[0], held[:7])


@pytest.mark.parametrize("kind", ["npy", "safetensors", "two tensors", "parquet", "two columns", "data set", "folder"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, table, kind):
    x, label = table
    x, column, place = torch.from_numpy(x[:60]), None, tmp_path / "x.npy"
    if kind in ("npy", "folder"):
        np.save(place, x.numpy())
    elif kind in ("safetensors", "two tensors"):
        place, column = tmp_path / "x.safetensors", "b" if kind == "two tensors" else None
        save_file({"b": x} | ({"a": x + 1} if kind == "two tensors" else {"label": torch.zeros(60)}), place)
    else:
        import datasets

        columns = {"label": label[:60].tolist(), "vector": x.tolist()}
        column = "vector" if kind == "two columns" else None
        found = datasets.Dataset.from_dict(columns | ({"other": x.tolist()} if kind == "two columns" else {}))
        place = tmp_path / ("x" if kind == "data set" else "x.parquet")
        found.save_to_disk(place) if kind == "data set" else found.to_parquet(place)
    place = tmp_path if kind == "folder" else place
    vectors = VectorFiles(HarvestSection(files=(str(place),), column=column, heldout=0.0))
    torch.testing.assert_close(vectors.at(np.array([59, 0, 7])), x[[59, 0, 7]])
    assert (vectors.rows, vectors.heldout_rows) == (60, 0)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.npy", None, r"none\.npy: expected files of vectors \(\.npy, .*found none"),
        ("a.npy", lambda p: p.write_bytes(b"junk"), r"a\.npy: expected a NumPy array of numbers, got another file"),
        (
            "a.npy",
            lambda p: np.save(p, np.array([{}], object), allow_pickle=True),
            r"a\.npy: expected a NumPy array of numbers",
        ),
        ("a.npy", lambda p: np.save(p, np.zeros(5)), r"a\.npy: expected vectors in a matrix \(rows, d\), got shape \(5,\)"),
        ("a.npy", lambda p: np.save(p, np.array([["a"]])), r"a\.npy: expected .* of numbers"),
        ("a.npy", lambda p: np.save(p, np.zeros((0, 3))), r"expected vectors to train on, got 0"),
        ("a.safetensors", lambda p: p.write_bytes(b"junk"), r"a\.safetensors: expected a safetensors file"),
        (
            "a.safetensors",
            lambda p: save_file({"aa": torch.zeros(2, 2), "bb": torch.zeros(2, 2)}, p),
            r"harvest\.column: expected the name of one of the tensors of .*\(aa, bb\), got None",
        ),
        ("a.parquet", lambda p: p.write_bytes(b"junk"), r"a\.parquet: expected a parquet file or a data set's folder"),
        ("a.csv", lambda p: p.write_text("1,2\n"), r"a\.csv: expected one of \.npy, \.safetensors, \.parquet"),
    ],
)
def test_other_files_are_one_message(tmp_path, name, write, message):
    if write is not None:
        write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        VectorFiles(HarvestSection(files=(str(tmp_path / name),)))


def test_files_of_another_width_are_named(files):
    np.save(files / "part-3.npy", np.zeros((4, D + 1)))
    with pytest.raises(ValueError, match=rf"part-3\.npy: expected width {D}, as in .*part-2\.npy, got {D + 1}"):
        VectorFiles(HarvestSection(files=(str(files / "*.npy"),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "kl"}, "objective: expected reconstruction with harvest.files, because vectors have no model, got 'kl'"),
        ({"dictionary.kind": "transcoder"}, "dictionary.kind: expected sae with harvest.files"),
        (
            {"dictionary.encoder": {"name": "gradient_topk", "k": 2}},
            "dictionary.encoder.name: expected one that needs no gradients",
        ),
        ({"harvest.store": "store", "harvest.tokens": 5}, "harvest.store: expected null with harvest.files"),
        ({"harvest.gradients": True}, "harvest.gradients: expected false with harvest.files"),
    ],
)
def test_what_only_a_model_gives_is_refused(files, change, message):
    with pytest.raises(ValueError, match=message):
        sparsary.train(recipe(files), **{key.replace(".", "__"): value for key, value in change.items()})


def test_trained_judged_and_described(files, table, capsys):
    directory = sparsary.train(recipe(files))
    report = sparsary.evaluate(directory)
    # Held-out rows, half of which fit.
    assert (report["tokens"], report["model"]) == (50, None)
    assert report["fvu"] < 0.3
    about = sparsary.features(directory)
    assert (about["tokens"], about["n_labels"]) == (140, 5)
    records = [json.loads(line) for line in (directory / "features" / "features.jsonl").read_text().splitlines()]
    assert len(records) == 10
    best = {}
    for record in records:
        for example in record["examples"]:
            assert example["of"] == {"label": f"kind {table[1][example['row']]}", "text": f"row {example['row']}"}
        values = [abs(example["value"]) for example in record["examples"]]
        assert values == sorted(values, reverse=True)
        if record["label"]:
            name = record["label"]["label"]
            best[name] = max(best.get(name, 0.0), record["label"]["f1"])
    # Planted: each direction has a latent that tells it from the others. Two latents may share one; chance is 0.33.
    assert len(best) == 5
    assert sum(best.values()) / 5 > 0.6
    page = (directory / "features" / "features.html").read_text()
    assert "kind 3" in page
    assert sparsary.render(directory / "features" / "features.json").name == "features.html"
    assert "features.html" in (directory / "report.html").read_text()


def test_firing_and_labels_are_counted_over_all_batches(files, table, monkeypatch):
    directory = sparsary.train(recipe(files))
    whole = sparsary.features(directory, files / "whole")
    monkeypatch.setattr("sparsary.eval.features.vectors.ROWS_AT_ONCE", 13)
    parts = sparsary.features(directory, files / "parts")
    assert parts["dead"] == whole["dead"]
    read = [
        [json.loads(line) for line in (files / name / "features.jsonl").read_text().splitlines()] for name in ("whole", "parts")
    ]
    for one, other in zip(*read, strict=True):
        assert one["label"] == other["label"]
        assert one["density"] == other["density"]
        assert [e["row"] for e in one["examples"]] == [e["row"] for e in other["examples"]]


def test_a_run_goes_on_and_refuses_other_content(files, caplog):
    directory = sparsary.train(recipe(files, tokens=3200))
    sparsary.train(recipe(files, tokens=6400))
    assert sparsary.load(directory).provenance["training_tokens"] == 6400
    x = np.load(files / "part-2.npy")
    np.save(files / "part-2.npy", x + 1)
    with pytest.raises(ValueError, match=r"harvest\.files: part-2\.npy has other content than it had"):
        sparsary.train(recipe(files, tokens=9600))
    report = sparsary.evaluate(directory)
    assert "harvest.files: part-2.npy has other content than it had" in report["doubts"]


def test_other_files_can_be_judged(files, table):
    directory = sparsary.train(recipe(files))
    np.save(files / "others.npy", table[0][:40] * 2)
    options = CheckpointOptions(settings={"harvest.files": [str(files / "others.npy")], "harvest.heldout": 0.5})
    assert sparsary.evaluate(directory, files / "others", options=options)["tokens"] == 10
    with pytest.raises(ValueError, match=r"--set text\.bos: expected a key of harvest"):
        sparsary.evaluate(directory, files / "others", options=CheckpointOptions(settings={"text.bos": "none"}))


def test_rows_that_are_not_finite_are_left_out_and_counted(files, table):
    x = table[0].copy()
    x[::200] = np.nan
    np.save(files / "part-2.npy", x[:300])
    np.save(files / "part-10.npy", x[300:])
    directory = sparsary.train(recipe(files))
    numbers = set(VectorFiles(HarvestSection(files=(str(files / "*.npy"),), heldout=0.2)).heldout()[1].tolist())
    bad = list(range(0, N, 200))
    report = sparsary.evaluate(directory, tokens=140)
    held = sum(row in numbers for row in bad)
    assert any("training: " in line and str(len(bad) - held) in line for line in report["skipped"])
    about = sparsary.features(directory)
    assert about["tokens"] == 140 - held


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("rows.txt", r"harvest\.rows: .*rows\.txt: expected one of \.csv, \.jsonl, \.parquet"),
        ("missing.csv", r"harvest\.rows: .*missing\.csv: expected a table of one record per vector, got .*No such file"),
        ("short.csv", r"harvest\.rows: .*short\.csv: expected 700 records, one per vector, got 2"),
    ],
)
def test_a_table_that_does_not_fit_is_one_message(files, rows, message):
    directory = sparsary.train(recipe(files))
    (files / "short.csv").write_text("label\na\nb\n")
    with pytest.raises(ValueError, match=message):
        sparsary.features(directory, options=CheckpointOptions(settings={"harvest.rows": str(files / rows)}))


def test_thumbnails_come_from_the_table_s_folder_alone(files, table):
    import matplotlib.image

    (files / "thumbs").mkdir()
    matplotlib.image.imsave(files / "thumbs" / "one.png", np.eye(4))
    outside = files.parent / f"{files.name}-outside.png"
    matplotlib.image.imsave(outside, np.eye(4))
    places = ("thumbs/one.png", f"../{outside.name}", "thumbs/none.png")
    lines = ["label,image", *(f"{table[1][row]},{places[row % 3]}" for row in range(N))]
    (files / "pictures.csv").write_text("\n".join(lines))
    directory = sparsary.train(recipe(files))
    sparsary.features(directory, options=CheckpointOptions(settings={"harvest.rows": str(files / "pictures.csv")}))
    pictures = json.loads((directory / "features" / "features.json").read_text())["pictures"]
    assert pictures
    assert {int(row) % 3 for row in pictures} == {0}
    page = (directory / "features" / "features.html").read_text()
    assert "img-src data:" in page
    assert 'src="data:image/png;base64,' in page
    outside.unlink()


def test_changed_files_are_told_one_by_one():
    before = {"vectors": {"a": "1", "b": "2", "c": "3"}}
    after = {"vectors": {"a": "1", "b": "9", "d": "4"}}
    assert vector_problems(before, after) == [
        "harvest.files: c is gone",
        "harvest.files: d is new",
        "harvest.files: b has other content than it had",
    ]
    assert vector_problems({}, after) == vector_problems(before, before) == []


def test_recipes_on_vectors_are_compared_and_not_harvested(files, tmp_path):
    from sparsary.training.recipe import check_recipe

    # The hook has a name wherever a recipe is checked: alone, as a member of a grid, in a comparison.
    assert check_recipe(recipe(files), "recipe").dictionary.hook == "vectors:out"
    grid = recipe(files, grid={"dictionary.encoder.k": [1, 2]})
    directory = sparsary.train(grid, out_dir=str(tmp_path / "grid"))
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["k=1", "k=2"]
    (files / "recipe.yaml").write_text(json.dumps(recipe(files)))
    with pytest.raises(ValueError, match=r"harvest\.files: vectors are read where they are, and not harvested"):
        sparsary.harvest(files / "recipe.yaml")
