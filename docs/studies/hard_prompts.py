"""Prompts of the embedded language on which its model errs: lists and signatures longer than training ever had.

The model makes no errors on the embedded tasks, nor on agreement across nine phrases or names that a passage before had in
other roles. Its lists had up to 10 items, its signatures up to 4 arguments. All prompts of a task have one length and ask at
one place, so that neither tells of errors. In corrupted prompts another item stands in place of the one asked for.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch

from sparsary.eval.circuits.known.handbuilt import equal_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question
from sparsary.training.activations.model import LanguageModel
from sparsary.training.embedded import lexicon

# Items, and the place of the one asked for.
LIST = (18, 12)
SIGNATURE = (7, 6)


def long_lists(model: LanguageModel, n: int, seed: int) -> PromptPairs:
    """Return lists of names that are said again up to one of them, which is asked for; the foils are the other names."""

    def words(said: Sequence[str], first: Sequence[str], draw: Random) -> list[str]:
        return [*"The roll :".split(), *first, *"; again :".split(), *said]

    return _asked("long list", model, n, seed, lexicon.NAMES, LIST, words)


def long_signatures(model: LanguageModel, n: int, seed: int) -> PromptPairs:
    """Return signatures that a docstring goes through up to an argument, which is asked for; the foils are the others."""

    def words(said: Sequence[str], first: Sequence[str], draw: Random) -> list[str]:
        found = ["def", draw.choice(lexicon.FUNCTIONS), "("]
        found += [*[word for argument in first for word in (argument, ",")][:-1], ")", ":"]
        for argument in said:
            found += ["param", argument, ":", "the", draw.choice(lexicon.FILLER_NOUNS), "."]
        return [*found, "param"]

    return _asked("long signature", model, n, seed, lexicon.ARGUMENTS, SIGNATURE, words)


HARD: dict[str, Callable[[LanguageModel, int, int], PromptPairs]] = {
    "long list": long_lists,
    "long signature": long_signatures,
}


def _asked(
    task: str,
    model: LanguageModel,
    n: int,
    seed: int,
    pool: Sequence[str],
    sizes: tuple[int, int],
    words: Callable[[Sequence[str], Sequence[str], Random], list[str]],
) -> PromptPairs:
    ids, bos = model.tokenizer.convert_tokens_to_ids, model.tokenizer.bos_token_id
    size, place = sizes
    clean, corrupted, questions = [], [], []
    for index in range(n):
        draw = Random(f"{task}/{seed}/{index}")
        *items, other = draw.sample(pool, size + 1)
        changed = [*items[:place], other, *items[place + 1 :]]
        # The same function and fillers in both prompts.
        key = draw.random()
        for rows, first in ((clean, items), (corrupted, changed)):
            rows.append(torch.tensor([bos, *ids(words(items[:place], first, Random(key)))]))
        foils = tuple(ids([item for item in items if item != items[place]]))
        questions.append((Question(len(clean[-1]) - 1, (ids(items[place]),), foils),))
    return equal_pairs(task, "another item", torch.stack(clean), torch.stack(corrupted), questions)
