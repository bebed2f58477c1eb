"""English prompts from templates, filled in with single-token words, once clean and once corrupted."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from string import Formatter
from typing import Any, NamedTuple

from ..pairs import Question
from ..reader import PromptEncoder
from ..task import Corruption, Example, Request, Variant, with_subject_end

# Maximum number of words in an error.
LISTED = 30


class Filled(NamedTuple):
    """Fields of a template for both prompts; a field's name is the role of its word.

    Answers and foils are text that continues the prompt, or token ids if a specific token is meant.
    """

    template: str
    clean: dict[str, str]
    changes: dict[str, str]
    answers: tuple[str | int, ...]
    foils: tuple[str | int, ...]


class SingleTokenWords:
    """Words that a tokenizer encodes as single tokens, after a space."""

    def __init__(self, reader: PromptEncoder, task: str):
        self.reader, self.task = reader, task
        self.known: dict[str, Any] = {}

    def single(self, what: str, words: Sequence[str], at_least: int = 2) -> list[str]:
        """Return the ``words`` that are one token, in order; ``what`` names them in errors and in the cache.

        Raises:
            ValueError: If there are fewer than ``at_least``; words of several tokens are listed.
        """
        if what not in self.known:
            self.known[what] = [word for word in words if self._is_one(word)]
            self.require(what, self.known[what], [word for word in words if word not in self.known[what]], at_least)
        return self.known[what]

    def pairs(self, what: str, pairs: Sequence[tuple[str, str]], at_least: int = 2) -> list[tuple[str, str]]:
        """Return the pairs whose words are both one token.

        Raises:
            ValueError: Like ``single``.
        """
        if what not in self.known:
            self.known[what] = [pair for pair in pairs if all(self._is_one(word) for word in pair)]
            bad = [word for pair in pairs for word in pair if not self._is_one(word)]
            self.require(what, self.known[what], bad, at_least)
        return self.known[what]

    def other(self, random: Random, words: Sequence[str], *but: str) -> str:
        """Return a random word other than ``but``."""
        return random.choice([word for word in words if word not in but])

    def _is_one(self, word: str) -> bool:
        # Checked after a word, as tokenizers treat the beginning of a text differently.
        return self.reader.next_token("The", f" {word}") is not None

    def require(self, what: str, known: list, bad: list[str], at_least: int) -> None:
        if len(known) < at_least:
            listed = ", ".join(bad[:LISTED]) + (f" and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
            raise ValueError(
                f"{self.task}: expected at least {at_least} {what} that are one token each, got {len(known)}; several tokens "
                f"or unknown: {listed}. Choose another task for this tokenizer, or give pairs in a file."
            )


def from_templates(
    task: str,
    corruptions: tuple[Corruption, ...],
    draw: Callable[[SingleTokenWords, Random, str], Filled],
    metric: str = "logit_diff",
) -> Variant:
    """Return a variant that draws filled templates; the same draw gives the same clean prompt for any corruption."""

    def examples(request: Request) -> Iterator[Example]:
        words, index = SingleTokenWords(request.reader, task), 0
        while True:
            filled = draw(words, Random(f"{task}/{request.seed}/{index}"), request.corruption)
            if _belongs(filled.template.format(**filled.clean), request.split):
                try:
                    made = example(filled, request.reader)
                except ValueError as error:
                    raise ValueError(
                        f"{task}: {error}. Choose another task for this tokenizer, or give pairs in a file."
                    ) from None
                yield made
            index += 1

    return Variant(corruptions, metric, examples)


def example(filled: Filled, reader: PromptEncoder) -> Example:
    """Return a filled template as token ids.

    Raises:
        ValueError: If the tokenizer gives the two prompts different lengths, or an answer several tokens.
    """
    text = filled.template.format(**filled.clean)
    clean, corrupted = reader.ids(text), reader.ids(filled.template.format(**{**filled.clean, **filled.changes}))
    if len(clean) != len(corrupted):
        raise ValueError(f"{text!r}: expected a corrupted prompt of {len(clean)} tokens, got {len(corrupted)}")
    answers, foils = (
        tuple(one if isinstance(one, int) else reader.following(text, one) for one in several)
        for several in (filled.answers, filled.foils)
    )
    question = Question(len(clean) - 1, answers, foils)
    return Example(tuple(clean), tuple(corrupted), (question,), _roles(filled, text, reader))


def _roles(filled: Filled, text: str, reader: PromptEncoder) -> dict[str, int]:
    """Return the position of the last token of every field's word, at its first occurrence, and of the prompt."""
    ends: dict[str, int] = {}
    at = 0
    for literal, name, _, _ in Formatter().parse(filled.template):
        at += len(literal)
        if name is not None:
            at += len(filled.clean[name])
            ends.setdefault(name, at)
    positions = dict(zip(ends, reader.positions(text, list(ends.values())), strict=True))
    known = {name: position for name, position in positions.items() if position is not None}
    return with_subject_end(known) | {"end": len(reader.ids(text)) - 1}


def _belongs(text: str, split: str) -> bool:
    """Return True if the text is in the split: a hash of the text holds out half of all clean prompts."""
    return split == "all" or (zlib.crc32(text.encode()) % 2 == 0) == (split == "heldout")
