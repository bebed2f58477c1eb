"""Where dictionaries come from: hooks, models, and configurations in the folders above."""

import json

import pytest
import torch

from sae.formats import Options, Source
from sae.formats.files import HubSource
from sae.formats.neutral import Gate, Neutral
from sae.formats.origin import config_above, hooks_of, model_of, originated, source_config


def plain():
    return Neutral("sae", torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2), torch.zeros(2), Gate("relu"))


def test_files_count_before_options_and_options_before_nothing():
    said = originated(plain(), "x", {"a": 1}, Options(hook="model.layers.9:out"), hook="blocks.2.hook_resid_pre", model="gpt2")
    assert hooks_of(said) == ("transformer.h.2:in", "transformer.h.2:in")
    assert model_of(said) == "openai-community/gpt2"
    assert source_config(said, "x") == {"a": 1}
    assert source_config(said, "y") == {}
    assert not said.warnings
    given = originated(plain(), "x", {}, Options(hook="blocks.9.hook_mlp_out", model="gpt2"), hook="no.such place")
    assert hooks_of(given) == ("transformer.h.9.mlp:out", "transformer.h.9.mlp:out")
    unknown = originated(plain(), "x", {}, Options())
    assert hooks_of(unknown) == (None, None)
    assert unknown.warnings == ("no hook is named: give hook=MODULE:SIDE, or model=ID",)


def test_what_reads_one_place_and_writes_another_has_no_single_hook():
    n = originated(plain(), "x", {}, Options(), hook="model.layers.2.mlp:in", hook_out="model.layers.2.mlp:out")
    assert hooks_of(n) == ("model.layers.2.mlp:in", "model.layers.2.mlp:out")
    assert "hook" not in n.provenance


def test_a_configuration_is_looked_for_in_folders_above(tmp_path):
    inner = tmp_path / "run" / "layers.1" / "seed0"
    inner.mkdir(parents=True)
    (inner / "w.pt").write_bytes(b"")
    (tmp_path / "run" / "c.json").write_text('{"depth": 0}')
    (tmp_path / "c.json").write_text('{"depth": -1}')
    for source in (Source(inner), Source(tmp_path, "run/layers.1/seed0"), Source(inner / "w.pt")):
        assert config_above(source, "c.json", 2) == {"depth": 0}
        assert config_above(source, "c.json", 1) == {}
    (inner / "c.json").write_text('{"depth": 2}')
    assert config_above(Source(inner), "c.json", 2) == {"depth": 2}
    assert config_above(Source(inner / "w.pt"), "c.json", 2) == {"depth": 2}
    (inner / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        config_above(Source(inner), "c.json", 2)


def test_of_a_repository_it_is_looked_for_within(tmp_path, monkeypatch):
    files = {"layers.1/seed0/cfg.json": 2, "config.json": 0}
    monkeypatch.setattr("sae.formats.files.hub_files", lambda repo_id, revision: list(files))

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
