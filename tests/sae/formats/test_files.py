"""Foreign files, damaged and hostile: each a clear error, and nothing executed."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsary.sae.files import natural_order
from sparsary.sae.formats.archives import read_npz, read_torch
from sparsary.sae.formats.files import Header, SourceFiles, inner_path


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def folder(tmp_path):
    """Two dictionaries' files in folders, and a single one."""
    for name in ("layer_2", "layer_10"):
        (tmp_path / name).mkdir()
        save_file({"W": torch.ones(3, 2), "h": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / name / "w.safetensors")
        (tmp_path / name / "cfg.json").write_text('{"a": 1}')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.json").write_text("{}")
    return tmp_path


def test_a_folder_is_listed_and_its_parts_are_sources(folder):
    source = SourceFiles(folder)
    assert source.folders == ("layer_2", "layer_10")
    assert source.files == ("layer_10/cfg.json", "layer_10/w.safetensors", "layer_2/cfg.json", "layer_2/w.safetensors")
    assert source.named(r"layer_\d+/cfg\.json") == ["layer_2/cfg.json", "layer_10/cfg.json"]
    inner = source.at("layer_2")
    assert (inner.name, inner.config("cfg.json"), inner.has("w.safetensors")) == ("layer_2", {"a": 1}, True)
    assert inner.headers("w.safetensors") == {"W": Header("float32", (3, 2)), "h": Header("bfloat16", (4,))}
    one = SourceFiles(folder / "layer_2" / "w.safetensors")
    assert one.files == ("w.safetensors",)
    assert torch.equal(one.tensors("w.safetensors")["W"], torch.ones(3, 2))
    assert natural_order("layer_10") > natural_order("layer_9")


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "~/x", "", "C:/x", "..\\x", "a\0b"])
def test_paths_do_not_lead_out(name, folder):
    with pytest.raises(ValueError, match="expected a path within it"):
        inner_path(name, "here")
    with pytest.raises(ValueError, match="expected a path within it"):
        SourceFiles(folder).path(name)


def test_links_do_not_lead_out_but_in_the_hub_s_cache(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.json").write_text("{}")
    os.symlink(outside / "secret.json", folder / "link.json")
    with pytest.raises(ValueError, match="got a link out of it"):
        SourceFiles(folder).json("link.json")
    # As the hub's client keeps files: links in a snapshot to blobs beside it.
    cache = outside / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "blobs" / "0f").write_text('{"a": 2}')
    os.symlink("../../blobs/0f", cache / "snapshots" / "abc" / "cfg.json")
    assert SourceFiles(cache / "snapshots" / "abc").json("cfg.json") == {"a": 2}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"\xff\xfe", "expected UTF-8 text"),
        (b"[1]", "expected a mapping, got list"),
    ],
)
def test_damaged_configurations_are_named(content, says, tmp_path):
    (tmp_path / "cfg.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        SourceFiles(tmp_path).config("cfg.json")


def test_configurations_in_yaml_hold_plain_values(tmp_path):
    (tmp_path / "config.yaml").write_text("k: 3\nname: no\n")
    assert SourceFiles(tmp_path).config("config.yaml") == {"k": 3, "name": "no"}
    (tmp_path / "config.yaml").write_text("k: !!python/object/apply:os.system ['touch x']\n")
    with pytest.raises(ValueError, match="expected YAML"):
        SourceFiles(tmp_path).config("config.yaml")


def test_a_configuration_of_gigabytes_is_none(tmp_path):
    with (tmp_path / "cfg.json").open("wb") as handle:
        handle.truncate(1 << 30)
    with pytest.raises(ValueError, match="expected a configuration of at most 16777216 bytes, got 1073741824"):
        SourceFiles(tmp_path).json("cfg.json")


@pytest.mark.parametrize("cut", [4, 60, -3])
def test_truncated_safetensors_are_errors(cut, folder):
    path = folder / "layer_2" / "w.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged file or another format"):
        SourceFiles(folder).tensors("layer_2/w.safetensors")
    with pytest.raises(ValueError, match="damaged file or another format"):
        SourceFiles(folder).headers("layer_2/w.safetensors")


def test_sizes_that_a_safetensors_file_does_not_have_are_not_allocated(tmp_path):
    header = json.dumps({"W": {"dtype": "F32", "shape": [1 << 30, 1 << 10], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="damaged file or another format"):
        SourceFiles(tmp_path).tensors("w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(ValueError, match="damaged file or another format"):
        SourceFiles(tmp_path).tensors("w.safetensors")


def test_torch_files_hold_tensors_numbers_and_strings(tmp_path):
    torch.save({"ae": {"W": torch.ones(2, 3)}, "step": 4, "activation": "ReLU", "none": None}, tmp_path / "ae.pt")
    source = SourceFiles(tmp_path)
    assert source.values("ae.pt")["step"] == 4
    assert source.values("ae.pt")["activation"] == "ReLU"
    assert source.headers("ae.pt") == {"ae.W": Header("float32", (2, 3))}


def test_pickled_objects_are_never_built(tmp_path):
    torch.save({"cfg": Bomb(tmp_path / "created"), "W": torch.ones(2)}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=r"got pickled Python objects, which are never loaded here .*save its tensors alone"):
        read_torch(tmp_path / "sae.pt")
    assert not (tmp_path / "created").exists()


def test_torch_files_of_older_or_no_form_are_refused(tmp_path):
    torch.save({"W": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "none.pt").write_bytes(b"\x80\x04K\x01.")
    for name in ("old.pt", "none.pt"):
        with pytest.raises(ValueError, match=r"expected a torch file .* got a damaged or older one"):
            read_torch(tmp_path / name)
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="expected a dictionary of tensors, got Tensor"):
        read_torch(tmp_path / "tensor.pt")


def test_torch_files_that_unpack_to_more_are_refused(tmp_path):
    torch.save({"W": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in plain.namelist():
            bomb.writestr(part, plain.read(part))
    with pytest.raises(ValueError, match="got one that unpacks to more"):
        read_torch(tmp_path / "bomb.pt")


def test_tensors_of_a_torch_file_that_claim_more_than_they_have_are_refused(tmp_path):
    torch.save({"W": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "claim.pt")
    with pytest.raises(ValueError, match=r"got fewer in the file\. The file is damaged"):
        read_torch(tmp_path / "claim.pt")
    torch.save({"W": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match=r"expected (a plain tensor|tensors)"):
        read_torch(tmp_path / "sparse.pt")


def test_truncated_torch_files_are_errors(tmp_path):
    torch.save({"W": torch.randn(100)}, tmp_path / "ae.pt")
    data = (tmp_path / "ae.pt").read_bytes()
    (tmp_path / "ae.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_torch(tmp_path / "ae.pt")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_of_arrays_are_read(save, tmp_path):
    arrays = {"W_enc": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(2.5), "empty": np.zeros((0, 3))}
    save(tmp_path / "params.npz", **arrays)
    source = SourceFiles(tmp_path)
    for name, tensor in source.tensors("params.npz").items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    assert source.headers("params.npz")["W_enc"] == Header("float32", (2, 3))
    # Not a view of a file that must not be written.
    source.tensors("params.npz")["W_enc"].add_(1)


def npy(dtype, shape, data):
    """An array file whose header claims what one likes."""
    head = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def archive(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("W_enc.npy", content)
    return path


def test_objects_in_an_archive_are_never_built(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb(tmp_path / "created")], dtype=object))
    with pytest.raises(ValueError, match=r"expected numbers, got object. Objects are not unpickled"):
        read_npz(tmp_path / "params.npz")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("content", "method", "says"),
    [
        (npy("<f4", (1 << 40, 1 << 20), b"\0" * 8), zipfile.ZIP_STORED, "the archive has 8"),
        (npy("<f4", (10,), b"\0" * 8), zipfile.ZIP_STORED, "expected 40 bytes"),
        (npy("<f4", (1 << 19,), b"\0" * (1 << 21)), zipfile.ZIP_DEFLATED, "expected 2097152 bytes"),
        (npy("|S4", (2,), b"\0" * 8), zipfile.ZIP_STORED, "expected numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff", zipfile.ZIP_STORED, "damaged file or another format"),
        (b"no array at all", zipfile.ZIP_STORED, "damaged file or another format"),
        (npy("<f4", (-2,), b"\0" * 8), zipfile.ZIP_STORED, "damaged file or another format"),
    ],
)
def test_false_claims_of_an_archive_are_not_allocated(content, method, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_npz(archive(tmp_path / "params.npz", content, method))


def test_a_truncated_archive_is_an_error(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, W=np.zeros(100))
    (tmp_path / "params.npz").write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(ValueError, match="damaged file or another format"):
        read_npz(tmp_path / "params.npz")


def test_other_files_hold_no_tensors(tmp_path):
    (tmp_path / "w.csv").write_text("1")
    with pytest.raises(ValueError, match=r"expected .safetensors, .npz or .pt, .* got '.csv'"):
        SourceFiles(tmp_path).tensors("w.csv")
