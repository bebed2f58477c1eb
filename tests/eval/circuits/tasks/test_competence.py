"""Whether a model does a task: the figures by hand, and what is refused."""

import dataclasses
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from sparsary.eval.circuits.tasks import competence, require_solved
from sparsary.eval.circuits.tasks.competence import wilson
from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question
from sparsary.training.activations.model import LanguageModel

# Logits of tokens 0, 1 and 2 after each token: the answer 0 leads by 3, by 1, and is behind by 2.
TABLE = [[3.0, 0.0, -1.0], [1.0, 0.0, 0.5], [0.0, 2.0, -3.0]]


class Table(torch.nn.Module):
    """Logits after a token are a row of a table."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor(TABLE))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.rows[input_ids])


@pytest.fixture
def model():
    return LanguageModel(Table(), None, "table", None)


def pairs_of(clean, corrupted, foils=(1,)):
    questions = tuple((Question(0, (0,), tuple(foils)),) for _ in clean)
    ids = (torch.tensor(one)[:, None] for one in (clean, corrupted))
    return PromptPairs("toy", "swapped", *ids, questions, torch.ones(len(clean), dtype=torch.long))


def test_figures_are_those_worked_out_by_hand(model):
    found = competence(model, pairs_of([0, 0, 1, 2], [2, 1, 2, 2]), batch_size=3)
    assert (found.task, found.corruption, found.metric, found.pairs) == ("toy", "swapped", "logit_diff", 4)
    assert (found.accuracy, found.chance) == (0.75, 0.5)
    # Leads of 3, 3, 1, -2 on clean prompts and -2, 1, -2, -2 on corrupted ones: differences of 5, 2, 3, 0.
    assert found.clean == pytest.approx(1.25)
    assert found.corrupted == pytest.approx(-1.25)
    assert found.difference == pytest.approx(2.5)
    assert found.difference_error == pytest.approx(math.sqrt((6.25 + 0.25 + 0.25 + 6.25) / 3 / 4))
    assert found.clean_error == pytest.approx(math.sqrt((2 * 1.75**2 + 0.25**2 + 3.25**2) / 3 / 4))


def test_the_interval_is_wilson_s():
    for right, n in ((9, 10), (0, 7), (50, 50), (31, 50)):
        known = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((known.low, known.high), abs=1e-6)


def test_chance_falls_with_the_number_of_foils(model):
    assert competence(model, pairs_of([0, 1], [2, 2], foils=(1, 2))).chance == pytest.approx(1 / 3)


def test_differences_are_of_pairs(model):
    # Clean and corrupted prompts vary as much as each other, and together: what they differ by is certain.
    found = competence(model, pairs_of([0, 1, 0, 1] * 5, [1, 2, 1, 2] * 5))
    assert found.difference_error < 0.6 * found.clean_error
    assert not found.noise


def test_ratios_are_refused_where_the_metric_does_not_move(model):
    found = competence(model, pairs_of([0, 1, 2, 0] * 4, [1, 0, 0, 2] * 4))
    assert abs(found.difference) < 2 * found.difference_error
    with pytest.raises(ValueError, match=r"toy: expected logit_diff to differ between clean prompts and swapped, .* noise"):
        require_solved(found)
    with pytest.raises(ValueError, match=r"noise"):
        found.require_signal()
    # One pair says nothing about noise; the same prompt twice does.
    with pytest.raises(ValueError, match=r"noise"):
        competence(model, pairs_of([0], [2])).require_signal()
    with pytest.raises(ValueError, match=r"noise"):
        competence(model, pairs_of([0, 1], [0, 1])).require_signal()


def test_a_negative_difference_is_one_too(model):
    competence(model, pairs_of([2] * 9 + [1], [0] * 10)).require_signal()


@pytest.mark.parametrize(
    ("clean", "warned"),
    [([0] * 30, False), ([0, 2] * 15, True), ([0] * 17 + [2] * 13, True), ([2] * 30, True), ([0] * 22 + [2] * 8, False)],
)
def test_a_model_at_chance_or_below_is_warned_of(model, caplog, clean, warned):
    found = competence(model, pairs_of(clean, [1 if token == 0 else 0 for token in clean]))
    found = dataclasses.replace(found, difference=9.0, difference_error=1.0)
    with caplog.at_level(logging.WARNING):
        require_solved(found)
    assert found.at_chance is warned
    assert (f"accuracy {found.accuracy:.3f}" in caplog.text) is warned
