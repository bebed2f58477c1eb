"""Comparison of circuits where the answer is known: programs that share a variable, and tasks of the embedded model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.eval.circuits.compared_units import components, mlp_neurons
from sparsary.eval.circuits.comparison.overlaps import EQUAL, cross_rows, difference_rows, overlap_rows, shared_rows
from sparsary.eval.circuits.comparison.scored_task import score_task
from sparsary.eval.circuits.known import siit
from sparsary.eval.circuits.known.siit import SHARING, TOLERANCE, distances_of, trained_together
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import jaccard
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.training.activations.model import LanguageModel

GOLDEN = Path(__file__).parents[3] / "golden" / "known" / "siit_x_three_ways.safetensors"


def trained(program, seed, max_steps):
    """Stands in for training, which takes a minute: the command is in the file's header."""
    config = siit.ToyConfig(2, 4, 32, 8, siit.LENGTH, program.d_vocab, len(program.circuits), d_mlp=64, activation="gelu")
    model = siit.ToyTransformer(config)
    model.load_state_dict(load_file(GOLDEN))
    return model


@pytest.fixture(scope="module")
def programs():
    """The circuits of three programs in one model, and their scored tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siit, "train_siit", trained)
        known = trained_together(n_pairs=48)
    space = NodeSpace(next(iter(known.values())).model, components(next(iter(known.values())).model))
    tasks = [
        score_task(
            name, "toy", space, one.pairs.take(slice(0, 24)), one.pairs.take(slice(24, 48)), METHODS["exact"](), pairs_number=at
        )
        for at, (name, one) in enumerate(known.items())
    ]
    return known, space, tasks


def truth(known, space):
    """The mask of a known circuit's nodes among heads and MLPs."""
    return known.node_labels("resample", [name.replace("/", ".h") for name in space.names()])


def test_the_trained_model_is_all_three_programs(programs):
    known, _, _ = programs
    assert max(distances_of(known["share"].module, SHARING, seed=7).values()) < 1.5 * TOLERANCE


def test_outputs_of_a_program_are_in_the_order_of_its_circuits():
    values = SHARING.outputs(torch.tensor([[0, 2, 1, 2]]), {})
    assert values[0].tolist() == [[0, 0, 0], [1, 0, 0.5], [0, 1, pytest.approx(1 / 3)], [1, 0, 0.5]]
    other = SHARING.outputs(torch.tensor([[0, 2, 1, 2]]), {"is_x": torch.tensor([[0.0, 0, 1, 1]])})
    assert other[0, :, 0].tolist() == [0, 0, 1, 1]
    assert other[0, :, 1].tolist() == [0, 0, 0, 1]


def test_programs_that_share_a_variable_share_its_unit(programs):
    known, space, tasks = programs
    circuits = {task.name: task.circuit(task.size) for task in tasks}
    for name, found in circuits.items():
        assert jaccard(found, truth(known[name], space)) == 1.0
    shared = truth(known["before"], space) & truth(known["share"], space)
    assert jaccard(circuits["before"] & circuits["share"], shared) == 1.0
    assert [name for name, member in zip(space.names(), shared, strict=True) if member] == ["m0"]
    assert [row["unit"] for row in shared_rows(tasks)] == ["m0"]


def test_the_shared_part_does_the_task_of_the_shared_variable_alone(programs):
    _, _, tasks = programs
    rows = {(row["circuit"], row["task"]): row for row in cross_rows(tasks, 4) if row["at"] == EQUAL}
    # The shared variable is an output too; whatever circuit holds it does that task, and it does no other task alone.
    for circuit in ("is_x", "before", "share"):
        assert rows[circuit, "is_x"]["faithfulness"] == pytest.approx(1.0, abs=0.05)
    assert rows["before", "share"]["faithfulness"] == pytest.approx(0.0, abs=0.05)
    assert rows["share", "before"]["faithfulness"] == pytest.approx(0.0, abs=0.05)
    is_x = tasks[0]
    intersection = tasks[1].circuit(2) & tasks[2].circuit(2)
    found = is_x.faithfulness(intersection)
    assert found.value == pytest.approx(1.0, abs=0.05)
    assert found.low <= found.value <= found.high


def test_overlaps_of_programs_have_their_ceiling_and_intervals(programs):
    _, _, tasks = programs
    row = next(row for row in overlap_rows(tasks) if (row["a"], row["b"], row["at"]) == ("before", "share", EQUAL))
    assert (row["size_a"], row["size_b"], row["shared"]) == (2, 2, 1)
    assert row["jaccard"] == pytest.approx(1 / 3, abs=1e-6)
    # Which units matter does not depend on the pairs.
    assert (row["jaccard_low"], row["jaccard_high"]) == pytest.approx((1 / 3, 1 / 3), abs=1e-6)
    assert row["ceiling"] == 1.0
    assert row["p_holm"] >= row["p"] > 0.05


@pytest.fixture(scope="module")
def neurons_of_embedded():
    model = LanguageModel.from_pretrained("embedded", device="cpu")
    space, tasks = NodeSpace(model, mlp_neurons(model)), []
    for number, name in enumerate(("agreement_pp", "agreement_across_rc", "greater_than")):
        pairs = make_pairs(name, model, 32)
        halves = pairs.take(slice(0, 16)), pairs.take(slice(16, 32))
        tasks.append(score_task(name, "embedded", space, *halves, METHODS["attribution"](), pairs_number=number))
    return tasks


def test_agreement_across_phrases_and_clauses_shares_neurons_and_years_do_not(neurons_of_embedded):
    rows = {(row["a"], row["b"]): row for row in overlap_rows(neurons_of_embedded) if row["at"] == EQUAL}
    alike, apart = rows["agreement_pp", "agreement_across_rc"], rows["agreement_pp", "greater_than"]
    assert alike["jaccard_low"] > apart["jaccard_high"]
    assert alike["jaccard_low"] > alike["floor_high"]
    assert alike["p_holm"] < 0.01
    assert alike["ceiling"] > alike["jaccard_halves"] > apart["jaccard_halves"]
    claims = {(row["a"], row["b"], row["c"]): row for row in difference_rows(neurons_of_embedded)}
    claim = claims["agreement_pp", "agreement_across_rc", "greater_than"]
    assert claim["difference_low"] > 0.2
    assert claim["p_holm"] < 0.01
