"""Files of pairs: what is written is read back, published files are read, and what cannot be used is named."""

import dataclasses
import json

import pytest
import torch

from sparsary.eval.circuits.tasks import competence, make_pairs, read_pairs, write_pairs

FIELDS = ("task", "corruption", "metric", "questions", "roles")
GOOD = {"clean": "Mary and Paul went", "corrupted": "Mary and Kate went", "answers": [" to"], "foils": [" in"]}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def ids(model, *words):
    return model.tokenizer.convert_tokens_to_ids(list(words))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.json"])
def test_files_of_editors_are_read(embedded_model, write, name):
    """A byte order mark at the beginning is no part of the first line; Latin-1 is named."""
    to, in_ = ids(embedded_model, "to", "in")
    pairs = [{"clean": GOOD["clean"], "corrupt": GOOD["corrupted"], "answers": [" to"], "wrong_answers": [" in"]}]
    line = {
        "pairs.jsonl": json.dumps(GOOD),
        "pairs.csv": f"clean,corrupted,correct_idx,incorrect_idx\nMary and Paul went,Mary and Kate went,{to},{in_}",
        "pairs.json": json.dumps({"prompts": pairs}),
    }[name]
    plain = read_pairs(write(line, name=name), embedded_model)
    path = write("\ufeff" + line, name=name)
    assert torch.equal(read_pairs(path, embedded_model).clean, plain.clean)
    path.write_bytes(line.replace("Mary", "Zoé").encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8 text, got other bytes"):
        read_pairs(path, embedded_model)


@pytest.mark.parametrize("name", ["ioi", "greater_than", "induction", "docstring"])
def test_written_pairs_are_read_back(embedded_model, tmp_path, name):
    pairs = make_pairs(name, embedded_model, n=7, metric="max_logit_diff")
    write_pairs(pairs, tmp_path / "pairs.jsonl", embedded_model)
    back = read_pairs(tmp_path / "pairs.jsonl", embedded_model)
    assert all(getattr(pairs, field) == getattr(back, field) for field in FIELDS)
    assert all(torch.equal(getattr(pairs, field), getattr(back, field)) for field in ("clean", "corrupted", "lengths"))
    record = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert isinstance(record["clean"], str)
    asked = record if name != "induction" else record["questions"][0]
    assert all(isinstance(answer, str) for answer in asked["answers"])


def test_tokens_that_are_no_text_are_written_as_ids(gpt2_tokens, tmp_path):
    pairs = make_pairs("induction", gpt2_tokens, n=5)
    # Some random neighbours make one token when read as text.
    pairs = dataclasses.replace(pairs, clean=pairs.clean.clone())
    pairs.clean[0, :2] = torch.tensor(gpt2_tokens.tokenizer.convert_tokens_to_ids(["h", "e"]))
    write_pairs(pairs, tmp_path / "pairs.jsonl", gpt2_tokens)
    assert isinstance(json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["clean"], list)
    back = read_pairs(tmp_path / "pairs.jsonl", gpt2_tokens)
    assert torch.equal(pairs.clean, back.clean)
    assert pairs.questions == back.questions


@pytest.mark.parametrize(
    ("clean", "corrupted", "answer", "foil"),
    [
        ("clean", "corrupt", "answer", "wrong"),
        ("clean", "corrupt", "answers", "wrong_answers"),
        ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer"),
    ],
)
def test_published_key_names(embedded_model, write, clean, corrupted, answer, foil):
    lines = [{clean: GOOD["clean"], corrupted: GOOD["corrupted"], answer: " to", foil: " in", "case": "x"}]
    pairs = read_pairs(write(*lines), embedded_model)
    assert embedded_model.tokenizer.convert_ids_to_tokens(pairs.corrupted[0].tolist()) == "<bos> Mary and Kate went".split()
    assert pairs.questions[0][0] == (4, tuple(ids(embedded_model, "to")), tuple(ids(embedded_model, "in")))
    assert (pairs.task, pairs.corruption, pairs.metric, pairs.roles) == ("pairs", "corrupted", "logit_diff", ())


def test_mib_s_records_have_several_corruptions(embedded_model, write):
    record = {
        "prompt": "Then, Mary and Paul went to the store. Mary gave a ring to",
        "choices": ["Paul", "Mary"],
        "answerKey": 0,
        "abc_counterfactual": {
            "prompt": "Then, Kate and Lisa went to the store. Adam gave a ring to",
            "choices": ["Kate", "Lisa"],
            "answerKey": 1,
        },
        "s2_io_flip_counterfactual": {
            "prompt": "Then, Mary and Paul went to the store. Paul gave a ring to",
            "choices": ["Paul", "Mary"],
            "answerKey": 1,
        },
    }
    path = write(record)
    [[question]] = read_pairs(path, embedded_model).questions
    assert (question.answers, question.foils) == (tuple(ids(embedded_model, "Paul")), tuple(ids(embedded_model, "Mary")))
    other = read_pairs(path, embedded_model, corruption="abc")
    assert other.corruption == "abc"
    assert other.questions[0][0].foils == tuple(ids(embedded_model, "Lisa"))
    with pytest.raises(ValueError, match=r"line 1: corruption: expected one of abc, s2_io_flip, got 'abd'. Did you mean 'abc'"):
        read_pairs(path, embedded_model, corruption="abd")


def test_several_questions_at_named_places(embedded_model, write):
    questions = [
        {"position": 1, "answers": [" and"], "foils": [" went"]},
        {"position": 4, "answers": ids(embedded_model, "to")},
    ]
    record = {"clean": GOOD["clean"], "corrupted": GOOD["corrupted"], "questions": questions, "roles": {"S": 1}}
    pairs = read_pairs(write(record), embedded_model)
    first, second = pairs.questions[0]
    assert first == (1, tuple(ids(embedded_model, "and")), tuple(ids(embedded_model, "went")))
    assert second == (4, tuple(ids(embedded_model, "to")), ())
    assert pairs.roles == ({"S": 1},)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"corrupted": "Mary went"}, "clean has 5 tokens, corrupted 3; expected equal numbers"),
        ({"answers": [" to the"]}, "' to the' is not one token after 'Mary and Paul went': it gives to the"),
        ({"answers": ["to"]}, r"'to' is not one token .*is a leading space missing"),
        ({"foils": [" to"]}, "the same token is among the answers"),
        ({"answers": []}, "has no answers"),
        ({"answers": {"a": 1}}, "answers is {'a': 1}; expected a list"),
        ({"answers": [10**6]}, r"1000000 is not a token id of this model; expected 0 to \d+"),
        ({"clean": ""}, "clean is ''; expected text, or a list of token ids"),
        ({"clean": "Mary Zebedee"}, "'Mary Zebedee' has words the tokenizer does not know"),
        ({"clean": None}, "has no clean or clean_prefix, only clean, corrupted, answers, foils"),
        ({"position": 5}, "position is 5; expected one of 0 to 4"),
        ({"roles": {"S": 9}}, "roles are at {'S': 9}"),
        ({"questions": "?"}, "questions is '[?]'; expected a list of objects"),
        ("{not json", r"is not JSON \(Expecting property name"),
        ("[1]", "is not a JSON object but list"),
    ],
)
def test_lines_that_cannot_be_used_are_named(embedded_model, write, change, reason, caplog):
    bad = change if isinstance(change, str) else GOOD | change
    path = write(GOOD, "", bad)
    with pytest.raises(ValueError, match=rf"(?s)got 1 of 2 lines that are not:\n  line 3: .*{reason}.*skip=True"):
        read_pairs(path, embedded_model)
    assert len(read_pairs(path, embedded_model, skip=True)) == 1
    assert "left out 1 of 2 lines; the first: line 3" in caplog.text


def test_ten_offenders_are_listed_and_the_others_counted(embedded_model, write):
    path = write(GOOD, *[GOOD | {"answers": [" to the"]}] * 12)
    with pytest.raises(ValueError, match=r"got 12 of 13 lines") as raised:
        read_pairs(path, embedded_model)
    assert "line 11:" in str(raised.value)
    assert "line 12:" not in str(raised.value)
    assert "... and 2 more" in str(raised.value)


def test_files_that_give_nothing_are_refused(embedded_model, write, tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: expected a file of pairs, found none"):
        make_pairs(str(tmp_path / "none.jsonl"), embedded_model)
    with pytest.raises(ValueError, match=r"expected pairs, got an empty file"):
        read_pairs(write(""), embedded_model)
    with pytest.raises(ValueError, match=r"got 1 of 1 lines that are not"):
        read_pairs(write({"clean": "Mary"}), embedded_model, skip=True)
    with pytest.raises(ValueError, match=r"expected one task in a file, got a, b"):
        read_pairs(write(GOOD | {"task": "a"}, GOOD | {"task": "b"}), embedded_model)
    with pytest.raises(ValueError, match=r"expected an object with a list 'prompts', got list"):
        read_pairs(write("[]", name="pairs.json"), embedded_model)
    with pytest.raises(ValueError, match=r"line 2: has no columns of answers"):
        read_pairs(write("clean,corrupted", "Mary,Kate", name="pairs.csv"), embedded_model)


def test_some_of_a_file_in_its_order(embedded_model, write):
    names = "Mary Paul Kate Lisa Adam Brian Carl Jane Rose Ruth".split()
    path = write(
        *[GOOD | {"clean": f"{name} and Paul went"} for name in names], {"clean": "Paul", "corrupted": "Mary", "answers": ["?"]}
    )
    whole = read_pairs(path, embedded_model)
    assert len(whole) == 11
    some = make_pairs(path, embedded_model, n=4, seed=1)
    rows = [whole.clean.tolist().index(row) for row in some.clean.tolist()]
    assert len(some) == 4
    assert rows == sorted(rows)
    assert some.clean.tolist() != make_pairs(path, embedded_model, n=4, seed=2).clean.tolist()
    assert make_pairs(path, embedded_model, n=None, one_length=True).lengths.tolist() == [5] * 10


@pytest.mark.parametrize(
    ("file", "n", "metric", "answers", "foils"),
    [
        ("ioi", 499, "logit_diff", [" Amber"], [" Aaron"]),
        (
            "greater_than",
            1000,
            "prob_diff",
            [f"{year}" for year in range(53, 100)],
            [f"{year:02d}" for year in range(53)],
        ),
        ("gender_bias", 986, "logit_diff", [" she"], [" he"]),
        ("hypernymy_comma", 198, "prob_diff", [" gem", " gems"], [" elected", " politicians"]),
        ("fact_retrieval_comma", 190, "logit_diff", [" Afghanistan"], [" United"]),
        (
            "greater_than_sequence",
            825,
            "prob_diff",
            [f"{year}" for year in range(57, 100)],
            [f"{year:02d}" for year in range(57)],
        ),
    ],
)
def test_the_published_tables(gpt2_tokens, shared_data, file, n, metric, answers, foils):
    pairs = read_pairs(shared_data / "circuits" / "eap" / f"{file}_gpt2.csv", gpt2_tokens)
    assert (len(pairs), pairs.metric, pairs.task) == (n, metric, f"{file}_gpt2")
    [question] = pairs.questions[0]
    assert [gpt2_tokens.tokenizer.decode([token]) for token in question.answers] == answers
    assert [gpt2_tokens.tokenizer.decode([token]) for token in question.foils] == foils


def test_the_published_tables_other_corruption_and_lists_of_ids(gpt2_tokens, shared_data):
    folder = shared_data / "circuits" / "eap"
    hard = read_pairs(folder / "ioi_gpt2.csv", gpt2_tokens, corruption="corrupted_hard")
    assert hard.corruption == "corrupted_hard"
    assert gpt2_tokens.tokenizer.decode(hard.corrupted[0, : hard.lengths[0]]).endswith("Amber decided to give a drink to")
    lists = read_pairs(folder / "induction_gpt2.csv", gpt2_tokens)
    assert torch.equal(lists.clean[:, :19], lists.clean[:, 20:])
    assert (lists.clean[:, 19] == torch.tensor([question.answers[0] for [question] in lists.questions])).all()


def test_stories_accuracies_are_those_measured(shared_data):
    from sparsary.training.activations.model import load_model
    from sparsary.training.recipe import ModelSection

    model = load_model(ModelSection(id=str(shared_data / "models" / "stories3M"), device="cpu"))
    folder = shared_data / "circuits" / "stories"
    for task, known in json.loads((folder / "measured.json").read_text())["tasks"].items():
        found = competence(model, make_pairs(folder / f"{task}.jsonl", model, n=None))
        assert found.pairs == known["n"]
        assert round(found.accuracy, 3) == known["accuracy"]
        assert found.clean == pytest.approx(known["logit_diff_clean"], abs=0.006)
        assert found.corrupted == pytest.approx(known["logit_diff_corrupt"], abs=0.006)
