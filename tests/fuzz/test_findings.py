"""Regression tests of the faults that fuzzing found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsary
from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.files import file_crc32, read_json, read_tensors, write_tensors
from sparsary.training.activations.manifest import write_manifest
from sparsary.training.activations.shards import ActivationStore, RowReader
from sparsary.training.recipe import check_recipe, parse_yaml
from sparsary.training.report import TrainingLog
from sparsary.training.state import Logged

HOOK = "transformer.h.2:out"


def test_yaml_and_json_nested_without_end_are_refused(tmp_path):
    """Were a RecursionError."""
    with pytest.raises(ValueError, match="nested"):
        parse_yaml("[" * 1_500, "recipe.yaml")
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"x\.json: expected JSON, got brackets nested"):
        read_json(tmp_path / "x.json")


def test_an_encoder_s_name_may_be_anything(recipe_values):
    """A list was looked up in a dictionary: TypeError."""
    recipe_values["dictionary"]["encoder"]["name"] = ["topk"]
    with pytest.raises(ValueError, match=r"encoder\.name: expected one of topk"):
        check_recipe(recipe_values, "recipe")


@pytest.fixture
def store(tmp_path):
    """Return a store of 37 int8 rows of width 6, in blocks of 3, and its manifest."""
    tensors = {"x:h": torch.zeros(37, 6, dtype=torch.int8), "scale:x:h": torch.ones(37, 2).half()}
    digest = write_tensors(tmp_path / "train-00000.safetensors", tensors, {"split": "train"})
    size = (tmp_path / "train-00000.safetensors").stat().st_size
    shard = {"name": "train-00000.safetensors", "split": "train", "unit": 0, "tokens": 37, "bytes": size, "sha256": digest}
    manifest = {"format": "sparsary-store", "format_version": 1, "block": 3, "gradients": None, "shards": [shard]}
    manifest |= {"hooks": {"h": {"width": 6, "count": 0}}, "model": {"id": "m"}, "cursor": [0, 0], "complete": True}
    write_manifest(tmp_path, manifest)
    return tmp_path, manifest


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hooks", {"h": {"width": 6}}, r"hooks\.h\.count: Field required"),
        ("hooks", {"h": {"width": 6, "count": 5, "mean": [0.0], "deviation": [0.0]}}, "expected 6 means and deviations"),
        ("hooks", {"h": {"width": 6, "count": 1, "mean": [float("nan")] * 6, "deviation": [0.0] * 6}}, r"mean\.0"),
        ("shards", [{"name": "x"}], r"shards\.0\.split"),
        ("shards", 0.5, "shards"),
        ("block", 0, "block"),
        ("cursor", [1], "cursor"),
    ],
)
def test_a_manifest_of_other_types_is_named(store, key, value, said):
    """Were KeyError, TypeError and RuntimeError, some of them long after the start."""
    directory, manifest = store
    (directory / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{said}.*: the file is damaged"):
        ActivationStore.open(directory)


def test_a_shard_s_name_stays_in_the_store(store):
    directory, manifest = store
    manifest["shards"][0]["name"] = "../x.safetensors"
    write_manifest(directory, manifest)
    with pytest.raises(ValueError, match=r"shards\.0\.name"):
        ActivationStore.open(directory)


def test_a_digit_flipped_in_a_manifest_is_found(store):
    """Means of activations were taken as they were, and shifted all inputs."""
    directory, _ = store
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 37', '"tokens": 36'))
    with pytest.raises(ValueError, match=r"manifest\.json: differs from its checksum"):
        ActivationStore.open(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.update({"x:h": torch.zeros(37, 7, dtype=torch.int8)}), "scale:x:h: expected"),
        (lambda tensors: tensors.update({"scale:x:h": torch.ones(36, 2).half()}), "scale:x:h: expected"),
        (lambda tensors: tensors.update({"scale:x:h": torch.ones(37, 2)}), "scale:x:h: expected"),
        (lambda tensors: tensors.update({"x:h": torch.zeros(37, 6, 1, dtype=torch.int8)}), "shape"),
    ],
)
def test_shards_whose_tensors_do_not_fit_together_are_refused(store, change, said):
    """Compiled code read and wrote beyond their memory."""
    directory, _ = store
    path = directory / "train-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=said):
        RowReader(ActivationStore.open(directory), "train", "x:h")


@pytest.mark.parametrize(
    ("before", "after"), [(b'"shape":[37,6]', b'"shape":[99,6]'), (b'"dtype":"I8"', b'"dtype":"F3"'), (b"x:h", b"y:h")]
)
def test_a_shard_s_header_is_not_trusted(store, before, after):
    directory, _ = store
    path = directory / "train-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(before, after, 1))
    with pytest.raises(ValueError, match="expected a shard with the tensor"):
        RowReader(ActivationStore.open(directory), "train", "x:h")


def test_a_header_longer_than_the_file_takes_no_memory(store):
    directory, _ = store
    path = directory / "train-00000.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="the header is longer than the file"):
        RowReader(ActivationStore.open(directory), "train", "x:h")


def test_every_flipped_bit_of_a_sealed_file_is_found_or_harmless(tmp_path):
    """Weights with a flipped bit were evaluated, and trained on, in silence."""
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(5.0), "b": torch.arange(3)}
    write_tensors(path, tensors, {"counters": '{"step": 3}'}, sealed=True)
    whole, harmless = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
        try:
            found, metadata = read_tensors(path)
        except ValueError:
            continue
        harmless += 1
        # The name of the checksum itself.
        assert metadata["counters"] == '{"step": 3}'
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert harmless <= 8 * len("crc32")


def test_a_dictionary_with_a_flipped_bit_is_refused(tmp_path):
    SAE(6, 19, ENCODERS["topk"](k=3)).save(tmp_path)
    path = tmp_path / "dictionary.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"dictionary\.safetensors: expected the checksum \w+ in its header, got"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("provenance", 3), ("provenance", {"model": 4}), ("dictionary", {"kind": "sae"}), ("training_usage", {"tokens": "x"})],
)
def test_a_checkpoint_s_entries_of_other_types_are_named(tmp_path, key, value):
    """Were AttributeError, KeyError and TypeError."""
    SAE(6, 19, ENCODERS["topk"](k=3)).save(tmp_path)
    path = tmp_path / "dictionary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"dictionary\.json: {key}.*The file is damaged"):
        sparsary.info(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 13, 24])
def test_a_log_that_lost_lines_is_continued_without_zeros(recipe_values, tmp_path, caplog, kept):
    """The file was lengthened to the recorded size, with zeros."""
    line = '{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text((2 * line)[:kept])
    log = TrainingLog(check_recipe(recipe_values, "recipe"), tmp_path, Logged(24), 0)
    log.handle.write('{"step": 3}\n')
    log.flush()
    log.handle.close()
    steps = [json.loads(each)["step"] for each in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1] * (kept // 12) + [3]
    assert ("lines were lost" in caplog.text) == (kept < 24)


def test_a_log_that_was_changed_is_told(recipe_values, tmp_path, caplog):
    """A flipped digit would show as a point of the training curve."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    saved = Logged(24, file_crc32(path))
    for digit, told in (("2", False), ("3", True)):
        path.write_text(path.read_text().replace("2}", f"{digit}}}"))
        log = TrainingLog(check_recipe(recipe_values, "recipe"), tmp_path, saved, 0)
        assert (log.flush() == saved) != told
        log.handle.close()
        assert ("damaged or edited" in caplog.text) == told


def test_a_saved_recipe_that_is_not_utf8_is_named(recipe_values, tmp_path):
    """Was a UnicodeDecodeError."""
    from sparsary.training.checkpoints import require_same_run

    (tmp_path / "recipe.yaml").write_bytes(b"tokens: \xff")
    (tmp_path / "state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"recipe\.yaml: expected UTF-8 text"):
        require_same_run(tmp_path, check_recipe(recipe_values, "recipe"))
