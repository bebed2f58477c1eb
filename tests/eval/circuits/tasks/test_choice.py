"""Multiple choice: prompts of every kind and number of options under GPT-2's tokenizer and under one of words."""

import re

import pytest
import torch

from sparsary.eval.circuits.heads.direct_effects import label_places
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.english.choice import LETTERS, PAIRS, SYMBOLS

PROMPT = re.compile(r"(?:<bos>)?The (\w+) is (\w+)\. What color is the \1\?\n((?:.+ - \w+\n)+)Answer:")


def read(tokenizer, ids):
    """The color asked for, and the options by label, of a prompt."""
    thing, color, lines = PROMPT.fullmatch(tokenizer.decode(ids)).groups()
    return thing, color, dict(line.split(" - ") for line in lines.strip().split("\n"))


@pytest.fixture(scope="module")
def words(word_model):
    """A tokenizer that has our words but for one object and one color."""
    colors = {color for _, color in PAIRS} - {"gold"}
    known = {thing for thing, _ in PAIRS} - {"plum"}
    return word_model([*known, *colors, *"The What Answer is color the".split(), *LETTERS])


@pytest.mark.parametrize(
    "task", ["multiple_choice-2", "multiple_choice", "multiple_choice_random_letters-10", "multiple_choice_symbols-7"]
)
@pytest.mark.parametrize("corruption", ["option_swap", "other_fact", "other_labels"])
def test_the_answer_is_the_label_of_the_option_that_is_stated(gpt2_tokens, task, corruption):
    pairs = make_pairs(task, gpt2_tokens, n=12, corruption=corruption, split="all")
    decode, places = gpt2_tokens.tokenizer.decode, label_places(pairs)
    assert len({int(length) for length in pairs.lengths}) == 1
    for row, [question] in enumerate(pairs.questions):
        _, color, options = read(gpt2_tokens.tokenizer, pairs.clean[row])
        right = next(label for label, option in options.items() if option == color)
        assert [decode([token]) for token in question.answers] == [f" {right}"]
        assert {decode([token]) for token in question.foils} == {f" {label}" for label in options if label != right}
        # The positions of the labels in the prompt, in its order, and the right one among them.
        assert [decode([pairs.clean[row, at]]) for at in places.positions[row]] == list(options)
        assert list(options)[places.right[row]] == right
        _, other, changed = read(gpt2_tokens.tokenizer, pairs.corrupted[row])
        if corruption == "other_labels":
            assert other == color
            assert list(changed.values()) == list(options.values())
            assert all(one != two for one, two in zip(changed, options, strict=True))
        else:
            now = next(label for label, option in changed.items() if option == other)
            assert f" {now}" in {decode([token]) for token in question.foils}
            assert (other == color) == (corruption == "option_swap")
    labels = [list(read(gpt2_tokens.tokenizer, ids)[2]) for ids in pairs.clean]
    assert (len(set(map(tuple, labels))) == 1) == ("_" not in task.removeprefix("multiple_choice"))
    assert all(set(own) <= set(SYMBOLS if "symbols" in task else LETTERS) for own in labels)


def test_every_place_is_right_equally_often(gpt2_tokens):
    right = label_places(make_pairs("multiple_choice", gpt2_tokens, n=200, split="all")).right
    assert torch.bincount(right, minlength=4).min() > 30


def test_other_tokenizers_get_the_words_that_they_have(words):
    pairs = make_pairs("multiple_choice-5", words, n=40, split="all")
    used = {word for ids in pairs.clean for word in read(words.tokenizer, ids)[:2]}
    assert used.isdisjoint({"plum", "gold"})
    assert len(used) > 20


def test_too_few_words_are_named(word_model):
    model = word_model(["The", "What", "Answer", "is", "color", "the", "snow", "white", "coal", "black", *LETTERS])
    with pytest.raises(ValueError, match="expected at least 3 objects and colours that are one token each, got 2"):
        make_pairs("multiple_choice-3", model)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("multiple_choice-11", "task: multiple_choice: expected 2 to 10 options, got 11"),
        ("multiple_choice_symbols-1", "expected 2 to 10 options, got 1"),
        ("ioi-3", "expected a number of options behind one of multiple_choice, .*got 'ioi-3'"),
        ("multiple_chioce", "Did you mean 'multiple_choice'"),
    ],
)
def test_other_names_are_refused(gpt2_tokens, name, said):
    with pytest.raises(ValueError, match=said):
        make_pairs(name, gpt2_tokens)
