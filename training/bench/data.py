"""Benchmarks of reading activation stores, and of a harvest relative to the model's forward passes."""

import itertools
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...sae.files import write_tensors
from ..activations.contexts import context_batches
from ..activations.harvest import harvest_activations
from ..activations.manifest import FORMAT, FORMAT_VERSION, write_manifest
from ..activations.model import load_model_for, skeleton
from ..activations.shards import LABELS, ActivationStore, encode
from ..activations.store_stream import WINDOW_BATCHES, StoreStream
from ..recipe import HarvestSection, ModelSection, TextSection

STREAM_DTYPES = ("float32", "bfloat16", "int8")
SYNTHETIC_HOOK = "synthetic:out"


def synthetic_store(
    directory: Path, tokens: int, width: int, dtype: str, block: int = 64, shard_tokens: int = 65_536
) -> ActivationStore:
    """Write a store of standard normal rows at ``SYNTHETIC_HOOK``, all in the training split, without a language model."""
    random = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, tokens, shard_tokens)):
        n = min(shard_tokens, tokens - first)
        stored, scale, _ = encode(torch.randn(n, width, generator=random), dtype, block)
        tensors = {label: torch.arange(first, first + n, dtype=torch.int32) for label in LABELS} | {
            f"x:{SYNTHETIC_HOOK}": stored
        }
        if scale is not None:
            tensors[f"scale:x:{SYNTHETIC_HOOK}"] = scale
        path = directory / f"train-{number:05d}.safetensors"
        digest = write_tensors(path, tensors, {"split": "train"})
        entry = {"name": path.name, "split": "train", "unit": number, "tokens": n}
        shards.append(entry | {"bytes": path.stat().st_size, "sha256": digest})
    # Reading needs no statistics.
    hooks = {SYNTHETIC_HOOK: {"width": width, "count": 0}}
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": dtype, "block": block, "gradients": None}
    head |= {"model": {"id": "none"}, "cursor": [0, 0], "complete": True}
    write_manifest(directory, head | {"hooks": hooks, "shards": shards})
    return ActivationStore.open(directory)


def bench_stream(
    width: int = 768, tokens: int = 131_072, batch_tokens: int = 2048, windows: int = 8, repeats: int = 5
) -> dict[str, Any]:
    """Measure GB/s (1e9 bytes) of float32 batches read from stores in the page cache, for every store dtype in turn.

    Reports, for every dtype: ``gb_per_second``, the median over ``repeats`` of reading ``windows`` windows of batches;
    ``cpu_seconds_per_gb`` of the whole process; ``bytes_ratio``, the size of the shards relative to the float32 store; and
    ``bytes_ratio_activations``, the same without labels (16 bytes per token in every store).
    """
    report: dict[str, Any] = {"width": width, "tokens": tokens, "batch_tokens": batch_tokens}
    with tempfile.TemporaryDirectory() as directory:
        stores = {dtype: synthetic_store(Path(directory) / dtype, tokens, width, dtype) for dtype in STREAM_DTYPES}
        streams = {dtype: StoreStream(store, (SYNTHETIC_HOOK,), batch_tokens, seed=0) for dtype, store in stores.items()}
        measured: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in STREAM_DTYPES}
        # The first repeat is discarded: it compiles and touches memory for the first time.
        for _ in range(repeats + 1):
            for dtype, stream in streams.items():
                # Closing the stream stops its read-ahead, so every measured batch is read during the measurement.
                measured[dtype].append(_timed_read(stream, windows * WINDOW_BATCHES))
                stream.close()
        for stream in streams.values():
            stream.release()
        size = {dtype: sum(shard["bytes"] for shard in store.shards("train")) for dtype, store in stores.items()}
    gigabytes = windows * WINDOW_BATCHES * batch_tokens * width * 4 / 1e9
    labels = len(LABELS) * 4 * tokens
    for dtype in STREAM_DTYPES:
        wall, cpu = (median(column) for column in zip(*measured[dtype][1:], strict=True))
        report[dtype] = {
            "gb_per_second": gigabytes / wall,
            "cpu_seconds_per_gb": cpu / gigabytes,
            "bytes_ratio": size[dtype] / size["float32"],
            "bytes_ratio_activations": (size[dtype] - labels) / (size["float32"] - labels),
        }
    return report


def _timed_read(stream: StoreStream, batches_wanted: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds to read ``batches_wanted`` batches."""
    clock = _Clock()
    for batch in itertools.islice(stream, batches_wanted):
        # Frees the batch before the next one is requested.
        del batch
    return clock.read()


def bench_harvest(
    model: str = "embedded",
    hook: str = "transformer.h.2:out",
    tokens: int = 50_000,
    context_length: int = 128,
    dtype: str = "float32",
    repeats: int = 5,
    text_files: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure a harvest and the forward passes alone, on the same contexts up to the same hook, in turn.

    ``ratio`` is the median over ``repeats`` of harvest seconds over forward seconds, ``cpu_ratio`` the same in CPU seconds.
    ``text_seconds`` is the time to sample and tokenize the text: the harvest includes it, the forward passes do not. Without
    ``text_files`` it is the embedded corpus, which only the embedded model's tokenizer reads.
    """
    source: dict[str, Any] = {"source": "files", "files": text_files} if text_files else {}
    text = TextSection.model_validate({"context_length": context_length} | source)
    named = ModelSection(id=model)
    language_model = load_model_for(named, (hook,), skeleton(named))
    seconds: dict[str, list[tuple[float, float]]] = {"harvest": [], "forward": [], "text": []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(repeats + 1):
            section = HarvestSection.model_validate(
                {"hooks": (hook,), "tokens": tokens, "store": f"{directory}/{repeat}", "dtype": dtype}
            )
            clock = _Clock()
            inputs = _inputs(language_model, text, section)
            seconds["text"].append(clock.read())
            clock = _Clock()
            for token_ids in inputs:
                language_model.activations(token_ids, (hook,))
            seconds["forward"].append(clock.read())
            clock = _Clock()
            harvest_activations(language_model, text, section)
            seconds["harvest"].append(clock.read())
    # The first repeat is discarded: it compiles and touches memory for the first time.
    pairs = list(zip(seconds["harvest"][1:], seconds["forward"][1:], strict=True))
    return {
        "tokens": tokens,
        "harvest_seconds": median(wall for wall, _ in seconds["harvest"][1:]),
        "forward_seconds": median(wall for wall, _ in seconds["forward"][1:]),
        "text_seconds": median(wall for wall, _ in seconds["text"][1:]),
        "ratio": median(ours[0] / bare[0] for ours, bare in pairs),
        "cpu_ratio": median(ours[1] / bare[1] for ours, bare in pairs),
    }


class _Clock:
    """Timer of wall-clock and CPU seconds since its creation."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def _inputs(model: Any, text: TextSection, section: HarvestSection) -> list[torch.Tensor]:
    """Return the token ids on which a harvest of ``section`` runs the model."""
    assert section.tokens is not None
    inputs, stored = [], 0
    for batch in context_batches(model, text, section, section.batch_contexts):
        inputs.append(batch.on(model.device).token_ids)
        stored += int(batch.kept.sum())
        if stored >= section.tokens:
            break
    return inputs
