"""Tasks in the embedded language: prompts of its own generators, corrupted word by word according to their factors.

Every word is one token, so a prompt and its corruption have equal length for any replacement.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

from ....training.embedded import lexicon
from ....training.embedded.corpus import Prompt, task_prompts
from . import corruptions
from .pairs import Question
from .task import Corruption, Example, Request, Variant, with_subject_end

# Role names of the tasks in both languages, if the corpus has another name.
NAMES = {"indirect_object": "IO", "subject_1": "S1", "subject_2": "S2"}

# New words by role.
Changes = dict[str, str]
# Index of the word to predict, right answers, wrong answers.
Asked = tuple[int, tuple[str, ...], tuple[str, ...]]


def _at_end(prompt: Prompt, roles: dict[str, int], changes: Changes) -> list[Asked]:
    return [(len(prompt.words), prompt.answers, prompt.foils)]


def _any_argument(prompt: Prompt, roles: dict[str, int], changes: Changes) -> list[Asked]:
    """Ask at the end; arguments of the corrupted prompt are foils as well."""
    foils = tuple(dict.fromkeys((*prompt.foils, *changes.values())))
    return [(len(prompt.words), prompt.answers, foils)]


def _each_repeated(prompt: Prompt, roles: dict[str, int], changes: Changes) -> list[Asked]:
    """Ask before every word of the second list except its first."""
    listed = [prompt.words[at] for role, at in roles.items() if role.startswith("listed_")]
    repeated = [at for role, at in roles.items() if role.startswith("repeated_")]
    asked = [(at, prompt.words[at]) for at in repeated[1:]] + [(len(prompt.words), prompt.answers[0])]
    return [(at, (word,), tuple(one for one in listed if one != word)) for at, word in asked]


@dataclass(frozen=True)
class EmbeddedTask:
    """Source of a task's prompts, their corruptions (``change``) and questions (``ask``).

    ``ready`` may truncate a prompt further than the corpus does, or reject it with None.
    """

    task: str
    change: Callable[[str, Prompt, dict[str, int], Random], Changes]
    ask: Callable[[Prompt, dict[str, int], Changes], list[Asked]] = _at_end
    ready: Callable[[Prompt], Prompt | None] = lambda prompt: prompt
    options: dict[str, str] = field(default_factory=dict)

    def examples(self, request: Request) -> Iterator[Example]:
        """Yield examples endlessly; clean prompts do not depend on the corruption."""
        for index, drawn in enumerate(_prompts(self, request)):
            prompt = self.ready(drawn)
            if prompt is not None:
                random = Random(f"corrupt/{request.seed}/{request.split}/{self.task}/{index}")
                yield self._example(prompt, request, random)

    def _example(self, prompt: Prompt, request: Request, random: Random) -> Example:
        roles = _roles(prompt)
        changes = self.change(request.corruption, prompt, roles, random)
        words = list(prompt.words)
        for role, word in changes.items():
            words[roles[role]] = word
        tokens = request.reader.tokenizer.convert_tokens_to_ids
        clean, corrupted = ((*request.reader.head, *tokens(list(one))) for one in (prompt.words, words))
        # BOS shifts positions by one: position i holds word i - 1 and predicts word i.
        questions = tuple(
            Question(at, tuple(tokens(list(answers))), tuple(tokens(list(foils))))
            for at, answers, foils in self.ask(prompt, roles, changes)
        )
        positions = {role: at + 1 for role, at in roles.items()} | {"end": len(prompt.words)}
        return Example(clean, corrupted, questions, with_subject_end(positions))


def _prompts(source: EmbeddedTask, request: Request) -> Iterator[Prompt]:
    """Yield all prompts in order; the corpus returns only the first ``size``, so ``size`` doubles when they run out."""
    done, size = 0, 128
    while True:
        batch = task_prompts(source.task, size, request.seed, request.split, **source.options)
        yield from batch[done:]
        done, size = size, 2 * size


def _roles(prompt: Prompt) -> dict[str, int]:
    """Return the word index of every role, by place if it has several, else its first word."""
    roles: dict[str, int] = {}
    for index, factors in enumerate(prompt.factors):
        role = str(factors["role"])
        if role == "frame":
            continue
        if role == "answer":
            # Earlier answers within a prompt: documented arguments, repeated items, a possessive.
            role = {"argument_copying": "doc", "induction": "repeated"}.get(prompt.task, "possessive")
        name = f"{role}_{factors['place']}" if "place" in factors else NAMES.get(role, role)
        roles.setdefault(name, index)
    return roles


def _other(random: Random, words: tuple[str, ...], *but: str) -> str:
    return random.choice([word for word in words if word not in but])


def _ioi(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    io, s = prompt.words[roles["IO"]], prompt.words[roles["S1"]]
    others = random.sample([name for name in lexicon.NAMES if name not in (io, s)], 3)
    return corruptions.ioi_changes(corruption, io, s, others)


def _years(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    if corruption == "year_01":
        return {"start_year": "01"}
    if corruption == "year_random":
        return {"start_year": _other(random, lexicon.YEARS[2:98], prompt.words[roles["start_year"]])}
    return {"event": _other(random, lexicon.EVENTS, prompt.words[roles["event"]])}


def _agreement(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    role, what = corruption.split("_")
    word = prompt.words[roles[role]]
    if what == "random":
        number = int(prompt.factors[roles[role]]["number"])
        return {role: _other(random, tuple(pair[number] for pair in lexicon.NOUNS), word)}
    changes = {role: _other_number(word, lexicon.NOUNS)}
    if "inner_verb" in roles:
        # The clause's verb agrees with the attractor if that is its subject, else with the sentence's subject.
        governor = "attractor" if roles["attractor"] < roles["inner_verb"] else "subject"
        if role == governor:
            changes["inner_verb"] = _other_number(prompt.words[roles["inner_verb"]], lexicon.TRANSITIVE_VERBS)
    return changes


def _other_number(word: str, pairs: tuple[tuple[str, ...], ...]) -> str:
    singular, plural = next(pair for pair in pairs if word in pair)
    return plural if word == singular else singular


def _pronoun(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    name, gender = prompt.words[roles["person"]], prompt.factors[roles["person"]]["gender"]
    own, other = lexicon.MALE_NAMES, lexicon.FEMALE_NAMES
    if gender == "female":
        own, other = other, own
    if corruption == "name_random":
        return {"person": _other(random, own, name)}
    changes = {"person": random.choice(other)}
    if "possessive" in roles:
        changes["possessive"] = lexicon.PRONOUNS["female" if gender == "male" else "male"][2]
    return changes


def _induction(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    first = [role for role in roles if role.startswith("listed_")]
    second = [role for role in roles if role.startswith("repeated_")]
    items = [prompt.words[roles[role]] for role in first]
    if corruption == "shuffled":
        return dict(zip(first, corruptions.reordered(items, random), strict=True))
    pool = [name for name in lexicon.NAMES if name not in items]
    changed = first if corruption == "first_random" else second
    return dict(zip(changed, random.sample(pool, len(changed)), strict=True))


def _docstring(corruption: str, prompt: Prompt, roles: dict[str, int], random: Random) -> Changes:
    signature = [role for role in roles if role.startswith("signature_")]
    documented = [role for role in roles if role.startswith("doc_")]
    pool = [argument for argument in lexicon.ARGUMENTS if argument not in prompt.words]
    others = random.sample(pool, len(signature) + len(documented))
    return corruptions.docstring_changes(corruption, signature[:-1], signature[-1], documented, others)


def _within_clause(prompt: Prompt) -> Prompt | None:
    """Return the prompt cut before the relative clause's verb if its subject is the attractor, else None."""
    roles = [str(factors["role"]) for factors in prompt.factors]
    end = roles.index("inner_verb")
    if "attractor" not in roles[:end]:
        return None
    number = int(prompt.factors[end]["number"])
    right, wrong = (tuple(pair[form] for pair in lexicon.TRANSITIVE_VERBS) for form in (number, 1 - number))
    return replace(prompt, words=prompt.words[:end], factors=prompt.factors[:end], answers=right, foils=wrong)


def _variant(source: EmbeddedTask, kinds: tuple[Corruption, ...], metric: str = "logit_diff") -> Variant:
    return Variant(kinds, metric, source.examples)


def _agreement_of(kind: str, ready: Callable[[Prompt], Prompt | None] = lambda prompt: prompt) -> EmbeddedTask:
    return EmbeddedTask("agreement", _agreement, ready=ready, options={"kind": kind})


VARIANTS = {
    "ioi": _variant(EmbeddedTask("indirect_object", _ioi), corruptions.IOI),
    "greater_than": _variant(EmbeddedTask("greater_than", _years), corruptions.GREATER_THAN, "prob_diff"),
    "agreement_simple": _variant(_agreement_of("simple"), corruptions.AGREEMENT_SIMPLE),
    "agreement_pp": _variant(_agreement_of("across_pp"), corruptions.AGREEMENT_ACROSS),
    "agreement_rc": _variant(_agreement_of("across_rc", ready=_within_clause), corruptions.AGREEMENT_WITHIN),
    "agreement_across_rc": _variant(_agreement_of("across_rc"), corruptions.AGREEMENT_ACROSS),
    "pronoun": _variant(EmbeddedTask("pronoun", _pronoun), corruptions.PRONOUN),
    "induction": _variant(EmbeddedTask("induction", _induction, _each_repeated), corruptions.INDUCTION),
    "docstring": _variant(EmbeddedTask("argument_copying", _docstring, _any_argument), corruptions.DOCSTRING, "max_logit_diff"),
}
