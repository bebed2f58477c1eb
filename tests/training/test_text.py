"""Text: sources, tokenising, packing, and the split by document."""

import itertools
import json

import numpy as np
import pytest

from sparsary.training.recipe import TextSection
from sparsary.training.text import Cursor, are_heldout, contexts, is_heldout, pack

BOS = 99


def texts_of(packed):
    return [list(map(int, context.token_ids)) for context in packed]


def test_packing_lays_documents_end_to_end_with_bos_at_heads():
    packed = list(pack([(0, [1, 2, 3]), (1, [4, 5, 6, 7, 8]), (2, [9])], 5, BOS, "context"))
    assert texts_of(packed) == [[BOS, 1, 2, 3, BOS], [BOS, 4, 5, 6, 7]]
    assert packed[0].document_ids.tolist() == [0, 0, 0, 0, 1]
    assert packed[0].positions.tolist() == [-1, 0, 1, 2, -1]
    assert packed[1].positions.tolist() == [-1, 0, 1, 2, 3]
    assert packed[1].cursor == Cursor(1, 4)


def test_bos_before_documents_only():
    packed = pack([(0, [1, 2, 3]), (1, [4, 5, 6, 7, 8]), (2, [9, 10, 11])], 4, BOS, "document")
    assert texts_of(packed) == [[BOS, 1, 2, 3], [BOS, 4, 5, 6], [7, 8, BOS, 9]]


def test_no_bos():
    assert texts_of(pack([(0, [1, 2, 3]), (1, [4, 5])], 2, None, "none")) == [[1, 2], [3, 4]]


def test_separate_contexts_are_padded_and_never_shared():
    packed = list(pack([(0, [1, 2, 3, 4, 5]), (1, [6])], 4, BOS, "context", pad_id=0))
    assert texts_of(packed) == [[BOS, 1, 2, 3], [BOS, 4, 5, 0], [BOS, 6, 0, 0]]
    assert packed[1].document_ids.tolist() == [0, 0, 0, -1]
    assert packed[2].cursor == Cursor(2, 0)


@pytest.mark.parametrize("bos", ["context", "document", "none"])
@pytest.mark.parametrize("pad_id", [None, 0])
def test_packing_goes_on_from_every_cursor_as_if_never_stopped(bos, pad_id):
    generator = np.random.default_rng(0)
    documents = [(i, list(range(100 * i, 100 * i + int(n)))) for i, n in enumerate(generator.integers(1, 17, 40))]
    whole = list(pack(documents, 7, BOS, bos, pad_id=pad_id))
    for number, context in enumerate(whole[:-1]):
        cursor = context.cursor
        rest = list(pack(documents[cursor.document :], 7, BOS, bos, cursor.offset, pad_id))
        assert texts_of(rest) == texts_of(whole[number + 1 :])


def test_every_token_of_every_document_is_packed_once():
    documents = [(i, [1000 * i + j for j in range(n)]) for i, n in enumerate([3, 1, 20, 6, 6, 12])]
    packed = pack(documents, 6, BOS, "context")
    own = [int(t) for context in packed for t, p in zip(context.token_ids, context.positions, strict=True) if p >= 0]
    everything = [t for _, ids in documents for t in ids]
    assert own == everything[: len(own)]
    assert len(everything) - len(own) < 6


def test_heldout_share_is_met_and_nested():
    marks = [is_heldout(i, 0.05) for i in range(20_000)]
    assert abs(np.mean(marks) - 0.05) < 0.005
    assert not any(is_heldout(i, 0.0) for i in range(100))
    assert all(is_heldout(i, 0.2) for i in range(20_000) if marks[i])


def write_sources(folder):
    stories = ["The war lasted.", "Mary went home.", "", "The roll."]
    (folder / "a.txt").write_text("\n\n".join(stories))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": s, "n": 1}) + "\n" for s in stories))
    return [s for s in stories if s]


def section(folder, name, **options):
    return TextSection(source="files", files=(str(folder / name),), context_length=4, **options)


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet"])
def test_files_give_their_documents(tmp_path, embedded_model, name):
    stories = write_sources(tmp_path)
    if name == "c.parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"text": stories}), tmp_path / name)
    tokenizer = embedded_model.tokenizer
    packed = list(contexts(section(tmp_path, name, packing="separate"), tokenizer))
    words = [tokenizer.convert_ids_to_tokens([int(t) for t in c.token_ids if t != tokenizer.pad_token_id]) for c in packed]
    expected = ["<bos> The war lasted", "<bos> .", "<bos> Mary went home", "<bos> .", "<bos> The roll ."]
    assert [" ".join(row) for row in words] == expected


def test_a_txt_separator_may_be_chosen_and_may_straddle_reads(tmp_path, embedded_model):
    (tmp_path / "n.txt").write_text("The" + " war" * 300_000 + "<|end|>Mary")
    found = contexts(section(tmp_path, "n.txt", separator="<|end|>", packing="separate"), embedded_model.tokenizer)
    last = list(found)[-1]
    assert embedded_model.tokenizer.convert_ids_to_tokens(last.token_ids[:2].tolist()) == ["<bos>", "Mary"]
    assert last.document_ids[1] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone\.txt does not exist.*embedded"),
        ("x.csv", "a", r"expected \.txt, \.jsonl, \.parquet, got .*x\.csv"),
        ("x.jsonl", '{"body": "x"}\n', r"x\.jsonl:1: expected a JSON object with the key 'text'.*text\.column"),
        ("x.jsonl", '{"text": "x"}\nnonsense\n', r"x\.jsonl:2: "),
        ("x.jsonl", '{"text": 3}\n', r"x\.jsonl:1: expected text, got int"),
        ("x.parquet", "not parquet", r"could not be had"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, embedded_model, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(contexts(section(tmp_path, name), embedded_model.tokenizer))


def test_a_dataset_that_cannot_be_had_names_the_alternatives(embedded_model, monkeypatch):
    import datasets

    def offline(*_arguments, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'some/set' could not be had .*no network.*embedded"):
        list(contexts(TextSection(source="hub", dataset="some/set"), embedded_model.tokenizer))


def test_a_hub_dataset_is_streamed(embedded_model, monkeypatch):
    import datasets

    calls = []

    def fake(*arguments, **options):
        calls.append((arguments, options))
        return [{"body": "The war lasted."}, {"body": "Mary went home."}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    text = TextSection(source="hub", dataset="some/set", dataset_split="valid", column="body", context_length=5)
    assert len(list(contexts(text, embedded_model.tokenizer))) == 2
    assert calls == [(("some/set", None), {"streaming": True, "trust_remote_code": False, "split": "valid", "revision": None})]
    with pytest.raises(ValueError, match=r"text\.column: expected one of body of some/set, got 'text'"):
        list(contexts(TextSection(source="hub", dataset="some/set"), embedded_model.tokenizer))


def test_heldout_contexts_hold_heldout_documents_only(embedded_model):
    found = itertools.islice(contexts(TextSection(context_length=32), embedded_model.tokenizer, heldout=0.1), 20)
    owners = {int(d) for context in found for d in context.document_ids if d >= 0}
    assert owners
    assert all(is_heldout(d, 0.1) for d in owners)


def test_a_tokenizer_without_bos_is_refused_with_the_remedy():
    class NoBos:
        bos_token_id = None

    with pytest.raises(ValueError, match=r"text\.bos: .*Set text\.bos: none"):
        contexts(TextSection(), NoBos())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.7, 1.0])
def test_whole_arrays_are_split_as_single_documents(share):
    numbers = np.concatenate([np.arange(-1, 3000), np.random.default_rng(0).integers(0, 2**31 - 1, 499)]).astype(np.int32)
    # Not contiguous, and of two dimensions, as documents of contexts are.
    rows = numbers.reshape(2, -1)[:, ::3]
    assert are_heldout(rows, share).tolist() == [[is_heldout(int(number), share) for number in row] for row in rows]
