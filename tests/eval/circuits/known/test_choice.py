"""Transformer trained to answer multiple choice at two known heads: what is found of it.

A trained one lies in tests/golden/known, by the command in its header.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.eval.circuits import benchmark
from sparsary.eval.circuits.benchmark import CircuitSettings, circuits, head_rows
from sparsary.eval.circuits.heads.low_rank import HeadProjections
from sparsary.eval.circuits.heads.tables import head_tables
from sparsary.eval.circuits.known import ToyTransformer, node_names
from sparsary.eval.circuits.known.choice import (
    ACCURACY,
    INDEX,
    LETTER,
    Choices,
    accuracies_of,
    known_choice,
    train_choice,
    trained_choice,
)
from sparsary.eval.circuits.known.written_choice import SHAPES, ranks_needed, written_choice
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks.competence import competence
from sparsary.eval.pages.circuit_glossary import explanation
from sparsary.training.activations.model import LanguageModel

# Entries that name what they say.
NAMES = {"node", "heads", "part", "options", "ranks"}
GOLDEN = Path(__file__).parents[3] / "golden" / "known" / "siit_choice.safetensors"


@pytest.fixture(scope="module")
def known():
    choices = Choices(3)
    model = ToyTransformer(choices.config)
    model.load_state_dict(load_file(GOLDEN))
    return known_choice(choices, model, n_pairs=96, seed=3)


def test_the_program_looks_up_the_letter_of_what_is_asked():
    token_ids = torch.tensor([[0, 5, 9, 2, 6, 1, 11, 6]])
    assert Choices(3).run(token_ids, {}) == {"index": torch.tensor([1]), "letter": torch.tensor([2])}
    assert Choices(3).run(token_ids, {"index": torch.tensor([2])})["letter"] == 1


def test_prompts_have_distinct_letters_and_colors_and_corrupted_ones_ask_for_another(known):
    for row in Choices(4).draw(20, torch.Generator().manual_seed(0)).tolist():
        assert len(set(row[1:-1:2])) == len(set(row[2:-1:2])) == 4
        assert row[-1] in row[2:-1:2]
    changed = known.pairs.clean != known.pairs.corrupted
    assert changed.any(0).tolist() == [False] * 7 + [True]
    for row, roles in enumerate(known.pairs.roles):
        [question] = known.pairs.questions[row]
        assert known.pairs.clean[row, roles["right_label"]] == question.answers[0]
        assert tuple(int(known.pairs.clean[row, roles[f"other_label_{i}"]]) for i in (0, 1)) == question.foils


def test_a_trained_model_answers_by_its_two_heads_alone(known, brute):
    accuracies = accuracies_of(known.module, Choices(3), seed=7)
    together = {"others", f"{INDEX} and others", f"{LETTER} and others"}
    assert set(accuracies) == {"as it is", *node_names(known.config)[1:]} | together
    assert min(accuracies.values()) > 0.99
    assert competence(known.model, known.pairs).accuracy > 0.99
    nodes = brute(replace(known, pairs=known.pairs.take(slice(0, 16))), "resample", "nodes")
    assert known.nodes["resample"] == {"embed", INDEX, LETTER}
    assert roc_auc(nodes.alone(), nodes.truth()) == 1.0


@torch.no_grad()
def test_two_heads_that_stand_in_for_each_other_show_only_together(known):
    """A second way to the answer, of two copies of the circuit's last head, which hold when it is patched."""
    model = ToyTransformer(known.config)
    model.load_state_dict(known.module.state_dict())
    attention, own = model.attention(1), slice(16, 24)
    for copy in (slice(8, 16), slice(24, 32)):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[copy], projection.bias[copy] = projection.weight[own], projection.bias[own]
        attention.o_proj.weight[:, copy] = attention.o_proj.weight[:, own]
    accuracies = accuracies_of(model, Choices(3), seed=7)
    assert accuracies["a1.h1"] > 0.9
    assert accuracies["a1.h3"] > 0.9
    assert accuracies["others"] < 0.7


def test_the_head_of_the_letter_has_the_direct_effect_and_attends_to_the_right_label(known):
    chosen, judged = known.pairs.take(slice(0, 48)), known.pairs.take(slice(48, 96))
    rows, ranks = head_tables(known.model, chosen, judged, seed=0)
    assert rows[0]["node"] == LETTER
    assert rows[0]["direct_share"] > 0.8
    assert rows[0]["attends"] == "right label"
    # The head of the index writes nothing that the unembedding reads.
    assert abs(next(row for row in rows if row["node"] == INDEX)["direct_share"]) < 0.1
    assert [row["part"] for row in ranks] == ["q", "k", "v"]
    assert all(row["heads"] == [LETTER] and row["options"] == 3 for row in ranks)


def test_this_trained_model_needs_options_less_one_directions(known):
    """Not all do: three scores of which attention picks the largest can also be told apart along a line."""
    chosen, judged = known.pairs.take(slice(0, 48)), known.pairs.take(slice(48, 96))
    projections = HeadProjections(known.model, [(1, 2)], chosen)
    for part in "qk":
        curve = projections.curve(part, judged, ranks=[0, 1, 2, 8])
        assert curve.full == curve.accuracy[-1] > 0.99
        assert curve.needed == 2
        assert curve.random[1] < 0.9
    # The queries of the other head say which of six colors is asked for.
    asked = HeadProjections(known.model, [(0, 1)], chosen).curve("q", judged, ranks=[0, 1, 2, 3, 4, 5, 8])
    assert asked.needed > 3
    assert asked.accuracy[1] < 0.7


@pytest.mark.parametrize("options", [3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rank_test_finds_the_directions_of_handwritten_heads(shape, options):
    written = written_choice(options, shape, n_pairs=192, seed=options)
    chosen, judged = written.pairs.take(slice(0, 96)), written.pairs.take(slice(96, 192))
    assert min(accuracies_of(written.module, Choices(options), seed=1, n_prompts=128).values()) == 1.0
    projections = HeadProjections(written.model, [(1, 2)], chosen)
    for part, rank in ranks_needed(shape, options).items():
        assert projections.curve(part, judged, [rank - 1, rank, 8]).needed == rank


def test_the_handwritten_circuit_is_exact(check_truth):
    check_truth(written_choice(4, n_pairs=3), floor=1e-2)


def test_shapes_and_options_that_cannot_be_written_are_refused():
    with pytest.raises(ValueError, match="shape: expected one of contrasts, circle, line, got 'cube'"):
        written_choice(3, "cube")
    with pytest.raises(ValueError, match="options: expected 3 to 5, as two options on a circle are a line, got 2"):
        written_choice(2, "circle")


def test_too_few_steps_or_letters_are_refused():
    with pytest.raises(
        ValueError, match=r"max_steps: multiple choice is not yet learnt after 1 steps: .*\(a1.h2\).* Give more"
    ):
        train_choice(Choices(3), seed=0, max_steps=1)
    with pytest.raises(ValueError, match="options: expected 2 to 5, as there are 5 letters, got 6"):
        trained_choice(6)


def test_training_makes_the_program():
    known = trained_choice(n_pairs=64, seed=1)
    assert min(accuracies_of(known.module, Choices(3), seed=9).values()) > ACCURACY - 0.01


def test_the_command_s_page_shows_heads_and_ranks(known, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "make_pairs", lambda *_: known.pairs.take(slice(0, 48)))
    settings = CircuitSettings(tasks=("siit_choice",), methods=("exact",), units=("components",), heads=True)
    found = circuits((), settings, tmp_path, model=LanguageModel(known.module, None, "known", None))
    assert found["head_effects"][0]["node"] == LETTER
    assert {row["part"]: row["rank_needed"] <= 2 for row in found["head_ranks"]} == {"q": True, "k": True, "v": True}
    page = (tmp_path / "circuits.html").read_text(encoding="utf-8")
    assert "Direct effects on the answer" in page
    assert page.count("right label</td>") == sum(row.get("attends") == "right label" for row in found["head_effects"])
    assert "least rank with 95 % of the accuracy, 1" in page
    effects, ranks = head_rows(found)
    assert effects[1][0][:2] == ["siit_choice", LETTER]
    assert ranks[1][0][:3] == ["siit_choice", LETTER, "q"]
    for key in {key for row in (*found["head_effects"], *found["head_ranks"]) for key in row} - NAMES:
        assert explanation(key)
