"""Circuit tasks: their languages and corruptions, and the conversion of examples to pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ....training.activations.model import LanguageModel
from .pairs import PromptPairs, Question
from .reader import PromptEncoder

# Number of repeated draws in a row after which a task counts as exhausted.
REPEATS = 1000


class Corruption(NamedTuple):
    """Corruption of a prompt, and its effect on the clean prompt's answers.

    ``flips``: a foil becomes the right answer. ``removes``: the prompt no longer determines the answers. ``keeps``: the answers
    stay right.
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
    """Request for examples from a task's generator."""

    reader: PromptEncoder
    corruption: str
    seed: int
    split: str


@dataclass(frozen=True)
class Variant:
    """Task in one language: an endless stream of examples, with repeats. The first corruption is the default.

    ``with_options`` makes the same task with another number of options; None if it has none.
    """

    corruptions: tuple[Corruption, ...]
    metric: str
    draw: Callable[[Request], Iterator[Example]]
    with_options: "Callable[[int], Variant] | None" = None


@dataclass(frozen=True)
class CircuitTask:
    """Task by name: for the embedded model, and for models that read English; one of them may be missing."""

    name: str
    what: str
    embedded: Variant | None = None
    english: Variant | None = None

    def variant(self, model: LanguageModel) -> Variant | None:
        """Return the task in the language that the model reads, or None."""
        return self.embedded if model.id == "embedded" else self.english


def distinct(examples: Iterator[Example], n: int, task: str) -> list[Example]:
    """Return the first ``n`` examples that differ in their clean prompt or their questions.

    Raises:
        ValueError: If the stream ends, or only repeats itself, before there are ``n``.
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
            f"n: expected at most about {len(found)}, the distinct pairs of {task} for this model, got {n}. Lower n, or use "
            "split='all'."
        )
    return list(found.values())


def same_length(examples: Iterator[Example], n: int) -> Iterator[Example]:
    """Yield examples of the most common length among the first ``n``: these first, then later ones."""
    first = [example for _, example in zip(range(n), examples, strict=False)]
    counts: dict[int, int] = {}
    for example in first:
        counts[len(example.clean)] = counts.get(len(example.clean), 0) + 1
    length = max(counts, key=lambda one: (counts[one], -one))
    yield from (example for example in first if len(example.clean) == length)
    yield from (example for example in examples if len(example.clean) == length)


def with_subject_end(roles: dict[str, int]) -> dict[str, int]:
    """Add the position after the subject's first mention, where previous-token heads of the IOI circuit write."""
    return roles | {"S1+1": roles["S1"] + 1} if "S1" in roles else roles


def assemble(examples: list[Example], task: str, corruption: str, metric: str) -> PromptPairs:
    """Return examples as pairs; shorter ones are padded on the right with token 0, which causal models never attend to."""
    lengths = torch.tensor([len(example.clean) for example in examples])
    clean, corrupted = torch.zeros((2, len(examples), int(lengths.max())), dtype=torch.long)
    for row, example in enumerate(examples):
        assert len(example.clean) == len(example.corrupted)
        clean[row, : lengths[row]] = torch.tensor(example.clean)
        corrupted[row, : lengths[row]] = torch.tensor(example.corrupted)
    questions = tuple(example.questions for example in examples)
    roles = tuple(example.roles for example in examples) if any(example.roles for example in examples) else ()
    return PromptPairs(task, corruption, clean, corrupted, questions, lengths, metric, roles)
