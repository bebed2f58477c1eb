"""InfoMEC: one latent a factor, a rotation of them, copies of them, and noise; factors from files."""

import json

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from sparsary.eval.probing.datasets import Tokens
from sparsary.eval.probing.factor_file import read_factors, tokens_of_file, value_names
from sparsary.eval.probing.infomec import infomec, infomec_table, probe_cross_entropy
from sparsary.eval.probing.subject import probe_target
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

FACTORS, VALUES, TOKENS = 6, 4, 3000


@pytest.fixture(scope="module")
def planted():
    """Tokens with independent factors of four values, and a code with one latent for each factor."""
    values = np.random.default_rng(0).integers(0, VALUES, (TOKENS, FACTORS))
    factors = [{f"f{i}": str(value) for i, value in enumerate(row)} for row in values.tolist()]
    return values.astype(np.float64), factors


def scored(planted, codes):
    values, factors = planted
    tokens = Tokens(values.astype(np.float32), None, np.arange(len(values)) // 10, factors)
    return infomec(tokens, sparse.csc_array(codes), value_names)


def test_one_latent_a_factor_has_all_three(planted):
    report, rows = scored(planted, planted[0])
    assert report["infomec_modularity"] >= 0.98
    assert report["infomec_compactness"] >= 0.98
    assert report["infomec_explicitness"] >= 0.98
    assert [row["latent"] for row in rows] == list(range(FACTORS))
    assert all(row["nmi"] > 0.98 and row["nmi_floor"] < 0.02 for row in rows)
    assert 0.98 <= report["infomec_modularity_low"] <= report["infomec_modularity_high"] <= 1
    json.dumps([report, rows], allow_nan=False)
    head, lines = infomec_table(rows)
    assert all(len(line) == len(head) for line in lines)


def test_a_rotation_keeps_what_is_explicit_and_loses_modularity():
    # The largest of n squared entries of a random direction is about 2 log(n) / n: with few factors no rotation mixes them all.
    values = np.random.default_rng(0).integers(0, 2, (2000, 32))
    factors = [{f"f{i}": str(value) for i, value in enumerate(row)} for row in values.tolist()]
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(32, 32)))[0]
    rotated = (values - 0.5) @ rotation
    report, _ = scored((rotated, factors), rotated)
    assert report["infomec_explicitness"] >= 0.95
    assert report["infomec_modularity"] <= 0.2


def test_copies_of_every_latent_quarter_compactness_alone(planted):
    report, _ = scored(planted, np.repeat(planted[0], 4, axis=1))
    assert report["infomec_modularity"] >= 0.98
    assert report["infomec_compactness"] == pytest.approx(0.25, abs=0.04)
    # Of four equal latents one is matched with each value.
    assert report["infomec_matched_compactness"] >= 0.98


def test_latents_that_fire_at_random_are_below_the_floor(planted):
    noise = np.random.default_rng(2).random((TOKENS, 40))
    report, rows = scored(planted, noise * (noise > 0.8))
    assert report["infomec_latents"] <= 5
    assert report["infomec_explicitness"] < 0.05
    assert sum(row["latent"] is None for row in rows) >= 3
    silent, _ = scored(planted, np.zeros((TOKENS, 5)))
    assert (silent["infomec_modularity"], silent["infomec_latents"]) == (0, 0)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_cross_entropy_is_finite_where_a_probability_underflows(n_classes):
    rng = np.random.default_rng(0)
    y = np.arange(60) % n_classes
    x = np.eye(n_classes)[y] + 0.3 * rng.standard_normal((60, n_classes))
    probe = LogisticRegression().fit(x, y)
    assert probe_cross_entropy(probe, x, y) == pytest.approx(-probe.predict_log_proba(x)[np.arange(60), y].mean())
    # As far on the wrong side as no float64 probability goes.
    far = -1e4 * (np.eye(n_classes)[[0]] - np.eye(n_classes)[[1]])
    assert 1e3 < probe_cross_entropy(probe, far, np.array([0])) < np.inf


def test_one_factor_is_too_few(planted):
    alone = (planted[0], [{"f0": factors["f0"]} for factors in planted[1]])
    with pytest.raises(ValueError, match=r"expected two factors with two values .* got \['f0'\] in 3000 tokens"):
        scored(alone, planted[0])


SPANS = {"text": "Mary went to the store .", "spans": [{"start": 0, "end": 4, "factors": {"who": "Mary"}}]}


@pytest.fixture(scope="module")
def subject(embedded_model):
    source = {
        "hook": "transformer.h.2:out",
        "model": {"id": "embedded", "device": "cpu"},
        "text": {"source": "files", "files": ["gone.txt"], "context_length": 5},
        "harvest": {"heldout": 0.05, "exclude_leading": 8},
    }
    return probe_target(SAE(128, 67, build_encoder({"name": "topk", "k": 5})), embedded_model, source)


def test_spans_and_tokens_give_the_same_factors(subject, tmp_path):
    tokenizer = subject.model.tokenizer
    ids = tokenizer(SPANS["text"], add_special_tokens=False)["input_ids"]
    words = SPANS["text"].split()
    both = SPANS["spans"] + [{"start": 3, "end": 9, "factors": {"half": 1, "who": "nobody"}}]
    lines = [
        SPANS,
        {"tokens": ids, "factors": [{"who": "Mary"}] + [{}] * (len(ids) - 1)},
        {"tokens": words, "factors": [{"who": "Mary"}] + [None] * (len(words) - 1)},
        SPANS | {"spans": both},
    ]
    path = tmp_path / "factors.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    first, *others, last = read_factors(path, tokenizer)
    assert first.ids == ids
    assert first.factors == [{"who": "Mary"}] + [{}] * (len(ids) - 1)
    assert others == [first, first]
    # A later span has the last word, and counts for every token that it overlaps.
    assert last.factors[:3] == [{"who": "nobody", "half": "1"}, {"who": "nobody", "half": "1"}, {}]
    read = tokens_of_file(subject, [first, last], 100)
    # The context is cut to five tokens, of which BOS is one.
    kept = min(len(ids), 4 if tokenizer.bos_token_id is not None else 5)
    assert read.documents.tolist() == [0] * kept + [1] * kept
    assert read.factors == first.factors[:kept] + last.factors[:kept]
    assert read.x.shape == (2 * kept, 128)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"factors.jsonl:1: expected \{\"text\""),
        (json.dumps(SPANS | {"spans": [{"start": 4, "end": 99, "factors": {}}]}), r"spans\[0\]: expected start and end with"),
        (json.dumps(SPANS | {"spans": [{"start": 0, "end": 4, "factors": {"a=b": 1}}]}), r"names without \"=\""),
        (json.dumps({"tokens": ["Mary"], "factors": []}), r"expected one object for each of 1 tokens, got 0"),
        (json.dumps({"tokens": ["Mary went home"], "factors": [{}]}), r"expected tokens or ids of .* got 'Mary went home'"),
        (json.dumps(SPANS | {"spans": []}), r"expected factors of some tokens, got none in 1 lines"),
    ],
)
def test_malformed_factors_are_refused_with_their_line(subject, tmp_path, line, message):
    path = tmp_path / "factors.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_factors(path, subject.model.tokenizer)


def test_the_file_of_factors_is_named_when_it_is_missing(subject):
    with pytest.raises(ValueError, match=r"--factors: nowhere.jsonl does not exist"):
        read_factors("nowhere.jsonl", subject.model.tokenizer)
