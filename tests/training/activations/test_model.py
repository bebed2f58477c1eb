"""Hook points: read, replace, gradients, and errors that list what there is."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.activations.model import LanguageModel, load_model, resolve_device, skeleton
from sparsary.training.recipe import ModelSection
from sparsary.training.tokens import tokenizer_digest

HOOKS = (
    "transformer.h.1:in",
    "transformer.h.1.mlp:in",
    "transformer.h.1.mlp:out",
    "transformer.h.1.attn:out",
    "transformer.h.1:out",
)


@pytest.fixture
def token_ids():
    return torch.randint(3, 900, (3, 13))


def test_hooks_see_the_tensors_of_the_forward_pass(embedded_model, token_ids):
    seen = embedded_model.activations(token_ids, HOOKS)
    with torch.no_grad():
        states = embedded_model.module(token_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen["transformer.h.1:in"], states[1])
    torch.testing.assert_close(seen["transformer.h.1:out"], states[2])
    mid = seen["transformer.h.1:in"] + seen["transformer.h.1.attn:out"]
    torch.testing.assert_close(mid + seen["transformer.h.1.mlp:out"], seen["transformer.h.1:out"])
    block = embedded_model.module.transformer.h[1]
    torch.testing.assert_close(block.mlp(seen["transformer.h.1.mlp:in"]), seen["transformer.h.1.mlp:out"])


def test_one_pass_feeds_any_number_of_hooks_and_stops_at_the_last(embedded_model, token_ids):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in embedded_model.module.named_modules()
        if name in ("transformer.h.0", "transformer.h.1.mlp", "transformer.h.2", "lm_head")
    ]
    embedded_model.activations(token_ids, HOOKS)
    for handle in handles:
        handle.remove()
    assert calls == ["transformer.h.0", "transformer.h.1.mlp"]


def test_replacing_changes_what_comes_after_and_restores(embedded_model, token_ids):
    clean = embedded_model.logits(token_ids)
    for hook in HOOKS:
        with embedded_model.replacing(hook, lambda x: x):
            assert torch.equal(embedded_model.logits(token_ids), clean)
        with embedded_model.replacing(hook, torch.zeros_like):
            assert not torch.allclose(embedded_model.logits(token_ids), clean)
        with pytest.raises(KeyboardInterrupt), embedded_model.replacing(hook, torch.zeros_like):
            raise KeyboardInterrupt
        assert torch.equal(embedded_model.logits(token_ids), clean)


def test_gradients_are_those_of_the_summed_next_token_loss(embedded_model, token_ids):
    hooks = ("transformer.h.1:out", "transformer.h.3.mlp:in")
    values, gradients = embedded_model.activations_and_gradients(token_ids, hooks)
    for hook in hooks:
        torch.testing.assert_close(values[hook], embedded_model.activations(token_ids, (hook,))[hook])
        # A small step at one token changes the loss by step times gradient.
        step = torch.zeros_like(values[hook])
        step[1, 5] = 1e-2 * torch.randn(values[hook].shape[-1])
        losses = []
        for sign in (1.0, -1.0):
            with embedded_model.replacing(hook, lambda x, sign=sign, step=step: x + sign * step):
                losses.append(next_token_loss(embedded_model.logits(token_ids), token_ids).double().sum())
        expected = (gradients[hook] * step).double().sum()
        torch.testing.assert_close((losses[0] - losses[1]) / 2, expected, rtol=2e-2, atol=2e-4)


def test_a_token_s_gradient_is_that_of_its_own_document_s_losses(embedded_model, token_ids):
    """A document's gradients are those it has with nothing behind it, and earlier documents have none of it."""
    hooks = ("transformer.h.1:out", "transformer.h.3.mlp:in")
    ends = (0, 5, 9, 13)
    documents = torch.tensor([4] * 5 + [7] * 4 + [8] * 4).expand(3, -1).clone()
    # Another context is one document, and half a context is padding.
    documents[1], documents[2, 5:] = 3, -1
    _, packed = embedded_model.activations_and_gradients(token_ids, hooks, documents)
    for hook in hooks:
        for first, last in pairwise(ends):
            _, alone = embedded_model.activations_and_gradients(token_ids[:, :last], hooks)
            torch.testing.assert_close(packed[hook][0, first:last], alone[hook][0, first:last], rtol=1e-4, atol=5e-5)
            # What predicts the next document predicts nothing of its own.
            assert not packed[hook][0, last - 1].any()
        _, whole = embedded_model.activations_and_gradients(token_ids, hooks)
        torch.testing.assert_close(packed[hook][1], whole[hook][1], rtol=1e-4, atol=5e-5)
        assert not packed[hook][2, 5:].any()
        _, short = embedded_model.activations_and_gradients(token_ids[:, :5], hooks)
        torch.testing.assert_close(packed[hook][2, :5], short[hook][2], rtol=1e-4, atol=5e-5)


def test_a_token_s_gradient_does_not_depend_on_its_batch_mates(embedded_model, token_ids):
    _, together = embedded_model.activations_and_gradients(token_ids, ("transformer.h.1:out",))
    _, alone = embedded_model.activations_and_gradients(token_ids[:1], ("transformer.h.1:out",))
    torch.testing.assert_close(together["transformer.h.1:out"][:1], alone["transformer.h.1:out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("transfomer.h.2:out", r"'transfomer\.h\.2:out' does not exist in embedded\. Nearest: transformer\.h\.2:out"),
        ("transformer.h.9.mlp:in", r"Nearest: transformer\.h\.\d\.mlp:in"),
        ("transformer.h.2", r"does not exist"),
        ("transformer.h.2:outt", r"does not exist"),
        ("transformer.h.2.attn.resid_dropout.nothing:out", r"does not exist"),
    ],
)
def test_a_hook_that_does_not_exist_lists_the_nearest(embedded_model, hook, message):
    with pytest.raises(ValueError, match=message):
        embedded_model.widths((hook,))


def test_a_module_that_never_runs_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids, **_):
            return self.used(input_ids)

    model = LanguageModel(Odd(), None, "odd", None)
    assert model.widths(("used:out",)) == {"used:out": 4}
    with pytest.raises(ValueError, match=r"idle:out: the model never ran this module"):
        model.widths(("idle:out",))
    with pytest.raises(ValueError, match=r"used:in: expected a tensor \(contexts, positions, width\)"):
        model.widths(("used:in",))


def test_widths_come_from_the_configuration_alone():
    assert skeleton(ModelSection()).widths(("transformer.h.2.mlp.c_fc:out", "transformer.h.2:in")) == {
        "transformer.h.2.mlp.c_fc:out": 512,
        "transformer.h.2:in": 128,
    }


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Llama"])
def test_block_hooks_of_other_architectures(family, tmp_path):
    import transformers

    sizes = {
        "GPT2": {"n_layer": 2, "n_embd": 12, "n_head": 2},
        "GPTNeoX": {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20},
        "Llama": {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20},
    }
    config = getattr(transformers, f"{family}Config")(vocab_size=50, **sizes[family])
    module = transformers.AutoModelForCausalLM.from_config(config)
    model = LanguageModel(module, None, family, None)
    path = {"GPT2": "transformer.h.1", "GPTNeoX": "gpt_neox.layers.1", "Llama": "model.layers.1"}[family]
    hooks = (f"{path}:in", f"{path}.mlp:in", f"{path}.mlp:out", f"{path}:out")
    assert set(model.widths(hooks).values()) == {12}
    ids = torch.randint(0, 50, (2, 7))
    clean = model.logits(ids)
    for hook in hooks:
        with model.replacing(hook, lambda x: x + 0):
            torch.testing.assert_close(model.logits(ids), clean)
        with model.replacing(hook, lambda x: x + 1):
            assert not torch.allclose(model.logits(ids), clean)


def test_a_model_that_cannot_be_had_names_the_embedded_one(tmp_path, monkeypatch):
    # The environment variable is read when the client is imported, which is long past.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for model_id in (str(tmp_path / "empty"), "nobody/no-such-model-here"):
        with pytest.raises(ValueError, match=r"could not be loaded .*embedded, which needs no network"):
            load_model(ModelSection(id=model_id))
        with pytest.raises(ValueError, match=r"could not be loaded"):
            skeleton(ModelSection(id=model_id))


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"model\.device: 'cuda:77' is not available"):
        resolve_device("cuda:77")


def test_loss_is_the_cross_entropy_of_the_next_token():
    logits, ids = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(next_token_loss(logits, ids), expected)


def test_tokenizers_that_cut_alike_have_equal_digests(embedded_model):
    again = load_model(ModelSection(device="cpu")).tokenizer
    assert tokenizer_digest(again) == tokenizer_digest(embedded_model.tokenizer)
    again.add_tokens(["new"])
    assert tokenizer_digest(again) != tokenizer_digest(embedded_model.tokenizer)
