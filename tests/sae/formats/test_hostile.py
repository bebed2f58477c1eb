"""Damaged and hostile files of every format: each a clear error that names the file, no code run, nothing left behind."""

import io
import json
import os
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsary
from sparsary.sae.formats import FORMATS
from sparsary.transcoders.convert import convert

D = 16


class Payload:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def weights(folder):
    """The file with the first dictionary's tensors."""
    found = [p for p in sorted(folder.rglob("*")) if p.suffix in (".safetensors", ".pt", ".pth", ".npz")]
    return found[0]


def config(folder):
    """The JSON file that describes it; ``None`` for formats without one."""
    return next((path for path in sorted(folder.rglob("*.json")) if path.name != "sparsary.json"), None)


def tensors(path):
    """Everything in a file, inner dictionaries under one key with a dot."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        return {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    return torch.load(path, weights_only=True)


def rewrite(path, change):
    """Apply a change to the dictionary of tensors in a file, wherever in it that is."""
    whole = tensors(path)
    inner = next(
        (v for v in whole.values() if isinstance(v, dict) and any(isinstance(t, torch.Tensor) for t in v.values())), whole
    )
    change(inner)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in whole.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: np.ascontiguousarray(value.numpy()) for key, value in whole.items()})
    else:
        torch.save(whole, path)


def matrix(found):
    """The name of the first matrix."""
    return next(key for key, value in found.items() if isinstance(value, torch.Tensor) and value.ndim == 2)


def truncated(folder, _):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder, _):
    weights(folder).write_bytes(b"")


def lacking(folder, _):
    path = weights(folder)
    rewrite(path, lambda found: found.pop(matrix(found)))
    if path.name == "1.pt":
        # Of OpenAI's, one matrix alone is a tied one.
        rewrite(path, lambda found: found.pop(matrix(found)))


def cut(folder, _):
    """One row and column less in one matrix than in what belongs to it."""
    rewrite(weights(folder), lambda found: found.update({matrix(found): found[matrix(found)][:-1, :-1].clone()}))


def flat(folder, _):
    rewrite(weights(folder), lambda found: found.update({matrix(found): found[matrix(found)].flatten()}))


def not_a_number(folder, _):
    def change(found):
        found[matrix(found)][3, 2] = float("nan")

    rewrite(weights(folder), change)


def infinite(folder, _):
    def change(found):
        name = next(
            key
            for key, value in found.items()
            if isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_floating_point()
        )
        found[name][1] = float("inf")

    rewrite(weights(folder), change)


def whole_numbers(folder, _):
    rewrite(weights(folder), lambda found: found.update({matrix(found): (100 * found[matrix(found)]).long()}))


def pickled(folder, sentinel):
    """An object in place of, or beside, the tensors: named as torch names its files, whatever is in them."""
    path = weights(folder)
    if path.suffix in (".pt", ".pth"):
        torch.save({**tensors(path), "cfg": Payload(sentinel)}, path)
    elif path.suffix == ".npz":
        found = {key: value.numpy() for key, value in tensors(path).items()}
        found["W_enc"] = np.array([Payload(sentinel)], dtype=object)
        np.savez(path, **found)
    else:
        torch.save({"W_dec": Payload(sentinel)}, path)


def linked(folder, sentinel):
    """The tensors are outside, behind a link."""
    path, outside = weights(folder), sentinel.parent / f"outside{weights(folder).suffix}"
    path.rename(outside)
    os.symlink(outside, path)


EVERYWHERE = (truncated, emptied, lacking, cut, flat, not_a_number, infinite, whole_numbers, pickled, linked)
# What a damage may be called.
SAYS = r"expected|missing|damaged|cannot|Choose one"


@pytest.fixture
def damaged(build_format, tmp_path):
    """A format's files after a damage, what they leave open, and the file that no code may have made."""

    def build(name, damage):
        sentinel = tmp_path / "executed"
        left_open = build_format(name, tmp_path / "files", D)
        damage(tmp_path / "files", sentinel)
        return tmp_path / "files", left_open, sentinel

    return build


def refused(path, tmp_path, sentinel, format=None, **left_open):  # noqa: A002
    """The error of loading; converting it leaves nothing behind either."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        sparsary.load(str(path), format=format, options=sparsary.CheckpointOptions(**left_open))
    assert type(caught.value) is ValueError
    text = str(caught.value)
    assert str(path.name) in text
    assert re.search(SAYS, text), text
    assert len(text) < 2500
    with pytest.raises(ValueError):  # noqa: PT011
        convert(path, tmp_path / "converted", format=format)
    assert not sentinel.exists()
    assert not (tmp_path / "converted").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    return text


@pytest.mark.parametrize("damage", EVERYWHERE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_every_damage(name, damage, damaged, tmp_path):
    path, left_open, sentinel = damaged(name, damage)
    refused(path, tmp_path, sentinel, name, **left_open)


def test_the_files_are_good_before_they_are_damaged(build_format, tmp_path):
    for name in FORMATS:
        options = sparsary.CheckpointOptions(**build_format(name, tmp_path / name, D))
        assert sparsary.load(str(tmp_path / name), options=options) is not None
        assert sparsary.load(str(tmp_path / name), format=name, options=options) is not None


CONFIGS = {
    "list": b'["d_in", 16]',
    "number": b"7",
    "nothing": b"",
    "half": b'{"d_in": 16, "arch',
    "deep": b'{"a":' * 60_000,
    "not UTF-8": b'{"d_in": 16, "name": "\xff\xfe"}',
    "zero bytes": b"\0" * 64,
    "twice": None,
}
WITH_CONFIG = ("saelens", "saelens_legacy", "dictionary_learning", "sparsify", "batch_topk", "llama_scope", "llamascopium")


@pytest.mark.parametrize("content", CONFIGS, ids=str)
@pytest.mark.parametrize("name", WITH_CONFIG)
def test_configurations_that_are_none(name, content, build_format, tmp_path):
    left_open = build_format(name, tmp_path / "files", D)
    path = config(tmp_path / "files")
    if name == "sparsify":
        path = next(p for p in (tmp_path / "files").rglob("cfg.json"))
    text = CONFIGS[content]
    if text is None:
        # Which of the two counts nobody can know.
        text = path.read_bytes().rstrip()[:-1] + b', "d_in": 3, "d_in": 5}'
    path.write_bytes(text)
    refused(tmp_path / "files", tmp_path, tmp_path / "executed", name, **left_open)


def changed(folder, **values):
    path = config(folder)
    about = json.loads(path.read_text())
    for key, value in values.items():
        about.pop(key, None)
        if value is not None:
            about[key] = value
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("saelens", {"architecture": "telepathy"}, "architecture: expected one of .*got 'telepathy'"),
        ("saelens", {"architecture": "temporal"}, "temporal attends to earlier tokens"),
        ("saelens", {"d_in": "16"}, "d_in: expected a whole number"),
        ("saelens", {"d_in": 10**15}, "W_enc: expected shape"),
        ("saelens", {"k": -3}, "k: expected a whole number from 1, got -3"),
        ("saelens", {"k": True}, "k: expected a whole number from 1, got True"),
        ("saelens", {"k": 10**9}, "k: expected at most the 40 latents"),
        ("saelens", {"k": None}, "k: expected the number of latents per token"),
        ("saelens", {"normalize_activations": "magic"}, "normalize_activations: expected one of"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "Give the factor: scale=NUMBER"),
        ("saelens", {"architecture": ["topk"]}, "expected"),
        ("saelens", {"metadata": ["x"]}, "expected"),
        ("saelens_legacy", {"activation_fn_str": "tanh-relu"}, "activation function: expected relu or topk"),
        ("saelens_legacy", {"normalize_activations": 3}, "normalize_activations: expected a name"),
        ("batch_topk", {"sae_type": "dream"}, "expected"),
        ("llama_scope", {"act_fn": "dream"}, "expected"),
        ("llama_scope", {"jump_relu_threshold": "high"}, "expected"),
        ("llamascopium", {"sae_type": "lorsa"}, "sae_type: expected"),
        ("llamascopium", {"act_fn": "batchtopk"}, "depend on the other tokens"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_values_that_cannot_be_meant(name, values, says, build_format, tmp_path):
    left_open = build_format(name, tmp_path / "files", D)
    changed(tmp_path / "files", **values)
    text = refused(tmp_path / "files", tmp_path, tmp_path / "executed", name, **left_open)
    assert re.search(says, text), text


@pytest.mark.parametrize("name", ["saelens", "saelens_legacy", "sparsify", "llama_scope", "llamascopium"])
@pytest.mark.parametrize("claim", ["header longer than the file", "tensor larger than the file", "overlapping", "no JSON"])
def test_safetensors_headers_are_not_believed(name, claim, build_format, tmp_path):
    left_open = build_format(name, tmp_path / "files", D)
    path = weights(tmp_path / "files")
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    first, second, *_ = header
    if claim == "header longer than the file":
        path.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    else:
        if claim == "tensor larger than the file":
            header[first] |= {"shape": [1 << 24, 1 << 20], "data_offsets": [0, 1 << 46]}
        elif claim == "overlapping":
            header[first]["data_offsets"] = header[second]["data_offsets"]
        encoded = b"{" * 40 if claim == "no JSON" else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + rest)
    refused(tmp_path / "files", tmp_path, tmp_path / "executed", name, **left_open)


def npy(array_header, data=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, array_header)
    return buffer.getvalue() + data


@pytest.mark.parametrize("claim", ["shape", "bomb", "object", "traversal", "version", "encrypted"])
def test_archives_of_arrays_are_not_believed(claim, build_format, tmp_path):
    left_open = build_format("gemma_scope", tmp_path / "files", D)
    path = tmp_path / "files" / "params.npz"
    found = {key: value.numpy() for key, value in tensors(path).items()}
    floats = {"descr": "<f4", "fortran_order": False}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in found.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            if key != "W_enc":
                archive.writestr(f"{key}.npy", buffer.getvalue())
        content = {
            "shape": npy(floats | {"shape": (1 << 40, 1 << 20)}),
            "bomb": npy(floats | {"shape": (1 << 22,)}, b"\0" * (1 << 24)),
            "object": npy({"descr": "|O", "fortran_order": False, "shape": (1,)}, b"cos\nsystem\n"),
            "traversal": npy(floats | {"shape": (1,)}, b"\0" * 4),
            "version": b"\x93NUMPY\x09\x00" + b"\0" * 64,
            "encrypted": npy(floats | {"shape": (1,)}, b"\0" * 4),
        }[claim]
        archive.writestr("../../W_enc.npy" if claim == "traversal" else "W_enc.npy", content)
    if claim == "encrypted":
        raw = bytearray(path.read_bytes())
        for mark in (b"PK\x03\x04", b"PK\x01\x02"):
            at = raw.rfind(mark)
            raw[at + (6 if mark == b"PK\x03\x04" else 8)] |= 1
        path.write_bytes(bytes(raw))
    refused(tmp_path / "files", tmp_path, tmp_path / "executed", "gemma_scope", **left_open)
    assert not (tmp_path.parent / "W_enc.npy").exists()


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd", "~/x.safetensors", "a\0b"])
def test_paths_in_a_list_do_not_lead_out(name, build_format, tmp_path):
    left_open = build_format("circuit_tracer", tmp_path / "files", D)
    path = tmp_path / "files" / "config.yaml"
    path.write_text(path.read_text() + "\ntranscoders: " + json.dumps([name] * 4) + "\n")
    assert "within it" in refused(tmp_path / "files", tmp_path, tmp_path / "executed", "circuit_tracer", **left_open)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch executed']", "&a [*a, *a]: 1", "{a: 1, a: 2}"])
def test_yaml_holds_plain_values(tag, build_format, tmp_path):
    left_open = build_format("circuit_tracer", tmp_path / "files", D)
    (tmp_path / "files" / "config.yaml").write_text(f"model_kind: transcoder_set\nx: {tag}\n")
    refused(tmp_path / "files", tmp_path, tmp_path / "executed", "circuit_tracer", **left_open)


def test_an_ambiguous_folder_lists_the_candidates(build_format, tmp_path):
    build_format("saelens", tmp_path / "files", D)
    build_format("gemma_scope", tmp_path / "files", D)
    text = refused(tmp_path / "files", tmp_path, tmp_path / "executed")
    assert re.search(r"several formats: saelens \(.*gemma_scope \(.*--from NAME", text)


@pytest.mark.parametrize("name", ["saelens", "saelens_legacy", "dunefsky", "hook_z"])
def test_matrices_that_lie_the_wrong_way_round(name, build_format, tmp_path):
    left_open = build_format(name, tmp_path / "files", D)

    def change(found):
        key = next(k for k in found if k.endswith("W_enc"))
        found[key] = found[key].T.contiguous()

    rewrite(weights(tmp_path / "files"), change)
    text = refused(tmp_path / "files", tmp_path, tmp_path / "executed", name, **left_open)
    assert re.search(r"W_enc.*expected .*got \(40, 16\)", text)


def test_a_compressed_torch_file_is_a_bomb(build_format, tmp_path):
    left_open = build_format("openai", tmp_path / "files", D)
    path = weights(tmp_path / "files")
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in contents.items():
            archive.writestr(key, value + b"\0" * (1 << 20))
    assert "unpacks to more" in refused(tmp_path / "files", tmp_path, tmp_path / "executed", "openai", **left_open)
