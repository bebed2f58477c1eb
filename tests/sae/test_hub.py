"""Loading by repository id and pushing, against a client that is played."""

import shutil

import huggingface_hub
import pytest

import sparsary
from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.formats import write_dictionary
from sparsary.sae.hub import files_of
from sparsary.transcoders.convert import convert


@pytest.fixture
def checkpoint(tmp_path):
    SAE(5, 13, ENCODERS["topk"](k=3)).save(tmp_path / "d")
    (tmp_path / "d" / "state.safetensors").write_bytes(b"large and private")
    return tmp_path / "d"


def test_a_hub_id_is_downloaded_and_loaded(checkpoint, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, sorted(allow_patterns)))
        shutil.copytree(checkpoint, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sparsary.load("someone/some-sae", revision="v2").n_latents == 13
    assert asked == [("someone/some-sae", "v2", ["dictionary.json", "dictionary.safetensors", "usage.safetensors"])]


def test_a_hub_id_that_cannot_be_had_says_both_things_looked_for(monkeypatch):
    def offline(*_arguments, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"someone/some-sae: expected a directory or a Hugging Face Hub repository, .* \(no network\)"
    ):
        sparsary.load("someone/some-sae")


@pytest.mark.parametrize("path", ["/nowhere/at-all", "./nowhere", "no/such/three"])
def test_paths_are_not_taken_for_hub_ids(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="expected a checkpoint directory"):
        sparsary.load(path)


@pytest.fixture
def pushed(monkeypatch):
    """A hub that notes what is sent to it."""
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            calls.append(("upload", repo_id, folder_path, sorted(allow_patterns)))
            return type("Commit", (), {"repo_url": f"https://hub/{repo_id}"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_another_library_s_files_are_uploaded_as_they_are(checkpoint, pushed, tmp_path):
    write_dictionary(load_dictionary(checkpoint), tmp_path / "theirs", "saelens")
    assert sparsary.push_to_hub(str(tmp_path / "theirs"), "me/mine") == "https://hub/me/mine"
    assert pushed[1] == ("upload", "me/mine", str(tmp_path / "theirs"), ["cfg.json", "sae_weights.safetensors"])


def test_push_uploads_the_two_files_only(checkpoint, pushed):
    assert sparsary.push_to_hub(str(checkpoint), "me/mine", private=True) == "https://hub/me/mine"
    assert pushed == [
        ("create", "me/mine", True, True),
        ("upload", "me/mine", str(checkpoint), ["dictionary.json", "dictionary.safetensors"]),
    ]


def test_push_of_something_else_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"dictionary\.json"):
        sparsary.push_to_hub(str(tmp_path), "me/mine")


@pytest.mark.parametrize("problem", ["no token", "offline", "no rights", "no connection", "a name that is none"])
def test_a_hub_that_takes_nothing_from_here_is_one_message(checkpoint, monkeypatch, tmp_path, problem):
    """Against the client itself, which knows some of these without asking anybody."""
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", problem == "offline")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def failing(*_, **__):
        raise {"no token": errors.LocalTokenNotFoundError("Token is required"), "no rights": PermissionError("403")}.get(
            problem, ConnectionError("gone")
        )

    if problem in ("no token", "no rights", "no connection"):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing)
    with pytest.raises(ValueError, match=r"could not be uploaded to \(.*hf auth login.*HF_TOKEN"):
        sparsary.push_to_hub(str(checkpoint), "a b/../c" if problem == "a name that is none" else "me/mine")


def test_only_what_is_read_is_uploaded(build_format, tmp_path):
    build_format("saelens", tmp_path / "theirs", 16)
    for name in ("optimizer.pt", "notes.txt", "report.json", "secrets/token.json"):
        (tmp_path / "theirs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "theirs" / name).write_text("{}")
    assert files_of(tmp_path / "theirs") == ["cfg.json", "sae_weights.safetensors"]


def test_several_of_ours_are_uploaded_together(build_format, tmp_path):
    build_format("circuit_tracer", tmp_path / "theirs", 16)
    convert(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "ours" / "report.json").write_text("{}")
    found = files_of(tmp_path / "ours")
    assert len(found) == 8
    assert {name.rpartition("/")[2] for name in found} == {"dictionary.json", "dictionary.safetensors"}
    (tmp_path / "theirs" / "layer_2.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged file or another format"):
        files_of(tmp_path / "theirs")
