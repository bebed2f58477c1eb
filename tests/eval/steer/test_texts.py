"""Selectivity, directions, frequent tokens and the classifier of `sparsary steer`, against direct computations."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from sparsary.eval.probing.probes import auroc
from sparsary.eval.steer.codes import DocumentCodes, position_differences, record_of, selectivity, spectrum
from sparsary.eval.steer.outcomes import TokenClassifier
from sparsary.eval.steer.texts import frequent_tokens, lengths


def codes(seed, documents=12, tokens=5, latents=7, width=3):
    rng = np.random.default_rng(seed)
    dense = rng.random((documents * tokens, latents)).astype(np.float32) * (rng.random((documents * tokens, latents)) < 0.3)
    dense[:, -1] = 0
    owners = np.repeat(np.arange(documents), tokens)
    sums = rng.normal(size=(tokens, width))
    return DocumentCodes(
        sparse.csr_array(dense), owners, rng.integers(0, 4, len(owners)), sums.sum(0), sums, np.full(tokens, documents)
    )


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_selectivity_is_the_auroc_of_pieces_of_joined_documents(pooling):
    # 60 tokens are seven pieces of eight, across the ends of documents, and four tokens left over.
    a, b = codes(0), codes(1)
    pooled = [getattr(each.codes.toarray()[:56].reshape(7, 8, 7), pooling)(1) for each in (a, b)]
    np.testing.assert_allclose(a.pooled(pooling, 8), pooled[0], rtol=1e-6)
    # Documents come in batches of similar length, not in their order.
    order = np.concatenate([np.arange(30, 60), np.arange(30)])
    shuffled = replace(a, codes=a.codes[order], documents=a.documents[order], token_ids=a.token_ids[order])
    np.testing.assert_array_equal(shuffled.pooled(pooling, 8), a.pooled(pooling, 8))
    labels = np.repeat([True, False], 7)
    expected = [auroc(np.concatenate([pooled[0][:, latent], pooled[1][:, latent]]), labels) for latent in range(7)]
    np.testing.assert_allclose(selectivity(a, b, pooling, 8), expected)
    assert selectivity(a, b, pooling, 8)[-1] == 0.5


def test_differences_by_position_and_their_spectrum():
    a, b = codes(0), codes(1)
    np.testing.assert_allclose(position_differences(a, b), (a.position_sums - b.position_sums) / 12)
    figures, directions = spectrum(np.outer([1.0, 2.0, 3.0], [3.0, 4.0]))
    assert figures["effective_rank"] == pytest.approx(1)
    np.testing.assert_allclose(np.abs(directions[0]), [0.6, 0.8])
    # Two directions of equal size before a small third one.
    figures, _ = spectrum(np.diag([2.0, 2.0, 0.1]))
    assert figures["directions"] == 2
    assert figures["effective_rank"] == pytest.approx(2, abs=0.05)


def test_a_record_has_the_strongest_contexts_of_a_latent():
    a = codes(0)
    record = record_of(2, a, ["a", "b", "c", "d"])
    column = a.codes.toarray()[:, 2]
    peak = int(column.argmax())
    first = record["top"][0]
    assert first["document"] == peak // 5
    assert first["activations"][first["peak"]] == pytest.approx(column[peak], rel=1e-4)
    assert record["density"] == pytest.approx((column > 0).mean(), rel=1e-4)
    assert sum(entry["share"] for entry in record["top_tokens"]) == pytest.approx(1, abs=1e-3)


def test_frequent_tokens_differ_in_frequency_beyond_chance():
    towards, away_from = [[3] * 50 + [4] * 50 + [6]] * 2, [[3] * 50 + [5] * 50 + [7]] * 2
    sets = frequent_tokens(towards, away_from, 8, special=[0])
    # Tokens that occur twice prove nothing.
    assert np.flatnonzero(sets.target).tolist() == [4]
    assert np.flatnonzero(sets.contrast).tolist() == [5]
    assert np.flatnonzero(frequent_tokens(towards, away_from, 8, special=[4]).target).tolist() == []


def test_the_classifier_judges_pieces_and_not_empty_ones():
    import torch

    rng = np.random.default_rng(0)
    a, b = ([rng.integers(low, low + 5, 30).tolist() for _ in range(20)] for low in (2, 5))
    classifier = TokenClassifier.fitted((a[:10], b[:10]), (a[10:], b[10:]), 10, special=[0, 1], vocabulary=10)
    assert classifier.accuracy > 0.95
    pieces = torch.tensor([a[0][:10], b[0][:10], [0] * 10])
    assert classifier.judges(pieces).tolist() == [True, False, False]
    other = TokenClassifier.fitted((b[:10], a[:10]), (b[10:], a[10:]), 10, special=[0, 1], vocabulary=10)
    assert other.judges(pieces).tolist() == [False, True, False]


@pytest.mark.parametrize("context", [16, 64, 128, 4096])
def test_lengths_fit_a_context_together(context):
    found = lengths(context, 20)
    assert found.prefix + found.prompt + found.new <= found.document <= context
    assert min(found.prompt, found.prefix, found.new) > 0
