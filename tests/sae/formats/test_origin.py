"""Where a dictionary comes from; and that a repository is told apart by names, without its files being fetched."""

import datetime

import pytest

from sae.formats import FORMATS, Options, Source
from sae.formats.origin import origin, plain


def test_hooks_are_module_paths_where_they_are_known():
    found, warnings = origin("x", {"a": 1}, "gpt2-small", ["blocks.1.hook_resid_post"], ["blocks.1.hook_resid_post"])
    assert (found["hook"], found["model"], warnings) == ("transformer.h.1:out", {"id": "openai-community/gpt2"}, [])
    assert found["source"] == {"format": "x", "config": {"a": 1}}


def test_what_is_not_known_is_a_warning_and_may_be_given():
    arguments = ("x", {}, "gpt2", ["blocks.1.ln2.hook_normalized"], ["blocks.1.hook_mlp_out"])
    found, warnings = origin(*arguments)
    assert "hooks_in" not in found
    assert found["hooks_out"] == ["transformer.h.1.mlp:out"]
    assert warnings == [
        "hooks blocks.1.ln2.hook_normalized of gpt2 are no module's input or output known here: give hook=MODULE:SIDE"
    ]
    told, none = origin(*arguments, Options(hook="transformer.h.1.ln_2:in"))
    assert (told["hooks_in"], none) == (["transformer.h.1.ln_2:in"], [])
    # One name cannot be that of every layer.
    several = origin("x", {}, None, [None, None], [None, None], Options(hook="a.b:in"))
    assert several[1] == ["the files do not say what hooks it is for"]


def test_configurations_are_kept_as_json_can_hold_them():
    assert plain({1: [datetime.date(2025, 1, 2), None, True]}) == {"1": ["2025-01-02", None, True]}


class Listing(Source):
    """Names of a repository's files, and the configurations among them; nothing else can be had."""

    def __init__(self, *names, **configurations):
        super().__init__("owner/repository")
        self.names, self.configurations = names, configurations

    @property
    def remote(self):
        return True

    def _list(self):
        return iter(self.names)

    def _text(self, name):
        return self.configurations[name.partition(".")[0]]

    json = yaml = _text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Listing("params.npz"), "gemma_scope"),
        (Listing("params.safetensors", "config.json"), "gemma_scope"),
        (Listing("params_layer_0.safetensors", "params_layer_1.safetensors", "config.json"), "gemma_scope"),
        (Listing("layer_0.safetensors", "layer_1.safetensors"), "circuit_tracer"),
        (Listing("layer_0.safetensors", "config.yaml", config={"model_kind": "transcoder_set"}), "circuit_tracer"),
        (Listing("W_enc_0.safetensors", "W_dec_0.safetensors", "config.yaml", config={"model_kind": "x"}), "circuit_tracer"),
        (Listing("hyperparams.json", "checkpoints/final.safetensors"), "llama_scope"),
        (Listing("config.json", "sae_weights.safetensors", config={"sae_type": "clt"}), "llamascopium"),
        (Listing("config.json", "sae_weights.dcp/a", config={"sae_type": "clt"}), "llamascopium"),
    ],
)
def test_repositories_are_told_apart_by_names_alone(source, name):
    ours = ("gemma_scope", "llama_scope", "llamascopium", "circuit_tracer", "dunefsky")
    assert [key for key in ours if FORMATS[key].detect(source) is not None] == [name]
