"""Laws of density, and whole numbers that follow them."""

import pytest
import torch

from sparsary.sae.zipf import fit_zipf, integer_budgets, underused, zipf


def test_zipf_is_the_law_and_sums_to_1():
    law = zipf(5, 2.0, 3.0)
    weights = [1 / (rank + 3.0) ** 2 for rank in range(1, 6)]
    assert law.tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-12)
    assert float(zipf(4099, 1.1, 7.0).sum()) == pytest.approx(1.0, rel=1e-12)


def test_alpha_0_is_uniform():
    assert zipf(7, 0.0, 3.0).tolist() == pytest.approx([1 / 7] * 7)
    assert integer_budgets(zipf(7, 0.0, 0.0), 35, 11).tolist() == [5] * 7
    # What does not divide goes out one by one.
    budgets = integer_budgets(zipf(7, 0.0, 0.0), 38, 11)
    assert sorted(budgets.tolist()) == [5] * 4 + [6] * 3


@pytest.mark.parametrize("seed", range(5))
def test_budgets_add_up_stay_within_bounds_and_follow_the_law(seed):
    generator = torch.Generator().manual_seed(seed)
    for n, most in ((1, 7), (2, 1), (13, 5), (211, 97), (1009, 31)):
        law = torch.rand(n, generator=generator, dtype=torch.float64).pow(4) + 1e-9
        law = law.sort(descending=True).values / law.sum()
        for total in {n, n + 1, (n + n * most) // 2, n * most - 1, n * most}:
            if not n <= total <= n * most:
                continue
            budgets = integer_budgets(law, total, most)
            assert budgets.dtype == torch.long
            assert int(budgets.sum()) == total
            assert int(budgets.min()) >= 1
            assert int(budgets.max()) <= most
            assert (budgets[:-1] >= budgets[1:]).all(), (n, most, total)


def test_budgets_are_the_scaled_law_to_less_than_one_unit():
    law = zipf(211, 0.7, 4.0)
    budgets = integer_budgets(law, 5003, 97)
    inside = (budgets > 1) & (budgets < 97)
    scale = float(budgets[inside].sum() / law[inside].sum())
    assert (budgets - (scale * law).clamp(1, 97)).abs().max() < 1.1
    assert inside.sum() > 100


@pytest.mark.parametrize(
    ("n_latents", "tokens", "k", "first", "last"), [(12_288, 4096, 32, 1686, 1), (32_768, 131_072, 32, 47_391, 16)]
)
def test_the_method_sheets_examples(n_latents, tokens, k, first, last):
    budgets = integer_budgets(zipf(n_latents, 1.0, 10.0), tokens * k, tokens)
    assert (int(budgets[0]), int(budgets[-1]), int(budgets.sum())) == (first, last, tokens * k)


@pytest.mark.parametrize("total", [0, 12, 66, 10_000])
def test_budgets_that_cannot_be_are_refused(total):
    with pytest.raises(ValueError, match=rf"budget: expected 13 to 13 x 5 matches for 13 latents, got {total}"):
        integer_budgets(zipf(13, 1.0, 0.0), total, 5)


@pytest.mark.parametrize(("alpha", "shift"), [(0.5, 1.0), (1.0, 10.0), (1.1, 40.0), (1.7, 200.0)])
def test_fit_recovers_the_law_behind_a_rare_end_that_departs_from_it(alpha, shift):
    density = 30 * zipf(4099, alpha, shift)
    density[-400:] /= torch.linspace(1, 300, 400)
    density[torch.tensor([4000, 4050])] = 0.0
    found_alpha, found_shift = fit_zipf(density[torch.randperm(4099)])
    assert found_alpha == pytest.approx(alpha, abs=0.03)
    assert found_shift == pytest.approx(shift, rel=0.1, abs=0.5)


def test_the_many_rare_ranks_do_not_outweigh_the_few_frequent_ones():
    """Half of the ranks are too steep, but that is a twelfth of the axis on which the law is straight."""
    density = 30 * zipf(4099, 0.8, 5.0)
    density[2049:] *= (torch.arange(2049, 4099) / 2049.0).double().pow(-3)
    assert fit_zipf(density)[0] == pytest.approx(0.8, abs=0.25)


def test_fit_of_counted_firings_is_close():
    generator = torch.Generator().manual_seed(0)
    density = torch.poisson(1e6 * zipf(2003, 0.9, 15.0), generator=generator) / 1e6
    alpha, shift = fit_zipf(density)
    assert alpha == pytest.approx(0.9, abs=0.05)
    assert shift == pytest.approx(15.0, rel=0.3)


def test_fit_stays_within_its_bounds():
    steep = 1 / torch.arange(1, 1010).double().pow(5)
    assert fit_zipf(steep)[0] == 2.0
    alpha, shift = fit_zipf(torch.full((1009,), 0.1))
    assert alpha == pytest.approx(0.3)
    assert 0 <= shift < 101


@pytest.mark.parametrize("alive", [0, 1, 2])
def test_fit_of_too_few_latents_is_uniform(alive):
    density = torch.zeros(101)
    density[:alive] = 0.5
    assert fit_zipf(density) == (0.0, 0.0)


def lawful(n=1009, weak=37):
    """Densities that follow a law, but for some latents that fire a hundred times too rarely. With the weak ones' places."""
    density = 20 * zipf(n, 0.8, 12.0)
    density[-weak:] /= 100
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    is_weak = torch.zeros(n, dtype=torch.bool)
    is_weak[-weak:] = True
    return density[order], is_weak[order]


def test_underused_are_those_far_below_their_due():
    density, weak = lawful()
    assert torch.equal(underused(density, 0.5), weak)
    assert torch.equal(underused(density.float(), 0.5), weak)


def test_underused_counts_the_silent():
    density, weak = lawful()
    density[weak] = 0.0
    assert torch.equal(underused(density, 0.5), weak)


def test_tau_0_and_no_firing_leave_none_underused():
    density, _ = lawful()
    assert not underused(density, 0.0).any()
    assert not underused(density, 0.0, absolute=True).any()
    for absolute in (False, True):
        assert not underused(torch.zeros(101), 0.5, absolute).any()


def test_the_absolute_variant_compares_with_the_last_rank():
    density, weak = lawful()
    due = float(zipf(1009, *fit_zipf(density))[-1] * density.sum())
    for tau in (0.5, 1.5, 3.0):
        assert torch.equal(underused(density, tau, absolute=True), density < tau * due)
    assert torch.equal(underused(density, 0.5, absolute=True), weak)
    # Three times the rarest one's due is more than many fire that have their own rank's due.
    assert underused(density, 3.0, absolute=True).sum() > 2 * weak.sum()


def test_underused_does_not_depend_on_the_scale_of_densities():
    density, _ = lawful()
    assert torch.equal(underused(density, 0.9), underused(density / 7, 0.9))
