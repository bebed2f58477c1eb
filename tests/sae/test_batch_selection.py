"""Which cells a budget buys: always exactly as many as it says, and the same ones as a full sort."""

import pytest
import torch

from sparsary.sae.batch_selection import SAMPLE_STRIDE, SLACK, between, largest_cells
from sparsary.sae.tiled_scores import Scorer, largest_per_latent

# Large enough for the cut to be estimated from a sample.
TOKENS, LATENTS = 127, 89
CELLS = TOKENS * LATENTS


def full_sort(scores, budget):
    """The best cells by score, the lower one of equals first."""
    return scores.reshape(-1).sort(descending=True, stable=True).indices[:budget].sort().values.tolist()


def only_at(positions, generator):
    """Large scores at some flat positions, small ones elsewhere."""
    scores = torch.rand(CELLS, generator=generator)
    scores[positions] += 10
    return scores.view(TOKENS, LATENTS)


# Every kind of scores on which an estimated cut may fail.
SCORES = {
    "random": lambda g: torch.randn(TOKENS, LATENTS, generator=g),
    "ties": lambda g: torch.randint(0, 4, (TOKENS, LATENTS), generator=g).float(),
    "mostly one value": lambda g: (torch.rand(TOKENS, LATENTS, generator=g) < 0.01).float(),
    "all equal": lambda g: torch.full((TOKENS, LATENTS), 0.25),
    "all negative": lambda g: -torch.rand(TOKENS, LATENTS, generator=g),
    "minus infinity": lambda g: torch.rand(TOKENS, LATENTS, generator=g).sub(0.7).relu().log(),
    "large where the sample looks": lambda g: only_at(torch.arange(0, CELLS, SAMPLE_STRIDE), g),
    "large where it does not": lambda g: only_at(torch.arange(1, CELLS, SAMPLE_STRIDE), g),
    "large in one token": lambda g: only_at(torch.arange(3 * LATENTS, 4 * LATENTS), g),
    "large in one latent": lambda g: only_at(torch.arange(5, CELLS, LATENTS), g),
    "ascending": lambda g: torch.arange(float(CELLS)).view(TOKENS, LATENTS),
}


@pytest.mark.parametrize("budget", [0, 1, 7, 131, 500, 3 * TOKENS, CELLS - 1, CELLS, CELLS + 5])
@pytest.mark.parametrize("kind", SCORES)
def test_largest_cells_are_those_of_a_full_sort(kind, budget):
    scores = SCORES[kind](torch.Generator().manual_seed(1))
    cells = largest_cells(scores, budget)
    assert cells.dtype == torch.long
    assert len(cells) == min(budget, CELLS)
    assert cells.tolist() == full_sort(scores, budget)


def test_the_sample_is_used_and_does_mislead():
    """Without these the cases above would test the plain ranking only."""
    budget = 500
    rank = int(budget / SAMPLE_STRIDE * SLACK) + 8
    sampled = -(-CELLS // SAMPLE_STRIDE)
    assert rank < sampled < budget
    misleading = SCORES["large where the sample looks"](torch.Generator().manual_seed(1))
    cut = misleading.reshape(-1)[::SAMPLE_STRIDE].topk(rank).values.amin()
    assert (misleading >= cut).sum() < budget


def test_ties_go_to_the_lowest_cell():
    assert largest_cells(torch.zeros(TOKENS, LATENTS), 131).tolist() == list(range(131))
    scores = torch.zeros(3, 5)
    scores[2, 4] = 1.0
    assert largest_cells(scores, 3).tolist() == [0, 1, 14]


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_small_shapes(shape, budget):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert largest_cells(scores, budget).tolist() == full_sort(scores, budget)


def test_scores_may_carry_gradient_and_stay_as_they_are():
    scores = torch.randn(13, 7, requires_grad=True)
    before = scores.detach().clone()
    largest_cells(scores, 17)
    assert torch.equal(scores.detach(), before)
    assert scores.grad is None


@pytest.fixture(params=["kernels", "plain"])
def per_latent(request, monkeypatch):
    """Cells that ``largest_per_latent`` keeps of given scores, and the smallest of each latent."""
    if request.param == "plain":
        monkeypatch.setattr("sparsary.sae.batch_selection.selection", lambda *tensors: None)
    # Tiles of a few latents.
    monkeypatch.setattr("sparsary.sae.tiled_scores.LEAST_WIDTH", 7)
    monkeypatch.setattr("sparsary.sae.tiled_scores.TILE_NUMBERS_CPU", 1)

    def choose(scores, budgets):
        found = largest_per_latent(Scorer(scores, torch.eye(scores.shape[1]), None), budgets)
        assert torch.equal(found.code.values, scores[found.code.token_ids(), found.code.latents])
        return found.code.token_ids() * scores.shape[1] + found.code.latents, found.smallest

    return choose


BUDGETS = {
    "mixed": lambda g: torch.randint(0, TOKENS + 9, (LATENTS,), generator=g),
    "zipf": lambda g: (TOKENS / torch.arange(1, LATENTS + 1)).long()[torch.randperm(LATENTS, generator=g)],
    "none": lambda g: torch.zeros(LATENTS, dtype=torch.long),
    "one each": lambda g: torch.ones(LATENTS, dtype=torch.long),
    "all": lambda g: torch.full((LATENTS,), TOKENS),
    "more than all": lambda g: torch.full((LATENTS,), TOKENS + 3),
    "one latent has all": lambda g: torch.zeros(LATENTS, dtype=torch.long).index_fill(0, torch.tensor([29]), TOKENS),
}


@pytest.mark.parametrize("kind", BUDGETS)
def test_largest_per_latent_equal_numpy_column_by_column(per_latent, kind):
    generator = torch.Generator().manual_seed(3)
    scores, budgets = torch.randn(TOKENS, LATENTS, generator=generator), BUDGETS[kind](generator)
    given = budgets.clone()
    cells, smallest = per_latent(scores, budgets)
    assert torch.equal(budgets, given)
    expected = []
    for latent, column in enumerate(scores.numpy().T):
        m = min(int(budgets[latent]), TOKENS)
        best = column.argsort()[::-1][:m]
        expected += (best * LATENTS + latent).tolist()
        assert float(smallest[latent]) == (column[best[-1]] if m else float("inf"))
    assert cells.tolist() == sorted(expected)


def test_per_latent_counts_are_exact_on_ties(per_latent):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(0, 3, (TOKENS, LATENTS), generator=generator).float()
    budgets = BUDGETS["mixed"](generator)
    cells, smallest = per_latent(scores, budgets)
    assert len(cells.unique()) == len(cells)
    assert torch.equal(torch.bincount(cells % LATENTS, minlength=LATENTS), budgets.clamp(max=TOKENS))
    kept = torch.zeros(CELLS, dtype=torch.bool).index_fill(0, cells, True).view(TOKENS, LATENTS)
    assert (scores.where(kept, torch.inf).amin(0) == smallest).all()
    assert (scores.where(~kept, -torch.inf).amax(0) <= smallest).all()


def test_between_is_exceeded_by_exactly_so_many():
    scores = torch.tensor([5.0, 3.0, 2.0, 2.0, 0.5])
    for rank in (0, 1, 2, 4):
        assert int((scores > between(scores, rank)).sum()) == rank
    assert between(scores, 1) == 4.0
    # Among equals it is their value: none of them exceeds it.
    assert between(scores, 3) == 2.0


def test_between_is_never_below_zero():
    assert between(torch.tensor([2.0, -1.0, -3.0]), 2) == 0.0
    assert between(torch.tensor([2.0, 1.0]), 2) == 0.0
    assert between(torch.tensor([2.0, 1.0]), 9) == 0.0
    assert between(torch.tensor([]), 0) == 0.0


def test_between_of_negative_scores_alone_is_zero():
    assert between(torch.tensor([-1.0, -2.0]), 0) == 0.0
