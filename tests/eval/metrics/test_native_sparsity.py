"""Active share of the model's own neurons: against one counted by hand, and over architectures."""

import numpy as np
import pytest
import torch

from sparsary.eval.circuits.known.toy import ToyConfig, blank
from sparsary.eval.heldout import TextBatch
from sparsary.eval.metrics.base import DictionaryOutputs, Setting
from sparsary.eval.metrics.model_outputs import ModelOutputs
from sparsary.eval.metrics.native_sparsity import NativeSparsity
from sparsary.eval.pages.report import render_report
from sparsary.eval.undefined import settled
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.mlp_neurons import gated_neurons
from sparsary.training.activations.model import LanguageModel
from sparsary.training.text import Cursor

HOOK = "h.0:out"


def counted_neurons(activation):
    """Two blocks of four neurons: always on, always off, on at token 1 only, exactly at zero; the second block's never."""
    model = blank(ToyConfig(2, 1, 3, 3, n_ctx=5, d_vocab=3, d_vocab_out=3, d_mlp=4, activation=activation))
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(3))
        model.mlp(0).up_proj.weight[2] = torch.tensor([0.0, 1, 0])
        model.mlp(0).up_proj.bias.copy_(torch.tensor([1.0, -1, 0, 0]))
        model.mlp(1).up_proj.bias.fill_(-2)
    return LanguageModel(model, None, "counted", None)


def entries(model, hooks=(HOOK,)):
    """The group's report over two batches, some of whose positions are not kept."""
    setting = Setting(SAE(3, 5, ENCODERS["topk"](k=1)), torch.device("cpu"), model=model, hook_in=hooks[0], hook_out=hooks[0])
    group = NativeSparsity(setting)
    ids = torch.tensor([[0, 1, 1, 2], [1, 2, 0, 0], [1, 1, 1, 1]])
    kept = torch.tensor([[False, True, True, True], [True, True, True, False], [False, False, True, True]])
    for rows in (slice(0, 2), slice(2, 3)):
        owners = np.zeros(ids[rows].shape, dtype=int)
        batch = TextBatch(ids[rows], kept[rows], kept[rows][:, 1:], Cursor(0, 0), {0}, owners)
        with torch.no_grad():
            passage = ModelOutputs(model, batch, hooks, with_logits=True, figures=group.token_figures)
            group.score(DictionaryOutputs(setting, passage))
    return group.report()


@pytest.mark.parametrize("hook", [HOOK, "h.0.mlp.down_proj:in"])
def test_the_share_is_that_counted_by_hand(hook):
    """Also where the dictionary is at the neurons themselves."""
    found = entries(counted_neurons("relu"), (hook,))
    # Of eight kept tokens, five are token 1, at which two neurons of four are active; at the others one is.
    assert found["mlp_active_share"] == pytest.approx([(5 * 2 + 3) / 8 / 4, 0.0])
    assert "0.4062, 0" in render_report(found, [])


def test_without_a_gate_at_zero_the_reason_is_given():
    values, reasons = settled(entries(counted_neurons("gelu")))
    assert values == {"mlp_active_share": None}
    assert "GELU, has no gate at zero" in reasons["mlp_active_share"]


READ = {
    "gpt2": ({"activation_function": "relu"}, "transformer.h.{}.mlp.c_proj:in"),
    "llama": ({"hidden_act": "relu"}, "model.layers.{}.mlp.down_proj:in"),
    "gpt_neox": ({"hidden_act": "relu"}, "gpt_neox.layers.{}.mlp.dense_4h_to_h:in"),
    "opt": ({"activation_function": "relu"}, "model.decoder.layers.{}.fc2:in"),
    "nemotron": ({"hidden_act": "relu2"}, "model.layers.{}.mlp.down_proj:in"),
}
UNREAD = {
    "gpt2": "NewGELUActivation, has no gate",
    "llama": "SiLUActivation, has no gate",
    "mixtral": "mixtures of experts",
    "mamba": "no MLP",
}


@pytest.fixture(scope="module")
def tiny(load_beside):
    return load_beside("tiny_models").tiny_model


@pytest.mark.parametrize("kind", READ)
def test_neurons_behind_a_relu_are_read_before_the_last_projection(tiny, kind):
    changes, hook = READ[kind]
    module = tiny(kind, **changes)
    assert [each.hook for each in gated_neurons(module)] == [hook.format(layer) for layer in range(4)]
    x = LanguageModel(module, None, kind, None).activations(torch.arange(3, 14)[None], (hook.format(1),))[hook.format(1)]
    assert 0.05 < float((x == 0).float().mean()) < 0.95


@pytest.mark.parametrize("kind", UNREAD)
def test_other_neurons_are_not_read(tiny, kind):
    for each in gated_neurons(tiny(kind)):
        assert each.hook is None
        assert UNREAD[kind] in each.reason
