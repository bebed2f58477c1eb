"""Damaged, foreign and hostile checkpoints: a clear error each, nothing half-loaded, nothing executed."""

import json
import logging
import pickle
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file

from sparsary.sae import ENCODERS, SAE, SparseDictionary, load_dictionary
from sparsary.sae.checkpoint import KINDS, build_dictionary, kind_class
from sparsary.sae.checkpoint_files import read_config
from sparsary.sae.files import DTYPES, read_json, remove_partial_files, replacing, sha256, write_json, write_tensors
from sparsary.transcoders import Transcoder


@pytest.fixture
def checkpoint(tmp_path):
    SAE(5, 13, ENCODERS["topk"](k=3)).save(tmp_path / "d", {"training_tokens": 7})
    return tmp_path / "d"


def rewrite(checkpoint, change):
    path = checkpoint / "dictionary.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_directory_holds_two_plain_files(checkpoint):
    assert sorted(p.name for p in checkpoint.iterdir()) == ["dictionary.json", "dictionary.safetensors"]
    config = json.loads((checkpoint / "dictionary.json").read_text())
    assert config["format_version"] == 1
    assert config["dictionary"] == {"kind": "sae", "d_in": 5, "n_latents": 13, "encoder": {"name": "topk", "k": 3}}
    assert config["provenance"] == {"training_tokens": 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc"), r"missing \['b_enc'\]"),
        (lambda t: t.update(extra=torch.zeros(2)), r"not expected \['extra'\]"),
        (
            lambda t: t.update(W_dec=t["W_dec"].T.contiguous()),
            r"W_dec: expected torch.float32 \(13, 5\), got torch.float32 \(5, 13\)",
        ),
        (lambda t: t.update(W_enc=t["W_enc"].half()), r"W_enc: expected torch.float32"),
        (lambda t: t["b_dec"].__setitem__(2, float("nan")), r"b_dec: expected finite numbers, got nan at \[2\]"),
        (lambda t: t["W_enc"].__setitem__((1, 4), float("inf")), r"W_enc: expected finite numbers, got inf at \[1, 4\]"),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_dictionary(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 40, 300])
def test_truncated_weights_are_named(checkpoint, keep):
    path = checkpoint / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"dictionary\.safetensors"):
        load_dictionary(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[]", "expected a sparsary dictionary"),
        ('{"format": "other"}', "expected a sparsary dictionary"),
        ('{"format": "sparsary-dictionary", "format_version": 99}', "format_version: expected 1, got 99"),
    ],
)
def test_wrong_json_is_named(checkpoint, text, message):
    (checkpoint / "dictionary.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dictionary(checkpoint)


@pytest.mark.parametrize("name", ["dictionary.json", "dictionary.safetensors"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_dictionary(checkpoint)


def test_no_directory_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="sparsary train"):
        load_dictionary(tmp_path / "nothing")


def test_a_pickle_is_not_opened(checkpoint):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    (checkpoint / "dictionary.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged file or another format"):
        load_dictionary(checkpoint)


def test_an_interrupted_save_loads_with_the_weights_own_description(checkpoint, caplog):
    """Killed between the two renames: new weights beside the old JSON."""
    before = (checkpoint / "dictionary.json").read_text()
    newer = SAE(5, 17, ENCODERS["topk"](k=2))
    newer.save(checkpoint, {"training_tokens": 8})
    (checkpoint / "dictionary.json").write_text(before)
    with caplog.at_level(logging.WARNING):
        loaded = load_dictionary(checkpoint)
    assert loaded.arguments() == newer.arguments()
    assert torch.equal(loaded.W_dec, newer.W_dec)
    assert "a save was interrupted" in caplog.text


def test_a_flipped_bit_in_the_description_is_found(checkpoint):
    """Was read in silence by all but the weights' loader: a report of another text, or with other training tokens."""
    path = checkpoint / "dictionary.json"
    whole, right = path.read_bytes(), read_config(checkpoint)
    for place in range(0, len(whole), 5):
        for bit in range(0, 8, 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            # A blank between two entries, or a letter of the checksum's name, changes no value.
            with suppress(ValueError):
                found = read_config(checkpoint)
                assert (found["provenance"], found["dictionary"]) == (right["provenance"], right["dictionary"]), (place, bit)


def test_a_damaged_description_says_what_to_do(checkpoint):
    path = checkpoint / "dictionary.json"
    path.write_text(path.read_text().replace('"training_tokens": 7', '"training_tokens": 3'))
    for read in (read_config, load_dictionary):
        with pytest.raises(
            ValueError, match=r"dictionary\.json: .* is damaged, or was edited\. Restore .* delete its entry 'ch"
        ):
            read(checkpoint)


@pytest.mark.parametrize("edited", [False, True])
def test_a_description_without_a_checksum_may_be_older_or_edited(checkpoint, edited, caplog):
    path = checkpoint / "dictionary.json"
    config = json.loads(path.read_text())
    del config["checksum"]
    if edited:
        config["provenance"]["training_tokens"] = 3
        # What belongs to the weights stays theirs.
        config["dictionary"]["encoder"]["k"] = 1
    path.write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        found, loaded = read_config(checkpoint), load_dictionary(checkpoint)
    assert found["provenance"]["training_tokens"] == loaded.provenance["training_tokens"] == (3 if edited else 7)
    assert loaded.encoder.k == 3
    assert ("edited by hand, or damaged" in caplog.text) == edited


def test_a_description_of_damaged_weights_stays_readable(checkpoint):
    """A run is continued from its state; weights are told to be damaged by those who read them."""
    path = checkpoint / "dictionary.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(bytes(content))
    assert read_config(checkpoint)["provenance"]["training_tokens"] == 7
    with pytest.raises(ValueError, match=r"dictionary\.safetensors"):
        load_dictionary(checkpoint)


def test_json_that_was_sealed_is_compared_with_its_checksum(tmp_path):
    path, values = tmp_path / "r.json", {"fvu": 0.1, "names": ("a", "b"), "by_layer": {10: 1, 9: None}, "text": "é"}
    for compact in (False, True):
        write_json(path, values, sealed=True, compact=compact)
        assert read_json(path) == {"fvu": 0.1, "names": ["a", "b"], "by_layer": {"10": 1, "9": None}, "text": "é"}
        # The layout of the file does not count.
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
        assert read_json(path)["fvu"] == 0.1
        path.write_text(path.read_text().replace("0.1", "0.3"))
        with pytest.raises(ValueError, match=r"r\.json: expected the checksum .* is damaged, or was edited"):
            read_json(path)
    write_json(path, values)
    path.write_text(path.read_text().replace("0.1", "0.3"))
    assert read_json(path)["fvu"] == 0.3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / ".x.safetensors.1-abc.partial").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


GIVEN = {
    "array": lambda x: x.numpy(),
    "float64 array": lambda x: x.double().numpy(),
    "float16 array": lambda x: x.half().numpy(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "list": lambda x: x.tolist(),
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("mapping", ["sae", "transcoder"])
def test_activations_of_every_kind_are_encoded_and_decoded(kind, mapping):
    encoder = ENCODERS["topk"](k=3)
    d = SAE(5, 13, encoder) if mapping == "sae" else Transcoder(5, 5, 13, encoder, skip=True)
    if mapping == "transcoder":
        torch.nn.init.normal_(d.W_skip)
    # Exact in half precision.
    x = torch.randint(-8, 9, (7, 5)).float()
    given, code = GIVEN[kind](x), d.encode(x)
    found = d.encode(given)
    torch.testing.assert_close(found.to_dense(13), code.to_dense(13))
    torch.testing.assert_close(d(given), d(x))
    torch.testing.assert_close(d.decode(found, given), d.decode(code, x))
    torch.testing.assert_close(d.encode_at(0, given).values, code.values)
    dense = code.to_dense(13).detach()
    torch.testing.assert_close(d.decode(dense.numpy(), given), d.decode(code, x))
    torch.testing.assert_close(d.decode(dense, given), d.decode(code, x))
    if mapping == "sae":
        torch.testing.assert_close(d.pursue(given, 2, "matching_pursuit").values, d.pursue(x, 2, "matching_pursuit").values)


@pytest.mark.parametrize(
    "given", [np.zeros((3, 4)), "text", [["a"]], np.zeros((2, 3, 4)), np.zeros(5), None, np.zeros((3, 5), "c8")]
)
def test_what_is_no_activations_is_one_message(given):
    d = SAE(5, 13, ENCODERS["topk"](k=3))
    for call in (d.encode, d, lambda x: d.pursue(x, 1, "matching_pursuit")):
        with pytest.raises((ValueError, TypeCheckError), match=r"expected|parameter"):
            call(given)
    with pytest.raises((ValueError, TypeCheckError), match=r"expected|parameter"):
        d.decode(given)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, files_of_at_most):
    SAE(5, 13, ENCODERS["topk"](k=3)).save(tmp_path / "d")
    with files_of_at_most(200), pytest.raises(OSError, match="unchanged"):
        SAE(50, 130, ENCODERS["topk"](k=3)).save(tmp_path / "d")
    assert load_dictionary(tmp_path / "d").n_latents == 13
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["dictionary.json", "dictionary.safetensors"]


def test_writing_into_a_file_in_the_way_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)}, {})


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    """Also in parts, and the checksum is the file's."""
    every = {f"tensor:{name}": torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    every |= {
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 7),
        "large": torch.randn(700, 200),
        "part": torch.randn(6, 4).T,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in every.items()}, tmp_path / "a", metadata={"config": '{"k": "\u00e9"}'}
    )
    parts = every | {"large": every["large"].split(333), "part": [every["part"]]}
    digest = write_tensors(tmp_path / "b", parts, {"config": '{"k": "\u00e9"}'})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert digest == sha256(tmp_path / "b")


# Kinds.

SIZES = {
    "sae": {"d_in": 6, "n_latents": 10},
    "transcoder": {"d_in": 6, "d_out": 4, "n_latents": 10},
    "cross_layer_transcoder": {"n_layers": 2, "d_in": 6, "d_out": 4, "n_latents": 10},
    "crosscoder": {"widths": [4, 2], "n_latents": 10},
}
FRESH = """
import sys
from sparsary.sae import load_dictionary
print(type(load_dictionary(sys.argv[1])).__name__)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_where_nothing_else_was_imported(kind, tmp_path):
    build_dictionary({"kind": kind, **SIZES[kind], "encoder": {"name": "topk", "k": 2}}).save(tmp_path)
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == kind_class(kind).__name__, run.stderr


def test_a_new_kind_answers_six_questions():
    assert SparseDictionary.__abstractmethods__ == {"arguments", "blocks", "bypass", "calibrate", "code_of", "shift"}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_override_abstract_members_only(kind):
    ours = [cls for cls in kind_class(kind).__mro__ if issubclass(cls, SparseDictionary)]
    for place, cls in enumerate(ours):
        for name in vars(cls).keys() - {"__init__", "__doc__", "__module__", "__abstractmethods__", "_abc_impl"}:
            inherited = [vars(above)[name] for above in ours[place + 1 :] if name in vars(above)]
            members = [each for each in inherited if callable(each) or isinstance(each, property)]
            assert all(getattr(each, "__isabstractmethod__", False) for each in members), f"{cls.__name__}.{name}"
