"""One run at a time in a process: accelerate and torch's random generators are shared by its threads."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsary
from sparsary.training.locks import OneRun

RECIPE = {"dictionary": {"n_latents": 32, "encoder": {"name": "topk", "k": 4}}, "tokens": 4096, "batch_tokens": 256}


class Held:
    """Activations that wait, once they are read, until they are released."""

    def __init__(self, rows):
        self.rows, self.read, self.released = rows, threading.Event(), threading.Event()

    def __iter__(self):
        for batch in self.rows.split(256):
            yield batch
            self.read.set()
            assert self.released.wait(600)


def rows(seed=0):
    return torch.randn(2048, 16, generator=torch.Generator().manual_seed(seed))


def trained(activations, out, **changes):
    return load_file(Path(sparsary.train(RECIPE | {"out_dir": str(out)}, activations, **changes)) / "state.safetensors")


def test_a_second_run_in_another_thread_is_refused_and_the_first_is_untouched(tmp_path):
    held = Held(rows())
    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool:
        first = pool.submit(trained, held, tmp_path / "first")
        try:
            assert held.read.wait(600)
            message = r"second: expected one run at a time in a process, got a second while .*first trains in thread first_0"
            with pytest.raises(ValueError, match=message):
                trained(rows(1), tmp_path / "second", precision="bf16", accumulate=2)
            assert not (tmp_path / "second").exists()
        finally:
            held.released.set()
        found = first.result()
    alone = trained(held, tmp_path / "alone")
    assert found.keys() == alone.keys()
    assert not [name for name in found if not torch.equal(found[name], alone[name])]
    # Its end frees the process.
    trained(rows(1), tmp_path / "second")


@pytest.mark.parametrize("fails", ["before training", "in training"])
def test_a_run_that_fails_frees_the_process(tmp_path, fails):
    class Broken:
        def __iter__(self):
            yield rows()[:256]
            raise RuntimeError("the disk is gone")

    with pytest.raises((RuntimeError, ValueError), match=r"disk is gone|finite"):
        trained(Broken() if fails == "in training" else torch.full((512, 16), torch.nan), tmp_path / "broken")
    trained(rows(), tmp_path / "next")


def test_a_run_within_a_run_is_refused(tmp_path):
    class Nested:
        def __iter__(self):
            trained(rows(), tmp_path / "inner")
            yield rows()

    with pytest.raises(ValueError, match=r"inner: expected one run at a time in a process, got a second while .*outer"):
        trained(Nested(), tmp_path / "outer")


def test_a_fork_of_a_training_process_may_train(monkeypatch):
    """The entry is copied with the process, but not the thread that would remove it."""
    own = OneRun()
    with own.training("runs/parent"):
        with pytest.raises(ValueError, match=r"runs/other: .*runs/parent"), own.training("runs/other"):
            pass
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        with own.training("runs/child"):
            pass
        monkeypatch.undo()
    with own.training("runs/other"):
        pass
