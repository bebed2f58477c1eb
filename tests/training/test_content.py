"""Identity by content: what changed under its name is noticed, what only has another name is not mistaken for another."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary import CheckpointOptions, evaluate
from sparsary.eval.compare.recipes import is_complete
from sparsary.eval.compare.runs import is_stale
from sparsary.sae.checkpoint_files import WEIGHTS_FILE
from sparsary.sae.files import sha256
from sparsary.training import content
from sparsary.training.activations.manifest import read_manifest, write_manifest
from sparsary.training.activations.model import load_model
from sparsary.training.activations.model_source import section_content
from sparsary.training.content import (
    TextDigest,
    file_digest,
    folder_content,
    model_problems,
    pinned,
    text_content,
    text_problems,
    text_record,
)
from sparsary.training.embedded import MODEL_DIR
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.preflight import preflight
from sparsary.training.recipe import ModelSection, TextSection, load_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import harvest, train
from sparsary.training.text import Cursor, documents

TEXTS = [f"{embedded_document(1, number).text} {number}" for number in range(400)]


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Paths of the files that were read; digests are remembered however young the files are."""
    read = []
    monkeypatch.setenv("SPARSARY_CACHE", str(tmp_path / "remembered"))
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1e9)
    monkeypatch.setattr(content, "sha256", lambda path: read.append(path.name) or sha256(path))
    return read


@pytest.fixture
def model_dir(tmp_path):
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    write_texts(path, TEXTS)
    return path


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def change_weight(folder, by=1e-3):
    """One number of one tensor, the file's size and times as before."""
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += by
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_are_read_once_and_again_when_anything_changed(counted, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert [file_digest(path), file_digest(path)] == [first, first] == [sha256(path)] * 2
    assert counted == ["weights"]
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path) == sha256(path) != first
    # Another file in its place.
    (tmp_path / "new").write_bytes(b"six")
    (tmp_path / "new").replace(path)
    assert file_digest(path) == sha256(path)
    assert len(counted) == 3


def test_a_file_that_has_just_changed_is_not_remembered(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SETTLED_SECONDS", 3600.0)
    (tmp_path / "young").write_bytes(b"one")
    assert file_digest(tmp_path / "young") == file_digest(tmp_path / "young")
    assert counted == ["young", "young"]


@pytest.mark.parametrize("damage", ["nonsense", "[]", '{"file x": 3}', '{"file x": {"files": []}}'])
def test_a_damaged_memory_is_replaced(counted, tmp_path, damage):
    (tmp_path / "remembered").mkdir()
    (tmp_path / "remembered" / content.REMEMBERED_FILE).write_text(damage)
    (tmp_path / "file").write_bytes(b"one")
    assert file_digest(tmp_path / "file") == file_digest(tmp_path / "file") == sha256(tmp_path / "file")
    assert counted == ["file"]


def test_without_a_cache_folder_files_are_read_each_time(counted, tmp_path):
    (tmp_path / "remembered").write_text("a file where the folder would be")
    (tmp_path / "file").write_bytes(b"one")
    assert file_digest(tmp_path / "file") == file_digest(tmp_path / "file") == sha256(tmp_path / "file")
    assert counted == ["file", "file"]


def test_a_model_s_content_is_what_is_loaded_from_its_folder(model_dir):
    before = folder_content(model_dir)
    edit_json(model_dir / "config.json", transformers_version="1.0", _name_or_path="elsewhere")
    (model_dir / "README.md").write_text("other words")
    (model_dir / "optimizer.safetensors").write_bytes(b"not loaded")
    assert folder_content(model_dir) == before
    change_weight(model_dir)
    assert {key for key, value in folder_content(model_dir).items() if value != before[key]} == {"weights"}
    edit_json(model_dir / "config.json", layer_norm_epsilon=1e-3)
    assert {key for key, value in folder_content(model_dir).items() if value != before[key]} == {"config", "weights"}
    (model_dir / "code.py").write_text("x = 1")
    code = folder_content(model_dir, with_code=True)["code"]
    (model_dir / "code.py").write_text("x = 2")
    assert folder_content(model_dir, with_code=True)["code"] != code


def test_sharded_weights_count_by_every_shard(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "model-1.safetensors")
    (model_dir / "model-2.safetensors").write_bytes(b"two")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    before = folder_content(model_dir)["weights"]
    (model_dir / "model-2.safetensors").write_bytes(b"TWO")
    assert folder_content(model_dir)["weights"] != before


def test_a_tokenizer_s_content_is_how_it_cuts_and_what_it_calls_special(model_dir):
    section = ModelSection(id=str(model_dir))
    before = section_content(section)["tokenizer"]
    edit_json(model_dir / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=77)
    assert section_content(section)["tokenizer"] == before
    edit_json(model_dir / "tokenizer_config.json", eos_token="<pad>")
    special = section_content(section)["tokenizer"]
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text())
    vocabulary["normalizer"] = {"type": "Lowercase"}
    (model_dir / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert len({before, special, section_content(section)["tokenizer"]}) == 3


def test_the_content_of_a_model_is_the_same_loaded_or_not(model_dir, embedded_model):
    section = ModelSection(id=str(model_dir), device="cpu")
    model = load_model(section)
    assert model.content() == section_content(section)
    assert embedded_model.content() == section_content(ModelSection())
    # One that was not loaded goes by its parameters.
    model.section = None
    before = model.content()["model"]
    assert model.content()["model"] == before
    with torch.no_grad():
        next(model.module.parameters())[0, 0] += 1
    assert model.content()["model"] != before


def test_a_text_s_digest_while_it_is_read_is_that_of_its_documents(text_file):
    section = TextSection(source="files", files=(str(text_file),))
    reading = TextDigest(section)
    reader = documents(section, 0, lambda _: True, reading=reading.add)
    for _ in range(40):
        next(reader)
    # Documents read ahead do not count, one of which a token was used does.
    assert reading.up_to(Cursor(7, 0)) == text_record(section, 7)
    assert reading.up_to(Cursor(7, 3)) == text_record(section, 8)
    assert reading.up_to(Cursor(2, 0)) == text_record(section, 8)
    assert [number for number, _ in reader] == list(range(40, 400))
    # From the start, as a text that is read several times, and from the middle, as one that is gone on with.
    for start in (0, 11):
        assert len(list(documents(section, start, lambda _: True, reading=reading.add))) == 400 - start
    assert reading.up_to(Cursor(400, 0)) == text_record(section, None) | {"documents": 400}
    resumed = TextDigest(section)
    next(documents(section, 30, lambda _: True, reading=resumed.add))
    assert resumed.up_to(Cursor(30, 0)) == text_record(section, 30)


def test_texts_go_by_the_documents_that_were_read(counted, text_file, tmp_path):
    section = TextSection(source="files", files=(str(text_file),))
    recorded = {"text": text_record(section, 100)}
    assert text_problems(recorded, section) == []
    write_texts(text_file, [*TEXTS, "one more"])
    assert text_problems(recorded, section) == []
    write_texts(text_file, TEXTS[:100])
    assert text_problems(recorded, section) == []
    moved = text_file.rename(tmp_path / "moved.jsonl")
    assert text_problems(recorded, TextSection(source="files", files=(str(moved),))) == []
    # Not there: nothing tells.
    assert text_problems(recorded, section) is None
    write_texts(text_file, [*TEXTS[:50], TEXTS[50].replace("e", "a", 1), *TEXTS[51:]])
    assert "first 100 documents" in text_problems(recorded, section)[0]
    write_texts(text_file, TEXTS[:99])
    assert text_problems(recorded, section)
    other = section.model_copy(update={"column": "title"})
    text_file.write_text("".join(json.dumps({"text": text, "title": "x"}) + "\n" for text in TEXTS))
    assert text_problems(recorded, section) == []
    assert text_problems(recorded, other)


def test_a_text_s_digest_is_remembered_and_what_finds_it_changed_is_not(counted, text_file, monkeypatch):
    section = TextSection(source="files", files=(str(text_file),))
    read = []
    monkeypatch.setattr(content, "documents", lambda *a, **k: read.append(1) or documents(*a, **k))
    first = text_record(section, 20)
    assert text_record(section, 20) == first
    assert read == [1]
    # How documents are cut into contexts is no part of them.
    assert text_record(section.model_copy(update={"context_length": 9, "bos": "none"}), 20) == first
    assert read == [1]
    write_texts(text_file, TEXTS[1:])
    assert text_record(section, 20) != first
    assert len(read) == 2


def test_models_and_data_sets_of_the_hub_go_by_their_commit(monkeypatch):
    old, new = "a" * 40, "b" * 40
    assert model_problems({"model": {"commit": old}}, {"model": {"commit": old}}) == []
    assert "set model.revision: " + old in model_problems({"model": {"commit": old}}, {"model": {"commit": new}})[0]
    # Unknown is not changed.
    assert model_problems({"model": {"commit": old}}, {"model": {}}) == []
    section = TextSection(source="hub", dataset="some/set", dataset_revision=old)
    assert text_content(section, 5) == {"documents": 5, "commit": old}
    assert text_problems({"text": {"documents": 5, "commit": old}}, section) == []
    asked = []
    monkeypatch.setattr(content, "dataset_commit", lambda section: asked.append(1) or new)
    assert pinned(TextSection(source="hub", dataset="some/set")).dataset_revision == new
    problem = text_problems({"text": {"documents": 5, "commit": old}}, TextSection(source="hub", dataset="some/set"))
    assert f"text.dataset_revision: {old}" in problem[0]
    monkeypatch.setattr(content, "dataset_commit", lambda section: None)
    assert text_problems({"text": {"commit": old}}, TextSection(source="hub", dataset="some/set")) is None


@pytest.fixture
def values(recipe_values, model_dir, text_file):
    recipe_values["model"] = {"id": str(model_dir), "device": "cpu"}
    recipe_values["text"] = {"source": "files", "files": [str(text_file)], "context_length": 32}
    return recipe_values


def check(path, **overrides):
    return preflight(resolve_recipe(load_recipe(path, {key.replace("__", "."): v for key, v in overrides.items()})))


def test_a_store_goes_by_content(values, write_recipe, model_dir, text_file, tmp_path, caplog):
    values["harvest"]["tokens"] = 2500
    path = write_recipe(values)
    store = harvest(path)
    assert store.manifest["content"]["text"]["documents"] > 50
    assert store.manifest["content"]["model"]["weights"]
    # Text that follows what was read, other times, other names: the same store.
    write_texts(text_file, [*TEXTS, "one more"])
    os.utime(model_dir / "model.safetensors")
    check(path)
    again, text = Path(shutil.copytree(model_dir, tmp_path / "again")), shutil.copy(text_file, tmp_path / "again.jsonl")
    check(path, model__id=str(again), text__files=[str(text)])
    assert harvest(path, model__id=str(again)).manifest["content"] == store.manifest["content"]

    for change, words in (
        (lambda: change_weight(again), "model: its weights changed"),
        (lambda: edit_json(again / "config.json", activation_function="relu"), "model: its configuration changed"),
        (lambda: edit_json(again / "tokenizer_config.json", eos_token="<pad>"), "tokenizer: it changed"),
    ):
        change()
        with pytest.raises(ValueError, match=f"(?s)expected a store of this recipe, got one made with other settings.*{words}"):
            check(path, model__id=str(again))
    write_texts(text_file, ["another beginning", *TEXTS])
    with pytest.raises(
        ValueError,
        match=r"(?s)expected a store of this recipe, .*text: the first \d+ documents of .*text\.jsonl changed",
    ):
        check(path)
    # A complete store does without its text.
    text_file.unlink()
    check(path)
    assert "cannot be read, so changes to it cannot be detected" in caplog.text

    # Before contents were recorded: used, with a remark.
    manifest = read_manifest(store.directory)
    del manifest["content"]
    write_manifest(store.directory, manifest)
    caplog.clear()
    check(path)
    assert "recorded no hashes of model and text" in caplog.text
    with pytest.raises(ValueError, match=r"model\.id"):
        check(path, model__id=str(again))


def test_an_interrupted_harvest_does_not_go_on_in_a_changed_text(values, write_recipe, text_file):
    values["harvest"]["tokens"] = 2500
    harvest(write_recipe(values))
    values["harvest"]["tokens"] = 4000
    write_texts(text_file, TEXTS[3:])
    with pytest.raises(ValueError, match="text: the first"):
        harvest(write_recipe(values))
    write_texts(text_file, TEXTS)
    store = harvest(write_recipe(values))
    assert store.tokens("train") + store.tokens("heldout") >= 4000
    section = TextSection(source="files", files=(str(text_file),))
    recorded = store.manifest["content"]["text"]
    assert recorded == text_record(section, recorded["documents"])


def test_a_run_and_what_is_measured_of_it_go_by_content(values, write_recipe, model_dir, text_file, caplog, no_page):
    values["harvest"] |= {"store": None, "tokens": None, "live_buffer_tokens": 1500}
    values |= {"tokens": 2000, "eval_tokens": 400}
    path = write_recipe(values)
    out = train(path)
    provenance = json.loads((out / "dictionary.json").read_text())["provenance"]
    assert provenance["content"]["model"] == folder_content(model_dir)
    section = TextSection(source="files", files=(str(text_file),))
    recorded = provenance["content"]["text"]
    assert recorded["documents"] > 10
    assert recorded == text_record(section, recorded["documents"])
    member = resolve_recipe(load_recipe(path))
    assert not evaluate(out)["doubts"]
    assert is_complete(member.recipe, member.content)
    assert not is_stale(out)

    cached = {file.name: file.stat().st_mtime_ns for file in (out / "eval_cache").iterdir()}
    write_texts(text_file, [TEXTS[0] + " more", *TEXTS[1:]])
    with pytest.raises(
        ValueError, match=r"(?s)expected a run of this recipe, got another run; these keys differ:.*text: the first"
    ):
        train(path)
    report = evaluate(out)
    assert [doubt[:15] for doubt in report["doubts"] if doubt.startswith("text")] == ["text: the first"]
    # Measured again, under the same key: another text would have another.
    assert all((out / "eval_cache" / name).stat().st_mtime_ns > time for name, time in cached.items())

    write_texts(text_file, TEXTS)
    change_weight(model_dir)
    with pytest.raises(
        ValueError, match=r"(?s)expected a run of this recipe, got another run; these keys differ:.*model: its weights changed"
    ):
        train(path)
    fresh = resolve_recipe(load_recipe(path))
    with pytest.raises(ValueError, match="its weights changed"):
        is_complete(fresh.recipe, fresh.content)
    caplog.clear()
    assert any("its weights changed" in doubt for doubt in evaluate(out)["doubts"])
    assert "trained on something else: model: its weights changed" in caplog.text
    assert len(list((out / "eval_cache").iterdir())) == 2 * len(cached)
    # Who names the model means it.
    assert not evaluate(out, options=CheckpointOptions(model=str(model_dir)))["doubts"]

    # The weights of the dictionary itself.
    shutil.copytree(out, out.with_name("twin"))
    tensors = load_file(out / WEIGHTS_FILE)
    save_file({name: x * 1.01 for name, x in tensors.items()}, out / WEIGHTS_FILE)
    assert is_stale(out)
    assert not is_stale(out.with_name("twin"))

    # A run from before contents were recorded goes on, with a remark.
    config = json.loads((out / "dictionary.json").read_text())
    del config["provenance"]["content"], config["checksum"]
    (out / "dictionary.json").write_text(json.dumps(config))
    caplog.clear()
    train(path)
    assert "recorded no hashes of model and text" in caplog.text


def test_a_model_of_the_hub_goes_by_the_commit_it_resolves_to(tmp_path, monkeypatch):
    """The hub's cache as its client lays it out, offline; then the branch moves on."""
    import huggingface_hub

    commits = ["a" * 40, "b" * 40]
    repository = tmp_path / "hub" / "models--somebody--small"
    for commit in commits:
        shutil.copytree(MODEL_DIR, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = []
    for commit in commits:
        (repository / "refs" / "main").write_text(commit)
        found.append(section_content(ModelSection(id="somebody/small")))
    assert [content["model"] for content in found] == [{"commit": commit} for commit in commits]
    assert commits[0] in model_problems(*found)[0]
    assert section_content(ModelSection(id="somebody/small", revision=commits[0])) == found[0]
    assert load_model(ModelSection(id="somebody/small", device="cpu")).content() == found[1]
