"""Tasks in English: against published prompts under GPT-2's tokenizer, and under tokenizers that lack words."""

import csv
import json
import re
from string import Formatter

import pytest
import torch

from sparsary.eval.circuits.tasks import TASKS, make_pairs, read_pairs
from sparsary.eval.circuits.tasks.english import agreement, docstrings, ioi, objects, pronouns, years
from sparsary.eval.circuits.tasks.english.fill import SingleTokenWords
from sparsary.eval.circuits.tasks.reader import PromptEncoder

NAMES = [name for name, task in TASKS.items() if task.english is not None]


def pattern(template):
    """A template as a regular expression; a field's second occurrence must be the same word, a width is that of its word."""
    parts, seen = [], set()
    for literal, name, width, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else rf"(?P<{name}>\w{{{width}}})" if width else rf"(?P<{name}>\w+?)")
            seen.add(name)
    return re.compile("".join(parts))


def fields(templates, prompt):
    """The words that fill the one template that matches."""
    [found] = [match.groupdict() for match in (pattern(template).fullmatch(prompt) for template in templates) if match]
    return found


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_under_gpt2_every_corruption_gives_pairs_of_equal_length(gpt2_tokens, name):
    first = None
    for kind in TASKS[name].english.corruptions:
        pairs = make_pairs(name, gpt2_tokens, n=6, corruption=kind.name)
        first = pairs if first is None else first
        assert torch.equal(pairs.clean, first.clean)
        assert ((pairs.clean != pairs.corrupted) & pairs.valid).any(1).all()
        for row, roles in enumerate(pairs.roles):
            assert pairs.questions[row][-1].position == roles["end"] == pairs.lengths[row] - 1
            assert not set(pairs.questions[row][-1].answers) & set(pairs.questions[row][-1].foils)


def test_published_indirect_objects_are_of_our_templates_and_words(gpt2_tokens, shared_data):
    path = shared_data / "circuits" / "eap" / "ioi_gpt2.csv"
    both = [*ioi.TEMPLATES, *(one.replace("{S1} and {IO}", "{IO} and {S1}") for one in ioi.TEMPLATES)]
    for row in rows(path):
        found = [pattern(one).fullmatch(row["clean"]) for one in both]
        words = next(match.groupdict() for match in found if match and match["S2"] == match["S1"])
        assert {words["IO"], words["S1"]} <= set(ioi.NAMES)
        assert words.get("object") in {None, *ioi.OBJECTS}
        assert words.get("place") in {None, *ioi.PLACES}
    # Names that are not one token after a space are in neither.
    pairs = read_pairs(path, gpt2_tokens)
    single = {token for questions in pairs.questions for q in questions for token in (*q.answers, *q.foils)}
    ours = make_pairs("ioi", gpt2_tokens, n=600, split="all")
    drawn = {token for questions in ours.questions for q in questions for token in (*q.answers, *q.foils)}
    assert single <= drawn


@pytest.mark.parametrize("kind", ["s2_io", "s2_random"])
def test_half_of_indirect_objects_have_the_names_exchanged(gpt2_tokens, kind):
    pairs = make_pairs("ioi", gpt2_tokens, n=60, corruption=kind)
    exchanged = sum(roles["IO"] < roles["S1"] for roles in pairs.roles)
    assert 20 <= exchanged <= 40
    for row, roles in enumerate(pairs.roles):
        [question] = pairs.questions[row]
        named = {role: int(pairs.clean[row, roles[role]]) for role in ("IO", "S1", "S2")}
        assert (named["IO"], named["S1"], named["S2"]) == (*question.answers, *question.foils, *question.foils)
        if kind == "s2_io":
            assert int(pairs.corrupted[row, roles["S2"]]) == named["IO"]
            assert (pairs.clean[row] != pairs.corrupted[row]).sum() == 1


def test_published_spans_of_years_are_ours(gpt2_tokens, shared_data):
    path = shared_data / "circuits" / "eap" / "greater_than_gpt2.csv"
    template = years.TEMPLATE.replace("{start_year}", "{start_year:2}")
    published = [fields([template], row["clean"]) for row in rows(path)]
    assert {words["event"] for words in published} <= set(years.EVENTS)
    ours = make_pairs("greater_than", gpt2_tokens, n=200)
    decode = gpt2_tokens.tokenizer.decode
    drawn = {decode(ours.clean[row, roles["century"] : roles["start_year"] + 1]) for row, roles in enumerate(ours.roles)}
    shared = {f" {words['century']}{words['start_year']}" for words in published}
    # A thousand prompts have drawn four fifths of the years there are.
    spans = years.spans(SingleTokenWords(PromptEncoder(gpt2_tokens), "greater_than"))
    kept = {f" {century}{year}" for century, several in spans.items() for year in several}
    assert shared < kept
    assert drawn <= kept
    assert len(shared) > 0.75 * len(kept)
    assert all(len(gpt2_tokens.tokenizer.tokenize(year)) == 2 for year in drawn)
    theirs = read_pairs(path, gpt2_tokens)
    assert theirs.metric == ours.metric == "prob_diff"
    by_year = {len(q.foils): q for [q] in theirs.questions}
    for row, [question] in enumerate(ours.questions):
        same = by_year.get(len(question.foils))
        assert same is None or (same.answers, same.foils) == (question.answers, question.foils)
        assert decode(ours.clean[row, ours.roles[row]["start_year"]]) == f"{len(question.foils) - 1:02d}"


def test_published_docstrings_are_of_our_template(shared_data):
    content = json.loads((shared_data / "circuits" / "docstring_prompts.json").read_text())
    for prompt in content["prompts"]:
        words = fields([docstrings.TEMPLATE], prompt["clean"])
        signature = [words[role] for role in docstrings.SIGNATURE]
        assert {words["method"], *signature} <= set(docstrings.VARIABLES)
        assert signature[2:4] == [words["doc_2"], words["doc_3"]]
        assert prompt["answers"] == [f" {words[docstrings.ANSWER]}"]
        assert {f" {one}" for one in signature if one != words[docstrings.ANSWER]} <= set(prompt["wrong_answers"])
        corrupted = fields([docstrings.TEMPLATE], prompt["corrupt"])
        changed = {role for role in words if words[role] != corrupted[role]}
        assert changed <= {"signature_2", "signature_3", "signature_4", "doc_2", "doc_3"}


def test_docstrings_change_as_the_published_ones(gpt2_tokens):
    pairs = make_pairs("docstring", gpt2_tokens, n=20)
    for row, roles in enumerate(pairs.roles):
        changed = {at for at in range(int(pairs.lengths[row])) if pairs.clean[row, at] != pairs.corrupted[row, at]}
        assert changed == {roles[role] for role in ("signature_2", "signature_3", "signature_4", "doc_2", "doc_3")}
        [question] = pairs.questions[row]
        assert question.answers == (int(pairs.clean[row, roles["signature_4"]]),)


def test_published_colored_objects_are_of_our_template(shared_data):
    for prompt, answer in json.loads((shared_data / "circuits" / "colored_objects.json").read_text()):
        words = fields([objects.TEMPLATE], re.sub(r"(there|you|I) (is|see)", r"\1_\2", prompt))
        assert {words[f"object_{item}"] for item in range(6)} <= set(objects.OBJECTS)
        assert {words[f"color_{item}"] for item in range(6)} <= set(objects.COLORS)
        assert {words["view_0"].replace("_", " "), words["view_1"].replace("_", " ")} <= set(objects.VIEWS)
        assert {words["surface_0"], words["surface_1"]} <= set(objects.SURFACES)
        [asked] = [item for item in range(3, 6) if words[f"object_{item}"] == words["queried"]]
        assert answer == f" {words[f'color_{asked}'].capitalize()}"


def test_a_colored_object_s_answer_is_its_colour_before_and_after(gpt2_tokens):
    for kind in ("queried_object", "color_swap"):
        pairs = make_pairs("colored_objects", gpt2_tokens, n=12, corruption=kind)
        for row, [question] in enumerate(pairs.questions):
            for ids, expected in ((pairs.clean, question.answers), (pairs.corrupted, question.foils)):
                text = gpt2_tokens.tokenizer.decode(ids[row, : pairs.lengths[row]])
                words = fields([objects.TEMPLATE], re.sub(r"(there|you|I) (is|see)", r"\1_\2", text))
                [color] = [words[f"color_{item}"] for item in range(3, 6) if words[f"object_{item}"] == words["queried"]]
                assert gpt2_tokens.tokenizer.decode(list(expected)) == f" {color.capitalize()}"
                assert all((words[f"article_{item}"] == "an") == (words[f"color_{item}"] == "orange") for item in range(6))


def test_published_professions_are_ours(shared_data):
    for row in rows(shared_data / "circuits" / "eap" / "gender_bias_gpt2.csv"):
        words = fields(pronouns.BIAS_FRAMES, row["clean"])
        if row["label"] == "0":
            assert words["person"] in pronouns.OF_WOMEN
        else:
            assert words["person"] not in pronouns.OF_WOMEN
        other = {"0": "man", "1": "woman"}[row["label"]]
        assert fields(pronouns.BIAS_FRAMES, row["corrupted"])["person"] == other


@pytest.mark.parametrize(
    ("file", "name"),
    [("simple_test", "agreement_simple"), ("nounpp_test", "agreement_pp"), ("within_rc_test", "agreement_rc")],
)
def test_published_agreement_is_of_our_templates_and_nouns(shared_data, file, name):
    kind = agreement.KINDS[name]
    lines = (shared_data / "circuits" / "feature_circuits_sva" / f"{file}.jsonl").read_text().splitlines()
    forms = {role: {form for pair in nouns for form in pair} for role, nouns in kind.nouns.items()}
    for line in map(json.loads, lines):
        clean, corrupted = (fields([kind.template], line[key]) for key in ("clean_prefix", "patch_prefix"))
        assert all(clean[role] in known for role, known in forms.items())
        # The default corruption is theirs: the noun the verb agrees with changes its number, and nothing else.
        role = kind.corruptions[0].name.split("_")[0]
        assert [one for one in clean if clean[one] != corrupted[one]] == [role] == [kind.governor]
        pair = (line["clean_answer"].strip(), line["patch_answer"].strip())
        assert pair in agreement.VERBS or pair[::-1] in agreement.VERBS


VOCABULARY = """Then and After When got at While were working the commuting went to gave decided give it Afterwards had a lot of
    fun thinking about going wanted long argument afterwards said lunch Friends found in""".split()


def test_a_tokenizer_with_bos_has_it_in_front_and_nothing_behind(word_model):
    model = word_model([*VOCABULARY, *ioi.NAMES[:9], *ioi.PLACES, *ioi.OBJECTS, "The"])
    pairs = make_pairs("ioi", model, n=30)
    tokens = model.tokenizer.convert_ids_to_tokens
    for row, length in enumerate(pairs.lengths.tolist()):
        clean = tokens(pairs.clean[row, :length].tolist())
        assert (clean[0], clean[-1]) == ("<bos>", " to")
        # Names beyond the ninth are several tokens here, and left out.
        [[answer]] = [tokens(list(question.answers)) for question in pairs.questions[row]]
        assert answer.strip() in ioi.NAMES[:9]
        assert clean[pairs.roles[row]["IO"]] == answer


def test_a_tokenizer_that_lacks_words_is_refused_with_their_list(word_model):
    model = word_model(["The", *VOCABULARY, "Mark", "Paul", "James"])
    with pytest.raises(
        ValueError,
        match=r"ioi: expected at least 5 names .* got 3; .*: Michael, Christopher, .*Elizabeth, Adam and 66 more\. ",
    ):
        make_pairs("ioi", model)
    with pytest.raises(ValueError, match=r"greater_than: expected years that are two tokens"):
        make_pairs("greater_than", word_model(["The", "year", *years.EVENTS], numbers=range(2, 100)))
    with pytest.raises(ValueError, match=r"greater_than: expected at least 100 two-digit numbers .* got 99; .* unknown: 99\."):
        make_pairs("greater_than", word_model(["The", "year", *years.EVENTS], numbers=range(99)))


def test_a_task_of_the_other_side_and_a_misspelling_are_refused(word_model):
    with pytest.raises(ValueError, match=r"expected one of .*multiple_choice_symbols in English.*Did you mean 'gender_bias'"):
        make_pairs("gender_biased", word_model([]))


def test_splits_share_no_prompt(gpt2_tokens):
    made = {}
    for split in ("train", "heldout"):
        pairs = make_pairs("agreement_pp", gpt2_tokens, n=60, split=split)
        made[split] = set(map(tuple, pairs.clean.tolist()))
    assert not made["train"] & made["heldout"]
