"""Synthetic corpus of the embedded model, in which each token is labeled with the latent factors that generated it.

A document is a BOS-delimited sequence of passages, each written by one task generator (indirect objects, years, agreement,
pronouns, induction, argument copying) or by the Zipfian filler grammar. The factors are a ground truth with which features
and circuits found in the embedded model can be compared.

Document ``i`` of a corpus is a pure function of ``(seed, split, i)`` and can be generated without the others, which lets a
harvest resume in the middle.

Held-out means held-out *combinations*: one in ten pairs of names, noun-attractor pairs, event-year pairs, and so on is
withheld from the training split, and the held-out split uses only those.
"""

import zlib
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from random import Random
from typing import NamedTuple

from . import lexicon

Factors = dict[str, str | int]


class Word(NamedTuple):
    """One token and its latent factors; ``glued`` means no space before it."""

    text: str
    glued: bool
    factors: Factors


@dataclass(frozen=True)
class Document:
    """Text, its tokens (without BOS), and one dict of latent factors per token.

    Every dict has ``task`` and ``role``; ``entity``, ``number``, ``gender``, ``year``, ``subject_number``, ``answer``,
    ``topic``, and ``rank`` are present where applicable.
    """

    text: str
    words: tuple[str, ...]
    factors: tuple[Factors, ...]


@dataclass(frozen=True)
class Prompt:
    """Task prompt cut before its answer, with right answers and wrong ones of the same kind (foils)."""

    task: str
    words: tuple[str, ...]
    factors: tuple[Factors, ...]
    answers: tuple[str, ...]
    foils: tuple[str, ...]


@dataclass
class FilledPassage:
    """Passage under construction by a task generator: its words and the positions of answers."""

    task: str
    words: list[Word] = field(default_factory=list)
    # (index of the answer in words, right answers, wrong answers)
    questions: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)

    def say(self, text: str, role: str = "frame", **factors: str | int) -> None:
        """Append the words of ``text``, all with the same role and factors."""
        for piece in text.split():
            glued = piece in ".,:;?)" or (bool(self.words) and self.words[-1].text == "(")
            self.words.append(Word(piece, glued, {"task": self.task, "role": role, **factors}))

    def ask(self, answer: str, answers: tuple[str, ...], foils: tuple[str, ...], role: str, **factors: str | int) -> None:
        """Append ``answer`` and record its position, right answers, and foils."""
        self.questions.append((len(self.words), answers, foils))
        self.say(answer, role, **factors)


class DocumentChoices:
    """Random choices for one document, restricted to the combinations of its split."""

    def __init__(self, key: str, split: str):
        self.random = Random(key)
        self.split = split

    def one(self, options):
        return options[int(self.random.random() * len(options))]

    def sample(self, options, n: int) -> list:
        return self.random.sample(options, n)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def zipf(self, words: tuple[str, ...], topic: int) -> tuple[str, int]:
        """Draw a word by Zipf's law and return it with its rank; half of the draws use only words of the document's topic."""
        rank = bisect(_zipf_cumulative(len(words)), self.random.random())
        if self.chance(0.5):
            rank = min(rank - rank % lexicon.N_TOPICS + topic, len(words) - 1)
        return words[rank], rank

    def allowed(self, *combination: str) -> bool:
        """Return True if this split may use the combination."""
        if self.split == "all":
            return True
        withheld = zlib.crc32("/".join(combination).encode()) % 10 == 0
        return withheld == (self.split == "heldout")

    def until_allowed(self, draw: Callable[[], tuple]) -> tuple:
        """Repeat ``draw`` until the split allows the combination it returns first."""
        while True:
            combination, *rest = draw()
            if self.allowed(*combination):
                return (combination, *rest)


@cache
def _zipf_cumulative(n: int) -> list[float]:
    weights = [1.0 / (rank + 2.0) for rank in range(n)]
    total = sum(weights)
    return [value / total for value in accumulate(weights)][:-1]


@cache
def _gender_of(name: str) -> str:
    return "male" if name in lexicon.MALE_NAMES else "female"


def _say_name(passage: FilledPassage, name: str, role: str) -> None:
    passage.say(name, role, entity=name, gender=_gender_of(name))


# {0} and {1} are the two names in the order of their first mention, {p} a place, {o} an object.
_IOI_OPENINGS = (
    "Then , {0} and {1} went to the {p} .",
    "After {0} and {1} went to the {p} ,",
    "When {0} and {1} got a {o} at the {p} ,",
    "While {0} and {1} were working at the {p} ,",
    "While {0} and {1} were commuting to the {p} ,",
    "Afterwards , {0} and {1} had a lot of fun at the {p} .",
    "Friends {0} and {1} found a {o} at the {p} .",
    "Then , {0} and {1} had a long argument at the {p} .",
)
_IOI_CLOSINGS = (
    "{s} gave a {o} to",
    "{s} decided to give a {o} to",
    "{s} handed the {o} to",
    "{s} offered a {o} to",
    "{s} passed the {o} to",
    "{s} wanted to give it to",
)


def indirect_object(draw: DocumentChoices, passage: FilledPassage, topic: int, ambiguous: bool | None = None) -> None:
    """Write a passage in which one of two people gives the other something (IOI; Wang et al. 2022, arXiv:2211.00593).

    One passage in ten is ambiguous (a third person gives), so that corrupted prompts for patching are in distribution.
    """

    def names():
        pair = draw.sample(lexicon.NAMES, 2)
        return (sorted(pair), pair)

    _, (first, second) = draw.until_allowed(names)
    if ambiguous is None:
        ambiguous = draw.chance(0.1)
    subject_first = draw.chance(0.5)
    giver, receiver = (first, second) if subject_first else (second, first)
    order = "BABA" if subject_first else "ABBA"
    if ambiguous:
        giver = draw.one([name for name in lexicon.NAMES if name not in (first, second)])
        order = "ABC"
    place, thing = draw.one(lexicon.PLACES), draw.one(lexicon.OBJECTS)
    for piece in draw.one(_IOI_OPENINGS).split():
        if piece in ("{0}", "{1}"):
            name = first if piece == "{0}" else second
            role = "name" if ambiguous else ("subject_1" if name == giver else "indirect_object")
            passage.say(name, role, entity=name, gender=_gender_of(name), order=order)
        else:
            _say_slot(passage, piece, place, thing)
    for piece in draw.one(_IOI_CLOSINGS).split():
        if piece == "{s}":
            passage.say(giver, "subject_2", entity=giver, gender=_gender_of(giver), order=order)
        else:
            _say_slot(passage, piece, place, thing)
    if ambiguous:
        _say_name(passage, draw.one((first, second)), "answer")
    else:
        passage.ask(receiver, (receiver,), (giver,), "answer", entity=receiver, gender=_gender_of(receiver), order=order)
    passage.say(".")


def _say_slot(passage: FilledPassage, piece: str, place: str, thing: str) -> None:
    if piece == "{p}":
        passage.say(place, "place", entity=place)
    elif piece == "{o}":
        passage.say(thing, "object", entity=thing)
    else:
        passage.say(piece)


def greater_than(draw: DocumentChoices, passage: FilledPassage, topic: int) -> None:
    """Write a span of years whose end exceeds its start within the century (Hanna et al. 2023, arXiv:2305.00586)."""

    def event():
        noun, century, start = draw.one(lexicon.EVENTS), draw.one(lexicon.CENTURIES), 2 + int(draw.random.random() * 96)
        return ((noun, century, str(start)), noun, century, start)

    _, noun, century, start = draw.until_allowed(event)
    passage.say("The")
    passage.say(noun, "event", entity=noun)
    passage.say("lasted from the year")
    passage.say(century, "century", year=int(century) * 100 + start)
    passage.say(lexicon.YEARS[start], "start_year", year=start)
    _glue_last(passage)
    passage.say("to the year")
    passage.say(century, "century_again", year=int(century) * 100 + start)
    right, wrong = lexicon.YEARS[start + 1 :], lexicon.YEARS[: start + 1]
    end = draw.one(right)
    passage.ask(end, right, wrong, "answer", year=int(end))
    _glue_last(passage)
    passage.say(".")


def _glue_last(passage: FilledPassage) -> None:
    passage.words[-1] = passage.words[-1]._replace(glued=True)


AGREEMENT_KINDS = ("simple", "across_pp", "across_rc")


def agreement(draw: DocumentChoices, passage: FilledPassage, topic: int, kind: str | None = None) -> None:
    """Write a subject, optionally an attractor noun, and a verb that agrees with the subject.

    ``across_rc`` covers both relative clauses: with the attractor as subject ("the boy that the dogs like") and as object
    ("the boy that likes the dogs").
    """

    def nouns():
        subject, attractor = draw.sample(lexicon.NOUNS, 2)
        return ((subject[0], attractor[0]), subject, attractor)

    _, subject, attractor = draw.until_allowed(nouns)
    kind = kind or draw.one(AGREEMENT_KINDS)
    number, other = int(draw.chance(0.5)), int(draw.chance(0.5))
    passage.say(draw.one(("The", "the")) if passage.words else "The", "determiner", subject_number=number)
    if draw.chance(0.3):
        passage.say(draw.one(lexicon.ADJECTIVES), "adjective", subject_number=number)
    passage.say(subject[number], "subject", entity=subject[0], number=number, subject_number=number)
    if kind == "across_pp":
        passage.say(draw.one(lexicon.LOCATIVES) + " the", "preposition", subject_number=number)
        passage.say(attractor[other], "attractor", entity=attractor[0], number=other, subject_number=number)
    elif kind == "across_rc":
        passage.say("that", "relative", subject_number=number)
        verb = draw.one(lexicon.TRANSITIVE_VERBS)
        if draw.chance(0.5):
            passage.say("the", "relative", subject_number=number)
            passage.say(attractor[other], "attractor", entity=attractor[0], number=other, subject_number=number)
            passage.ask(verb[other], (verb[other],), (verb[1 - other],), "inner_verb", number=other, subject_number=number)
        else:
            passage.ask(verb[number], (verb[number],), (verb[1 - number],), "inner_verb", number=number, subject_number=number)
            passage.say("the", "relative", subject_number=number)
            passage.say(attractor[other], "attractor", entity=attractor[0], number=other, subject_number=number)
    verb = draw.one(lexicon.VERBS)
    passage.ask(
        verb[number],
        tuple(pair[number] for pair in lexicon.VERBS),
        tuple(pair[1 - number] for pair in lexicon.VERBS),
        "verb",
        number=number,
        subject_number=number,
    )
    passage.say(draw.one(lexicon.VERB_TAILS.get(verb[number], lexicon.ADVERBS)), "tail")
    passage.say(".")


def pronoun(draw: DocumentChoices, passage: FilledPassage, topic: int) -> None:
    """Write a sentence with a named person and, later, a pronoun of that person's gender."""

    def person():
        name, profession = draw.one(lexicon.NAMES), draw.one(lexicon.ROLES_OF_PEOPLE)
        return ((name, profession), name, profession)

    _, name, profession = draw.until_allowed(person)
    gender = _gender_of(name)
    other = "female" if gender == "male" else "male"
    (he, him, his, himself), (she, her, hers, herself) = lexicon.PRONOUNS[gender], lexicon.PRONOUNS[other]
    form = int(draw.random.random() * 4)

    def ask(answer: str, foil: str) -> None:
        passage.ask(answer, (answer,), (foil,), "answer", entity=name, gender=gender)

    if form == 0:
        passage.say("The")
        passage.say(profession, "profession", entity=profession)
        _say_name(passage, name, "person")
        passage.say("said that")
        ask(he, she)
        passage.say("wanted the")
        passage.say(draw.one(lexicon.OBJECTS), "object")
        passage.say(".")
    elif form == 1:
        _say_name(passage, name, "person")
        passage.say("went home because")
        ask(he, she)
        passage.say(draw.one(("lost", "wanted", "found")))
        passage.say("a")
        passage.say(draw.one(lexicon.OBJECTS), "object")
        passage.say(".")
    elif form == 2:
        _say_name(passage, name, "person")
        passage.say("lost")
        ask(his, hers)
        passage.say(draw.one(lexicon.OBJECTS), "object")
        passage.say("at the")
        passage.say(draw.one(lexicon.PLACES), "place")
        passage.say(", so the")
        passage.say(profession, "profession", entity=profession)
        passage.say("called")
        ask(him, her)
        passage.say(".")
    else:
        _say_name(passage, name, "person")
        passage.say(", the")
        passage.say(profession, "profession", entity=profession)
        passage.say(",")
        passage.say(draw.one(("hurt", "saw", "praised", "blamed", "dressed")))
        ask(himself, herself)
        passage.say("again .")


def _induction(draw: DocumentChoices, passage: FilledPassage, topic: int) -> None:
    """Write a list of random words twice; from the second word of the repetition on, each word is predictable."""
    n = 4 + int(draw.random.random() * 7)
    pool = lexicon.NAMES if draw.chance(0.6) else lexicon.NAMES + lexicon.OBJECTS + lexicon.PLACES + lexicon.FILLER_NOUNS
    items = draw.sample(pool, n)
    passage.say("The roll :")
    for place, item in enumerate(items):
        passage.say(item, "listed", entity=item, place=place)
    passage.say("; again :")
    passage.say(items[0], "repeated", entity=items[0], place=0)
    for place, item in enumerate(items[1:], start=1):
        wrong = tuple(other for other in items if other != item)
        passage.ask(item, (item,), wrong, "answer", entity=item, place=place)
    passage.say(".")


def argument_copying(draw: DocumentChoices, passage: FilledPassage, topic: int) -> None:
    """Write a function's signature and a docstring that lists its arguments in order (Heimersheim and Janiak 2023)."""
    arguments = draw.sample(lexicon.ARGUMENTS, 3 + int(draw.random.random() * 2))
    passage.say("def")
    passage.say(draw.one(lexicon.FUNCTIONS), "function")
    passage.say("(")
    for place, argument in enumerate(arguments):
        if place:
            passage.say(",")
        passage.say(argument, "signature", entity=argument, place=place)
    passage.say(") :")
    for place, argument in enumerate(arguments):
        passage.say("param")
        wrong = tuple(other for other in arguments if other != argument)
        passage.ask(argument, (argument,), wrong, "answer", entity=argument, place=place)
        passage.say(":")
        word, rank = draw.zipf(lexicon.FILLER_NOUNS, topic)
        passage.say("the")
        passage.say(word, "description", rank=rank)
        passage.say(".")


def _filler(draw: DocumentChoices, passage: FilledPassage, topic: int) -> None:
    """Write a clause of invented words with Zipfian frequencies, half of them drawn from the document's topic."""

    def phrase(role: str) -> None:
        passage.say("the" if passage.words else "The", "determiner")
        if draw.chance(0.5):
            content(lexicon.FILLER_ADJECTIVES, "filler_adjective")
        content(lexicon.FILLER_NOUNS, role)

    def content(words: tuple[str, ...], role: str) -> None:
        word, rank = draw.zipf(words, topic)
        passage.say(word, role, topic=rank % lexicon.N_TOPICS, rank=rank)

    phrase("filler_subject")
    content(lexicon.FILLER_VERBS, "filler_verb")
    phrase("filler_object")
    if draw.chance(0.4):
        passage.say("in")
        phrase("filler_place")
    passage.say(".")


# Task -> (generator, share of passages).
TASKS: dict[str, tuple[Callable[..., None], float]] = {
    "indirect_object": (indirect_object, 0.22),
    "greater_than": (greater_than, 0.14),
    "agreement": (agreement, 0.20),
    "pronoun": (pronoun, 0.12),
    "induction": (_induction, 0.12),
    "argument_copying": (argument_copying, 0.06),
    "filler": (_filler, 0.14),
}
_TASK_NAMES = tuple(TASKS)
_TASK_CUMULATIVE = list(accumulate(share for _, share in TASKS.values()))

SPLITS = ("train", "heldout", "all")


def embedded_document(seed: int, index: int, split: str = "train") -> Document:
    """Return document ``index`` of the corpus, 2 to 6 passages long and deterministic."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}.")
    draw = DocumentChoices(f"{seed}/{split}/{index}", split)
    topic = int(draw.random.random() * lexicon.N_TOPICS)
    words: list[Word] = []
    for _ in range(2 + int(draw.random.random() * 5)):
        task = _TASK_NAMES[bisect(_TASK_CUMULATIVE, draw.random.random() * _TASK_CUMULATIVE[-1])]
        passage = FilledPassage(task)
        TASKS[task][0](draw, passage, topic)
        words += passage.words
    return Document(join(words), tuple(word.text for word in words), tuple(word.factors for word in words))


def embedded_documents(seed: int, split: str = "train", start: int = 0) -> Iterator[Document]:
    """Yield documents from ``start`` on, without end."""
    index = start
    while True:
        yield embedded_document(seed, index, split)
        index += 1


def task_prompts(task: str, n: int, seed: int = 0, split: str = "heldout", **options) -> list[Prompt]:
    """Return ``n`` prompts of a task, each cut before its last answer; ``options`` are passed to the task's generator.

    Raises:
        ValueError: If the task is unknown or has no answers (filler).
    """
    if task not in TASKS or task == "filler":
        raise ValueError(f"task: expected one of {', '.join(name for name in TASKS if name != 'filler')}, got {task!r}.")
    if task == "indirect_object":
        options.setdefault("ambiguous", False)
    found = []
    for index in range(n):
        draw = DocumentChoices(f"prompt/{seed}/{split}/{task}/{index}", split)
        passage = FilledPassage(task)
        TASKS[task][0](draw, passage, 0, **options)
        end, answers, foils = passage.questions[-1]
        cut = passage.words[:end]
        found.append(Prompt(task, tuple(w.text for w in cut), tuple(w.factors for w in cut), answers, foils))
    return found


def join(words: list[Word]) -> str:
    """Join words into text, which the embedded tokenizer splits back into exactly these words."""
    pieces: list[str] = []
    for index, word in enumerate(words):
        if index and not word.glued:
            pieces.append(" ")
        pieces.append(word.text)
    return "".join(pieces)
