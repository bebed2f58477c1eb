"""Where dictionaries come from: hooks, models, and configurations in the folders above."""

import datetime
import json

import pytest
import torch

from sparsary.sae.formats import FORMATS, ReadOptions, SourceFiles
from sparsary.sae.formats.canonical import ActivationFn, CanonicalSAE
from sparsary.sae.formats.files import HubSource
from sparsary.sae.formats.origin import config_above, hooks_from_files, model_of, origin, originated, plain, source_config


def bare():
    return CanonicalSAE("sae", torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2), torch.zeros(2), ActivationFn("relu"))


def test_files_count_before_options_and_options_before_nothing():
    said = originated(
        bare(), "x", {"a": 1}, ReadOptions(hook="model.layers.9:out"), hook="blocks.2.hook_resid_pre", model="gpt2"
    )
    assert hooks_from_files(said) == ("transformer.h.2:in", "transformer.h.2:in")
    assert model_of(said) == "openai-community/gpt2"
    assert source_config(said, "x") == {"a": 1}
    assert source_config(said, "y") == {}
    assert not said.warnings
    given = originated(bare(), "x", {}, ReadOptions(hook="blocks.9.hook_mlp_out", model="gpt2"), hook="no.such place")
    assert hooks_from_files(given) == ("transformer.h.9.mlp:out", "transformer.h.9.mlp:out")
    unknown = originated(bare(), "x", {}, ReadOptions())
    assert hooks_from_files(unknown) == (None, None)
    assert unknown.warnings == ("no hook is named: give hook=MODULE:SIDE, or model=ID",)


def test_what_reads_one_place_and_writes_another_has_no_single_hook():
    n = originated(bare(), "x", {}, ReadOptions(), hook="model.layers.2.mlp:in", hook_out="model.layers.2.mlp:out")
    assert hooks_from_files(n) == ("model.layers.2.mlp:in", "model.layers.2.mlp:out")
    assert "hook" not in n.provenance


def test_a_configuration_is_looked_for_in_folders_above(tmp_path):
    inner = tmp_path / "run" / "layers.1" / "seed0"
    inner.mkdir(parents=True)
    (inner / "w.pt").write_bytes(b"")
    (tmp_path / "run" / "c.json").write_text('{"depth": 0}')
    (tmp_path / "c.json").write_text('{"depth": -1}')
    for source in (SourceFiles(inner), SourceFiles(tmp_path, "run/layers.1/seed0"), SourceFiles(inner / "w.pt")):
        assert config_above(source, "c.json", 2) == {"depth": 0}
        assert config_above(source, "c.json", 1) == {}
    (inner / "c.json").write_text('{"depth": 2}')
    assert config_above(SourceFiles(inner), "c.json", 2) == {"depth": 2}
    assert config_above(SourceFiles(inner / "w.pt"), "c.json", 2) == {"depth": 2}
    (inner / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        config_above(SourceFiles(inner), "c.json", 2)


def test_of_a_repository_it_is_looked_for_within(tmp_path, monkeypatch):
    files = {"layers.1/seed0/cfg.json": 2, "config.json": 0}
    monkeypatch.setattr("sparsary.sae.formats.files.hub_files", lambda repo_id, revision: list(files))

    def fetched(self, name):
        path = tmp_path / name
        path.write_text(json.dumps({"at": files[f"{self.inside}/{name}".lstrip("/")]}))
        return path

    monkeypatch.setattr(HubSource, "path", fetched)
    source = HubSource("owner/name").at("layers.1/seed0")
    assert config_above(source, "cfg.json", 2) == {"at": 2}
    assert config_above(source, "config.json", 2) == {"at": 0}
    assert config_above(source, "config.json", 1) == {}
    assert config_above(source, "other.json", 2) == {}
    assert config_above(HubSource("owner/name"), "cfg.json", 2) == {}


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
    told, none = origin(*arguments, ReadOptions(hook="transformer.h.1.ln_2:in"))
    assert (told["hooks_in"], none) == (["transformer.h.1.ln_2:in"], [])
    # One name cannot be that of every layer.
    several = origin("x", {}, None, [None, None], [None, None], ReadOptions(hook="a.b:in"))
    assert several[1] == ["the files do not say what hooks it is for"]


def test_configurations_are_kept_as_json_can_hold_them():
    assert plain({1: [datetime.date(2025, 1, 2), None, True]}) == {"1": ["2025-01-02", None, True]}


class Listing(SourceFiles):
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
