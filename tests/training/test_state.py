"""Counters of a run."""

import pytest
import torch

from sparsary.training.objective import Terms
from sparsary.training.phases import HALF_LIVES_TO_DEATH
from sparsary.training.state import Randomness, TrainState


def advanced(dead_after_tokens, firings, batch=2048):
    """The state after batches of which so many tokens each fired the one latent."""
    state = TrainState(1, dead_after_tokens, torch.device("cpu"), Randomness(0))
    for count in firings:
        state.advance(batch, Terms({"loss": torch.zeros(())}, torch.tensor([count])))
    return state


@pytest.mark.parametrize("dead_after_tokens", [20_480, 204_800])
def test_the_density_of_a_dead_latent_is_nearly_forgotten_whatever_the_run_s_length(dead_after_tokens):
    batches = dead_after_tokens // 2048
    state = advanced(dead_after_tokens, [20] * batches + [0] * batches)
    assert bool(state.dead)
    # A plain mean until then.
    assert float(advanced(dead_after_tokens, [20] * 2).density) == pytest.approx(20 / 2048)
    assert float(state.density) == pytest.approx(20 / 2048 / 2**HALF_LIVES_TO_DEATH, rel=0.15)
    later = advanced(dead_after_tokens, [20] * batches + [0] * 4 * batches)
    assert float(later.density) < 1e-3 * 20 / 2048


def test_the_density_of_a_steady_latent_is_its_share_of_tokens():
    state = advanced(20_480, [20, 40] * 100)
    assert float(state.density) == pytest.approx(30 / 2048, rel=0.1)
