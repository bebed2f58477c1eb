"""The bilingual corpus: twins of every word, documents of one language, and a model that is made whole or not at all."""

import itertools
import json

import pytest
import torch

from sparsary.training.embedded import MODEL_DIR, bilingual, lexicon
from sparsary.training.embedded.bilingual import (
    FIRST,
    NEITHER,
    SECOND,
    bilingual_document,
    bilingual_documents,
    bilingual_vocabulary,
    make_bilingual,
    token_batches,
    untrained_bilingual,
)
from sparsary.training.embedded.train import build_tokenizer


def test_every_word_has_a_twin_and_nothing_else_is_doubled():
    words = bilingual_vocabulary()
    old = lexicon.vocabulary()
    assert words[: len(old)] == old
    assert len(set(words)) == len(words)
    assert {word[:-1] for word in words[len(old) :]} == {word for word in old if word.isalpha()}


def test_a_document_is_the_same_in_both_languages_word_by_word():
    for index in range(20):
        first, second = (bilingual_document(0, index, language=language) for language in (FIRST, SECOND))
        assert len(first.words) == len(second.words)
        for one, other in zip(first.words, second.words, strict=True):
            assert other == (one + "u" if one.isalpha() else one)


def test_documents_are_of_one_language_in_the_shares_that_are_said():
    counts = dict.fromkeys((FIRST, SECOND, NEITHER), 0)
    for document in itertools.islice(bilingual_documents(3), 2000):
        counts[document.language] += 1
        letters = [word for word in document.words if word.isalpha()]
        if document.language == NEITHER:
            assert not letters
        else:
            # No word of the first language ends like a twin.
            twins = set(letters) & set(bilingual_vocabulary()[len(lexicon.vocabulary()) :])
            assert twins == (set(letters) if document.language == SECOND else set())
    assert counts[NEITHER] / 2000 == pytest.approx(0.1, abs=0.03)
    assert counts[SECOND] / (counts[FIRST] + counts[SECOND]) == pytest.approx(0.2, abs=0.04)


def test_the_tokenizer_splits_text_into_the_words():
    tokenizer = build_tokenizer(bilingual_vocabulary())
    for document in itertools.islice(bilingual_documents(5), 60):
        assert tuple(tokenizer.convert_ids_to_tokens(tokenizer(document.text)["input_ids"])) == document.words


def test_batches_hold_a_document_in_each_context_behind_bos():
    batch = next(token_batches(0, 4))
    words = bilingual_vocabulary()
    assert batch.shape[0] == 4
    assert (batch[:, 0] == words.index("<bos>")).all()
    assert (batch[:, 1:] != words.index("<bos>")).all()


def test_the_untrained_model_predicts_words_as_the_embedded_model_does():
    from transformers import GPT2LMHeadModel

    model, old = untrained_bilingual().eval(), GPT2LMHeadModel.from_pretrained(MODEL_DIR, trust_remote_code=False).eval()
    ids, known = torch.tensor([[1, 20, 21, 22]]), len(lexicon.vocabulary())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :known], old(ids).logits)


def test_the_folder_is_made_whole_and_then_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(bilingual, "CORPUS_DOCUMENTS", 30)
    monkeypatch.setattr(bilingual, "bilingual_scores", lambda model: {})
    lines = []
    out = make_bilingual(tmp_path / "bilingual", steps=2, report=lines.append)
    assert lines[0].startswith("step 2 loss")
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "tokenizer.json", "corpus.jsonl", "second.jsonl"}
    rows = [json.loads(line) for line in (out / "second.jsonl").read_text().splitlines()]
    assert {row["language"] for row in rows} == {SECOND}
    assert make_bilingual(out, steps=0) == out
    monkeypatch.setattr(bilingual, "write_texts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_bilingual(tmp_path / "other", steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bilingual"]
