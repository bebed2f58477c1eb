"""Subject-verb agreement. Source: Marks et al. 2024, arXiv:2403.19647, including most nouns and verbs."""

from functools import partial
from random import Random
from typing import NamedTuple

from ..corruptions import AGREEMENT_ACROSS, AGREEMENT_SIMPLE, AGREEMENT_WITHIN
from ..task import Corruption
from .fill import Filled, SingleTokenWords, from_templates


def _numbers(words: str) -> list[tuple[str, str]]:
    """Return (singular, plural) of each word; the plural adds an s unless it is given."""
    return [(one, many or f"{one}s") for one, _, many in (word.partition("/") for word in words.split())]


SUBJECTS = _numbers(
    """friend carpenter aunt man/men doctor mother victim lawyer singer poet kid teacher farmer athlete father woman/women
    guy girl boy uncle"""
)
OTHERS = _numbers("chef parent assistant architect executive guard dancer minister skater driver")
THINGS = _numbers("desk table car bike cat chair truck window tree dog")
PREPOSITIONS = "near behind beside".split()
VERBS = _numbers("has/have is/are goes/go does/do was/were")
INNER_VERBS = [(f"{verb}s", verb) for verb in "like admire follow help hate know trust love".split()]


class Kind(NamedTuple):
    """Template, its corruptions, nouns by role, and the role of the noun that the predicted verb agrees with."""

    template: str
    corruptions: tuple[Corruption, ...]
    nouns: dict[str, list[tuple[str, str]]]
    governor: str


KINDS = {
    # No other noun competes with the subject, so any noun will do.
    "agreement_simple": Kind("The {subject}", AGREEMENT_SIMPLE, {"subject": SUBJECTS + OTHERS}, "subject"),
    "agreement_pp": Kind(
        "The {subject} {preposition} the {attractor}",
        AGREEMENT_ACROSS,
        {"subject": SUBJECTS, "attractor": THINGS},
        "subject",
    ),
    "agreement_rc": Kind(
        "The {subject} that the {attractor}", AGREEMENT_WITHIN, {"subject": SUBJECTS, "attractor": OTHERS}, "attractor"
    ),
    "agreement_across_rc": Kind(
        "The {subject} that the {attractor} {inner_verb}",
        AGREEMENT_ACROSS,
        {"subject": SUBJECTS, "attractor": OTHERS},
        "subject",
    ),
}


def _draw(kind: Kind, words: SingleTokenWords, random: Random, corruption: str) -> Filled:
    lists = {role: words.pairs(f"nouns for the {role}", nouns) for role, nouns in kind.nouns.items()}
    nouns = {role: random.choice(pairs) for role, pairs in lists.items()}
    numbers = {role: random.randrange(2) for role in lists}
    verb, number = random.choice(words.pairs("verbs", VERBS)), numbers[kind.governor]
    clean = {role: pair[numbers[role]] for role, pair in nouns.items()}
    clean["preposition"] = random.choice(words.single("prepositions", PREPOSITIONS)) if "{prep" in kind.template else ""
    # The verb of the relative clause agrees with the clause's own noun.
    inner = random.choice(words.pairs("verbs of clauses", INNER_VERBS)) if "{inner" in kind.template else ("", "")
    clean["inner_verb"] = inner[numbers.get("attractor", 0)]
    role, what = corruption.split("_")
    if what == "random":
        changes = {role: words.other(random, [pair[numbers[role]] for pair in lists[role]], clean[role])}
    else:
        changes = {role: nouns[role][1 - numbers[role]]}
        if role == "attractor":
            changes["inner_verb"] = inner[1 - numbers[role]]
    return Filled(kind.template, clean, changes, (f" {verb[number]}",), (f" {verb[1 - number]}",))


VARIANTS = {name: from_templates(name, kind.corruptions, partial(_draw, kind)) for name, kind in KINDS.items()}
