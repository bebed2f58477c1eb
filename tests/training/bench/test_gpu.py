"""The benchmark of the GPU step: what it returns where it runs, and what it says where it cannot."""

import pytest
import torch

from sparsary.training.bench import gpu as bench
from sparsary.training.objective import Objective

SHAPE = {"tokens": 61, "d": 32, "n_latents": 128, "k": 5}


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        bench.bench_gpu_step()


@pytest.mark.parametrize("optimizer", ["auto", "plain"])
def test_the_step_that_it_takes_trains(optimizer, monkeypatch):
    losses = []

    class Noted(Objective):
        def forward(self, batch, usage):
            loss, terms = super().forward(batch, usage)
            losses.append(float(loss.detach()))
            return loss, terms

    monkeypatch.setattr(bench, "Objective", Noted)
    step = bench._step(**SHAPE, optimizer=optimizer, device=torch.device("cpu"))
    for _ in range(20):
        step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_small_step_is_measured():
    report = bench.bench_gpu_step(**SHAPE, steps=3)
    assert report["tokens_per_second"] == pytest.approx(61 / report["step_seconds"])
    assert report["share_of_product_speed"] > 0
