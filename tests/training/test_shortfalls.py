"""What was asked for and what there was: in plans, logs and checkpoints."""

import json
import logging

import pytest

from sparsary.sae.files import read_json
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.preflight import preflight, recipe_shortfalls
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
from sparsary.training.shortfalls import Shortfall, recorded, shortfalls_together


def resolved(values, **changes):
    return resolve_recipe(check_recipe(values | changes, "recipe"))


def keys(found):
    return {each.key: (each.had, each.asked) for each in found}


@pytest.fixture
def with_text(recipe_values, tmp_path):
    """The small recipe on a file of so many documents, streamed."""

    def build(documents, joined=False, **text):
        texts = [embedded_document(1, number).text for number in range(documents)]
        rows = [" ".join(texts)] if joined else texts
        path = tmp_path / f"{documents}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        recipe_values["text"] |= {"source": "files", "files": [str(path)]} | text
        recipe_values["harvest"] |= {"store": None, "live_buffer_tokens": 900}
        return recipe_values

    return build


def test_a_shortfall_is_doubtful_below_half_or_where_it_is_serious():
    assert [Shortfall("k", 100, had, "x", "y").doubtful for had in (49, 50, 99)] == [True, False, False]
    assert Shortfall("k", 100, 99, "x", "y", serious=True).doubtful
    first, later = Shortfall("k", 100, 9, "x", "planned"), Shortfall("k", 100, 8, "x", "measured")
    other = Shortfall("l", 2, 1, "x", "y")
    assert shortfalls_together([first, other], [later]) == (later, other)
    assert recorded({"shortfalls": [later.entry()]}) == (later,)
    assert recorded({}) == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"lr_warmup_steps": 1000}, {"lr_warmup_steps": (30, 1000)}),
        # The rate has begun to fall before it was up.
        ({"lr_warmup_steps": 28}, {"lr_warmup_steps": (25, 28)}),
        ({"lr_warmup_steps": 28, "lr_decay": 0.0}, {}),
        ({"dead_after_tokens": 5000}, {"dead_after_tokens": (3030, 5000)}),
        ({"auxk_latents": 100}, {"auxk_latents": (67, 100)}),
        ({"auxk_latents": 100, "auxk_weight": 0.0}, {}),
    ],
    ids=str,
)
def test_a_recipe_that_asks_for_more_than_its_run_has_says_so(recipe_values, changes, expected):
    found = recipe_shortfalls(check_recipe(recipe_values | changes, "recipe"))
    assert keys(found) == expected
    if "lr_warmup_steps" in expected:
        had, asked = expected["lr_warmup_steps"]
        assert f"the learning rate reaches only {had / asked:.1%} of lr" in str(found[0])


def test_without_held_out_documents_nothing_can_be_judged(recipe_values):
    recipe_values["harvest"]["heldout"] = 0.0
    (found,) = recipe_shortfalls(check_recipe(recipe_values, "recipe"))
    assert (found.key, found.had, found.doubtful) == ("eval_tokens", 0, True)


def test_a_plan_knows_how_much_text_there_is(with_text):
    values = with_text(60)
    member = resolved(values, tokens=30_300, eval_tokens=50_000)
    plan = preflight(member)
    assert plan.text is not None
    assert plan.text.whole
    assert plan.text.documents == 60
    assert plan.text.train == plan.training_tokens
    assert keys(plan.shortfalls) == {"tokens": (plan.text.train, 30_300), "eval_tokens": (plan.text.heldout, 50_000)}
    assert 0 < plan.text.heldout < plan.text.train < 30_300
    shown = plan.lines(member)
    assert f"60 documents: {plan.text.train:,} tokens to train on, {plan.text.heldout:,} held out" in dict(shown)["text holds"]
    told = [words for name, words in shown if name == "less than asked"]
    assert len(told) == 2
    assert "the tokens are repeated" in told[0]


def test_of_a_long_text_the_rest_is_estimated(with_text, monkeypatch):
    from sparsary.training import text_size

    whole = preflight(resolved(with_text(60))).text
    monkeypatch.setattr(text_size, "MEASURED_CHARACTERS", 10_000)
    part = preflight(resolved(with_text(60))).text
    assert not part.whole
    assert part.documents < 60
    # The file's braces and keys count as text.
    assert 1.0 <= part.estimate(part.train) / whole.train < 1.3
    assert part.words().startswith("about ")


def test_a_text_of_one_document_is_told_before_it_is_trained_on(with_text):
    plan = preflight(resolved(with_text(40, joined=True)))
    assert plan.text.documents == 1
    (found,) = [each for each in plan.shortfalls if each.key == "eval_tokens"]
    assert found.had == 0
    assert "one document (see text.separator)" in str(found)


@pytest.mark.parametrize("objective", ["reconstruction", "kl"])
def test_a_text_that_is_read_again_is_logged_and_kept(with_text, caplog, objective):
    values = with_text(60) | {"objective": objective}
    member = resolved(values, tokens=3535, eval_tokens=100)
    with caplog.at_level(logging.WARNING):
        directory = train_recipe(member)
    size = preflight(resolved(values, tokens=3535, out_dir=values["out_dir"] + "x")).text
    provenance = read_json(directory / "dictionary.json")["provenance"]
    assert keys(recorded(provenance)) == {"tokens": (size.train, 3535)}
    assert f"tokens: {size.train:,} of 3,535 tokens asked for: the tokens are repeated" in caplog.text
    before = (directory / "dictionary.json").read_text()
    # A finished run is done over from its end.
    train_recipe(member)
    assert (directory / "dictionary.json").read_text() == before


def test_tensors_that_are_passed_over_again_are_logged_and_kept(recipe_values, caplog):
    import torch

    rows = [torch.randn(500, 128) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        directory = train_recipe(resolved(recipe_values), rows)
    found = recorded(read_json(directory / "dictionary.json")["provenance"])
    assert keys(found) == {"tokens": (1000, 3030)}
    assert "each is trained on 3.0 times" in caplog.text


@pytest.mark.parametrize(
    "encoder", [{"name": "batch_topk", "k": 5}, {"name": "jumprelu", "target_l0": 5}], ids=["batch", "penalty"]
)
def test_calibration_on_fewer_tokens_than_asked_for_is_logged_and_kept(with_text, caplog, encoder):
    values = with_text(60)
    values["dictionary"]["encoder"] = encoder
    with caplog.at_level(logging.WARNING):
        directory = train_recipe(resolved(values, calibration_tokens=20_000, eval_tokens=100))
    found = recorded(read_json(directory / "dictionary.json")["provenance"])
    (calibration,) = [each for each in found if each.key == "calibration_tokens"]
    assert calibration.had == preflight(resolved(values, out_dir=values["out_dir"] + "x")).text.train
    # Foreseen and found are one.
    assert caplog.text.count("calibration_tokens") == 1


def test_a_store_that_holds_less_than_asked_for_is_told_by_its_next_plan(with_text, tmp_path):
    values = with_text(60)
    values["harvest"] |= {"store": str(tmp_path / "store"), "tokens": 50_000}
    planned = keys(preflight(resolved(values)).shortfalls)["harvest.tokens"]
    directory = train_recipe(resolved(values))
    held = keys(preflight(resolved(values)).shortfalls)["harvest.tokens"]
    assert planned[1] == held[1] == 50_000
    assert abs(planned[0] - held[0]) < 0.05 * held[0]
    assert "harvest.tokens" in keys(recorded(read_json(directory / "dictionary.json")["provenance"]))
