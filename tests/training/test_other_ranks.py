"""A run saved by some number of processes goes on in another number of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sparsary

D, TOKENS, STEPS = 11, 48, 9
# A rank: stops before step `stop`, as if a signal had come, or goes on to the end.
RANK = """
import torch
from sparsary.training.processes import leave
from sparsary.training.run import train
from sparsary.training.signals import Stopped, StopRequest
asked = []
def requested(self):
    asked.append(1)
    self.signal_number = 15 if stop is not None and len(asked) > stop else None
    return self.signal_number is not None
StopRequest.requested = property(requested)
rows = torch.randn(700, 11, generator=torch.Generator().manual_seed(3))
try:
    train(recipe, rows)
except Stopped:
    pass
leave()
"""


@pytest.fixture
def on_processes(load_beside):
    """Return a function that trains on so many processes, for ``stop`` steps if given."""

    def train(size, recipe, stop=None):
        statuses = load_beside("rank_processes").run_ranks(size, RANK, {"recipe": recipe, "stop": stop})
        assert statuses == [0] * size
        return Path(recipe["out_dir"])

    return train


def state_of(directory):
    with safe_open(directory / "state.safetensors", "pt") as handle:
        counters = json.loads(handle.metadata()["counters"])
    del counters["metrics_bytes"], counters["metrics_crc32"]
    return counters, load_file(directory / "state.safetensors")


@pytest.fixture
def recipe(tmp_path):
    return {
        "dictionary": {"n_latents": 17, "encoder": {"name": "batch_topk", "k": 3}},
        "tokens": TOKENS * STEPS,
        "batch_tokens": TOKENS,
        "lr_warmup_steps": 2,
        "dead_after_tokens": 3 * TOKENS,
        "log_every": 2,
        "save_every": 2,
        "calibration_tokens": 200,
        "out_dir": str(tmp_path / "run"),
    }


def test_a_run_saved_by_two_processes_goes_on_in_one_and_in_three(recipe, tmp_path, on_processes):
    whole = Path(sparsary.train(recipe | {"out_dir": str(tmp_path / "whole")}, rows()))
    at = {}
    for size, stop in ((2, 3), (1, 3), (3, None)):
        directory = on_processes(size, recipe, stop)
        at[size] = state_of(directory)
        shutil.copytree(directory, tmp_path / str(size))
    assert [at[size][0]["step"] for size in (2, 1, 3)] == [3, 6, 9]
    counters, tensors = state_of(whole)
    # No trace of how many there were.
    assert at[3][0] == counters
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for _, found in at.values():
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == shapes
    # Gradients that are nearly zero have another sign after rounding, and Adam steps by lr in either direction.
    for name, tensor in at[3][1].items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    one, other = sparsary.load(whole), sparsary.load(recipe["out_dir"])
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=1e-4, atol=2e-5)
    assert other.provenance.keys() == one.provenance.keys()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 9]


def test_the_same_number_of_processes_goes_on_bit_by_bit(recipe, tmp_path, on_processes):
    whole = on_processes(2, recipe | {"out_dir": str(tmp_path / "whole")})
    on_processes(2, recipe, 5)
    assert state_of(tmp_path / "run")[0]["step"] == 5
    (counters, tensors), (others, other) = state_of(whole), state_of(on_processes(2, recipe))
    assert counters == others
    assert not [name for name in tensors if not torch.equal(tensors[name], other[name])]


def rows():
    return torch.randn(700, D, generator=torch.Generator().manual_seed(3))
