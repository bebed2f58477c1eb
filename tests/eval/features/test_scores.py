"""Scores of latents whose meaning is known because it was planted, and of such as mean nothing."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array, csr_array

from sparsary.eval.features.collect import Background, Collected, Examples, Limits, TokenSample
from sparsary.eval.features.logit_lens import Unembedding
from sparsary.eval.features.predicates import predicates, token_texts
from sparsary.eval.features.scores import activation_auroc, example_embedding, logit_lens, predicate_f1
from sparsary.training.embedded import corpus

TOKENS, VOCABULARY = 4000, 23
WORDS = [" the", " Dog", ",", ".", " 17", "\n", " x", *(f" word{i}" for i in range(16))]


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, VOCABULARY, TOKENS).astype(np.int32)
    previous, following = np.roll(ids, 1), np.roll(ids, -1)
    documents = np.arange(TOKENS) // 20
    rest = np.zeros(TOKENS, np.int64)
    offsets = np.arange(TOKENS) % 20
    return TokenSample(ids, previous, following, documents, offsets, rest > 0, rest, rest, rest)


def scored(sample, columns):
    codes = csc_array(np.stack(columns, 1).astype(np.float32))
    known = predicates(sample, WORDS, None)
    return predicate_f1(sample, codes, known)


def test_a_latent_that_is_a_predicate_is_recognised(sample):
    rng = np.random.default_rng(4)
    noise = rng.random(TOKENS) < 0.2
    found = scored(
        sample,
        [
            sample.tokens == 7,
            sample.previous == 2,
            (sample.following == 9) * 2.0,
            sample.offsets < 4,
            # Weak on everything, strong on numbers: only a threshold tells.
            0.1 * noise + (sample.tokens == 4),
            noise,
            np.zeros(TOKENS),
        ],
    )
    names = [None if score.details is None else score.details["predicate"] for score in found]
    assert names[0] == "token ' word0' (id 7)"
    assert names[1] == "after token ',' (id 2)"
    assert names[2] == "before token ' word2' (id 9)"
    assert names[3] == "among the first 4 of the document"
    assert "17" in names[4] or names[4] == "is a number"
    assert [score.value for score in found[:5]] == pytest.approx([1, 1, 1, 1, 1])
    assert found[4].details["threshold"] > 0
    # What means nothing is worth no more than chance on documents it was not chosen on.
    assert found[5].value < found[5].details["chance"] + 0.06
    assert (found[6].value, "fewer than 10" in found[6].reason) == (None, True)


def test_f1_and_chance_are_counted_on_the_other_half(sample):
    latent = (sample.tokens == 7) & (sample.offsets < 15) | (sample.tokens == 8) & (sample.offsets < 3)
    score = scored(sample, [latent])[0]
    odd = sample.documents % 2 == 1
    true = sample.tokens == 7
    both, fires, holds = (latent & true & odd).sum(), (latent & odd).sum(), (true & odd).sum()
    assert score.value == pytest.approx(2 * both / (fires + holds))
    assert score.details["chance"] == pytest.approx(2 * (fires * holds / odd.sum()) / (fires + holds))


def test_one_document_is_no_ground_for_a_score(sample):
    alone = sample._replace(documents=np.zeros(TOKENS, np.int64))
    assert all(score.value is None and "halves" in score.reason for score in scored(alone, [sample.tokens == 7]))


def test_classes_of_tokens(sample):
    known = predicates(sample, WORDS, None)
    true = {name: set(sample.tokens[np.flatnonzero(known.true[:, [i]].toarray())]) for i, name in enumerate(known.names)}
    assert true["is capitalised"] == {1}
    assert true["is punctuation"] == {2, 3}
    assert true["ends a sentence"] == {3}
    assert true["is a number"] == {4}
    assert true["is a newline"] == {5}
    assert true["begins with a space"] == set(range(VOCABULARY)) - {2, 3}
    assert known.missing == "factors: the text is not the embedded corpus"


def test_factors_of_the_embedded_corpus_are_found(embedded_model):
    words = token_texts(embedded_model.tokenizer, len(embedded_model.tokenizer))
    number = {word: i for i, word in enumerate(words)}
    documents = [corpus.embedded_document(1, i) for i in (3, 8)]
    ids = np.array([number[word] for document in documents for word in document.words], np.int32)
    owners = np.repeat([3, 8], [len(document.words) for document in documents])
    offsets = np.concatenate([np.arange(len(document.words)) for document in documents])
    rest = np.zeros(len(ids), np.int64)
    sample = TokenSample(ids, rest - 1, rest - 1, owners, offsets, rest > 0, rest, rest, rest)
    known = predicates(sample, words, 1)
    factors = [factors for document in documents for factors in document.factors]
    assert known.missing is None
    roles = {name for name in known.names if name.startswith("factor: role")}
    assert roles == {f"factor: role = {entry['role']}" for entry in factors}
    place = known.names.index("factor: role = answer")
    assert known.true[:, [place]].toarray().ravel().tolist() == [entry["role"] == "answer" for entry in factors]
    assert "not the embedded corpus's words" in predicates(sample._replace(tokens=ids[::-1].copy()), words, 1).missing


def test_word_pieces_keep_their_spaces():
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return ["\u2581the", "ing", "\u0120dog", None][: len(ids)]

        def batch_decode(self, rows):
            return ["the", "ing", " dog", ""][: len(rows)]

    assert token_texts(Tokenizer(), 4) == [" the", "ing", " dog", ""]


def test_logit_lens_is_the_auroc_of_actual_next_tokens(sample):
    torch.manual_seed(1)
    lens = Unembedding(torch.randn(3, 5), torch.randn(VOCABULARY, 5))
    effects = torch.cat(list(lens.blocks())).numpy()
    fires = np.zeros((TOKENS, 3))
    # The first fires before what it promotes, the second anywhere.
    fires[:, 0] = effects[0][sample.following] > 1.0
    fires[:, 1] = np.random.default_rng(5).random(TOKENS) < 0.1
    found = logit_lens(sample, csc_array(fires), lens)
    for latent in range(2):
        at = fires[:, latent] > 0
        values = effects[latent][sample.following]
        assert found[latent].value == pytest.approx(activation_auroc(values[at], values[~at]))
    assert found[0].value == 1
    assert abs(found[1].value - 0.5) < 0.05
    assert found[2] == (None, "fires, or is silent, on fewer than 10 sampled tokens", None)
    assert [score.reason for score in logit_lens(sample, csc_array(fires), "no way")] == ["no way"] * 3


def test_auroc_counts_ties_half():
    assert activation_auroc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == pytest.approx(3.5 / 4)


def collected(sample_windows, fires):
    """Background windows of random words; latent ``i`` was sampled in ``sample_windows[i]``."""
    rng = np.random.default_rng(6)
    background = rng.integers(0, VOCABULARY, (200, 7)).astype(np.int32)
    tokens = np.stack(sample_windows).astype(np.int32)
    n, count = tokens.shape[:2]
    documents = np.broadcast_to(np.arange(count, dtype=np.int32), (n, count))
    keys = np.ones((n, count), np.float32)
    examples = Examples(tokens, np.zeros(tokens.shape, np.float32), documents, keys)
    zeros = np.zeros(n)
    none = TokenSample(*[np.zeros(0, np.int64)] * 9)
    pool = Background(background, np.arange(200), fires(background))
    return Collected(1, 1, Limits(), zeros, zeros, zeros, zeros, examples, examples, pool, none)


def test_example_embedding_tells_words_in_common_from_none():
    rng = np.random.default_rng(7)
    alike, unlike = rng.integers(0, VOCABULARY, (2, 40, 7))
    alike[:, 3], alike[:, 1] = 21, 22
    found = example_embedding(collected([alike, unlike], lambda windows: [np.zeros(0, np.int64)] * len(windows)), VOCABULARY)
    assert found[0].value > 0.95
    assert abs(found[1].value - 0.5) < 0.2
    assert found[0].details == {"positives": 20, "negatives": 100}


def test_example_embedding_is_a_nearest_mean_classifier():
    windows = np.random.default_rng(10).integers(0, 12, (1, 40, 7))
    found = collected(windows, lambda all_windows: [np.zeros(0, np.int64)] * len(all_windows))
    pool = found.background.tokens
    idf = np.log(201 / (1 + np.array([(pool == token).any(1).sum() for token in range(VOCABULARY)]))) + 1

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    positive, negative = (
        unit(np.stack([np.bincount(row, minlength=VOCABULARY) * idf for row in rows])) for rows in (windows[0], pool)
    )
    direction = unit(positive[::2].mean(0)) - unit(negative[::2].mean(0))
    expected = (np.greater.outer(positive[1::2] @ direction, negative[1::2] @ direction)).mean()
    assert example_embedding(found, VOCABULARY)[0].value == pytest.approx(expected)


def test_example_embedding_needs_windows_without_the_latent():
    windows = np.random.default_rng(8).integers(0, VOCABULARY, (40, 7))
    found = example_embedding(collected([windows], lambda all_windows: [np.zeros(1, np.int64)] * len(all_windows)), VOCABULARY)
    assert found[0].value is None
    assert "fewer than 5 windows" in found[0].reason


def test_tf_idf_is_the_textbook_s():
    from sparsary.eval.features.scores import _idf, _tf_idf

    windows = np.array([[0, 0, 1], [1, 2, -1], [1, 1, 1]], np.int32)
    idf = _idf(windows, 3)
    assert idf == pytest.approx(np.log(4 / (1 + np.array([1, 3, 1]))) + 1)
    row = np.array([2 * idf[0], idf[1], 0])
    assert isinstance(_tf_idf(windows, idf, 3), csr_array)
    assert _tf_idf(windows, idf, 3).toarray()[0] == pytest.approx(row / np.linalg.norm(row))
