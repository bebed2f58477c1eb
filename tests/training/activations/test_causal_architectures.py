"""Every causal architecture that transformers can build: planned from its configuration, read as its own code computes it."""

import json
import re

import pytest
import torch
from torch import nn

from sparsary.training.activations.live import Buffers
from sparsary.training.activations.model import load_model
from sparsary.training.preflight import plan_all
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.text import BEGINNING

CONTEXT, CONTEXTS = 16, 3
# Whose blocks hold other shapes than (contexts, positions, width), which is told, and a hook that does not.
ELSEWHERE = {
    # Patches of bytes.
    "blt": ("model.global_transformer.layers.0:out", "model.local_encoder.layers.0:out"),
    # 32 positions of a prompt before those of the text, until the end.
    "cpmant": ("cpmant.encoder.layers.0:out", "lm_head:in"),
    # Several streams side by side.
    "deepseek_v4": ("model.layers.0:out", "model.layers.0.mlp:out"),
    "gemma3n_text": ("model.layers.0:out", "model.layers.0.mlp:out"),
    "hy_v4": ("model.layers.0:out", "model.layers.0.mlp:out"),
    # The text, and once more for each token that is predicted ahead.
    "prophetnet": ("prophetnet.decoder.layers.0:out", "prophetnet.decoder.word_embeddings:out"),
}

# Blocks whose parts lie in lists of their own, and what the first returns last.
SPLIT = {"xlm": "transformer.layer_norm2.0:out"}


@pytest.fixture(scope="module")
def tiny(load_beside):
    return load_beside("tiny_models")


def kinds():
    """Names only: the builder is loaded with the first test."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def first_block(module):
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    # Not those of the towers that see or hear.
    lists = [name for name in lists if not re.search("vision|audio", name)]
    return f"{min(lists, key=lambda name: name.count('.'))}.0:out"


def recipe_of(folder, hook, **model):
    return resolve_recipe(
        check_recipe(
            {
                "model": {"id": str(folder), "device": "cpu"} | model,
                "text": {"source": "files", "files": [str(folder / "text.jsonl")], "context_length": CONTEXT},
                "harvest": {"hooks": [hook], "store": None, "live_buffer_tokens": 64, "exclude_leading": 2},
                "dictionary": {"hook": hook, "n_latents": 48, "encoder": {"name": "topk", "k": 4}},
                "tokens": 256,
                "batch_tokens": 32,
                "out_dir": str(folder / "run"),
            },
            "recipe",
        )
    )


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves a tiny model with a tokenizer and text; returns it."""

    def save(kind):
        if kind in tiny.IMPOSSIBLE:
            pytest.skip(tiny.IMPOSSIBLE[kind])
        module = tiny.tiny_model(kind)
        module.save_pretrained(tmp_path)
        tiny.tiny_tokenizer().save_pretrained(tmp_path)
        lines = [json.dumps({"text": text}) for text in tiny.words_of_text(20, 40)]
        (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return module

    return save


def test_few_architectures_cannot_be_built(tiny):
    assert len(tiny.IMPOSSIBLE) <= 5
    assert set(tiny.IMPOSSIBLE) <= set(tiny.CAUSAL)


# Of each kind of model some: attention of several kinds, experts, hybrids, state spaces, towers that see, blocks whose parts
# lie elsewhere, and those whose blocks hold other shapes. The others are a sweep of their own.
SAMPLE = "bart cpmant falcon_h1 gpt2 llama mamba mixtral mllama xlm".split()


@pytest.mark.parametrize("kind", sorted({*SAMPLE} & {*kinds()}))
def test_an_architecture_is_planned_and_read(kind, saved, tiny, tmp_path):
    planned_and_read(saved(kind), kind, tiny, tmp_path)


@pytest.mark.parametrize("kind", sorted({*kinds()} - {*SAMPLE}))
def test_every_other_architecture_is_planned_and_read(kind, saved, tiny, tmp_path):
    planned_and_read(saved(kind), kind, tiny, tmp_path)


def planned_and_read(module, kind, tiny, tmp_path):
    misshapen, hook = ELSEWHERE.get(kind) or (None, SPLIT.get(kind) or first_block(module))
    if misshapen is not None:
        with pytest.raises(ValueError, match=r"expected a tensor \(contexts, positions, width\)"):
            plan_all([recipe_of(tmp_path, misshapen)])
    member = recipe_of(tmp_path, hook)
    plan = plan_all([member])[0]
    assert not plan.assumed
    model = load_model(member.recipe.model)
    # Some kinds have a tokenizer of a class of their own, which knows no words.
    model.tokenizer = tiny.tiny_tokenizer()
    ids = torch.randint(4, 88, (CONTEXTS, CONTEXT))
    read = model.activations(ids, (hook,))[hook]
    assert read.shape == (CONTEXTS, CONTEXT, plan.widths[hook])
    rows, _ = Buffers(model, member.recipe.text, member.recipe.harvest, (hook,)).after(BEGINNING)
    assert len(rows) >= 64
    assert rows.tensors[f"x:{hook}"].shape[1] == plan.widths[hook]
    if misshapen is not None:
        return
    with torch.no_grad():
        states = model.module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    # Before or behind the first block, as the architecture counts.
    near = [state for state in states[:2] if state.shape == read.shape]
    assert any(torch.allclose(state, read, rtol=1e-4, atol=1e-5) for state in near)


# One of each way to compute, of those whose own code runs in half precision: attention,
# hybrids, experts, state spaces, positions of several kinds.
DTYPE_KINDS = ("bert", "falcon_h1", "gpt2", "gpt_oss", "jamba", "lfm2", "llama", "mamba2", "mixtral", "opt", "qwen3_5")


@pytest.mark.parametrize("kind", DTYPE_KINDS)
def test_whatever_dtype_the_configuration_says(kind, saved, tmp_path):
    module = saved(kind)
    hook, path = first_block(module), tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for said in (
        {},
        {"dtype": None},
        *({key: dtype} for key in ("dtype", "torch_dtype") for dtype in ("float32", "bfloat16", "float16")),
    ):
        kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        path.write_text(json.dumps(kept | said), encoding="utf-8")
        for dtype in ("float32", "bfloat16", "float16"):
            plan = plan_all([recipe_of(tmp_path, hook, dtype=dtype)])[0]
            assert not plan.assumed
            assert plan.widths[hook] == 32
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(recipe_of(tmp_path, hook, dtype=str(dtype).removeprefix("torch.")).recipe.model)
        assert model.activations(torch.randint(4, 88, (2, 5)), (hook,))[hook].shape == (2, 5, 32)


def test_a_width_that_cannot_be_known_is_said_to_be_unknown(saved, tmp_path, monkeypatch):
    module = saved("llama")
    member = recipe_of(tmp_path, first_block(module))

    def fails(*_, **__):
        raise RuntimeError("no kernel for this\nprocessor")

    monkeypatch.setattr(type(member.outline.model), "widths", fails)
    plan = plan_all([member])[0]
    assert plan.assumed == {"model.layers.0:out"}
    lines = dict(plan.lines(member))
    assert lines["hooks"] == "model.layers.0:out (unknown until the model runs; 32 assumed)"
    monkeypatch.setattr("sparsary.training.resolve_hooks.skeleton", fails)
    built = recipe_of(tmp_path, "model.layers.0:out")
    assert built.outline.model.module(torch.ones(1, 3).long()).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"'model\.layers\.9:out' does not exist"):
        plan_all([recipe_of(tmp_path, "model.layers.9:out")])
