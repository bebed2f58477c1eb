"""Initialisation, schedule and state: the small parts of a run."""

import math

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.sae.metrics import Moments
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.initialize import geometric_median, initialize
from sparsary.training.optim import DictionaryAdam, Schedule
from sparsary.training.phases import Phases
from sparsary.training.recipe import check_recipe, total_steps


def moments_of(rows):
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def test_the_geometric_median_resists_outliers():
    rows = torch.randn(1000, 4) + 3
    rows[:50] += 1e4
    assert (geometric_median(rows) - 3).abs().max() < 0.3
    assert (rows.mean(0) - 3).abs().max() > 100


def test_the_geometric_median_of_a_symmetric_set_is_its_centre():
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 5
    torch.testing.assert_close(geometric_median(corners), torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize("atoms", ["data", "random"])
def test_a_fresh_dictionary_has_unit_scale_and_from_data_a_reconstruction_that_does_not_overshoot(atoms):
    rows = 50 * torch.randn(2000, 12) @ torch.randn(12, 12) + 400
    sae = SAE(12, 61, ENCODERS["topk"](k=5))
    initialize(sae, ActivationBatch(rows), moments_of(rows), moments_of(rows), "scale", atoms)
    variance = float((rows - rows.mean(0)).pow(2).sum(-1).mean())
    assert float(sae.in_scale) == pytest.approx(math.sqrt(variance / 12), rel=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(61))
    # The encoder starts as a multiple of the atoms.
    ratio = sae.W_enc / sae.W_dec
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    if atoms == "data":
        assert ratio[0, 0] < 0.9
        assert float((sae(rows) - rows).pow(2).sum(-1).mean().detach()) < variance
    else:
        assert torch.equal(sae.W_enc, sae.W_dec)


def test_without_normalisation_scales_stay_1():
    rows = torch.randn(200, 7) * 9
    sae = SAE(7, 13, ENCODERS["topk"](k=2))
    initialize(sae, ActivationBatch(rows), moments_of(rows), moments_of(rows), "none", "random")
    assert float(sae.in_scale) == float(sae.out_scale) == 1.0


def test_fewer_samples_than_latents_give_distinct_atoms():
    rows = torch.randn(5, 7)
    sae = SAE(7, 31, ENCODERS["topk"](k=2))
    initialize(sae, ActivationBatch(rows), moments_of(rows), moments_of(rows), "scale", "data")
    cosines = sae.W_dec @ sae.W_dec.T - torch.eye(31)
    assert cosines.max() < 1 - 1e-4


def test_a_pursuit_starts_at_norm_1_from_data_of_any_size():
    rows = 50 * torch.randn(200, 7) + 400
    sae = SAE(7, 31, ENCODERS["matching_pursuit"](k=12, unit_norm=False))
    initialize(sae, ActivationBatch(rows), moments_of(rows), moments_of(rows), "scale", "data")
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(31))
    assert float((sae(rows) - rows).pow(2).sum().detach()) < float((rows - rows.mean(0)).pow(2).sum())


def test_constant_activations_are_refused():
    rows = torch.ones(50, 7)
    with pytest.raises(ValueError, match="expected variance above 0"):
        initialize(
            SAE(7, 13, ENCODERS["topk"](k=2)), ActivationBatch(rows), moments_of(rows), moments_of(rows), "scale", "data"
        )


def test_the_learning_rate_rises_stays_and_falls(recipe_values):
    recipe = check_recipe(recipe_values | {"lr": 1.0, "lr_warmup_steps": 4, "lr_decay": 0.2}, "recipe")
    sae = SAE(7, 67, ENCODERS["topk"](k=2))
    phases = Phases(sae, recipe)
    optimizer = DictionaryAdam(sae, phases, recipe)
    schedule = Schedule(optimizer, sae, phases, recipe)
    rates = [schedule.lr(step) for step in range(total_steps(recipe))]
    assert len(rates) == 30
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[23] == 1.0
    assert rates[24:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    flat = Schedule(optimizer, sae, phases, recipe.model_copy(update={"lr_warmup_steps": 0, "lr_decay": 0.0}))
    assert {flat.lr(step) for step in range(30)} == {1.0}
    schedule.apply(0)
    assert schedule.optimizer.param_groups[0]["lr"] == 0.25
