"""Query circuits: the measure, whose circuit is chosen, and the controls."""

import pytest
import torch

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.known import KNOWN
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.methods.method import Method, UnitScores
from sparsary.eval.circuits.methods.query import QueryCircuits, deviation, ndf, query_circuits, single_scores, variants_of
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.eval.circuits.units.passes import Cost
from sparsary.eval.circuits.units.ranking import largest


class Mean(Method):
    """A method that says what it finds on all pairs, and nothing of each."""

    def discover(self, space, pairs):
        return UnitScores(AttributionPatching().discover(space, pairs).values, Cost())


class Ruined(Method):
    """Attribution, upside down for one pair of those it is given."""

    def __init__(self, row):
        self.row = row

    def discover(self, space, pairs):
        per_pair = AttributionPatching().discover(space, pairs).per_pair.clone()
        per_pair[self.row] *= -1
        return UnitScores(per_pair.mean(0), Cost(), per_pair)


@pytest.fixture(scope="module")
def known():
    found = KNOWN["adder_gate"](n_pairs=14)
    return NodeSpace(found.model, components(found.model)), found


def test_ndf_is_the_published_one():
    # Ordinary faithfulness of 2.15, 1.32 and -1.57: both ways of missing the metric cost the same.
    circuits = -3.5 + 7.0 * torch.tensor([2.15, 1.32, -1.57, 1.0, 0.68, 0.0])
    found = ndf(torch.tensor([3.5]), circuits, torch.tensor([-3.5]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.68, 0.0, 1.0, 0.68, 0.0]), rtol=0, atol=1e-5)
    # A metric that corrupting lowers or raises, or leaves alone.
    torch.testing.assert_close(ndf(torch.tensor([1.0]), torch.tensor([1.5]), torch.tensor([2.0])), torch.tensor([0.5]))
    assert ndf(torch.tensor([1.0]), torch.tensor([1.0, 1.1]), torch.tensor([1.0])).tolist() == [1.0, 0.0]


def test_deviation_runs_every_circuit_on_the_query(known):
    space, found = known
    query = found.pairs.take([3])
    kept = torch.stack([largest(torch.randn(space.size), 2), torch.ones(space.size).bool(), torch.zeros(space.size).bool()])
    values = deviation(space, query, kept)
    full, corrupted = (query.measure(space.model.logits(ids)) for ids in (query.clean, query.corrupted))
    _, filler = space.see(query.corrupted)
    for row in range(3):
        alone = ndf(full, query.measure(space.run(query.clean, kept[row], filler)), corrupted)
        torch.testing.assert_close(values[row : row + 1], alone)
    assert values[1] == 1.0


def test_of_a_known_circuit_as_many_units_do_all(known):
    space, found = known
    truth = torch.tensor([unit.replace("/", ".h") in found.nodes["resample"] for unit in space.names()])
    n = int(truth.sum())
    curves = query_circuits(space, found.pairs, [0, 5], [1, n], AttributionPatching(), n_variants=4)
    for values in (curves.single, curves.best, curves.best_held_out, curves.single_held_out):
        assert values.shape == (2, 2)
        assert values[:, 1].min() > 0.999
    assert curves.best[:, 0].max() < 0.01
    assert curves.winner[:, 1].tolist() == [0, 0]
    scores = QueryCircuits(n_variants=4).discover(space, found.pairs)
    assert torch.equal(largest(scores.values, n), truth)
    assert scores.cost.backwards == 20


def test_the_best_is_never_worse_on_the_query_and_leaves_a_ruined_circuit_behind(known):
    space, found = known
    # Discovery sees the query first.
    curves = query_circuits(space, found.pairs, [0, 1, 2], [1, 2, 3], Ruined(0), n_variants=3, seed=1)
    assert (curves.best >= curves.single).all()
    assert curves.single.max() < 0.01
    # Either head brings half.
    torch.testing.assert_close(curves.best, torch.tensor([[0.0, 0.5, 1.0]] * 3), rtol=0, atol=1e-3)
    assert (curves.winner[:, 1:] > 0).all()
    assert curves.winner.max() <= 3
    n = int(sum(unit.replace("/", ".h") in found.nodes["resample"] for unit in space.names()))
    values = QueryCircuits(Ruined(0), n_variants=3, shares=[n / space.size]).discover(space, found.pairs).values
    assert values[largest(values, n)].min() > 0


def test_random_circuits_get_their_best_of_as_many(known):
    space, found = known
    few, many = (
        query_circuits(space, found.pairs, range(6), [3], AttributionPatching(), n_variants=n, seed=3) for n in (0, 12)
    )
    # One of ten circuits of three units is right.
    assert few.random.mean() < 0.6 < many.random.mean()
    # What was right on the query is right elsewhere: there is but one circuit here.
    torch.testing.assert_close(many.random_held_out, many.random, rtol=0, atol=1e-3)


def test_held_out_is_another_pair_that_chose_nothing(known, monkeypatch):
    """The only pair beside the query is held out, and its metric says how well the query's circuit does there."""
    space, found = known
    pairs = found.pairs.take([0, 1])
    asked = []

    def watched(space, query, kept):
        asked.append(query.clean.tolist())
        return deviation(space, query, kept) / (1 + len(asked))

    monkeypatch.setattr("sparsary.eval.circuits.methods.query.deviation", watched)
    curves = query_circuits(space, pairs, [1], [3], AttributionPatching())
    assert asked == [pairs.clean[[1]].tolist(), pairs.clean[[0]].tolist()]
    torch.testing.assert_close(curves.best_held_out, torch.tensor([[1 / 3]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(curves.best, torch.tensor([[1 / 2]]), rtol=0, atol=1e-3)
    assert curves.winner.tolist() == [[0]]


def test_a_method_without_scores_of_pairs_runs_on_each(known):
    space, found = known
    torch.testing.assert_close(
        single_scores(space, found.pairs, Mean()), AttributionPatching().discover(space, found.pairs).per_pair
    )


def test_variants_are_asked_the_like(known):
    _, found = known
    pairs = found.pairs.take(range(4))
    questions = list(pairs.questions)
    questions[2] = (questions[2][0]._replace(foils=(1, 2)),)
    other = type(pairs)(**{**pairs.__dict__, "questions": tuple(questions)})
    assert variants_of(other, 0) == [1, 3]
    with pytest.raises(ValueError, match="pair 2: expected another pair with as many answers and foils"):
        query_circuits(known[0], other, [2], [1], AttributionPatching())
    with pytest.raises(ValueError, match="n_variants: expected at least 0, got -1"):
        METHODS["query"](n_variants=-1)
