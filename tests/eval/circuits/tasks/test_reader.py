"""Text as token ids: what comes in front, what a single token is, where words end."""

import pytest

from sparsary.eval.circuits.tasks.reader import PromptEncoder

WORDS = ["Mary", "gave", "a", "ring", "to", "John"]


@pytest.mark.parametrize(("ends", "head"), [(("<bos>", "<eos>"), ["<bos>"]), (("", "<eos>"), []), (("", ""), [])])
def test_what_the_tokenizer_puts_in_front_is_kept_and_what_it_puts_behind_is_not(word_model, ends, head):
    reader = PromptEncoder(word_model(WORDS, ends))
    assert reader.tokenizer.convert_ids_to_tokens(reader.ids("Mary gave")) == [*head, "Mary", " gave"]


def test_the_embedded_model_gets_bos_which_its_tokenizer_does_not_add(embedded_model):
    tokenizer = embedded_model.tokenizer
    assert tokenizer("Mary").tokens() == ["Mary"]
    assert tokenizer.convert_ids_to_tokens(PromptEncoder(embedded_model).ids("Mary, 1732")) == [
        "<bos>",
        "Mary",
        ",",
        "17",
        "32",
    ]


def test_an_answer_is_the_one_token_it_adds(word_model):
    reader = PromptEncoder(word_model(WORDS))
    assert reader.following("Mary gave", " John") == reader.tokenizer.convert_tokens_to_ids(" John")
    with pytest.raises(ValueError, match=r"'John' is not one token after 'Mary gave'.*leading space"):
        reader.following("Mary gave", "John")
    with pytest.raises(ValueError, match=r"' John to' is not one token .*it gives  John  to"):
        reader.following("Mary gave", " John to")
    with pytest.raises(ValueError, match=r"' Zebedee' is not one token .*it gives <unk>"):
        reader.following("Mary gave", " Zebedee")
    with pytest.raises(ValueError, match=r"'Mary Zebedee' has words the tokenizer does not know"):
        reader.ids("Mary Zebedee")


def test_as_many_tokens_more_are_not_enough(word_model):
    # "123" is cut 12, 3: one token more than "1", but not after it.
    assert PromptEncoder(word_model(WORDS)).next_token("1", "23") is None


def test_an_answer_that_changes_the_prompt_s_own_tokens_is_none(gpt2_tokens):
    # GPT-2 has " 1700" as one token: after " 17" it is not "00".
    with pytest.raises(ValueError, match=r"'00' is not one token after 'the year 17': it gives Ġ1700"):
        PromptEncoder(gpt2_tokens).following("the year 17", "00")
    assert len(PromptEncoder(gpt2_tokens).two_digits) == 100


def test_text_comes_back_only_where_it_reads_as_the_same_ids(word_model):
    reader = PromptEncoder(word_model(WORDS))
    ids = reader.ids("Mary gave a ring")
    assert reader.text(ids) == "Mary gave a ring"
    assert reader.text(ids[1:]) is None
    split = [reader.head[0], *reader.tokenizer.convert_tokens_to_ids(["t", "o"])]
    assert reader.text(split) is None


def test_positions_of_words_and_none_where_the_tokenizer_does_not_cut(word_model):
    reader = PromptEncoder(word_model(WORDS))
    assert reader.positions("Mary gave a ring", [4, 9, 7]) == [1, 2, None]


def test_a_model_without_tokenizer_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"gpt2 has no tokenizer"):
        PromptEncoder(tiny_model("gpt2"))
