"""What a circuit task is: in which languages it exists, how it can be corrupted, and how its examples become pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ....training.activations.model import LanguageModel
from .pairs import PromptPairs, Question
from .reader import PromptEncoder

# How many draws in a row may repeat what is there before a task counts as exhausted.
REPEATS = 1000


class Corruption(NamedTuple):
    """A way to corrupt a prompt, and what the corrupted prompt says about the clean one's answers.

    ``flips``: it is right to answer with a foil. ``removes``: it no longer singles out the answers. ``keeps``: they are still
    right.
    """

    name: str
    effect: Literal["flips", "removes", "keeps"]
    what: str


class Example(NamedTuple):
    """One pair as token ids; ``roles`` are named positions of the clean prompt."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    questions: tuple[Question, ...]
    roles: dict[str, int]


class Request(NamedTuple):
    """What is asked of a task's generator."""

    reader: PromptEncoder
    corruption: str
    seed: int
    split: str


@dataclass(frozen=True)
class Variant:
    """A task in one language: an endless stream of examples, repeats among them. The first corruption is the default."""

    corruptions: tuple[Corruption, ...]
    metric: str
    draw: Callable[[Request], Iterator[Example]]


@dataclass(frozen=True)
class CircuitTask:
    """A task by name: on the embedded model, and on models that read English; it may lack one of them."""

    name: str
    what: str
    embedded: Variant | None = None
    english: Variant | None = None

    def variant(self, model: LanguageModel) -> Variant | None:
        """The task in the language the model reads, if it exists there."""
        return self.embedded if model.id == "embedded" else self.english


def distinct(examples: Iterator[Example], n: int, task: str) -> list[Example]:
    """The first ``n`` examples that differ in their clean prompt or in what is asked.

    Raises:
        ValueError: If the stream ends or goes on repeating itself before there are so many.
    """
    found: dict[tuple, Example] = {}
    repeats = 0
    for example in examples:
        key = example.clean, tuple((question.position, question.answers) for question in example.questions)
        repeats = repeats + 1 if key in found else 0
        found.setdefault(key, example)
        if len(found) == n or repeats == REPEATS:
            break
    if len(found) < n:
        raise ValueError(
            f"n: {task} has only about {len(found)} different pairs here, got n = {n}. Ask for fewer, or split='all'."
        )
    return list(found.values())


def same_length(examples: Iterator[Example], n: int) -> Iterator[Example]:
    """Those of the commonest length among the first ``n``, and of the same length from then on."""
    first = [example for _, example in zip(range(n), examples, strict=False)]
    counts: dict[int, int] = {}
    for example in first:
        counts[len(example.clean)] = counts.get(len(example.clean), 0) + 1
    length = max(counts, key=lambda one: (counts[one], -one))
    yield from (example for example in first if len(example.clean) == length)
    yield from (example for example in examples if len(example.clean) == length)


def with_subject_end(roles: dict[str, int]) -> dict[str, int]:
    """Roles with the position after the first mention of the subject, where previous-token heads of the IOI circuit write."""
    return roles | {"S1+1": roles["S1"] + 1} if "S1" in roles else roles


def assemble(examples: list[Example], task: str, corruption: str, metric: str) -> PromptPairs:
    """Pairs of examples; shorter ones are padded on the right with token 0, which causal models never look at."""
    lengths = torch.tensor([len(example.clean) for example in examples])
    clean, corrupted = torch.zeros((2, len(examples), int(lengths.max())), dtype=torch.long)
    for row, example in enumerate(examples):
        assert len(example.clean) == len(example.corrupted)
        clean[row, : lengths[row]] = torch.tensor(example.clean)
        corrupted[row, : lengths[row]] = torch.tensor(example.corrupted)
    questions = tuple(example.questions for example in examples)
    roles = tuple(example.roles for example in examples) if any(example.roles for example in examples) else ()
    return PromptPairs(task, corruption, clean, corrupted, questions, lengths, metric, roles)
