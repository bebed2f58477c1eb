"""Edge Pruning: masks that are what their formulas say, and circuits that are known, edge by edge."""

import math

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN
from sparsary.eval.circuits.methods.edge_pruning import EdgePruning, chance_kept, kept_units, sample_mask
from sparsary.eval.circuits.scoring.edge_circuits import node_scores
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.units.ablation import divergence
from sparsary.eval.circuits.units.edges import EdgeSpace
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace


def test_masks_are_hard_concrete():
    logits = torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0]).expand(5000, -1)
    drawn = sample_mask(logits, torch.Generator().manual_seed(0))
    assert drawn.min() == 0
    assert drawn.max() == 1
    torch.testing.assert_close((drawn > 0).float().mean(0), chance_kept(logits[0]), atol=0.02, rtol=0)
    # By hand: not 0 where the stretched sigmoid is above 0.1 / 1.2, and of what it is made of so much is above.
    edge = 2 / 3 * math.log((0.1 / 1.2) / (1 - 0.1 / 1.2))
    assert chance_kept(logits[0])[3].item() == pytest.approx(1 - 1 / (1 + math.exp(-(edge - 2.0))), abs=1e-6)


def test_gradients_flow_to_masks_that_are_between_0_and_1():
    logits = torch.zeros(1000, requires_grad=True)
    drawn = sample_mask(logits, torch.Generator().manual_seed(0))
    drawn.sum().backward()
    assert logits.grad is not None
    between = (drawn > 0) & (drawn < 1)
    assert 0 < int(between.sum()) < 1000
    assert torch.equal(logits.grad > 0, between)


def test_a_circuit_has_as_many_units_as_the_mask_keeps_on_average():
    logits = torch.tensor([5.0, -8.0, 0.3, -0.2, 9.0, -0.1, -7.0])
    expected = round(float(chance_kept(logits).sum()))
    kept = kept_units(logits)
    assert int(kept.sum()) == expected == 4
    assert kept.nonzero().flatten().tolist() == [0, 2, 4, 5]
    assert not kept_units(torch.full((6,), -20.0)).any()
    assert kept_units(torch.full((6,), 20.0)).all()


@pytest.mark.parametrize("name", ["and_gate", "induction", "fraction", "reverse"])
def test_known_circuits_are_found_edge_by_edge(name):
    known = KNOWN[name]()
    space = EdgeSpace(known.model)
    loss = "metric" if known.config.d_vocab_out == 1 else "kl"
    scores = EdgePruning(loss=loss).discover(space, known.pairs)
    edges = known.edge_labels("resample", space.names())
    assert roc_auc(scores.values, edges) == 1.0
    assert roc_auc(node_scores(space.edges, scores.values), known.node_labels("resample", space.edges.senders)) == 1.0
    assert torch.equal(kept_units(scores.values), edges)


def test_of_an_or_one_way_is_kept_and_does_what_the_model_does():
    known = KNOWN["or_gate"]()
    space = EdgeSpace(known.model)
    kept = kept_units(EdgePruning().discover(space, known.pairs).values)
    edges = known.edge_labels("resample", space.names())
    assert int(kept.sum()) == int((kept & edges).sum()) == 3 < int(edges.sum())
    logits, (_, filler) = known.model.run(known.pairs.clean), space.see(known.pairs.corrupted)
    left = divergence(known.pairs, logits, space.run(known.pairs.clean, kept, filler)).mean()
    gone = divergence(known.pairs, logits, space.run(known.pairs.clean, torch.zeros(space.size), filler)).mean()
    assert left < 1e-6 < 0.01 < gone


def test_a_target_that_rises_slowly_is_held():
    known = KNOWN["induction"](n_pairs=4)
    space = EdgeSpace(known.model)
    # Multipliers that learn fast put the target before the loss.
    scores = EdgePruning(target=0.5, multiplier_lr=0.8, ramp=5 / 6).discover(space, known.pairs)
    assert float(chance_kept(scores.values).mean()) == pytest.approx(0.5, abs=0.05)


def test_nodes_are_pruned_like_edges_and_passes_counted():
    known = KNOWN["and_gate"](n_pairs=8)
    width = known.config.d_model
    parts = [Coordinates("heads", "h.0.attn.o_proj:in", 4, 1), Coordinates("mlp", "h.0.mlp:out", width, width)]
    space, passes = NodeSpace(known.model, parts), []
    handle = space.model.module.register_forward_hook(lambda *_: passes.append(1))
    scores = EdgePruning(steps=120).discover(space, known.pairs)
    handle.remove()
    assert kept_units(scores.values).tolist() == [False, True, False, True, True]
    # The model on both prompts, once as all pairs are one batch; then one circuit a step.
    assert (scores.cost.forwards, scores.cost.backwards) == (len(passes), 120) == (122, 120)
    assert EdgePruning(steps=2, batch=4).discover(space, known.pairs).cost.forwards == 6


def test_the_same_seed_gives_the_same_mask():
    known = KNOWN["and_gate"](n_pairs=8)
    space = EdgeSpace(known.model)
    one, same, other = (EdgePruning(steps=5, batch=4, seed=seed).discover(space, known.pairs).values for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="loss: expected one of kl, metric, got 'mse'"):
        EdgePruning(loss="mse")
    with pytest.raises(ValueError, match="steps, ramp: expected"):
        EdgePruning(ramp=0.0)
    known = KNOWN["fraction"]()
    with pytest.raises(ValueError, match="Use loss: metric"):
        EdgePruning().discover(EdgeSpace(known.model), known.pairs)
