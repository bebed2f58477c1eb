"""Certified circuits: votes by brute force, bounds, and what the certificate promises, tried on other data sets."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.known import KNOWN, ToyConfig, ToyTransformer
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.methods.certified import Certified, lower_bound, radius
from sparsary.eval.circuits.methods.method import Method, UnitScores
from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace
from sparsary.eval.circuits.units.passes import Cost
from sparsary.training.activations.model import LanguageModel


class Given(Method):
    """Scores of each pair that a table says; a pair is known by its only token."""

    def __init__(self, table, singly=True):
        self.table, self.singly = table, singly

    def discover(self, space, pairs):
        per_pair = self.table[pairs.clean[:, 0]]
        return UnitScores(per_pair.mean(0), Cost(), per_pair if self.singly else None)


def data(tokens):
    tokens = torch.tensor(tokens)[:, None]
    questions = ((Question(0, (0,), (1,)),),) * len(tokens)
    return PromptPairs("any", "none", tokens, tokens, questions, torch.ones(len(tokens), dtype=torch.long))


@pytest.fixture(scope="module")
def space():
    """Six heads, which nobody looks at."""
    module = ToyTransformer(ToyConfig(1, 6, d_model=6, d_head=1, n_ctx=3, d_vocab=30, d_vocab_out=2))
    return NodeSpace(LanguageModel(module, None, "toy", None), [Coordinates("a0", "h.0.attn.o_proj:in", 6, 1)])


TABLE = torch.randn(30, 6, generator=torch.Generator().manual_seed(4)) + torch.tensor([3.0, 1.0, 0.5, 0.0, -0.5, -3.0])


def votes_by_hand(table, tokens, subsamples, p_del, seed, select):
    """Share of subsamples that select each unit, one after the other."""
    draw = torch.Generator().manual_seed(seed)
    votes = torch.zeros(6)
    for row in torch.rand(subsamples, len(tokens), generator=draw) >= p_del:
        if row.any():
            votes += select(table[torch.tensor(tokens)[row]].mean(0))
    return votes / subsamples


@pytest.mark.parametrize("singly", [True, False], ids=["pair by pair", "rerun"])
@pytest.mark.parametrize("options", [{"size": 2}, {"threshold": 0.4}, {"size": 2, "ranking": "absolute"}])
def test_votes_are_those_of_every_subsample_by_itself(space, singly, options):
    tokens = list(range(7))

    def select(means):
        strength = means.abs() if "ranking" in options else means
        if "threshold" in options:
            return (strength > 0.4).float()
        chosen = torch.zeros(6)
        chosen[strength.argsort(descending=True)[:2]] = 1
        return chosen * (strength > 0)

    found = Certified(Given(TABLE, singly), subsamples=150, seed=5, **options).certify(space, data(tokens))
    expected = votes_by_hand(TABLE, tokens, 150, 0.6, 5, select)
    torch.testing.assert_close(found.votes, expected)
    assert (found.votes * (1 - found.votes)).sum() > 0
    assert torch.equal(
        Certified(Given(TABLE), subsamples=150, seed=5, **options).discover(space, data(tokens)).values, expected
    )


def test_bounds_leave_out_the_truth_as_often_as_they_may():
    # The bound is where so many successes or more have a chance of alpha.
    counts = np.array([0.0, 1.0, 40.0, 99.0, 100.0])
    bounds = lower_bound(counts, 100, 0.01)
    assert bounds[0] == 0.0
    np.testing.assert_allclose(binom.sf(counts[1:] - 1, 100, bounds[1:]), 0.01, rtol=1e-6)


def test_the_radius_is_the_published_one():
    assert radius(0.95, 0.6) == 1
    # log(0.51) / log(0.9) is 6.39, log(0.9) / log(0.6) 0.2.
    assert (radius(0.99, 0.9), radius(0.6, 0.6)) == (6, 0)


def test_few_subsamples_or_all_units_at_once_certify_less(space):
    tokens = list(range(20))
    certify = lambda **options: Certified(Given(TABLE), size=2, seed=0, **options).certify(space, data(tokens))  # noqa: E731
    many, few = certify(), certify(subsamples=60)
    assert many.included[0]
    assert many.excluded[5]
    assert many.decisions()[0] == "IN"
    # 60 of 60 votes are no proof of 0.95.
    assert few.votes[0] == 1.0
    assert few.abstained.all()
    assert not few.included.any() | few.excluded.any()
    once, together = (certify(subsamples=160, simultaneous=together) for together in (False, True))
    assert once.included[0]
    # 0.001 ** (1 / 160) is 0.958, but (0.001 / 6) ** (1 / 160) is 0.947.
    assert together.votes[0] == 1.0
    assert not together.included[0]


def test_what_is_certified_keeps_its_majority_on_every_data_set_that_differs_by_one_pair(space):
    tokens = list(range(15))
    found = Certified(Given(TABLE), size=3, seed=0).certify(space, data(tokens))
    assert found.radius == 1
    assert found.included.any()
    assert found.excluded.any()
    assert found.abstained.any()
    deleted = [tokens[:row] + tokens[row + 1 :] for row in range(15)]
    inserted = [[*tokens, new] for new in range(15, 30)]
    replaced = [[*tokens[1:], new] for new in range(15, 30)]
    for others in (*deleted, *inserted, *replaced):
        votes = Certified(Given(TABLE), size=3, seed=1).discover(space, data(others)).values
        assert (votes[found.included] > 0.5).all()
        assert (votes[found.excluded] < 0.5).all()


def test_the_promise_needs_the_votes_to_be_over_tau(space):
    """A unit that one pair alone decides is over one half on the data set as it is, and is not certified."""
    table = torch.zeros(30, 6)
    table[:, 1] = 1.0
    table[0, 0] = 100.0
    found = Certified(Given(table), size=1, p_del=0.3, seed=0).certify(space, data(list(range(10))))
    assert 0.6 < found.votes[0] < 0.8
    assert found.decisions()[:2] == ["ABSTAIN", "ABSTAIN"]
    # Without that pair it is never selected.
    assert Certified(Given(table), size=1, p_del=0.3).discover(space, data(list(range(1, 10)))).values[0] == 0.0


@pytest.mark.parametrize("name", ["and_gate", "adder_gate"])
def test_what_is_in_a_known_circuit_is_certified_and_nothing_else(name):
    known = KNOWN[name](n_pairs=16)
    space = NodeSpace(known.model, components(known.model))
    truth = torch.tensor([unit.replace("/", ".h") in known.nodes["resample"] for unit in space.names()])
    found = METHODS["certified"](threshold=0.01).certify(space, known.pairs)
    assert torch.equal(found.included, truth)
    assert torch.equal(found.excluded, ~truth)
    assert (found.cost.forwards, found.cost.backwards) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2, "threshold": 0.1}, "size: expected size or threshold"),
        ({"tau": 0.4}, "tau: expected a number between 0.5 and 1, got 0.4"),
        ({"p_del": 1.0}, "p_del: expected a number between 0 and 1"),
        ({"threshold": -0.1}, "subsamples, threshold: expected"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Certified(**options)
