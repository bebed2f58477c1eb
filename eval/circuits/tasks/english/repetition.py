"""Induction on unrelated tokens: a random list, then the same list again.

Source: Olsson et al. 2022, arXiv:2209.11895; lists of 20 as in the data of EAP-IG (Hanna et al. 2024, arXiv:2403.17806).
"""

from collections.abc import Iterator
from random import Random

from ..corruptions import INDUCTION, reordered
from ..pairs import Question
from ..task import Example, Request, Variant

LENGTH = 20


def examples(request: Request) -> Iterator[Example]:
    """Yield examples endlessly; each split has its own random lists.

    Raises:
        ValueError: If the vocabulary has too few tokens for a list and its corruption.
    """
    special = set(request.reader.tokenizer.all_special_ids)
    pool = [token for token in range(request.reader.vocabulary) if token not in special]
    if len(pool) < 2 * LENGTH:
        raise ValueError(f"induction: expected a vocabulary of at least {2 * LENGTH} tokens, got {len(pool)}.")
    index = 0
    while True:
        yield _example(request, pool, Random(f"induction/{request.split}/{request.seed}/{index}"))
        index += 1


def _example(request: Request, pool: list[int], random: Random) -> Example:
    tokens = random.sample(pool, 2 * LENGTH)
    items, others = tokens[:LENGTH], tokens[LENGTH:]
    # The second list omits the last item, which is asked for at the end.
    again = items[:-1]
    corrupted = {
        "shuffled": (reordered(items, random), again),
        "first_random": (others, again),
        "second_random": (items, others[:-1]),
    }[request.corruption]
    head = request.reader.head
    start = len(head) + LENGTH
    questions = tuple(
        Question(start + place, (items[place + 1],), tuple(item for item in items if item != items[place + 1]))
        for place in range(LENGTH - 1)
    )
    roles = {f"listed_{place}": len(head) + place for place in range(LENGTH)}
    roles |= {f"repeated_{place}": start + place for place in range(LENGTH - 1)} | {"end": start + LENGTH - 2}
    return Example((*head, *items, *again), (*head, *corrupted[0], *corrupted[1]), questions, roles)


VARIANT = Variant(INDUCTION, "logit_diff", examples)
