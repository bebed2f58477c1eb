"""Concept bottleneck: planted concepts, zeroing one, labelled text and vectors; the whole way from images is a long test."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import sparse
from scipy.optimize import linear_sum_assignment

import sparsary
from sparsary.eval.pages.bottleneck import draw_path
from sparsary.eval.pages.probing import render_probing
from sparsary.eval.probing.bottleneck import bottleneck, bottleneck_table
from sparsary.eval.probing.datasets import Pooled


@pytest.fixture(scope="module")
def towers(load_beside):
    return load_beside("../docs/studies/two_towers")


@pytest.fixture(scope="module")
def planted(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    run = towers.planted_sae(folder, towers.write_towers(folder, images=800))
    sparsary.name(run, folder / "words.safetensors")
    return folder, run, sparsary.probe(run, tasks=["bottleneck"])


def rows_of(run):
    return [json.loads(line) for line in (run / "probing" / "bottleneck.jsonl").read_text().splitlines()]


def check_known_answer(report, rows, left):
    """The sparse probe is as good as the dense one, every class has its concept, and zeroing it takes that class only."""
    assert report["bottleneck_accuracy"] >= report["bottleneck_dense_accuracy"] - 0.01
    assert report["bottleneck_accuracy"] > 0.97
    # The other one is the absence of all concepts.
    for row in [row for row in rows if row["class"] != "none"]:
        assert row["concepts"][0]["name"] == row["class"].replace("class", "concept"), row
        assert row["recall_zeroed"] <= left, row
        assert row["others_zeroed"] >= row["others"] - 0.01
        assert row["recall_random"] >= row["recall"] - 0.02


def test_planted_concepts_are_the_classes_and_zeroing_one_takes_its_class(planted, towers):
    _, run, found = planted
    rows = rows_of(run)
    assert len(rows) == towers.CLASSES + 1
    check_known_answer(found.report, rows, left=0.05)
    assert found.report["bottleneck_concepts"] < 3
    steps = [found.report[f"bottleneck_path_{step}_concepts"] for step in range(1, 11)]
    assert steps == sorted(steps)
    page = (run / "probing" / "probing.html").read_text(encoding="utf-8")
    for words in ("Concept bottleneck", "concept 3", "dense probe", "others, zeroed"):
        assert words in page
    assert all(isinstance(value, str | int | float | bool | None) for value in found.report.values())


def test_what_latents_do_not_hold_is_not_found():
    generator = np.random.default_rng(0)
    labels = np.array(["a", "b"])[generator.integers(0, 2, 200)]
    x = np.stack([labels == "a", generator.random(200)], 1).astype(np.float32)
    codes = sparse.csc_array(sparse.random_array((200, 9), density=0.3, rng=generator))
    report, rows = bottleneck([Pooled("noise", x, codes, labels, None, np.ones(200, int))], 0)
    assert report["bottleneck_dense_accuracy"] == 1
    assert report["bottleneck_accuracy"] < 0.75
    assert report["bottleneck_gap"] == pytest.approx(1 - report["bottleneck_accuracy"])
    head, lines = bottleneck_table(rows)
    assert all(len(line) == len(head) for line in lines)


def test_labels_and_names_are_text_on_the_page():
    concept = {"latent": 3, "name": "<b>", "weight": 1.0, "contribution": 1.0}
    keys = ("n_concepts", "recall", "recall_zeroed", "recall_random", "others", "others_zeroed")
    row = {"set": "s", "class": "<i>", "concepts": [concept], **dict.fromkeys(keys, 0.5)}
    page = render_probing({"probing_version": 1, "seed": 0}, [], "f.html", [row])
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert 'href="f.html#3"' in page


@pytest.mark.parametrize(("concepts", "ticks"), [((1.15, 1.4), 4), ((1.7, 2.4), 4), ((1.0, 40.0), 3)])
def test_a_path_of_any_length_has_ticks(concepts, ticks):
    found = {"bottleneck_dense_accuracy": 1.0}
    for step, value in enumerate(concepts, 1):
        found |= {f"bottleneck_path_{step}_concepts": value, f"bottleneck_path_{step}_accuracy": 0.9}
    ax = Figure().subplots()
    draw_path(ax, found)
    low, high = ax.get_xlim()
    shown = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert len({f"{tick:.3g}" for tick in shown}) == len(shown) >= ticks


def test_other_tasks_and_labels_of_vectors_are_refused(planted, tmp_path):
    _, run, _ = planted
    with pytest.raises(ValueError, match="--task scr: expected bottleneck, because this dictionary is of vectors"):
        sparsary.probe(run, tasks=["scr"], out=tmp_path)
    (tmp_path / "l.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    with pytest.raises(ValueError, match=r"--labels: expected none for a dictionary of vectors"):
        sparsary.probe(run, labels=tmp_path / "l.jsonl", out=tmp_path)


def test_from_images_to_named_concepts_by_training(towers, tmp_path):
    concepts = towers.write_towers(tmp_path, images=6000, orthonormal=False)
    run = towers.trained_sae(tmp_path)
    sae = sparsary.load(run)
    cosines = sae.atoms.detach().numpy() @ concepts.T
    latents, matched = linear_sum_assignment(-cosines)
    named = sparsary.name(run, tmp_path / "words.safetensors")
    right = [named["latents"][latent]["name"] == f"concept {place}" for latent, place in zip(latents, matched, strict=True)]
    assert np.mean(right) >= 0.95
    found = sparsary.probe(run, tasks=["bottleneck"])
    check_known_answer(found.report, rows_of(run), left=0.25)
