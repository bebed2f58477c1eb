"""Contexts and tokenizers that do not fit a model are refused before anything is done."""

import json

import pytest
import transformers

from sparsary.training.activations.contexts import context_batches
from sparsary.training.activations.limits import context_problems, stated_positions, tokenizer_problems, untrained_positions
from sparsary.training.activations.model import load_model, skeleton
from sparsary.training.activations.weightless import weightless
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe


@pytest.fixture(scope="module")
def tiny(load_beside):
    return load_beside("tiny_models")


@pytest.fixture
def saved(tiny, tmp_path):
    def save(kind, tokenizer=None, **changes):
        tiny.tiny_model(kind, **changes).save_pretrained(tmp_path)
        (tokenizer or tiny.tiny_tokenizer()).save_pretrained(tmp_path)
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in tiny.words_of_text(20, 40)))
        return tmp_path

    return save


def problems_of(folder, **text):
    section = {"source": "files", "files": [str(folder / "text.jsonl")], "context_length": 16} | text
    hook = "lm_head:in"
    values = {
        "model": {"id": str(folder), "device": "cpu"},
        "text": section,
        "harvest": {"store": None, "live_buffer_tokens": 64, "exclude_leading": 2},
        "dictionary": {"hook": hook, "n_latents": 48, "encoder": {"name": "topk", "k": 4}},
        "tokens": 256,
        "batch_tokens": 32,
        "out_dir": str(folder / "run"),
    }
    return resolve_recipe(check_recipe(values, "recipe")).outline.text_problems(TextSection.model_validate(section))


# Positions of the model, a context that fits, and one that does not.
TABLES = {"gpt2": 64, "opt": 64, "bart": 64, "gpt_neo": 64, "gptj": 64, "codegen": 64, "biogpt": 64, "ctrl": 64, "xlm": 64}
# Positions begin behind the padding id (0 here): the table's first row is never used.
BEHIND_PADDING = {"roberta": 64, "xlm-roberta": 64}
ROTARY = {"llama": 64, "gpt_neox": 64, "qwen2": 64, "phi": 64, "gemma2": 64, "mixtral": 64, "falcon": 64}
WITHOUT = ("mamba", "bloom", "jamba", "rwkv")


@pytest.mark.parametrize("kind", [*TABLES, *BEHIND_PADDING])
def test_a_table_of_positions_ends(kind, saved):
    limit = 64 - (kind in BEHIND_PADDING)
    model = skeleton(ModelSection(id=str(saved(kind, max_position_embeddings=64))))
    assert context_problems(model, limit) == []
    assert untrained_positions(model, limit) == []
    (line,) = context_problems(model, 128)
    assert line.startswith(f"text.context_length: expected at most {limit}, the positions that ")
    assert "got 128" in line


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_that_were_never_trained(kind, saved):
    folder = saved(kind, max_position_embeddings=64)
    assert problems_of(folder, context_length=64) == []
    (line,) = problems_of(folder, context_length=65)
    assert line.startswith("text.context_length: expected at most 64, the positions that ")
    assert "later ones were never trained" in line


@pytest.mark.parametrize("kind", WITHOUT)
def test_models_without_positions_take_any_context(kind, saved):
    model = skeleton(ModelSection(id=str(saved(kind))))
    assert context_problems(model, 300) == untrained_positions(model, 300) == []


def test_alibi_takes_more_than_the_configuration_says(saved):
    model = skeleton(ModelSection(id=str(saved("falcon", alibi=True, max_position_embeddings=64))))
    assert context_problems(model, 300) == untrained_positions(model, 300) == []


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 64),
    ],
)
def test_scaled_rotary_positions_reach_further(tiny, rope, limit):
    config = tiny.tiny_config("llama", max_position_embeddings=64, rope_parameters=rope | {"rope_theta": 10_000.0})
    module = weightless(lambda: transformers.AutoModelForCausalLM.from_config(config))
    assert stated_positions(module) == limit


def test_the_plan_refuses_with_every_problem_at_once(saved, tiny):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.bos_token = None
    folder = saved("gpt2", tokenizer, n_positions=64)
    found = problems_of(folder, context_length=128)
    assert [line.split(":")[0] for line in found] == ["text.context_length", "text.bos"]


def test_a_tokenizer_of_another_model_is_refused(saved):
    (line,) = problems_of(saved("llama", vocab_size=50), bos="none")
    assert "expected ids below 50" in line
    assert "got 46 beyond, up to 95" in line


def test_tokens_added_later_may_lie_beyond_unless_the_text_holds_them(saved, tiny):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<later pad>"})
    folder = saved("llama", tokenizer)
    assert problems_of(folder) == []
    (line,) = problems_of(folder, packing="separate")
    assert "got 97 for padding (text.packing: separate)" in line
    model = load_model(ModelSection(id=str(folder), device="cpu"))
    (folder / "text.jsonl").write_text(json.dumps({"text": "w5 w6 <image> w7 " * 20}))
    text = TextSection(source="files", files=(str(folder / "text.jsonl"),), context_length=16)
    with pytest.raises(ValueError, match=r"tokenizer: expected ids below 96, .* got 96 in document 0"):
        next(context_batches(model, text, HarvestSection(), 2))


def test_the_embedded_model_has_no_problems(embedded_model):
    text = TextSection(context_length=64)
    assert tokenizer_problems(embedded_model, embedded_model.tokenizer, text) == []
    assert context_problems(embedded_model, 64) == []
