"""The embedded language: reproducible, tokenised word by word, and labelled truly."""

import pytest

from sparsary.training.embedded import lexicon
from sparsary.training.embedded.corpus import SPLITS, TASKS, embedded_document, task_prompts
from sparsary.training.embedded.train import build_tokenizer


def test_a_document_is_a_function_of_seed_split_and_number():
    assert embedded_document(3, 17) == embedded_document(3, 17)
    assert embedded_document(3, 17) != embedded_document(3, 18)
    assert embedded_document(3, 17) != embedded_document(4, 17)
    assert embedded_document(3, 17, "train") != embedded_document(3, 17, "heldout")
    with pytest.raises(ValueError, match="split: expected one of train, heldout, all, got 'test'"):
        embedded_document(0, 0, "test")


def test_the_first_document_stays_what_the_shipped_model_was_trained_on():
    assert embedded_document(0, 0).text.startswith("The drought lasted from the year 1589 to the year 1590. The young children")


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_returns_the_generators_words(embedded_model, split):
    for tokenizer in (embedded_model.tokenizer, build_tokenizer()):
        for index in range(150):
            found = embedded_document(0, index, split)
            ids = tokenizer(found.text)["input_ids"]
            assert tuple(tokenizer.convert_ids_to_tokens(ids)) == found.words
            assert tokenizer.unk_token_id not in ids
            assert len(found.factors) == len(found.words)


def test_the_vocabulary_is_of_the_promised_size_and_the_shipped_one(embedded_model):
    words = lexicon.vocabulary()
    assert len(set(words)) == len(words)
    assert 300 < len(words) < 2000
    assert embedded_model.tokenizer.convert_ids_to_tokens(list(range(len(words)))) == list(words)


def test_all_tasks_occur_and_every_token_says_task_and_role():
    seen = set()
    for index in range(200):
        for factors in embedded_document(1, index).factors:
            seen.add(factors["task"])
            assert factors["role"]
    assert seen == set(TASKS)


def test_factors_are_true():
    number_of = {form: n for pair in lexicon.NOUNS for n, form in enumerate(pair)}
    verb_number = {form: n for pair in lexicon.VERBS for n, form in enumerate(pair)}
    checked = set()
    for index in range(400):
        found = embedded_document(2, index)
        for word, factors in zip(found.words, found.factors, strict=True):
            if factors["role"] in ("subject", "attractor"):
                assert number_of[word] == factors["number"]
            if factors["role"] == "verb":
                assert verb_number[word] == factors["number"] == factors["subject_number"]
            if "gender" in factors and word in lexicon.NAMES:
                assert (word in lexicon.MALE_NAMES) == (factors["gender"] == "male")
            if factors["task"] == "pronoun" and factors["role"] == "answer":
                assert word in lexicon.PRONOUNS[factors["gender"]]
            if factors["role"] == "start_year":
                assert int(word) == factors["year"]
            checked.add(factors["role"])
    assert {"subject", "attractor", "verb", "start_year", "answer", "indirect_object"} <= checked


def test_answers_are_right():
    for prompt in task_prompts("indirect_object", 100):
        names = [word for word in prompt.words if word in lexicon.NAMES]
        assert len(set(names)) == 2
        assert prompt.answers[0] in names
        assert names.count(prompt.answers[0]) == 1
        assert names.count(prompt.foils[0]) == 2
    for prompt in task_prompts("greater_than", 100):
        start = int(prompt.words[7])
        assert all(int(year) > start for year in prompt.answers)
        assert all(int(year) <= start for year in prompt.foils)
        assert len(prompt.answers) + len(prompt.foils) == 100
    for prompt in task_prompts("induction", 50):
        words = list(prompt.words)
        assert words[words.index(words[-1]) + 1] == prompt.answers[0]
    for prompt in task_prompts("argument_copying", 50):
        assert prompt.answers[0] in prompt.words
        assert prompt.words[-1] == "param"
    with pytest.raises(ValueError, match=r"task: expected one of .*induction.*, got 'ioi'"):
        task_prompts("ioi", 1)


def test_both_name_orders_occur():
    orders = {f["order"] for prompt in task_prompts("indirect_object", 60) for f in prompt.factors if "order" in f}
    assert orders == {"ABBA", "BABA"}


def test_heldout_combinations_are_not_in_training():
    def pairs(split):
        found = set()
        for index in range(3000 if split == "train" else 300):
            subject = None
            for factors in embedded_document(0, index, split).factors:
                if factors["role"] == "subject":
                    subject = factors["entity"]
                if factors["role"] == "attractor":
                    found.add((subject, factors["entity"]))
        return found

    heldout, train = pairs("heldout"), pairs("train")
    assert len(heldout) > 50
    assert not heldout & train
