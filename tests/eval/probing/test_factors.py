"""Known factors: a dictionary made of them scores 1, probes bound latents, and what cannot be said is null with a reason."""

import json

import numpy as np
import pytest
from scipy import sparse

from sparsary.eval.probing.datasets import Tokens, embedded_tokens, halves
from sparsary.eval.probing.factors import factor_scores, factors_table, labels_of, names_of, score_factors
from sparsary.eval.probing.subject import probe_target, sparse_codes
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.training.activations.sites import neuron_hook
from sparsary.training.embedded import corpus

SOURCE = {
    "hook": "transformer.h.2:out",
    "model": {"id": "embedded", "device": "cpu"},
    "text": {"source": "embedded", "context_length": 64},
    "harvest": {"heldout": 0.05, "exclude_leading": 8},
}


@pytest.fixture(scope="module")
def subject(embedded_model):
    return probe_target(SAE(128, 67, build_encoder({"name": "topk", "k": 5})), embedded_model, SOURCE)


ENTITIES = ("boy", "dog", "ring", "store")


@pytest.fixture(scope="module")
def planted():
    """Tokens that name one of four things in one of two tasks, their factors' directions, and exact codes."""
    generator = np.random.default_rng(0)
    tasks, things = generator.integers(0, 2, 3001), generator.integers(0, 4, 3001)
    factors = [{"task": f"t{a}", "role": "r", "entity": ENTITIES[b]} for a, b in zip(tasks, things, strict=True)]
    codes = np.zeros((3001, 7))
    codes[np.arange(3001), tasks], codes[np.arange(3001), 2 + things] = 1.0, 0.5 + generator.random(3001)
    writes = np.linalg.qr(generator.normal(size=(17, 17)))[0][:7]
    x = (codes @ writes + 0.01 * generator.normal(size=(3001, 17))).astype(np.float32)
    return Tokens(x, np.maximum(x, 0), np.arange(3001) // 10, factors), codes, writes


def test_a_dictionary_of_the_factors_own_directions_scores_one(planted):
    tokens, codes, writes = planted
    report, rows = score_factors(tokens, sparse.csc_array(codes), writes, np.zeros(17))
    assert {row["factor"] for row in rows} >= {"task=t0", "role=t1/r", "entity=dog", "class=noun"}
    single = [row for row in rows if row["family"] in ("task", "entity")]
    for row in single:
        assert (row["latent_f1"], row["latent_auroc"], row["split"]) == (1, 1, 1), row["factor"]
        assert row["latent_firing_f1"] == 1
        assert row["probe_f1"] > 0.99
        assert row["absorption_fraction"] < 0.1
    # "noun" is boy or dog: two latents share it, and neither has all of it.
    (noun,) = [row for row in rows if row["factor"] == "class=noun"]
    assert noun["split"] == 2
    assert noun["latent_f1"] == pytest.approx(2 / 3, abs=0.05)
    assert noun["probe_f1"] > 0.99
    assert report["factors_latent_f1_low"] <= report["factors_latent_f1"] <= report["factors_latent_f1_high"]
    assert report["factors_chance_f1"] < report["factors_latent_f1"] < report["factors_probe_f1"]
    assert report["factors_entity_dimension_f1"] < report["factors_entity_latent_f1"] == 1
    assert report["factors_gap_f1"] == pytest.approx(report["factors_probe_f1"] - report["factors_latent_f1"])


def test_a_latent_that_gives_way_to_a_rare_word_s_own_is_absorbed():
    generator = np.random.default_rng(1)
    # One noun in twenty is "dog"; its latent writes the noun's direction too, and the noun's own latent is silent there.
    words = np.array(["boy", "dog", "ring"])[generator.choice(3, 4001, p=[0.38, 0.02, 0.6])]
    noun, own, rest = np.linalg.qr(generator.normal(size=(17, 17)))[0][:3]
    latents = 2.0 * np.stack([words == "boy", words == "dog", words == "ring"], 1)
    writes = np.stack([noun, 0.8 * noun + 0.6 * own, rest])
    x = (latents @ writes + 0.01 * generator.normal(size=(4001, 17))).astype(np.float32)
    factors = [{"task": "t", "role": "r", "entity": str(word)} for word in words]
    tokens = Tokens(x, None, np.arange(4001) // 10, factors)
    report, rows = score_factors(tokens, sparse.csc_array(latents), writes, np.zeros(17))
    (row,) = [row for row in rows if row["factor"] == "class=noun"]
    assert row["split"] == 1
    share = np.mean(words[words != "ring"] == "dog")
    assert row["full_absorption"] == row["absorption_fraction"] == pytest.approx(share, abs=0.02)
    assert row["full_absorption"] > 0.02
    assert report["factors_neuron_f1"] is None
    assert "no neurons" in report["factors_neuron_why"]


def test_a_dead_dictionary_gets_chance_and_reasons(planted):
    tokens, _, writes = planted
    report, rows = score_factors(tokens, sparse.csc_array((3001, 7)), writes, np.zeros(17))
    assert report["factors_no_latent_fires"]
    for row in rows:
        assert row["latent_f1"] == pytest.approx(row["chance_f1"])
        assert row["latent_auroc"] == 0.5
        assert row["latent_firing_f1"] == 0
        assert (row["split"], row["absorption_why"]) == (None, "no latent fires on it")
    assert report["factors_split"] is None
    assert report["factors_split_why"] == "no latent fires on it"
    json.dumps([report, rows], allow_nan=False)


def test_latents_that_fire_at_random_are_near_chance_on_the_other_half(planted):
    tokens, codes, writes = planted
    shuffled = np.random.default_rng(2).permutation(codes)
    report, _ = score_factors(tokens, sparse.csc_array(shuffled), writes, np.zeros(17))
    assert report["factors_latent_auroc"] == pytest.approx(0.5, abs=0.03)
    assert report["factors_latent_f1"] < report["factors_chance_f1"] + 0.03
    assert report["factors_probe_f1"] > 0.95


def test_tokens_come_with_the_factors_that_produced_them(subject):
    known = embedded_tokens(subject, 700)
    assert known.x.shape == (len(known.factors), 128)
    assert known.neurons.shape == (len(known.factors), 512)
    assert neuron_hook(subject.model, "transformer.h.2:out") == "transformer.h.2.mlp.c_proj:in"
    assert neuron_hook(subject.model, "transformer.wte:out") is None
    document = corpus.embedded_document(1, int(known.documents[-1]))
    # The last token's own words: no other document has this token's activation.
    ids = subject.model.tokenizer.convert_tokens_to_ids(list(document.words))
    assert subject.model.tokenizer(document.text, add_special_tokens=False)["input_ids"] == ids
    owners = set(known.documents.tolist())
    for owner in list(owners)[:5]:
        mine = [factors for factors, document in zip(known.factors, known.documents, strict=True) if document == owner]
        whole = list(corpus.embedded_document(1, owner).factors)
        assert any(mine == whole[start : start + len(mine)] for start in range(len(whole))) or len(mine) < len(whole)
    assert sparse_codes(subject, known.x).shape == (len(known.factors), 67)


def test_names_and_labels_of_factors():
    names = names_of({"task": "greater_than", "role": "century", "year": 1732})
    assert names == ["task=greater_than", "role=greater_than/century", "century=17"]
    assert "decade=4" in names_of({"task": "g", "role": "a", "year": 41})
    assert {"class=name", "entity=Mary", "gender=female"} <= set(
        names_of({"task": "t", "role": "r", "entity": "Mary", "gender": "female"})
    )
    assert "rank=2^3" in names_of({"task": "t", "role": "r", "rank": 9})
    fitted = halves(np.arange(200) // 10, seed=3)
    assert fitted.sum() == 100
    assert not set((np.arange(200) // 10)[fitted]) & set((np.arange(200) // 10)[~fitted])
    factors = [{"task": "t", "role": "r" if i % 3 else "s"} for i in range(200)]
    labels = labels_of(factors, fitted, least=10)
    # A factor that every token has is none.
    assert labels.names == ["role=t/r", "role=t/s"]
    assert labels.values.sum(0).tolist() == [133, 67]


def test_too_few_tokens_and_unknown_text_are_refused(subject):
    few = embedded_tokens(subject, 1)
    few = few.where(np.arange(len(few.factors)) < 40)
    with pytest.raises(ValueError, match=r"expected a factor that occurs 30 times .* Raise --tokens"):
        score_factors(few, sparse.csc_array((40, 67)), None, None)
    files = probe_target(subject.dictionary, subject.model, SOURCE | {"text": {"source": "files", "files": ["a.txt"]}})
    with pytest.raises(ValueError, match="give labelled text with --labels FILE"):
        factor_scores(files)
    with pytest.raises(ValueError, match=r"expected width 31, the dictionary's d_in, got 128"):
        probe_target(SAE(31, 67, build_encoder({"name": "topk", "k": 5})), subject.model, SOURCE)


def test_on_the_embedded_model_probes_bound_latents_which_beat_chance(subject):
    report, rows = factor_scores(subject, 3_000)
    assert report["factors_probe_f1"] > report["factors_latent_f1"] > report["factors_chance_f1"]
    assert factor_scores(subject, 3_000)[0] == report
    head, lines = factors_table(report, rows)
    assert all(len(line) == len(head) for line in lines)
    json.dumps([report, rows], allow_nan=False)
