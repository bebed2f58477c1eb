"""Random circuits of equal counts per hook: how they are drawn, and the floor that the best of many sets."""

import numpy as np
import pytest
import torch

from sparsary.eval.circuits import benchmark
from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.known.compiled import program
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import Trials, curve, ranked
from sparsary.eval.circuits.scoring.random_circuits import floor_curve, random_circuits
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.edges import EdgeSpace
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.sae import ENCODERS, SAE

GROUPS = {"a": slice(0, 10), "b": slice(10, 13), "c": slice(13, 20)}


def test_they_have_as_many_units_in_every_group_and_only_those_allowed():
    kept, among = torch.zeros(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)
    kept[[0, 1, 2, 10, 19]] = True
    among[[3, 4, 11, 15]] = False
    drawn = random_circuits(kept, GROUPS, 50, seed=1, among=among)
    for mask in drawn:
        assert [int(mask[group].sum()) for group in GROUPS.values()] == [3, 1, 1]
        assert not (mask & ~among).any()
    # Every unit that is allowed is drawn at times, and a seed repeats the draw.
    assert torch.equal(torch.stack(drawn).any(0), among)
    assert all(torch.equal(a, b) for a, b in zip(drawn, random_circuits(kept, GROUPS, 50, 1, among), strict=True))


def test_of_a_compiled_program_the_best_of_a_hundred_is_below_the_circuit(shared_data):
    known = program("tracr_detect_abc", shared_data / "models" / "toy" / "tracr_detect_abc", n_pairs=4)
    space = EdgeSpace(known.model)
    fill = ablation_values(space, "resample", known.pairs)
    trials = Trials(space, known.pairs, fill)
    truth = known.edge_labels("resample", space.names())
    # The edges of the program first; the others in any order.
    order = torch.cat([truth.nonzero().flatten(), (~truth).nonzero().flatten()])
    size = int(truth.sum())
    sizes = [size, (size + space.size // 2) // 2]
    assert size < space.size // 2
    found = curve(trials, order, sizes, complements=()).faithfulness()
    floor = floor_curve(trials, order, sizes, 100, seed=0)
    assert found == pytest.approx(1, abs=0.02)
    assert (floor.best < found - 0.05).all()
    assert (floor.mean <= floor.best).all()


def test_the_best_of_more_draws_is_no_worse_and_the_first_ones_are_the_same(embedded_model, some_pairs):
    space, pairs = NodeSpace(embedded_model, components(embedded_model)), some_pairs(4)
    trials = Trials(space, pairs, ablation_values(space, "resample", pairs))
    order = ranked(METHODS["attribution"]().discover(space, pairs))
    one, ten = (floor_curve(trials, order, [4, 10], n, seed=3) for n in (1, 10))
    assert one.mean.tolist() == one.best.tolist()
    assert (ten.best >= one.best).all()
    assert np.isfinite(ten.mean).all()


def test_a_benchmark_draws_them_into_its_page(tmp_path, monkeypatch):
    torch.manual_seed(0)
    hook = "transformer.h.1:out"
    SAE(128, 24, ENCODERS["topk"](k=4)).save(tmp_path / "sae", {"model": {"id": "embedded"}, "hook": hook})

    def few(model, several, token_ids, seed, wanted):
        return {"heads and MLPs": NodeSpace(model, components(model))}

    monkeypatch.setattr(benchmark, "spaces", few)
    settings = {"tasks": ("agreement_simple",), "methods": ("attribution",), "pairs": 8}
    plain = benchmark.circuits([str(tmp_path / "sae")], benchmark.CircuitSettings(**settings), tmp_path / "plain")
    assert "floor" not in plain["curves"][0]
    found = benchmark.circuits(
        [str(tmp_path / "sae")], benchmark.CircuitSettings(**settings, random_circuits=3), tmp_path / "out"
    )
    (entry,) = found["curves"]
    assert len(entry["floor"]) == len(entry["floor_best"]) == len(entry["sizes"])
    # Nothing and everything have no choice.
    assert entry["floor_best"][-1] == pytest.approx(1)
    known = [(mean, best) for mean, best in zip(entry["floor"], entry["floor_best"], strict=True) if mean is not None]
    assert all(mean <= best + 1e-6 for mean, best in known)
    page = (tmp_path / "out" / "circuits.html").read_text(encoding="utf-8")
    assert "best of the random circuits" in page
    assert "--random-circuits 3" in page
    with pytest.raises(ValueError, match=r"--random-circuits: expected 0 or more, got -1"):
        benchmark.CircuitSettings(**settings, random_circuits=-1)
