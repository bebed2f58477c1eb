"""Corruptions that the embedded language and English share, by task; the default comes first."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from .task import Corruption

IOI = (
    Corruption("s2_io", "flips", "the second mention of the subject becomes the indirect object"),
    Corruption("abc", "removes", "three other names, no two the same"),
    Corruption("s2_random", "removes", "the second mention of the subject becomes a third name"),
    Corruption("io_random", "removes", "the indirect object becomes a third name, so that the answer is nowhere in the prompt"),
    Corruption("s_random", "keeps", "both mentions of the subject become a third name"),
    Corruption("position_flip", "keeps", "the two names change places at their first mention"),
)
GREATER_THAN = (
    Corruption("year_01", "removes", "the first year becomes 01, which nearly every year exceeds"),
    Corruption("year_random", "removes", "the first year becomes any other"),
    Corruption("event_random", "keeps", "the event becomes another"),
)
SUBJECT_FLIP = Corruption(
    "subject_flip", "flips", "the subject changes its number, and a verb of the clause that agrees with it"
)
SUBJECT_RANDOM = Corruption("subject_random", "keeps", "the subject becomes another noun of the same number")
ATTRACTOR_FLIP = Corruption("attractor_flip", "keeps", "the other noun changes its number")
AGREEMENT_SIMPLE = (SUBJECT_FLIP, SUBJECT_RANDOM)
AGREEMENT_ACROSS = (SUBJECT_FLIP, ATTRACTOR_FLIP, SUBJECT_RANDOM)
# The verb inside the relative clause agrees with the clause's own noun.
AGREEMENT_WITHIN = (
    ATTRACTOR_FLIP._replace(effect="flips"),
    SUBJECT_FLIP._replace(effect="keeps"),
    Corruption("attractor_random", "keeps", "the other noun becomes another of the same number"),
)
PRONOUN = (
    Corruption("gender_flip", "flips", "the name becomes one of the other gender"),
    Corruption("name_random", "keeps", "the name becomes another of the same gender"),
)
INDUCTION = (
    Corruption("shuffled", "flips", "the first list is in another order, in which no item follows the item it followed"),
    Corruption("first_random", "removes", "the first list is of other items"),
    Corruption("second_random", "removes", "the second list is of other items"),
)
DOCSTRING = (
    Corruption("random_random", "removes", "arguments of the signature and those documented become others, unrelated"),
    Corruption("random_def", "keeps", "arguments of the signature become others, but for the answer"),
    Corruption("random_doc", "keeps", "the arguments documented become others"),
    Corruption("random_answer", "flips", "the answer becomes another argument in the signature"),
    Corruption("random_def_doc", "keeps", "random_def and random_doc at once"),
    Corruption("random_answer_doc", "flips", "random_answer and random_doc at once"),
)


def ioi_changes(corruption: str, io: str, s: str, others: Sequence[str]) -> dict[str, str]:
    """Return new names by role for an IOI prompt; ``others`` are three names that are not in it."""
    x, y, z = others
    changes = {
        "s2_io": {"S2": io},
        "abc": {"IO": x, "S1": y, "S2": z},
        "s2_random": {"S2": x},
        "io_random": {"IO": x},
        "s_random": {"S1": x, "S2": x},
        "position_flip": {"IO": s, "S1": io},
    }
    return changes[corruption]


def docstring_changes(
    corruption: str, signature: Sequence[str], answer: str, documented: Sequence[str], others: Sequence[str]
) -> dict[str, str]:
    """Return new arguments by role for a docstring prompt, from ``others``, one per role.

    ``signature`` and ``documented`` are the roles that may change; ``answer`` is the role of the answer in the signature.
    """
    fresh = iter(others)
    changed: list[str] = []
    if corruption in ("random_random", "random_def", "random_def_doc"):
        changed += signature
    if corruption in ("random_random", "random_answer", "random_answer_doc"):
        changed.append(answer)
    if corruption in ("random_random", "random_doc", "random_def_doc", "random_answer_doc"):
        changed += documented
    return {role: next(fresh) for role in changed}


def reordered(items: Sequence, random: Random) -> list:
    """Return the items in another order, the last in place, in which no item follows the same item as before.

    Four items or more have such an order.
    """
    followers = set(pairwise(items))
    while True:
        order = [*random.sample(items[:-1], len(items) - 1), items[-1]]
        if not followers & set(pairwise(order)):
            return order
