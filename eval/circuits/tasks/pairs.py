"""Prompt pairs: a clean prompt, a corrupted prompt of the same length, and questions about the next token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....sae.suggestions import require_choice

# Pairs per forward pass.
BATCH = 32
METRICS = ("logit_diff", "max_logit_diff", "prob_diff")


class Question(NamedTuple):
    """Token ids of ``answers`` and ``foils`` after ``position``; either may be empty, but not both."""

    position: int
    answers: tuple[int, ...]
    foils: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Pairs of one task. Shorter prompts are padded on the right; ``lengths`` exclude padding.

    ``corruption`` names the change, ``roles`` are named positions of each pair, if the task knows them.

    Metrics, per question, then averaged over a pair's questions:

    - ``logit_diff``: mean logit of the answers minus that of the foils;
    - ``max_logit_diff``: largest logit of the answers minus that of the foils;
    - ``prob_diff``: probability of the answers minus that of the foils.
    """

    task: str
    corruption: str
    clean: Int[Tensor, "pairs positions"]
    corrupted: Int[Tensor, "pairs positions"]
    questions: tuple[tuple[Question, ...], ...]
    lengths: Int[Tensor, " pairs"]
    metric: str = "logit_diff"
    roles: tuple[dict[str, int], ...] = ()

    def __post_init__(self) -> None:
        require_choice("metric", self.metric, METRICS)
        counts = {len(self.clean), len(self.corrupted), len(self.questions), len(self.lengths)}
        if len(counts) > 1 or self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"pairs: expected as many corrupted prompts, questions and lengths as clean prompts ({len(self.clean)}), got "
                f"{len(self.corrupted)}, {len(self.questions)} and {len(self.lengths)}."
            )
        for index, questions in enumerate(self.questions):
            end = int(self.lengths[index])
            if not questions or any(not 0 <= q.position < end or not (q.answers or q.foils) for q in questions):
                raise ValueError(
                    f"pairs: pair {index}: expected questions at positions 0 to {end - 1} with answers or foils, got "
                    f"{questions}."
                )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def equal(self) -> bool:
        """Return True if all prompts have one length, so that a position means the same in each."""
        return bool((self.lengths == self.clean.shape[1]).all())

    @property
    def valid(self) -> Bool[Tensor, "pairs positions"]:
        """Mask of positions that are not padding."""
        return torch.arange(self.clean.shape[1])[None] < self.lengths[:, None]

    def require_equal(self, what: str) -> None:
        """Raise ``ValueError``, listing the lengths, if prompts differ in length."""
        if not self.equal:
            lengths = ", ".join(
                f"{length} ({int((self.lengths == length).sum())})" for length in self.lengths.unique().tolist()
            )
            raise ValueError(
                f"{self.task}: {what} needs prompts of one length, so that positions correspond; got lengths (with numbers of "
                f"pairs) {lengths}. Give pairs of one length, or pool positions."
            )

    def take(self, rows: slice | Sequence[int] | Tensor) -> "PromptPairs":
        """Return some of the pairs, in the order of ``rows``; pairs may repeat."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        chosen = index.tolist()
        return replace(
            self,
            clean=self.clean[index],
            corrupted=self.corrupted[index],
            questions=tuple(self.questions[row] for row in chosen),
            lengths=self.lengths[index],
            roles=tuple(self.roles[row] for row in chosen) if self.roles else (),
        )

    def batches(self, size: int) -> Iterator["PromptPairs"]:
        """Yield all pairs in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def measure(self, logits: Float[Tensor, "pairs positions vocabulary"]) -> Float[Tensor, " pairs"]:
        """Return the metric of every pair, differentiable; higher favors the clean answer."""
        if self.metric == "max_logit_diff":
            return self.per_pair(self._leads(logits))
        asked = self._asked
        rows = self.asked_rows(logits)
        rows = rows.softmax(-1) if self.metric == "prob_diff" else rows
        rows = rows[:, : asked.signs.shape[1]]
        weights = asked.signs if self.metric == "prob_diff" else asked.means
        return self.per_pair((rows * weights.to(rows)).sum(-1))

    def right(self, logits: Float[Tensor, "pairs positions vocabulary"]) -> Float[Tensor, " pairs"]:
        """Return the share of each pair's questions whose best answer has a higher logit than the best foil."""
        return self.per_pair((self._leads(logits) > 0).to(logits.dtype))

    def _leads(self, logits: Float[Tensor, "pairs positions vocabulary"]) -> Float[Tensor, " questions"]:
        """Return the best answer's logit minus the best foil's, per question; a side without tokens counts as 0."""
        signs = self._asked.signs.to(logits.device)
        rows = self.asked_rows(logits)[:, : signs.shape[1]]
        answers = rows.masked_fill(signs <= 0, -torch.inf).amax(-1)
        foils = rows.masked_fill(signs >= 0, -torch.inf).amax(-1)
        return answers.masked_fill(answers.isinf(), 0.0) - foils.masked_fill(foils.isinf(), 0.0)

    def asked_rows(self, logits: Float[Tensor, "pairs positions vocabulary"]) -> Float[Tensor, "questions vocabulary"]:
        """Return the logits at the questions' positions, pair after pair."""
        return logits[self._asked.pair, self._asked.position]

    def per_pair(self, values: Float[Tensor, " questions"]) -> Float[Tensor, " pairs"]:
        """Return the mean over each pair's questions."""
        pair = self._asked.pair.to(values.device)
        counts = torch.bincount(pair, minlength=len(self)).to(values)
        return torch.zeros(len(self), dtype=values.dtype, device=values.device).index_add(0, pair, values) / counts

    @cached_property
    def _asked(self) -> "_Asked":
        flat = [(pair, question) for pair, questions in enumerate(self.questions) for question in questions]
        width = 1 + max((token for _, q in flat for token in (*q.answers, *q.foils)), default=0)
        signs, means = torch.zeros(len(flat), width), torch.zeros(len(flat), width)
        for row, (_, question) in enumerate(flat):
            for ids, sign in ((question.answers, 1.0), (question.foils, -1.0)):
                signs[row, list(ids)] = sign
                means[row, list(ids)] = sign / max(len(ids), 1)
        return _Asked(torch.tensor([pair for pair, _ in flat]), torch.tensor([q.position for _, q in flat]), signs, means)


class _Asked(NamedTuple):
    """All questions, flattened. ``signs`` is 1 at answers and -1 at foils; ``means`` averages over each question's tokens."""

    pair: Int[Tensor, " questions"]
    position: Int[Tensor, " questions"]
    signs: Float[Tensor, "questions tokens"]
    means: Float[Tensor, "questions tokens"]
