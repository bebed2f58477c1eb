"""Selection by compiled kernels, and by torch in their place."""

import pytest


@pytest.fixture
def without_kernels(monkeypatch):
    """Takes the kernels away for the rest of a test: ``without_kernels()``."""

    def take_away():
        monkeypatch.setattr("sparsary.sae.sparse_ops.backend", lambda *tensors: None)
        for module in ("tiled_scores", "batch_selection", "screen"):
            monkeypatch.setattr(f"sparsary.sae.{module}.selection", lambda *tensors: None)
        monkeypatch.setattr("sparsary.sae.sparse_code.cpu_kernels", lambda: None)

    return take_away


@pytest.fixture(params=["kernels", "plain"])
def kernels(request, without_kernels):
    """Both ways to do it."""
    if request.param == "kernels":
        pytest.importorskip("numba")
    else:
        without_kernels()
    return request.param
