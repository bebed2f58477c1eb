"""Held-out text in two halves: as much as was asked for, or all there is."""

import json
from pathlib import Path

import pytest

from sparsary.eval.heldout import EvalData, Halves, eval_shortfalls
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.recipe import HarvestSection, TextSection

LENGTH = 32


@pytest.fixture
def data(embedded_model, tmp_path):
    """Held-out text of so many documents, each made of some of the corpus's."""

    def build(documents, joined=1, heldout=0.999):
        path = tmp_path / "text.jsonl"
        texts = [" ".join(embedded_document(1, joined * number + i).text for i in range(joined)) for number in range(documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        text = TextSection(source="files", files=(str(path),), context_length=LENGTH)
        return EvalData(embedded_model, text, HarvestSection(tokens=1, heldout=heldout, exclude_leading=2))

    return build


def read(halves: Halves):
    """Tokens and documents of both halves."""
    fitted, scored = set(), set()
    for piece in halves.fit():
        fitted |= piece.documents
    for piece in halves.score():
        scored |= piece.documents
    return (halves.fitted, halves.scored), fitted & scored


def test_of_enough_text_half_of_what_was_asked_for_fits(data):
    halves = data(200).halves(2000)
    assert (halves.fit_tokens, halves.score_tokens, halves.size, halves.within) == (1000, 1000, 8, False)
    (fitted, scored), shared = read(halves)
    assert 1000 <= fitted < 1000 + 8 * LENGTH
    assert 1000 <= scored < 1000 + 8 * LENGTH
    assert not shared


@pytest.mark.parametrize("asked", [5000, 80_000])
def test_of_too_little_text_half_of_what_there_is_fits(data, asked):
    where = data(60)
    have = sum(int(piece.kept.sum()) for piece in where.pieces(where.halves(10).scored_from, 10**9))
    assert have < asked
    (fitted, scored), shared = read(where.halves(asked))
    # The rest of one document belongs to neither.
    assert abs(fitted - have / 2) < 8 * LENGTH
    assert scored > have / 2 - 8 * LENGTH
    assert fitted + scored > 0.9 * have
    assert not shared


def test_nearly_as_much_as_there_is_leaves_as_much_to_score(data):
    where = data(60)
    have = sum(int(piece.kept.sum()) for piece in where.pieces(where.halves(10).scored_from, 10**9))
    below, above = (read(where.halves(asked))[0] for asked in (have - 10, have + 10))
    assert abs(below[1] - above[1]) < 0.2 * have


@pytest.mark.parametrize(("documents", "joined"), [(1, 60), (2, 30)])
def test_too_few_documents_are_cut(data, documents, joined):
    (fitted, scored), shared = read(data(documents, joined).halves(50_000))
    assert min(fitted, scored) > 0.35 * (fitted + scored)
    assert shared or documents == 2


def test_one_long_document_before_a_short_one_is_cut(data, tmp_path):
    where = data(2)
    texts = [" ".join(embedded_document(1, number).text for number in range(100)), embedded_document(1, 200).text]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    halves = where.halves(2000)
    (fitted, scored), shared = read(halves)
    assert halves.within
    assert min(fitted, scored) >= 900
    assert shared == {0}


def test_without_held_out_documents_the_remedies_are_named(data):
    with pytest.raises(ValueError, match=r"expected held-out documents, got none\. Raise harvest\.heldout.* --text FILE"):
        read(data(20, heldout=1e-9).halves(1000))


def test_one_context_leaves_nothing_to_score(data):
    where = data(4, heldout=0.999)
    (path,) = where.text.files
    words = " ".join(embedded_document(1, number).text for number in range(9)).split()
    Path(path).write_text(json.dumps({"text": " ".join(words[: LENGTH + 4])}))
    with pytest.raises(ValueError, match="none was left to score"):
        read(where.halves(1000))


def test_the_embedded_corpus_is_not_counted(embedded_model):
    where = EvalData(embedded_model, TextSection(context_length=LENGTH), HarvestSection(tokens=1))
    assert where.halves(10**9).fit_tokens == 5 * 10**8


def test_what_an_evaluation_lacked_is_told():
    assert eval_shortfalls(1000, 512, 0) == []
    (few,) = eval_shortfalls(1000, 300, 0)
    assert not few.doubtful
    assert eval_shortfalls(1000, 200, 0)[0].doubtful
    (shared,) = eval_shortfalls(1000, 512, 1)
    assert shared.doubtful
