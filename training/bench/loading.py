"""Benchmark of loading third-party checkpoints: time and memory relative to reading the bytes with safetensors.

Each load runs in a separate process, in turn with the others, with the files in the page cache. Run as a script, this module
is such a process: it loads the format given on the command line and prints seconds and bytes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save_file

from ...sae import SAE
from ...sae.encoders import build_encoder
from ...sae.formats import write_dictionary

HOOK = "model.layers.3:out"
PROVENANCE = {"model": {"id": "google/gemma-2-2b"}, "hook": HOOK, "hooks_in": [HOOK], "hooks_out": [HOOK]}
WRITTEN = ("saelens", "sparsify", "dictionary_learning")
FORMATS = (*WRITTEN, "gemma_scope")
BYTES = "bytes.safetensors"
STATUS = Path("/proc/self/status")


def bench_loading(n_latents: int = 16_384, width: int = 2304, rounds: int = 5) -> dict[str, Any]:
    """Measure ``FORMAT_time`` and ``FORMAT_memory`` for every format.

    Time is the minimum over rounds, divided by that of ``safetensors.torch.load`` on the bytes of the same tensors. Memory is
    the increase in peak memory of the process, memory-mapped pages included, divided by the size of the tensors; it is absent
    if the system does not report it.
    """
    report: dict[str, Any] = {"n_latents": n_latents, "width": width}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write(folder, n_latents, width)
        report["tensor_bytes"] = size
        seconds: dict[str, list[float]] = {what: [] for what in ("bytes", *FORMATS)}
        peaks: dict[str, list[int]] = {what: [] for what in seconds}
        for _ in range(rounds):
            for what in seconds:
                found = _measured(what, folder)
                seconds[what].append(found["seconds"])
                if found["peak"] is not None:
                    peaks[what].append(found["peak"])
    # Minimum: background load only adds time.
    report["bytes_seconds"] = min(seconds["bytes"])
    for what in FORMATS:
        report[f"{what}_time"] = min(seconds[what]) / report["bytes_seconds"]
    for what, found in peaks.items():
        if found:
            report[f"{what}_memory"] = min(found) / size
    return report


def _write(folder: Path, n_latents: int, width: int) -> int:
    """Write one dictionary in every format and return the size of its tensors in bytes."""
    dictionary = SAE(width, n_latents, build_encoder({"name": "topk", "k": min(64, n_latents)})).eval()
    for name in WRITTEN:
        write_dictionary(dictionary, folder / name, name, PROVENANCE)
    state = {key: tensor.detach() for key, tensor in dictionary.state_dict().items() if tensor.ndim}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / BYTES)
    (folder / "gemma_scope").mkdir()
    found: dict[str, Any] = {key: tensor.numpy() for key, tensor in state.items()}
    found["W_enc"] = np.ascontiguousarray(found["W_enc"].T)
    np.savez(folder / "gemma_scope" / "params.npz", threshold=np.ones(n_latents, np.float32), **found)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _measured(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sparsary.training.bench.loading", what, str(folder)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(run.stdout.splitlines()[-1])


def _memory(key: str) -> int | None:
    """Return a memory counter of this process in bytes, or None if the system does not report it."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(what: str, folder: Path) -> dict[str, Any]:
    """Load once and return the seconds and the increase in peak memory in bytes."""
    from ...transcoders.load import load as load_any

    tasks: dict[str, Callable[[], Any]] = {name: lambda name=name: load_any(folder / name) for name in FORMATS}
    tasks["bytes"] = lambda: load((folder / BYTES).read_bytes())
    if what != "bytes":
        # Load a tiny dictionary first, so that lazy imports are not measured.
        with tempfile.TemporaryDirectory() as tiny:
            _write(Path(tiny), 8, 4)
            load_any(Path(tiny) / what)
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        # Resets the peak memory counter.
        resets.write_text("5")
    before, start = _memory("VmRSS"), time.perf_counter()
    kept = tasks[what]()
    seconds, peak = time.perf_counter() - start, _memory("VmHWM")
    del kept
    return {"seconds": seconds, "peak": None if peak is None or before is None else peak - before}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))) + "\n")
