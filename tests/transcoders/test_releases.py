"""The directory of published dictionaries: names, local copies, wrong names, damaged files."""

import gzip
import json

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsary
from sparsary.transcoders.releases import (
    DIRECTORY,
    REPOSITORIES,
    PublishedDictionary,
    Release,
    local_repository,
    release_directory,
    write_releases,
)

D, N = 6, 64


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test may reach the hub, nor read a directory that somebody refreshed."""

    def refused(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refused)
    monkeypatch.delenv(DIRECTORY, raising=False)
    monkeypatch.delenv(REPOSITORIES, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copies(monkeypatch, tmp_path):
    monkeypatch.setenv(REPOSITORIES, str(tmp_path / "copies"))
    return tmp_path / "copies"


def weights(seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
    return {name: draw.random(shape, dtype=np.float32) for name, shape in shapes.items()}


def of_gemma_scope(copies, path):
    folder = copies / "google" / "gemma-scope-2b-pt-res" / path
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights())


def qwen_scope(copies, layers):
    folder = copies / "Qwen" / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir(parents=True)
    for layer in layers:
        own = {name: torch.from_numpy(value) for name, value in weights(layer).items() if name != "threshold"}
        torch.save(
            own | {"W_enc": own["W_enc"].T.contiguous(), "W_dec": own["W_dec"].T.contiguous()}, folder / f"layer{layer}.sae.pt"
        )


def test_the_names_of_the_issue_are_there_with_their_facts():
    directory = release_directory()
    one = directory.get("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
    assert one == PublishedDictionary(
        "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
        "gemma-scope-2b-pt-res",
        "google/gemma-scope-2b-pt-res",
        "layer_12/width_16k/average_l0_82",
        "google/gemma-2-2b",
        82.0,
    )
    assert directory.get("gemma-2-2b/12-gemmascope-res-16k").path == "layer_12/width_16k/average_l0_82"
    for part in ("gemma-scope-2-", "llama_scope", "qwen-scope", "gpt2-small-res-jb", "mntss/clt-gemma-2-2b-426k", "sae_bench"):
        assert any(name.startswith(part) for name in directory.releases), part
    assert sum(len(release.dictionaries) for release in directory.releases.values()) > 13_000
    # One name, one dictionary: ids shared by several are no names.
    assert all(one.name == name or one.neuronpedia == name for name, one in directory.by_name.items())


def test_every_word_must_be_in_the_names():
    found = sparsary.published("GEMMA-2-9b", "width_16k", "layer_20")
    assert found
    assert all("layer_20" in one.name and one.model.startswith("google/gemma-2-9b") for one in found)
    assert sparsary.published("no such words at all") == []


@pytest.mark.parametrize("name", ["gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "gemma-2-2b/12-gemmascope-res-16k"])
def test_a_name_is_loaded_from_a_local_copy(copies, name):
    of_gemma_scope(copies, "layer_12/width_16k/average_l0_82")
    loaded = sparsary.load(name)
    assert (loaded.n_latents, loaded.model_id, loaded.hook) == (N, "google/gemma-2-2b", "model.layers.12:out")
    torch.testing.assert_close(loaded.W_dec, torch.from_numpy(weights()["W_dec"]))
    assert dict(sparsary.info(name).lines)["model"] == "google/gemma-2-2b"


@pytest.mark.parametrize("layers", [(3,), (2, 3, 11)])
def test_a_file_of_a_repository_is_loaded_alone_or_among_others(copies, layers):
    qwen_scope(copies, layers)
    loaded = sparsary.load("qwen-scope-3-1.7b-base-w32k-l50/layer3")
    torch.testing.assert_close(loaded.W_dec, torch.from_numpy(weights(3)["W_dec"]))
    # The files do not say the model: the directory does.
    assert (loaded.model_id, loaded.hook, loaded.encoder.k) == ("Qwen/Qwen3-1.7B-Base", "model.layers.3:out", 50)


def test_a_layer_of_a_set_is_read_without_the_others(copies):
    folder = copies / "mwhanna" / "qwen3-0.6b-transcoders-lowl0"
    folder.mkdir(parents=True)
    for layer in range(3):
        own = {name: torch.from_numpy(value).contiguous() for name, value in weights(layer).items() if name != "threshold"}
        save_file(own | {"W_enc": own["W_enc"].T.contiguous()}, folder / f"layer_{layer}.safetensors")
    (folder / "layer_2.safetensors").write_bytes(b"damaged")
    said = {"model_name": "Qwen/Qwen3-0.6B", "model_kind": "transcoder_set"}
    sites = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(json.dumps(said | sites))
    loaded = sparsary.load("mwhanna-qwen3-0.6b-transcoders-lowl0/layer_1")
    torch.testing.assert_close(loaded.W_dec, torch.from_numpy(weights(1)["W_dec"]))
    assert "model.layers.1." in loaded.provenance["hooks_out"][0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_83",
            r"found none\. Did you mean 'gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82'\? `sparsary list gemma-",
        ),
        ("gemma-scope-2b-pt-res", r"expected one dictionary, got a release of 316\. For example gemma-scope-2b-pt-res/"),
        (
            "gemma-scope-2b-pt-rez/layer_12/width_16k/average_l0_82",
            r"Did you mean 'gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82'\?$",
        ),
        ("gpt2-smal-res-jb/blocks.8.hook_resid_pre", r"Did you mean 'gpt2-small-res-jb/blocks.8.hook_resid_pre'\?$"),
        ("runs/quickstarrt", r"^runs/quickstarrt: expected a directory or a Hugging Face Hub repository, .*connection\.$"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        sparsary.load(name)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    sparsary.SAE(5, 7, sparsary.ENCODERS["topk"](k=2)).save(name, {})
    assert sparsary.load(name).n_latents == 7


def test_a_hub_id_is_read_from_a_local_copy_too(copies):
    of_gemma_scope(copies, "layer_3/width_16k/average_l0_9")
    assert local_repository("google/gemma-scope-2b-pt-res") == str(copies / "google" / "gemma-scope-2b-pt-res")
    assert local_repository("google/another") == "google/another"
    assert sparsary.load("google/gemma-scope-2b-pt-res", subfolder="layer_3/width_16k/average_l0_9").n_latents == N


def test_a_refreshed_directory_takes_the_place_of_the_package_s(tmp_path, monkeypatch):
    own = PublishedDictionary("mine/a", "mine", "me/mine", "folder/a", "gpt2-small", None, "gpt2/1-mine")
    other = PublishedDictionary("mine/b", "mine", "me/mine", "b", "gpt2-small", 3.0, None)
    path = tmp_path / "cache" / "sparsary" / "releases.json.gz"
    write_releases(path, [Release("mine", "me/mine", "gpt2-small", (other, own))], ["a test"], "2026-01-02")
    directory = release_directory()
    assert (directory.date, directory.sources, list(directory.releases)) == ("2026-01-02", ("a test",), ["mine"])
    assert [d.name for d in directory.search(["gpt2"])] == ["mine/a", "mine/b"]
    assert directory.get("gpt2/1-mine").path == "folder/a"
    assert directory.get("mine/b").l0 == 3.0
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "nowhere.json.gz"))
    with pytest.raises(ValueError, match=r"^SPARSARY_RELEASES: expected a file, found none at .*nowhere"):
        release_directory()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        gzip.compress(b"[]"),
        gzip.compress(b"{"),
        gzip.compress(b'{"version": 2}'),
        gzip.compress(b'{"version": 1, "date": "", "sources": [], "releases": {"a": {"repository": 1}}}'),
        gzip.compress(b'{"version": 1, "date": "", "sources": [], "releases": []}')[:-6],
    ],
    # Compressed bytes hold the time.
    ids=["empty", "no archive", "a list", "no JSON", "another version", "a release without entries", "cut off"],
)
def test_a_damaged_directory_is_one_message(data, tmp_path, monkeypatch):
    path = tmp_path / "releases.json.gz"
    path.write_bytes(data)
    monkeypatch.setenv(DIRECTORY, str(path))
    with pytest.raises(ValueError, match=r"expected a directory of releases, version 1, got something else .*--refresh"):
        release_directory()
