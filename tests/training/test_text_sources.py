"""Text as people have it: compressed files, folders, patterns, several columns, token ids, and mixes of these."""

import gzip
import itertools
import json

import pytest

from sparsary.training.content import TextDigest, text_record
from sparsary.training.documents import SourceDocument
from sparsary.training.mix import mixed_documents
from sparsary.training.recipe import MixPart, TextSection, check_recipe
from sparsary.training.text import Cursor, contexts, documents
from sparsary.training.tokens import tokenizer_digest

STORIES = ["The war lasted.", "Mary went home.", "The roll."]


def section(*files, **options):
    return TextSection.model_validate({"source": "files", "files": list(map(str, files)), "context_length": 4, **options})


def read(text):
    return [str(document) for _, document in documents(text, 0, lambda _: True)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def compressed_zst(path, data):
    import pyarrow as pa

    with pa.CompressedOutputStream(str(path), "zstd") as out:
        out.write(data)


def test_every_kind_of_file_holds_the_same_documents(tmp_path):
    rows = [{"text": story} for story in STORIES]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(json.dumps(STORIES))
    (tmp_path / "c.json").write_text(lines(rows))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress("\n\n".join(STORIES).encode("utf-16")))
    compressed_zst(tmp_path / "f.jsonl.zst", lines(rows).encode())
    (tmp_path / "notes.md").write_text("not text of ours")
    for name in sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md"):
        assert read(section(tmp_path / name)) == STORIES, name
    assert read(section(tmp_path)) == STORIES * 6
    assert read(section(tmp_path / "[bd].json*")) == STORIES * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.jsonl", r"text.files: expected files that match '.*\*\.jsonl', got none"),
        ("empty", r"text.files: expected files of \.txt, \.json, \.jsonl, \.parquet in the folder .*empty, got none"),
        ("*.md", r"text.files: expected \.txt.*, got .*notes\.md, which '.*\*\.md' matches"),
        ("cut.jsonl.gz", r"text.files: .*cut\.jsonl\.gz could not be read"),
        ("cut.json", r"cut\.json: expected a JSON list of rows, got invalid JSON"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_one_message(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "cut.json").write_text('[{"text": "a"}, ')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines([{"text": "a" * 999}]).encode())[:20])
    with pytest.raises(ValueError, match=message):
        read(section(tmp_path / name))


def test_zst_without_its_package_is_told(tmp_path, monkeypatch):
    compressed_zst(tmp_path / "f.jsonl.zst", b"x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"f\.jsonl\.zst needs the package pyarrow.*Run: pip install pyarrow"):
        read(section(tmp_path / "f.jsonl.zst"))


def test_columns_of_text_are_joined(tmp_path):
    rows = [{"q": "Why?", "a": "So.", "n": 1}, {"q": "", "a": "Only."}, {"q": None, "a": "Null."}, {"q": ["x"], "a": "List."}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    assert read(section(tmp_path / "a.jsonl", column=["q", "a"], separator=" ")) == ["Why? So.", "Only.", "Null."]


def test_an_absent_column_names_the_nearest(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"texts": STORIES, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text.column: expected one of texts, id of .*, got 'text'. Did you mean 'texts'"):
        read(section(tmp_path / "a.parquet"))


def test_token_ids_are_taken_as_they_are_and_checked(tmp_path, embedded_model, caplog):
    import pyarrow as pa
    import pyarrow.parquet

    tokenizer = embedded_model.tokenizer
    ids = [tokenizer(story, add_special_tokens=False)["input_ids"] for story in STORIES]
    (tmp_path / "a.jsonl").write_text(lines({"input_ids": [tokenizer.bos_token_id, *row]} for row in ids))
    (tmp_path / "t.jsonl").write_text(lines({"text": story} for story in STORIES))
    expected = [c.token_ids.tolist() for c in contexts(section(tmp_path / "t.jsonl"), tokenizer)]
    found = contexts(section(tmp_path / "a.jsonl", column="input_ids"), tokenizer)
    assert [c.token_ids.tolist() for c in found] == expected
    assert "nothing records which tokenizer" in caplog.text
    caplog.clear()
    own = tokenizer_digest(tokenizer)
    for recorded in (own, "0" * 64):
        table = pa.table({"input_ids": ids}).replace_schema_metadata({"tokenizer_sha256": recorded})
        pyarrow.parquet.write_table(table, tmp_path / f"{recorded[:3]}.parquet")
    found = contexts(section(tmp_path / f"{own[:3]}.parquet", column="input_ids"), tokenizer)
    assert [c.token_ids.tolist() for c in found] == expected
    assert not caplog.text
    for text in (
        section(tmp_path / "000.parquet", column="input_ids"),
        section(tmp_path / "a.jsonl", column="input_ids", tokenizer_sha256="0" * 64),
    ):
        with pytest.raises(
            ValueError, match=rf"tokenizer_sha256: expected .*\({own[:12]}\), got those of another \(000000000000\)"
        ):
            list(contexts(text, tokenizer))
    (tmp_path / "b.jsonl").write_text(lines([{"input_ids": [5, 1_000_000]}]))
    with pytest.raises(
        ValueError, match=r"text.column: expected token ids below \d+, the vocabulary .*, got 1000000 in document 0"
    ):
        list(contexts(section(tmp_path / "b.jsonl", column="input_ids"), tokenizer))


def parts(*weights):
    return [MixPart(source="files", files=(f"{number}.txt",), weight=weight) for number, weight in enumerate(weights)]


def test_a_mix_has_its_shares_from_the_beginning_on():
    mix = parts(0.5, 0.3, 0.2)

    def endless(part):
        return (SourceDocument(part.files[0][0] * size) for size in itertools.cycle([7, 31, 3, 12]))

    found = list(itertools.islice(mixed_documents(mix, endless), 3000))
    for end in (300, 3000):
        totals = [sum(len(d) for d in found[:end] if d.part == part) for part in range(3)]
        shares = [total / sum(totals) for total in totals]
        assert shares == pytest.approx([0.5, 0.3, 0.2], abs=31 / sum(totals) * 2)
    assert {d[0] for d in found if d.part == 1} == {"1"}


def test_a_mix_ends_with_its_first_part_and_an_empty_one_is_named():
    texts = {"0.txt": ["aaaa"] * 3, "1.txt": ["bb"] * 100}
    found = list(mixed_documents(parts(1, 1), lambda part: map(SourceDocument, texts[part.files[0]])))
    assert [d.part for d in found].count(0) == 3
    assert [d.part for d in found].count(1) in (6, 7, 8)
    with pytest.raises(ValueError, match=r"text.mix.1: expected documents, got none"):
        list(mixed_documents(parts(1, 1), lambda part: map(SourceDocument, ["a"] if part.files[0] == "0.txt" else ["", " "])))


@pytest.fixture
def mixed(tmp_path, load_beside):
    """Return a mix of chats and text, and the tokenizer for it."""
    chats = load_beside("tiny_chats")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "x" * (n % 7 + 1)}]}
        for n in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text(lines(rows))
    (tmp_path / "plain.txt").write_text("\n\n".join(f"plain text {n}" for n in range(80)))
    mix = [
        {"source": "files", "files": [str(tmp_path / "chats.jsonl")], "column": "messages", "weight": 1},
        {"source": "files", "files": [str(tmp_path / "plain.txt")], "weight": 2},
    ]
    return TextSection.model_validate({"mix": mix, "context_length": 24}), chats.chat_tokenizer()


def test_a_mix_resumes_at_any_context(mixed):
    text, tokenizer = mixed
    assert text.source == "mix"
    whole = list(contexts(text, tokenizer))
    assert any(context.roles is None for context in whole) or any((c.roles == -1).all() for c in whole if c.roles is not None)
    for number in (0, 5, len(whole) - 2):
        rest = list(contexts(text, tokenizer, whole[number].cursor))
        assert [c.token_ids.tolist() for c in rest] == [c.token_ids.tolist() for c in whole[number + 1 :]]


def test_the_record_of_a_mix_has_its_shares_and_its_digest_covers_every_part(mixed, tmp_path):
    text, _ = mixed
    digest = TextDigest(text)
    for number, document in documents(text, 0, lambda _: True):
        digest.add(number, document)
    record = digest.up_to(Cursor(60, 0))
    assert record["sha256"] == text_record(text, 60)["sha256"]
    chats, plain = record["characters"].values()
    assert plain / chats == pytest.approx(2, abs=0.2)
    assert record["chat_template"]
    assert digest.up_to(Cursor(40, 0)) == record
    (tmp_path / "plain.txt").write_text("changed\n\n" + (tmp_path / "plain.txt").read_text())
    assert text_record(text, 60)["sha256"] != record["sha256"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"mix": [{"source": "files", "files": ["a.txt"], "weight": 0}]},
            r"text.mix.0.weight: expected .*greater than 0, got 0",
        ),
        ({"mix": [{"source": "files", "files": ["a.txt"], "weight": -1.5}]}, r"text.mix.0.weight: .*greater than 0, got -1.5"),
        ({"mix": [{"source": "hub"}]}, r"text.mix.0.dataset: required when text.mix.0.source is hub"),
        ({"mix": [{"file": ["a.txt"]}]}, r"text.mix.0.file: .*Did you mean 'files'"),
        (
            {"source": "files", "files": ["a.txt"], "mix": [{"source": "embedded"}]},
            r"text.source: expected mix, or none, beside",
        ),
        ({"source": "mix"}, r"text.mix: required when text.source is mix"),
        ({"chat": {"roles": ["asistant"]}}, r"text.chat.roles.0: expected .*'assistant'.*got 'asistant'"),
        ({"packing": "pack_masked", "bos": "none"}, r"text.bos: expected context or document with text.packing: pack_masked"),
    ],
)
def test_mistakes_in_the_text_section_are_told(recipe_values, section, message):
    recipe_values["text"] |= section
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe_values, "recipe.yaml")
