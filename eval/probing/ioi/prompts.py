"""Prompts of the indirect object identification (IOI) task and their attributes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ....training.activations.model import LanguageModel
from ....training.embedded import lexicon

OPENINGS = (
    "Then , {0} and {1} went to the {p} .",
    "Then , {0} and {1} had a long argument at the {p} .",
    "Afterwards , {0} and {1} had a lot of fun at the {p} .",
)
CLOSINGS = ("{s} gave a {o} to", "{s} decided to give a {o} to")
# Prepended to every prompt, because dictionaries are not trained on a context's first positions.
PREFIX = "The old king laughs today . "
POSITIONS = ("io", "s1", "s2", "end")
CROSS_SECTIONS = {"end": (3,), "s2": (2,), "names": (0, 1), "all": (0, 1, 2, 3)}
ATTRIBUTES = ("io", "s", "pos")
N_NAMES, FIT_PROMPTS, SCORED_PROMPTS, EDIT_PROMPTS = 24, 3000, 600, 200


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts, right-padded, with the positions of IO, S1, S2 and END and the attribute values."""

    token_ids: Int[Tensor, "prompts tokens"]
    places: Int[Tensor, "prompts 4"]
    # Indices into names; Pos is 0 if IO comes first.
    io: Int[np.ndarray, " prompts"]
    s: Int[np.ndarray, " prompts"]
    pos: Int[np.ndarray, " prompts"]
    name_ids: Int[Tensor, " names"]

    def values(self, attribute: str) -> Int[np.ndarray, " prompts"]:
        return getattr(self, attribute)


@dataclass(frozen=True)
class PromptWords:
    """Names, places and objects that are single tokens of a tokenizer, to fill prompts with."""

    tokenizer: Any
    names: list[str]
    places: list[str]
    things: list[str]

    @classmethod
    def of(cls, model: LanguageModel, n_names: int = N_NAMES) -> "PromptWords":
        """Return up to ``n_names`` names, half of each gender, with places and objects.

        Raises:
            ValueError: If too few of them are single tokens.
        """

        def whole(words: Sequence[str]) -> list[str]:
            return [word for word in words if len(_ids(model.tokenizer, word)) == 1]

        unknown = model.tokenizer.unk_token_id
        known = [
            [name for name in whole(names) if unknown is None or _ids(model.tokenizer, name)[0] != unknown][: n_names // 2]
            for names in (lexicon.MALE_NAMES, lexicon.FEMALE_NAMES)
        ]
        places, things = whole(lexicon.PLACES), whole(lexicon.OBJECTS)
        if min(map(len, known)) < 4 or not places or not things:
            raise ValueError(
                f"--task supervised: expected a tokenizer with English names as single tokens, but {model.id} splits them. "
                "Leave the task out."
            )
        return cls(model.tokenizer, known[0] + known[1], places, things)

    def prompts(self, plans: Sequence["PromptPlan"]) -> Prompts:
        """Tokenize the prompts of these plans."""
        bos = self.tokenizer.bos_token_id
        prefix = [*([] if bos is None else [bos]), *(i for word in PREFIX.split() for i in _ids(self.tokenizer, word))]
        rows, places = [], []
        for plan in plans:
            row, where = list(prefix), {}
            for role, word in self._words(plan):
                row += _ids(self.tokenizer, word)
                where[role] = len(row) - 1
            rows.append(row)
            places.append([where["io"], where["s1"], where["s2"], len(row) - 1])
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        io, s, pos = (np.array([getattr(plan, name) for plan in plans]) for name in ATTRIBUTES)
        name_ids = torch.tensor([_ids(self.tokenizer, name)[0] for name in self.names])
        padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        return Prompts(padded, torch.tensor(places), io, s, pos, name_ids)

    def _words(self, plan: "PromptPlan") -> list[tuple[str, str]]:
        io, s = self.names[plan.io], self.names[plan.s]
        first, second = (("s1", s), ("io", io)) if plan.pos else (("io", io), ("s1", s))
        slots = {"{0}": first, "{1}": second, "{s}": ("s2", s)}
        slots |= {"{p}": ("place", self.places[plan.place]), "{o}": ("object", self.things[plan.thing])}
        text = f"{OPENINGS[plan.opening]} {CLOSINGS[plan.closing]}"
        return [slots.get(piece, ("frame", piece)) for piece in text.split()]


@dataclass(frozen=True)
class PromptPlan:
    """Choices that determine a prompt."""

    io: int
    s: int
    pos: int
    opening: int
    closing: int
    place: int
    thing: int

    def changed(self, attribute: str, value: int) -> "PromptPlan":
        """Return the plan with one attribute changed."""
        return PromptPlan(**{**self.__dict__, attribute: value})


def draw_plans(words: PromptWords, n: int, seed: int, names: Sequence[int] | None = None) -> list[PromptPlan]:
    """Draw ``n`` independent prompts in which IO and S differ."""
    generator = np.random.default_rng(seed)
    pool = np.arange(len(words.names)) if names is None else np.array(names)
    sizes = (2, len(OPENINGS), len(CLOSINGS), len(words.places), len(words.things))
    found = []
    for _ in range(n):
        io, s = generator.choice(pool, 2, replace=False)
        found.append(PromptPlan(int(io), int(s), *(int(generator.integers(size)) for size in sizes)))
    return found


def _ids(tokenizer: Any, word: str) -> list[int]:
    # Words within a text follow a space; punctuation does not.
    text = word if word in ",." else f" {word}"
    return tokenizer(text, add_special_tokens=False)["input_ids"]
