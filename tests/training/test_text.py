"""Text: sources, tokenising, packing, and the split by document."""

import itertools
import json

import numpy as np
import pytest

from sparsary.training import text_files
from sparsary.training.bad_rows import HALF_PAIR, NOT_UTF8, BadTexts
from sparsary.training.recipe import TextSection
from sparsary.training.text import Cursor, are_heldout, contexts, documents, is_heldout, pack

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


def test_a_txt_separator_may_be_chosen_and_may_straddle_reads(tmp_path, embedded_model, monkeypatch):
    monkeypatch.setattr(text_files, "READ_CHARACTERS", 1024)
    (tmp_path / "n.txt").write_text("The" + " war" * 255 + "<|end|>Mary")
    found = contexts(section(tmp_path, "n.txt", separator="<|end|>", packing="separate"), embedded_model.tokenizer)
    last = list(found)[-1]
    assert embedded_model.tokenizer.convert_ids_to_tokens(last.token_ids[:2].tolist()) == ["<bos>", "Mary"]
    assert last.document_ids[1] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone\.txt does not exist.*embedded"),
        ("x.csv", "a", r"expected \.txt, \.json, \.jsonl, \.parquet, got .*x\.csv"),
        ("x.jsonl", '{"body": "x"}\n', r"x\.jsonl:1: expected a JSON object with the key 'text'.*text\.column"),
        ("x.jsonl", '{"text": 3}\n', r"x\.jsonl:1: expected text, got int"),
        ("x.jsonl", "nonsense\n", r"x\.jsonl:1: expected a JSON object with the key 'text'"),
        ("x.parquet", "not parquet", r"x\.parquet: row 0: expected a parquet file, got a damaged one"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, embedded_model, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(contexts(section(tmp_path, name), embedded_model.tokenizer))


STORIES = ["The war lasted.", "Mary went home.", "The roll."]


def read(section, bad=None):
    return [text for _, text in documents(section, 0, lambda number: True, bad)]


def jsonl(rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


ROWS = [{"text": story} for story in STORIES]
BAD_FILES = {
    "blank lines": ("a.jsonl", jsonl(["", ROWS[0], "  ", *ROWS[1:], "", ""]), {}),
    "windows": ("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).replace("\n", "\r\n").encode(), {}),
    "utf-16": ("a.jsonl", jsonl(ROWS).encode("utf-16"), {}),
    "utf-16 text": ("a.txt", "\n\n".join(STORIES).encode("utf-16"), {}),
    "utf-32": ("a.jsonl", jsonl(ROWS).encode("utf-32"), {}),
    "bom text": ("a.txt", b"\xef\xbb\xbf" + "\n\n".join(STORIES).encode(), {}),
    "null": ("a.jsonl", jsonl([ROWS[0], {"text": None}, *ROWS[1:]]), {"rows with null in place of text": 1}),
    "number, list": ("a.jsonl", jsonl([{"text": 3}, *ROWS, {"text": ["x"]}]), {"rows with int in place of text": 1}),
    "no key": ("a.jsonl", jsonl([{"body": "x"}, *ROWS, "[1, 2]"]), {"lines that are no JSON object with the key 'text'": 2}),
    "cut off": ("a.jsonl", jsonl([*ROWS, '{"text": "The']), {"lines that are no JSON object with the key 'text'": 1}),
    "deep": ("a.jsonl", jsonl(["[" * 100_000, *ROWS]), {"lines that are no JSON object with the key 'text'": 1}),
    "NaN": ("a.jsonl", jsonl(['{"text": NaN}', *ROWS]), {"rows with float in place of text": 1}),
    "half an emoji": ("a.jsonl", jsonl([{"text": STORIES[0] + "\ud83d"}, *ROWS[1:]]), {HALF_PAIR: 1}),
    "whole emoji": ("a.jsonl", jsonl([{"text": STORIES[0] + "\U0001f600"}, *ROWS[1:]]), {}),
    "latin-1": ("a.jsonl", jsonl(['{"text": "caf\u00e9"}', *ROWS[1:]]).encode("latin-1"), {NOT_UTF8: 1}),
    "latin-1 text": ("a.txt", "\n\n".join(["caf\u00e9", *STORIES[1:]]).encode("latin-1"), {NOT_UTF8: 1}),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_can_be_read_is_read_and_the_rest_counted(tmp_path, case):
    name, content, counts = BAD_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text, bad = section(tmp_path, name), BadTexts(TextSection())
    found = read(text, bad)
    assert [story[:3] for story in found] == ["caf" if "latin" in case else "The", "Mar", "The"]
    assert ("\ufffd" in found[0]) == bool({NOT_UTF8, HALF_PAIR} & counts.keys())
    assert "\ufeff" not in "".join(found)
    assert counts.items() <= dict(bad.until(None)).items()
    assert bad.bad == sum(bad.until(None).values())
    # Reading once more counts nothing twice.
    read(text, bad)
    assert counts.items() <= dict(bad.until(None)).items()
    strict = section(tmp_path, name, on_bad_row="error")
    if counts:
        with pytest.raises(ValueError, match=r"a\.(jsonl|txt):[1-5]: expected .*Or set text\.on_bad_row: skip"):
            read(strict)
    else:
        assert read(strict) == found


def test_rows_of_parquet_are_read_one_by_one(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    raw = pa.array([b"The war.", None, b"caf\xe9", b"The roll."], pa.binary())
    kinds = {"string": raw.view(pa.string()), "binary": raw, "large": raw.cast(pa.large_binary()).view(pa.large_string())}
    for kind, column in kinds.items():
        pyarrow.parquet.write_table(pa.table({"text": column, "n": [1, 2, 3, 4]}), tmp_path / f"{kind}.parquet")
        bad = BadTexts(TextSection())
        assert read(section(tmp_path, f"{kind}.parquet"), bad) == ["The war.", "caf\ufffd", "The roll."]
        assert bad.until(None) == {"rows with null in place of text": 1, NOT_UTF8: 1}
    named = pa.table({"text": pa.array(["The war.", "The roll."]).dictionary_encode()})
    pyarrow.parquet.write_table(named, tmp_path / "named.parquet")
    assert read(section(tmp_path, "named.parquet")) == ["The war.", "The roll."]
    with pytest.raises(ValueError, match=r"text\.column: expected one of text, n of .*large\.parquet, got 'body'"):
        read(section(tmp_path, "large.parquet", column="body"))
    whole = (tmp_path / "large.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.parquet: row 0: expected a parquet file, got a damaged one"):
        read(section(tmp_path, "cut.parquet"))


@pytest.mark.parametrize(
    ("share", "bad_rows", "passes"), [(0.05, 40, True), (0.05, 60, False), (0.0, 1, False), (0.5, 400, True)]
)
def test_more_bad_rows_than_the_share_stop_with_file_line_and_remedy(tmp_path, share, bad_rows, passes):
    generator = np.random.default_rng(0)
    # Never more than the share among the first so many: they come late.
    rows = [{"text": "x"}] * 500 + [{"text": None} if i < bad_rows else {"text": "x"} for i in generator.permutation(500)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    text = section(tmp_path, "a.jsonl", max_bad_share=share)
    if passes:
        assert len(read(text)) == 1000 - bad_rows
        return
    first = next(number for number, row in enumerate(rows, 1) if row["text"] is None)
    message = (
        rf"a\.jsonl:{first}: expected text, got null\. [\d,]+ of [\d,]+ rows are bad, above text\.max_bad_share = {share:g}"
    )
    with pytest.raises(ValueError, match=message + r".*text\.column"):
        read(text)


def test_bad_rows_do_not_move_documents_and_are_known_by_place(tmp_path, embedded_model):
    """Contexts are those of the file without them, from every cursor too, and so many are behind each cursor."""
    rows = [{"text": f"The war lasted from {year} ."} for year in range(40)]
    (tmp_path / "clean.jsonl").write_text(jsonl(rows))
    mixed = [bad for i, row in enumerate(rows) for bad in ([row, {"text": None}] if i % 20 == 3 else [row])]
    (tmp_path / "mixed.jsonl").write_text(jsonl(mixed))
    expected = list(contexts(section(tmp_path, "clean.jsonl"), embedded_model.tokenizer))
    text, bad = section(tmp_path, "mixed.jsonl"), BadTexts(TextSection())
    found = list(contexts(text, embedded_model.tokenizer, bad=bad))
    assert texts_of(found) == texts_of(expected)
    assert [context.cursor for context in found] == [context.cursor for context in expected]
    for number, context in enumerate(found, 1):
        behind = sum(bad.until(context.cursor.document).values())
        assert behind == (context.cursor.document >= 4) + (context.cursor.document >= 24)
        again = BadTexts(TextSection())
        rest = contexts(text, embedded_model.tokenizer, context.cursor, bad=again)
        assert texts_of(rest) == texts_of(found[number:])
        assert sum(again.until(context.cursor.document).values()) == behind


def test_a_data_set_that_breaks_off_is_named_with_its_row(monkeypatch):
    import datasets

    def broken():
        yield {"text": "The war."}
        raise ConnectionResetError("peer gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken())
    with pytest.raises(ValueError, match=r"some/set: row 1 could not be read \(ConnectionResetError: peer gone\).*continues"):
        read(TextSection(source="hub", dataset="some/set"))


def test_a_dataset_that_cannot_be_had_names_the_alternatives(embedded_model, monkeypatch):
    import datasets

    def offline(*_arguments, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"'some/set' could not be downloaded from the Hugging Face Hub .*no network.*embedded"
    ):
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
