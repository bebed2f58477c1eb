"""PEFT adapters: merged or active, the model's activations are those of the fine-tuned model, and its identity says so."""

import pytest
import torch

from sparsary.training.activations.model import load_model
from sparsary.training.activations.model_source import section_content
from sparsary.training.content import model_problems
from sparsary.training.recipe import ModelSection

# peft asks transformers for what is to be renamed there.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
HOOK = "transformer.h.1.mlp.c_proj:out"


@pytest.fixture(scope="module")
def chats(load_beside):
    return load_beside("tiny_chats")


@pytest.fixture(scope="module")
def saved(chats, tmp_path_factory):
    """Return the folders of a model and of a random adapter on it, and the logits and activations of the two together."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path_factory.mktemp("adapted")
    chats.save_chat_model(folder / "base", "gpt2")
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(chats.chat_module("gpt2"), config).eval()
    model.save_pretrained(folder / "adapter")
    ids = torch.arange(5, 30).view(1, -1)
    with torch.no_grad():
        return folder / "base", folder / "adapter", ids, model(input_ids=ids).logits


@pytest.mark.parametrize("mode", ["merged", "active"])
def test_the_model_is_the_fine_tuned_one(saved, mode):
    base, adapter, ids, logits = saved
    plain = load_model(ModelSection(id=str(base)))
    adapted = load_model(ModelSection(id=str(base), adapter=str(adapter), adapter_mode=mode))
    torch.testing.assert_close(adapted.logits(ids), logits, rtol=1e-4, atol=1e-4)
    assert (plain.logits(ids) - logits).abs().max() > 0.1
    assert adapted.activations(ids, (HOOK,))[HOOK].shape == plain.activations(ids, (HOOK,))[HOOK].shape
    assert (adapted.activations(ids, (HOOK,))[HOOK] - plain.activations(ids, (HOOK,))[HOOK]).abs().max() > 0.01
    assert adapted.content() == section_content(adapted.section)
    assert not any(parameter.requires_grad for parameter in adapted.module.parameters())


def test_another_adapter_is_another_model(saved, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    base, adapter, _, _ = saved
    shutil.copytree(adapter, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "adapter_model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, tmp_path / "other" / "adapter_model.safetensors")
    first, other = (section_content(ModelSection(id=str(base), adapter=str(each))) for each in (adapter, tmp_path / "other"))
    assert [line.split("(")[0] for line in model_problems(first, other)] == ["model: its adapter changed "]


def test_adapters_that_cannot_be_used_are_told(saved, chats, tmp_path):
    base, adapter, _, _ = saved
    with pytest.raises(
        ValueError, match=r"model.adapter: expected a directory with adapter_config.json .* without adapter_config"
    ):
        load_model(ModelSection(id=str(base), adapter=str(tmp_path)))
    chats.save_chat_model(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"model.adapter: expected an adapter of .*llama, got .*, which does not fit it"):
        load_model(ModelSection(id=str(tmp_path / "llama"), adapter=str(adapter)))
