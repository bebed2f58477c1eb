"""Rows off the disk: compiled and plain path agree, damage is named, memory is used again only when nobody looks."""

import gc
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsary.training.activations import shards as shards_module
from sparsary.training.activations import shuffle as shuffle_module
from sparsary.training.activations.buffer_pool import Memory
from sparsary.training.activations.manifest import FORMAT, FORMAT_VERSION, MANIFEST_FILE
from sparsary.training.activations.shards import (
    LABELS,
    ActivationStore,
    RowReader,
    dequantize,
    quantize_rows,
)
from sparsary.training.activations.shuffle import permute
from sparsary.training.activations.store_stream import StoreStream

SIZES = (613, 1, 389)
BLOCK = 32


def make_store(directory, width, dtype, sizes=SIZES):
    """Shards of random rows at hook ``h``, and the rows as they should be read."""
    directory.mkdir()
    shards, expected = [], []
    for number, tokens in enumerate(sizes):
        x = torch.randn(tokens, width) * torch.logspace(-6, 4, tokens).unsqueeze(-1)
        tensors = {name: torch.arange(tokens, dtype=torch.int32) + 7 * i for i, name in enumerate(LABELS)}
        if dtype == torch.int8:
            tensors["x:h"], tensors["scale:x:h"] = quantize_rows(x, BLOCK)
            expected.append(dequantize(tensors["x:h"], tensors["scale:x:h"], BLOCK))
        else:
            tensors["x:h"] = x.to(dtype)
            expected.append(tensors["x:h"].float())
        name = f"train-{number:05d}.safetensors"
        save_file(tensors, directory / name)
        size = (directory / name).stat().st_size
        shards.append({"name": name, "split": "train", "unit": number, "tokens": tokens, "bytes": size, "sha256": ""})
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "gradients": None, "block": BLOCK, "shards": shards}
    manifest |= {"model": {"id": "none"}, "cursor": [0, 0], "complete": True}
    manifest["hooks"] = {"h": {"width": width, "count": 0}}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    return ActivationStore.open(directory), torch.cat(expected)


@pytest.fixture(params=["compiled", "plain"])
def path(request, monkeypatch):
    """Every test with it runs with the compiler and without."""
    if request.param == "plain":
        for module in (shards_module, shuffle_module):
            monkeypatch.setattr(module, "has_numba", lambda: False)
        monkeypatch.setattr(shards_module, "PLAIN_ROWS", 100)
    return request.param


ORDERS = {
    "scattered": lambda n: np.random.default_rng(1).permutation(n)[:97],
    "all": np.arange,
    "backwards": lambda n: np.arange(n)[::-1].copy(),
    "again and again": lambda n: np.random.default_rng(2).integers(0, n, 3 * n),
    "none": lambda n: np.arange(0),
}


@pytest.mark.parametrize("order", ORDERS)
# The last is wider than what is read at once.
@pytest.mark.parametrize("width", [1, 37, 128, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_rows_are_those_that_were_written(path, dtype, width, order, tmp_path):
    store, expected = make_store(tmp_path / "s", width, dtype, SIZES if width < 1000 else (5, 1, 7))
    rows = ORDERS[order](len(expected))
    assert torch.equal(RowReader(store, "train", "x:h").gather(rows), expected[rows])


def test_labels_are_those_that_were_written(path, tmp_path):
    store, _ = make_store(tmp_path / "s", 3, torch.float32)
    rows = np.random.default_rng(1).permutation(sum(SIZES))
    expected = torch.cat([torch.arange(n, dtype=torch.int32) + 14 for n in SIZES])[rows]
    found = RowReader(store, "train", LABELS[2]).gather(rows)
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_truncated_shard_is_named_with_the_row(path, dtype, tmp_path):
    store, expected = make_store(tmp_path / "s", 16, dtype)
    readers = RowReader(store, "train", "x:h")
    shard = readers.shards[2]
    # Cut in the middle of row 200 while it is open, as another program might.
    with shard.path.open("r+b") as handle:
        handle.truncate(shard.start + 200 * shard.row_bytes + 3)
    before = SIZES[0] + SIZES[1] + 200
    if dtype != torch.int8:
        # An int8 tensor's scales lie behind it, and are gone altogether.
        assert torch.equal(readers.gather(np.arange(before)), expected[:before])
    with pytest.raises(ValueError, match=r"train-00002\.safetensors: row \d+: the file ends too early: truncated") as caught:
        readers.gather(np.arange(len(expected)))
    if dtype != torch.int8:
        assert "row 200:" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_what_is_not_finite_is_named(path, dtype, bad, tmp_path):
    width = 37
    store, expected = make_store(tmp_path / "s", width, dtype)
    reader = RowReader(store, "train", "x:h")
    out = reader.empty(len(expected))
    assert reader.read(np.arange(len(expected)), out)
    # Any row, any place in it.
    target = reader if reader.scales is None else reader.scales
    shard = target.shards[0]
    raw = torch.tensor([bad], dtype=shard.dtype).view(torch.uint8).numpy().tobytes()
    with shard.path.open("r+b") as handle:
        handle.seek(shard.start + 411 * shard.row_bytes + shard.row_bytes - len(raw))
        handle.write(raw)
    stream = StoreStream(store, ("h",), 100, seed=0)
    with pytest.raises(ValueError, match=r"train-00000\.safetensors: x:h: row 411 is not finite"):
        list(itertools.islice(stream, 11))


def test_the_permutation_is_the_same_with_and_without_the_compiler(monkeypatch):
    numbers = [np.array([0]), np.arange(1003), np.arange(40_000, 70_000)]
    cases = [(index, n, key) for index in numbers for n in (1, 1003, 70_000, 1 << 40) for key in (-3, 0, 12) if index[-1] < n]
    compiled = [permute(*case) for case in cases]
    monkeypatch.setattr(shuffle_module, "has_numba", lambda: False)
    for case, found in zip(cases, compiled, strict=True):
        assert found.dtype == np.int64
        assert np.array_equal(permute(*case), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_batch_that_is_held_does_not_change(path, dtype, tmp_path):
    store, expected = make_store(tmp_path / "s", 24, dtype)
    stream = StoreStream(store, ("h",), 50, seed=4)
    # Views of views, and arrays, keep the memory as well as the batch itself.
    held = [(number, next(stream).x[7:].numpy()[::2]) for number in range(50)]
    gc.collect()
    for _ in range(50):
        next(stream)
    stream.close()
    for number, values in held:
        rows = stream.order(number * 50, 50)[7::2]
        assert np.array_equal(values, expected[rows].numpy())


def test_memory_that_nobody_holds_is_used_again():
    memory = Memory(3, 2)
    taken = memory.take()
    owner, tensor = taken.base, torch.from_numpy(taken)[1:]
    del taken
    other = memory.take()
    assert other.base is not owner
    del tensor
    assert memory.take().base is owner
