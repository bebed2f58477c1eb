"""A dictionary trained on what the assistant says, from recipe to page."""

import json

import pytest

import sparsary
from sparsary.eval.features.run import left_out_words
from sparsary.training.preflight import preflight_all
from sparsary.training.recipe import HarvestSection, TextSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipes


@pytest.fixture
def chats(load_beside):
    return load_beside("tiny_chats")


@pytest.fixture
def recipe(chats, tmp_path):
    """Return the values of a recipe for a model and chats in files."""
    folder = tmp_path / "model"
    chats.save_chat_model(folder)
    rows = [
        {"messages": [*chats.CHAT[:2], {"role": "assistant", "content": "ABCDEF"[n % 6] * (2 + n % 5)}]} for n in range(120)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"id": str(folder)},
        "text": {
            "source": "files",
            "files": [str(tmp_path / "*.jsonl")],
            "column": "messages",
            "chat": {"roles": ["assistant"]},
            "context_length": 80,
            "packing": "pack_masked",
        },
        "harvest": {"exclude_leading": 0, "heldout": 0.3, "live_buffer_tokens": 100, "exclude": {"tokens": ["A"]}},
        "dictionary": {"hook": "model.layers.1:out", "n_latents": 24, "encoder": {"name": "topk", "k": 4}},
        "tokens": 200,
        "batch_tokens": 50,
        "out_dir": str(tmp_path / "run"),
        "eval_tokens": 100,
    }


def test_masks_and_roles_reach_the_report_and_the_page(recipe, tmp_path, no_page):
    run = sparsary.train(recipe)
    provenance = json.loads((run / "dictionary.json").read_text())["provenance"]
    assert provenance["text"]["chat"]["roles"] == ["assistant"]
    assert provenance["harvest"]["exclude"]["tokens"] == ["A"]
    assert provenance["content"]["text"]["chat_template"] is True
    about = sparsary.features(run, tokens=60)
    assert about["left_out"] == "special tokens; roles other than assistant; tokens 'A'"
    assert "message['content'] | trim" in about["chat_template"]
    examples = [context for record in about.records_of(range(24)) for context in record["top"]]
    assert examples
    for example in examples:
        roles = [role for role, count in example["roles"] for _ in range(count)]
        left_out = set(example["left_out"])
        assert len(roles) == len(example["tokens"])
        for place, (token, role, value) in enumerate(zip(example["tokens"], roles, example["activations"], strict=True)):
            assert (place not in left_out) == (role == "assistant" and token != "A")
            assert value == 0 or place not in left_out
    page = (run / "features" / "features.html").read_text()
    assert "Grey tokens are outside the mask" in page
    assert "Chat template" in page
    assert sparsary.evaluate(run, tokens=60)["doubts"] is not None


def test_another_chat_template_keeps_a_run_from_being_resumed(recipe, chats, tmp_path):
    sparsary.train(recipe)
    chats.chat_tokenizer(chats.TEMPLATE.replace("<|end|>", "<|end|> ")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tokenizer: its chat template, which the text is read with, changed"):
        sparsary.train(recipe | {"tokens": 400})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no template"}, r"text.chat.template: expected a chat template .*got none"),
        ({"text": {"files": ["nothing-*.jsonl"]}}, r"text.files: expected files that match 'nothing-\*\.jsonl', got none"),
        (
            {"text": {"column": "message"}},
            r"text.column|expected a JSON object with the key 'message'.*Did you mean 'messages'",
        ),
        ({"harvest": {"exclude": {"tokens": ["two words"]}}}, r"harvest.exclude.tokens: expected one token .*'two words'"),
        ({"text": {"column": "ids"}}, r"text.column: expected token ids below 261, .*got 300"),
    ],
)
def test_a_dry_run_tells_what_is_wrong_with_chats(recipe, chats, tmp_path, change, message):
    if change == {"model": "no template"}:
        chats.chat_tokenizer(None).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
        change = {}
    if change.get("text") == {"column": "ids"}:
        (tmp_path / "ids.jsonl").write_text(json.dumps({"ids": [1, 300]}) + "\n")
        change = {"text": {"column": "ids", "files": [str(tmp_path / "ids.jsonl")]}}
    changed = recipe | {key: recipe[key] | value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        preflight_all(resolve_recipes([check_recipe(changed, "recipe")]))


def test_what_is_left_out_is_told_in_words():
    harvest = HarvestSection.model_validate({"exclude": {"norm_above": 10, "positions": [3]}})
    assert left_out_words(harvest, TextSection()) == (
        "special tokens; the first 8 positions; positions 3; norms above 10 times the median"
    )
    nothing = HarvestSection(exclude_special=False, exclude_leading=0)
    assert left_out_words(nothing, TextSection()) == "none"
