"""Chats: templates, the roles of tokens, reasoning, and BOS."""

import json

import numpy as np
import pytest

from sparsary.training.chats import ROLES, chat_template
from sparsary.training.recipe import ChatSection, TextSection
from sparsary.training.text import contexts, documents

QWEN = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ c }}{% else %}{{ c }}{% endif %}<|end|>\n{% endfor %}"
)
REASONED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nadd again\n</think>\n\n6"},
]


@pytest.fixture(scope="module")
def chats(load_beside):
    return load_beside("tiny_chats")


@pytest.fixture(scope="module")
def tokenizer(chats):
    return chats.chat_tokenizer()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def section(file, **options):
    options = {"column": "messages", "packing": "separate", "context_length": 128} | options
    return TextSection.model_validate({"source": "files", "files": [file], **options})


def words_of(tokenizer, context, role):
    return tokenizer.decode(context.token_ids[context.roles == ROLES.index(role)].tolist())


def test_tokens_are_those_of_the_template_and_roles_are_exactly_the_contents(chats, tokenizer, tmp_path):
    text = section(write_rows(tmp_path / "a.jsonl", [{"messages": chats.CHAT}]))
    (context,) = contexts(text, tokenizer)
    there = context.document_ids >= 0
    expected = tokenizer.apply_chat_template(chats.CHAT, tokenize=True)["input_ids"]
    # The template's own BOS is the only one.
    assert context.token_ids[there].tolist() == expected
    assert (context.token_ids == tokenizer.bos_token_id).sum() == 1
    # "assistant" is in the headers and in the user's words, too.
    assert words_of(tokenizer, context, "assistant") == "assistant"
    assert words_of(tokenizer, context, "user") == "user or assistant?"
    assert words_of(tokenizer, context, "system") == "Be brief."
    rest = np.isin(context.roles[there], [ROLES.index(role) for role in ("assistant", "user", "system")], invert=True)
    assert (context.roles[there][rest] == ROLES.index("template")).all()


@pytest.mark.parametrize("bos", ["context", "document", "none"])
@pytest.mark.parametrize("packing", ["pack", "pack_masked", "separate"])
def test_bos_never_follows_bos(chats, tokenizer, tmp_path, bos, packing):
    rows = [{"messages": chats.CHAT}, {"messages": [*chats.CHAT[1:]]}] * 3
    text = section(write_rows(tmp_path / "a.jsonl", rows), bos=bos, packing=packing, context_length=40)
    found = list(contexts(text, tokenizer))
    assert len(found) > 3
    for context in found:
        is_bos = context.token_ids == tokenizer.bos_token_id
        assert not (is_bos[1:] & is_bos[:-1]).any()
    begins = [c for c in found if 0 in c.positions.tolist()]
    assert all((c.token_ids == tokenizer.bos_token_id).any() for c in begins)


def test_a_text_that_begins_with_bos_gets_no_second_one(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("<s>one\n\ntwo</s>")
    text = section(str(tmp_path / "a.txt"), context_length=8)
    rows = [tokenizer.decode(c.token_ids.tolist()).replace("<pad>", "") for c in contexts(text, tokenizer)]
    assert rows == ["<s>one", "<s>two</s>"]


@pytest.mark.parametrize(
    ("thinking", "words", "there"),
    [
        ("keep", ["2+2?", "3+3?", "4", "add again", "6"], "<think>\nadd again\n</think>"),
        ("drop", ["2+2?", "3+3?", "4", "6"], ""),
    ],
)
def test_reasoning_is_kept_as_the_template_has_it_or_dropped(chats, thinking, words, there):
    tokenizer = chats.chat_tokenizer(QWEN)
    text, spans = chat_template(ChatSection(thinking=thinking), tokenizer).rendered(REASONED)
    assert sorted(text[span.start : span.end] for span in spans) == sorted(words)
    assert ("<think>" in text) == bool(there)
    assert there in text


def test_columns_of_other_spellings_are_chats(chats, tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    own = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    write_rows(tmp_path / "a.jsonl", [{"messages": shared}, {"messages": []}])
    # Its structs give every message all keys, null where a message has none.
    ragged = [[{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yes", "name": "x"}]]
    pyarrow.parquet.write_table(pa.table({"messages": ragged}), tmp_path / "b.parquet")
    texts = [section(str(tmp_path / name)) for name in ("a.jsonl", "b.parquet")]
    found = [document for text in texts for _, document in documents(text, 0, lambda _: True)]
    assert [[m["role"] for m in json.loads(text)] for text in found] == [["user", "assistant"]] * 2
    assert [m["name"] for m in json.loads(found[1]) if "name" in m] == ["x"]
    either = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }};{% endfor %}"
    text, spans = chat_template(ChatSection(), chats.chat_tokenizer(either)).rendered(own)
    assert text == "hi;yes;"
    assert [text[s.start : s.end] for s in spans] == ["hi", "yes"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"text.chat.template: expected a chat template for a column of messages, got none.*Give a Jinja file"),
        ("{% for m in messages %}", r"text.chat.template: expected Jinja, got an error in line 1"),
        ("{{ raise_exception('no system role') }}", r"document 0: expected a chat that .* takes, got .*no system role"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", r"contents are not found"),
    ],
)
def test_templates_that_do_not_fit_are_told_in_one_message(chats, tmp_path, template, message):
    text = section(write_rows(tmp_path / "a.jsonl", [{"messages": chats.CHAT}]), on_bad_row="error")
    with pytest.raises(ValueError, match=message):
        list(contexts(text, chats.chat_tokenizer(template)))


def test_a_chat_that_the_template_refuses_is_skipped_and_the_rest_read(chats, tmp_path, caplog):
    refusing = "{% if messages|length == 1 %}{{ raise_exception('alone') }}{% endif %}" + chats.TEMPLATE
    rows = [{"messages": chats.CHAT}, {"messages": chats.CHAT[:1]}, {"messages": chats.CHAT}]
    text = section(write_rows(tmp_path / "a.jsonl", rows))
    found = list(contexts(text, chats.chat_tokenizer(refusing)))
    assert [c.document_ids[1] for c in found] == [0, 2]
    assert "document 1" in caplog.text
    assert "alone" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"a.jsonl:1: expected the role .*assistant.*, got 'narrator'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"a.jsonl:1: expected the content of a message as text.*got int"),
        ({"message": []}, r"with the key 'messages', got one with message\. .*Did you mean 'message'"),
    ],
)
def test_unreadable_chats_are_named_with_their_line(tokenizer, tmp_path, row, message):
    text = section(write_rows(tmp_path / "a.jsonl", [row]), on_bad_row="error")
    with pytest.raises(ValueError, match=message):
        list(contexts(text, tokenizer))


def test_a_template_may_be_a_file(chats, tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    text = section(write_rows(tmp_path / "a.jsonl", [{"messages": chats.CHAT}]), chat={"template": str(tmp_path / "t.jinja")})
    (context,) = contexts(text, tokenizer)
    assert tokenizer.decode(context.token_ids.tolist()).startswith("<s>[Be brief.][ user or")
    gone = section(text.files[0], chat={"template": "nowhere.jinja"})
    with pytest.raises(ValueError, match=r"text.chat.template: expected 'tokenizer' or a file, got nowhere.jinja"):
        list(contexts(gone, tokenizer))
