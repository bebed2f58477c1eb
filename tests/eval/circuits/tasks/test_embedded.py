"""Tasks in the embedded language: corruptions do what they say, to the prompt and to the model."""

import pytest
import torch

from sparsary.eval.circuits.tasks import TASKS, competence, make_pairs
from sparsary.training.embedded import lexicon

NAMES = [name for name, task in TASKS.items() if task.embedded is not None]


def kinds(name):
    return TASKS[name].embedded.corruptions


def text(model, ids):
    return model.tokenizer.convert_ids_to_tokens(ids.tolist())


def word(model, pairs, row, role, which="clean"):
    return text(model, getattr(pairs, which)[row])[pairs.roles[row][role]]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_begin_with_bos_differ_and_share_their_clean_prompts(embedded_model, name):
    pairs = {kind.name: make_pairs(name, embedded_model, n=30, seed=3, corruption=kind.name) for kind in kinds(name)}
    first = next(iter(pairs.values()))
    assert make_pairs(name, embedded_model, n=30, seed=3).corruption == first.corruption
    assert len({tuple(row) + q for row, q in zip(first.clean.tolist(), first.questions, strict=True)}) == 30
    for kind, made in pairs.items():
        assert made.task == name
        assert made.corruption == kind
        assert torch.equal(made.clean, first.clean)
        assert (made.clean[:, 0] == embedded_model.tokenizer.bos_token_id).all()
        assert ((made.clean != made.corrupted) & made.valid).any(1).all()
        assert torch.equal(made.clean[~made.valid], made.corrupted[~made.valid])
        assert all(questions[-1].position == length - 1 for questions, length in zip(made.questions, made.lengths, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_answers_corrupted_prompts_as_their_effect_says(embedded_model, name):
    for kind in kinds(name):
        pairs = make_pairs(name, embedded_model, n=14, seed=1, corruption=kind.name)
        found = competence(embedded_model, pairs)
        assert found.accuracy > 0.95, kind
        right = float(pairs.right(embedded_model.logits(pairs.corrupted)).mean())
        if kind.effect == "keeps":
            assert right > 0.85, kind
        if kind.effect == "flips":
            assert right < 0.1 or name == "induction", kind
        if kind == kinds(name)[0]:
            assert found.difference > 0.5 * found.clean, kind
            assert found.difference > 5 * found.difference_error, kind


def test_roles_are_where_the_words_are(embedded_model):
    pairs = make_pairs("ioi", embedded_model, n=20)
    for row, roles in enumerate(pairs.roles):
        [question] = pairs.questions[row]
        named = {role: word(embedded_model, pairs, row, role) for role in ("IO", "S1", "S2")}
        assert {named["S1"], named["IO"]} <= set(lexicon.NAMES)
        assert named["S1"] == named["S2"] != named["IO"]
        assert embedded_model.tokenizer.convert_tokens_to_ids([named["IO"], named["S1"]]) == [
            *question.answers,
            *question.foils,
        ]
        assert roles["S1+1"] == roles["S1"] + 1
        assert roles["end"] == question.position
        assert word(embedded_model, pairs, row, "S2", "corrupted") == named["IO"]


@pytest.mark.parametrize(
    ("corruption", "io", "s1", "s2"),
    [
        ("abc", "new", "new", "new"),
        ("s2_random", "IO", "S1", "new"),
        ("io_random", "new", "S1", "S1"),
        ("s_random", "IO", "new", "new"),
        ("position_flip", "S1", "IO", "S1"),
        ("s2_io", "IO", "S1", "IO"),
    ],
)
def test_names_take_the_places_that_the_corruption_names(embedded_model, corruption, io, s1, s2):
    pairs = make_pairs("ioi", embedded_model, n=20, corruption=corruption)
    for row in range(len(pairs)):
        before = {word(embedded_model, pairs, row, role): role for role in ("IO", "S1")}
        after = [word(embedded_model, pairs, row, role, "corrupted") for role in ("IO", "S1", "S2")]
        assert [before.get(name, "new") for name in after] == [io, s1, s2]
        assert len(set(after)) == (3 if corruption in ("abc", "s2_random") else 2)


@pytest.mark.parametrize(("corruption", "role"), [("subject_flip", "subject"), ("attractor_flip", "attractor")])
def test_the_clause_s_verb_agrees_after_a_flip(embedded_model, corruption, role):
    pairs = make_pairs("agreement_across_rc", embedded_model, n=40, corruption=corruption)
    number_of = {form: number for pair in (*lexicon.NOUNS, *lexicon.TRANSITIVE_VERBS) for number, form in enumerate(pair)}
    flipped = 0
    for row, roles in enumerate(pairs.roles):
        governor = "attractor" if roles["attractor"] < roles["inner_verb"] else "subject"
        words = {one: word(embedded_model, pairs, row, one, "corrupted") for one in ("subject", "attractor", "inner_verb")}
        assert number_of[words["inner_verb"]] == number_of[words[governor]]
        assert number_of[words[role]] != number_of[word(embedded_model, pairs, row, role)]
        flipped += governor == role
    assert 0 < flipped < 40


def test_within_the_clause_the_verb_asked_for_is_the_clause_s(embedded_model):
    pairs = make_pairs("agreement_rc", embedded_model, n=30)
    plurals = [plural for _, plural in lexicon.NOUNS]
    for row, [question] in enumerate(pairs.questions):
        number = word(embedded_model, pairs, row, "attractor") in plurals
        expected = [pair[number] for pair in lexicon.TRANSITIVE_VERBS]
        assert text(embedded_model, torch.tensor(question.answers)) == expected
        assert pairs.roles[row]["attractor"] == question.position


def test_lists_are_asked_about_at_every_place_and_reordered_so_that_each_answer_is_another(embedded_model):
    pairs = make_pairs("induction", embedded_model, n=20)
    for row, questions in enumerate(pairs.questions):
        clean, corrupted = (text(embedded_model, ids[row]) for ids in (pairs.clean, pairs.corrupted))
        places = [at for role, at in pairs.roles[row].items() if role.startswith("listed_")]
        items, order = [clean[at] for at in places], [corrupted[at] for at in places]
        assert sorted(items) == sorted(order)
        asked = [clean[question.position] for question in questions]
        assert asked == items[:-1]
        for question, item in zip(questions, asked, strict=True):
            [answer], foils = (
                text(embedded_model, torch.tensor(question.answers)),
                text(embedded_model, torch.tensor(question.foils)),
            )
            assert answer == items[items.index(item) + 1]
            assert sorted([answer, *foils]) == sorted(items)
            assert order[order.index(item) + 1] in foils


def test_a_possessive_takes_the_gender_of_the_new_name(embedded_model):
    pairs = make_pairs("pronoun", embedded_model, n=60)
    seen = 0
    for row, roles in enumerate(pairs.roles):
        name = word(embedded_model, pairs, row, "person", "corrupted")
        assert (name in lexicon.MALE_NAMES) != (word(embedded_model, pairs, row, "person") in lexicon.MALE_NAMES)
        if "possessive" in roles:
            seen += 1
            gender = "male" if name in lexicon.MALE_NAMES else "female"
            assert word(embedded_model, pairs, row, "possessive", "corrupted") == lexicon.PRONOUNS[gender][2]
    assert seen > 5


def test_every_argument_of_either_prompt_but_the_answer_is_a_foil(embedded_model):
    pairs = make_pairs("docstring", embedded_model, n=20)
    assert pairs.metric == "max_logit_diff"
    for row, [question] in enumerate(pairs.questions):
        there = {one for ids in (pairs.clean, pairs.corrupted) for one in text(embedded_model, ids[row])}
        expected = (there & set(lexicon.ARGUMENTS)) - set(text(embedded_model, torch.tensor(question.answers)))
        assert set(text(embedded_model, torch.tensor(question.foils))) == expected


def test_years_are_right_if_they_exceed_the_first(embedded_model):
    pairs = make_pairs("greater_than", embedded_model, n=20)
    for row, [question] in enumerate(pairs.questions):
        start = int(word(embedded_model, pairs, row, "start_year"))
        assert [int(year) for year in text(embedded_model, torch.tensor(question.answers))] == list(range(start + 1, 100))
        assert len(question.answers) + len(question.foils) == 100
        assert word(embedded_model, pairs, row, "start_year", "corrupted") == "01"


def test_splits_and_seeds_give_other_prompts(embedded_model):
    made = {
        (split, seed): set(map(tuple, make_pairs("ioi", embedded_model, n=20, seed=seed, split=split).clean[:, :12].tolist()))
        for split, seed in (("heldout", 0), ("heldout", 1), ("train", 0))
    }
    assert len(set.union(*made.values())) == 60


def test_prompts_of_one_length(embedded_model):
    assert not make_pairs("ioi", embedded_model, n=50).equal
    pairs = make_pairs("ioi", embedded_model, n=50, one_length=True)
    assert pairs.equal
    assert len(pairs) == 50


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ioj", {}, "task: expected one of ioi, .*docstring in the embedded language, or a .jsonl.* Did you mean 'ioi'"),
        ("colored_objects", {}, "exists only in English, and embedded reads another. Expected one of ioi, "),
        ("ioi", {"corruption": "s2io"}, "corruption: expected one of s2_io, abc, .* for ioi, got 's2io'. Did you mean 's2_io'"),
        ("ioi", {"split": "test"}, "split: expected one of train, heldout, all, got 'test'"),
        ("ioi", {"metric": "kl"}, "metric: expected one of logit_diff"),
        ("ioi", {"n": 0}, "n: expected at least 1, got 0"),
        ("ioi", {"n": None}, "n: expected a number of pairs, got None"),
    ],
)
def test_what_does_not_exist_is_refused(embedded_model, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pairs(name, embedded_model, **arguments)


def test_more_pairs_than_there_are_is_refused(embedded_model, monkeypatch):
    monkeypatch.setattr("sparsary.eval.circuits.tasks.task.REPEATS", 5)
    with pytest.raises(
        ValueError, match=r"n: expected at most about .* distinct pairs of agreement_simple for this model, got 5000"
    ):
        make_pairs("agreement_simple", embedded_model, n=5000)
