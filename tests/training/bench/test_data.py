"""What `sparsary bench` measures of stores and harvests: every number is there and means what it says."""

import pytest
import torch

from sparsary.training.activations.shards import RowReader
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.bench.data import STREAM_DTYPES, SYNTHETIC_HOOK, bench_harvest, bench_stream, synthetic_store


def test_a_synthetic_store_is_whole_and_can_be_streamed(tmp_path):
    store = synthetic_store(tmp_path / "s", 700, 70, "int8", shard_tokens=300)
    store.verify()
    assert len(store.shards("train")) == 3
    stream = StoreStream(store, (SYNTHETIC_HOOK,), 100, seed=0)
    x = torch.cat([next(stream).x for _ in range(7)])
    stream.release()
    assert x.shape == (700, 70)
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)
    assert len(RowReader(store, "train", "token")) == 700


def test_the_speed_of_a_stream_is_measured_for_every_dtype():
    report = bench_stream(width=128, tokens=2000, batch_tokens=100, windows=1, repeats=2)
    for dtype in STREAM_DTYPES:
        assert report[dtype]["gb_per_second"] > 0
        assert report[dtype]["cpu_seconds_per_gb"] > 0
    # A byte and 1/32 a number over four, and the headers of the files.
    assert report["int8"]["bytes_ratio_activations"] == pytest.approx((1 + 2 / 64) / 4, abs=0.001)
    assert report["int8"]["bytes_ratio"] == pytest.approx((128 + 4 + 16) / (512 + 16), abs=0.001)
    assert report["bfloat16"]["bytes_ratio_activations"] == pytest.approx(0.5, abs=0.001)


def test_a_harvest_is_measured_against_the_forward_passes_of_its_contexts():
    report = bench_harvest(tokens=3000, context_length=32, repeats=1)
    assert report["ratio"] == report["harvest_seconds"] / report["forward_seconds"] > 0
    assert report["cpu_ratio"] > 0
    assert report["text_seconds"] > 0
