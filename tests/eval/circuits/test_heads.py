"""Heads of a task: direct effects that sum to the logit, attention to labels, and rank tests."""

from dataclasses import replace

import pytest
import torch

from sparsary.eval.circuits.heads.direct_effects import attends, direct_effects, label_places
from sparsary.eval.circuits.heads.low_rank import HeadProjections, Subspace
from sparsary.eval.circuits.heads.tables import effect_rows, head_tables, strongest_heads
from sparsary.eval.circuits.tasks.pairs import Question
from sparsary.training.activations.architecture import Architecture


@pytest.fixture(scope="module")
def labelled(random_pairs):
    """Pairs of three labels at positions 1 to 4, of which the right one is another each time; one is shorter."""
    pairs = random_pairs(n=9, lengths=[6, 5, 6, 6, 6, 6, 5, 6, 6])
    questions, roles = [], []
    for row, (question,) in enumerate(pairs.questions):
        questions.append((Question(question.position, (3 + row % 3,), tuple({3, 4, 5} - {3 + row % 3})),))
        others = [place for place in (1, 2, 4) if place != (1, 2, 4)[row % 3]]
        roles.append({"right_label": (1, 2, 4)[row % 3], "other_label_0": others[0], "other_label_1": others[1]})
    return replace(pairs, questions=tuple(questions), roles=tuple(roles))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_direct_effects_of_all_nodes_sum_to_the_centred_logit(tiny_model, labelled, family):
    model = tiny_model(family)
    found = direct_effects(model, labelled)
    assert found.nodes[-1] == "biases"
    assert len(found.nodes) == 1 + 3 * (len(found.heads) // 3 + 1) + 1
    torch.testing.assert_close(found.direct.sum(1).double(), found.logit.double(), rtol=1e-4, atol=1e-5)
    logits = model.logits(labelled.clean)
    for row, (question,) in enumerate(labelled.questions):
        own = logits[row, question.position]
        assert found.logit[row] == pytest.approx(float(own[list(question.answers)].mean() - own[3:6].mean()), rel=1e-4)


def test_attention_is_that_from_the_question_to_each_label(tiny_model, labelled):
    model = tiny_model("gpt2")
    found, trace = direct_effects(model, labelled), Architecture(model).trace(labelled.clean)
    assert found.heads[3] == "a1.h1"
    for row, (question,) in enumerate(labelled.questions):
        expected = trace.layers[1].pattern[row, 1, question.position, [1, 2, 4]]
        torch.testing.assert_close(found.attention[row, 3], expected)
    assert found.right.tolist() == [0, 1, 2] * 3
    rows = {row["node"]: row for row in effect_rows(found)}
    right = found.attention[torch.arange(9), :, found.right]
    assert rows["a1.h1"]["attention_right"] == pytest.approx(float(right[:, 3].mean()))
    assert rows["a1.h1"]["attention_others"] == pytest.approx(float((found.attention.sum(2) - right)[:, 3].mean()))
    assert "attends" not in rows["m0"]
    assert rows["m0"]["direct_low"] < rows["m0"]["direct"] < rows["m0"]["direct_high"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9]], "right label"),
        ([[0.7, 0.1, 0.1]] * 3, "one place"),
        ([[0.3, 0.3, 0.3]] * 3, "all labels"),
        ([[0.4, 0, 0], [0, 0.4, 0], [0, 0, 0.4]], "elsewhere"),
    ],
)
def test_heads_are_classed_by_where_they_attend(weights, expected):
    assert attends(torch.tensor(weights), torch.tensor([0, 1, 2])) == expected


def test_pairs_without_labels_have_direct_effects_only(tiny_model, random_pairs):
    pairs = random_pairs(n=4)
    assert label_places(pairs) is None
    rows, ranks = head_tables(tiny_model("gpt2"), pairs, pairs, seed=0)
    assert ranks == []
    assert {"direct", "direct_share"} <= rows[0].keys()
    assert "attention_right" not in rows[0]
    with pytest.raises(ValueError, match="expected pairs of multiple choice"):
        HeadProjections(tiny_model("gpt2"), [(0, 0)], pairs)


def test_several_questions_are_refused(tiny_model, labelled):
    two = replace(labelled, questions=tuple((*questions, *questions) for questions in labelled.questions))
    with pytest.raises(ValueError, match="--heads: expected one question"):
        direct_effects(tiny_model("gpt2"), two)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_vectors_of_one_head_are_replaced_at_their_places_only(tiny_model, labelled, family, part):
    """With one direction, against the same replacement written out; with all directions nothing changes."""
    model = tiny_model(family)
    projections = HeadProjections(model, [(1, 1)], labelled)
    place = projections.anatomy.head_inputs(1)[part]
    space = projections.fitted[part][0]
    gram = space.directions @ space.directions.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    ids, ends = labelled.clean, labelled.lengths - 1
    seen = []

    def by_hand(x):
        seen.append(x.clone())
        changed = x.clone()
        for row in range(len(x)):
            for at in [int(ends[row])] if part == "q" else [1, 2, 4]:
                own = place.of(changed)[row, at, 1]
                along = (own - space.mean.to(own)) @ space.directions[0].to(own)
                own.copy_(space.mean.to(own) + along * space.directions[0].to(own))
        return changed

    with projections.model.replacing(place.hook, by_hand):
        expected = projections.model.logits(ids)
    with projections._projected(part, labelled, [space], 1):
        torch.testing.assert_close(projections.model.logits(ids), expected, rtol=1e-5, atol=1e-6)
    with projections._projected(part, labelled, [space], len(gram)):
        torch.testing.assert_close(projections.model.logits(ids), model.logits(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model.logits(ids), rtol=1e-4, atol=1e-5)
    rows = torch.arange(9)[:, None]
    vectors = place.of(seen[0])[rows, ends[:, None] if part == "q" else torch.tensor([[1, 2, 4]]), 1].flatten(0, 1)
    torch.testing.assert_close(space.mean.double(), vectors.mean(0), rtol=1e-4, atol=1e-6)


def test_a_projection_keeps_the_mean_and_the_part_in_the_directions():
    space = Subspace(torch.tensor([1.0, 1, 1]), torch.eye(3)[[2, 0, 1]])
    x = torch.tensor([[2.0, 3, 4]])
    assert space.project(x, 0).tolist() == [[1, 1, 1]]
    assert space.project(x, 1).tolist() == [[1, 1, 4]]
    assert space.project(x, 3).tolist() == [[2, 3, 4]]


def test_the_strongest_heads_make_up_most_of_the_positive_effect(tiny_model, labelled):
    found = direct_effects(tiny_model("gpt2"), labelled)
    means = torch.zeros(len(found.nodes))
    for node, value in {"a0.h1": 5.0, "a2.h0": 3.0, "a1.h0": 1.0, "a1.h1": -7.0, "m1": 90.0}.items():
        means[found.nodes.index(node)] = value
    assert strongest_heads(replace(found, direct=means.expand(9, -1))) == [(0, 1), (2, 0)]
