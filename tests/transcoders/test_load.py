"""Loading by path or hub id, whoever wrote the files."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import sparsary
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.transcoders import Stack
from sparsary.transcoders.load import CheckpointOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "formats" / "saelens"


def test_another_library_s_directory_loads():
    expected = load_file(GOLDEN / "topk-none" / "expected.safetensors")
    for given in ({}, {"format": "saelens"}, {"hook": "transformer.h.3:out"}, {"hook": "blocks.3.hook_resid_post"}):
        loaded = sparsary.load(str(GOLDEN / "topk-none"), **given)
        assert not loaded.training
        torch.testing.assert_close(loaded(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    assert sparsary.load(str(GOLDEN), subfolder="topk-none").n_latents == 24
    assert sparsary.load(str(GOLDEN / "topk-none"), dtype="float64").W_dec.dtype == torch.float64


def test_options_say_what_arguments_say_and_arguments_come_first(tmp_path):
    options = CheckpointOptions(subfolder="topk-none", hook="transformer.h.3:out")
    assert sparsary.load(GOLDEN, options=options).n_latents == 24
    with pytest.raises(ValueError, match=r"hook: expected transformer.h.3:out, .*got .*h.4:out"):
        sparsary.load(GOLDEN, hook="transformer.h.4:out", options=options)
    SAE(5, 7, build_encoder({"name": "topk", "k": 2})).save(tmp_path, {})
    with pytest.raises(ValueError, match=r"^k: expected none, .*got 3"):
        sparsary.load(tmp_path, options=CheckpointOptions(k=3))


def test_what_is_asked_for_must_be_what_is_there():
    with pytest.raises(ValueError, match=r"hook: expected transformer.h.3:out, the hook of this dictionary, got .*h.4:out"):
        sparsary.load(str(GOLDEN / "topk-none"), hook="transformer.h.4:out")
    with pytest.raises(ValueError, match=r"format: expected one of .*saelens.*, got 'saelense'. Did you mean 'saelens'?"):
        sparsary.load(str(GOLDEN / "topk-none"), format="saelense")
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .*, got 'half'"):
        sparsary.load(str(GOLDEN / "topk-none"), dtype="half")
    with pytest.raises(ValueError, match=r"expected a path within it, got '../saelens'"):
        sparsary.load(str(GOLDEN), subfolder="../saelens")


def test_a_directory_of_nothing_known_says_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"expected a dictionary of a known format \(saelens.*\), found notes.txt"):
        sparsary.load(str(tmp_path))


def test_folders_of_several_hooks_are_a_stack(tmp_path):
    for layer in (2, 10):
        shutil.copytree(GOLDEN / "topk-none", tmp_path / f"layer_{layer}")
        path = tmp_path / f"layer_{layer}" / "cfg.json"
        cfg = json.loads(path.read_text())
        cfg["metadata"]["hook_name"] = f"blocks.{layer}.hook_resid_post"
        path.write_text(json.dumps(cfg))
    stack = sparsary.load(str(tmp_path))
    assert isinstance(stack, Stack)
    assert list(stack) == ["transformer.h.2:out", "transformer.h.10:out"]
    stack.save(tmp_path / "ours")
    one = sparsary.load(str(tmp_path / "ours"), hook="transformer.h.10:out")
    assert torch.equal(one.W_dec, stack["transformer.h.10:out"].W_dec)
    with pytest.raises(ValueError, match=r"hook: expected one of transformer.h.2:out, transformer.h.10:out, got 'x:in'"):
        sparsary.load(str(tmp_path / "ours"), hook="x:in")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository; what it was asked for."""
    repository = tmp_path / "repository"
    shutil.copytree(GOLDEN / "topk-none", repository / "layer_3" / "width_24")
    shutil.copytree(GOLDEN / "standard-none", repository / "layer_4" / "width_24")
    (repository / "layer_3" / "huge.bin").write_bytes(b"not needed")
    SAE(5, 13, build_encoder({"name": "topk", "k": 3})).save(repository / "ours")
    asked = []

    class Api:
        def list_repo_files(self, repo_id, revision=None):
            assert repo_id == "someone/saes"
            return [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]

    def download(repo_id, name, revision=None):
        asked.append(name)
        return str(repository / name)

    def snapshot(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_only_the_needed_files_of_a_repository_are_fetched(hub):
    expected = load_file(GOLDEN / "topk-none" / "expected.safetensors")
    loaded = sparsary.load("someone/saes", subfolder="layer_3/width_24")
    torch.testing.assert_close(loaded(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    assert set(hub) == {"layer_3/width_24/cfg.json", "layer_3/width_24/sae_weights.safetensors"}


def test_of_several_in_a_repository_one_must_be_named_before_weights_are_fetched(hub):
    with pytest.raises(ValueError, match=r"2 dictionaries: layer_3/width_24, layer_4/width_24. Give subfolder=NAME"):
        sparsary.load("someone/saes")
    assert not [name for name in hub if name.endswith(".safetensors")]


def test_our_own_in_a_folder_of_a_repository_load(hub):
    assert sparsary.load("someone/saes", subfolder="ours").n_latents == 13


def test_without_network_the_cache_is_asked(hub, monkeypatch, tmp_path):
    class Offline:
        def list_repo_files(self, repo_id, revision=None):
            raise ConnectionError("no network")

    shutil.copytree(GOLDEN / "topk-none", tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo_id, name, revision=None: str(tmp_path / "snapshot" / name)
    )
    assert sparsary.load("someone/saes").n_latents == 24


def test_a_path_may_begin_at_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    SAE(5, 11, build_encoder({"name": "topk", "k": 3})).save(tmp_path / "ours", {"hook": "h.0:out", "model": {"id": "m"}})
    assert sparsary.load("~/ours").n_latents == 11
    with pytest.raises(ValueError, match="none: expected a checkpoint directory"):
        sparsary.load("~/none")


def test_what_a_message_asks_for_can_be_given_as_it_is_written(tmp_path):
    """``Give it: k=NUMBER``: to ``load`` itself, and over a value in the files that is no number of latents."""
    torch.manual_seed(0)
    SAE(5, 11, build_encoder({"name": "topk", "k": 3})).save(tmp_path / "ours", {"hook": "h.0:out", "model": {"id": "m"}})
    sparsary.convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    x = torch.randn(7, 5)
    expected = sparsary.load(tmp_path / "ours")(x)
    path = tmp_path / "theirs" / "cfg.json"
    config = json.loads(path.read_text())
    for wrong in (None, 3.5, "3"):
        path.write_text(
            json.dumps({key: value for key, value in config.items() if key != "k"} | ({"k": wrong} if wrong else {}))
        )
        with pytest.raises(ValueError, match=r"Give it: k=NUMBER, or --k NUMBER"):
            sparsary.load(tmp_path / "theirs")
        torch.testing.assert_close(sparsary.load(tmp_path / "theirs", k=3)(x), expected)
