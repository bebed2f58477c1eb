"""Circuit tasks by name: pairs of a clean and a corrupted prompt, in the model's language or from a file."""

from pathlib import Path

from ....sae.suggestions import did_you_mean, require_choice
from ....training.activations.model import LanguageModel
from ....training.embedded.corpus import SPLITS
from . import embedded, english
from .competence import Competence, competence, require_solved
from .files import read_pairs, write_pairs
from .pairs import PromptPairs
from .reader import PromptEncoder
from .task import CircuitTask, Corruption, Request, Variant, assemble, distinct, same_length

__all__ = [
    "TASKS",
    "CircuitTask",
    "Competence",
    "Corruption",
    "competence",
    "make_pairs",
    "read_pairs",
    "require_solved",
    "write_pairs",
]

FILES = (".jsonl", ".json", ".csv")
_WHAT = {
    "ioi": "which of two people something is given to",
    "greater_than": "the end of a span of years, after its beginning",
    "agreement_simple": "a verb right after its subject",
    "agreement_pp": "a verb after its subject and a prepositional phrase with another noun",
    "agreement_rc": "the verb of a relative clause, after the clause's subject",
    "agreement_across_rc": "a verb after its subject and a relative clause",
    "pronoun": "a pronoun of a named person's gender",
    "gender_bias": "the pronoun assumed of a profession",
    "induction": "every next item of a list that is said again",
    "docstring": "the next argument of a signature that a docstring goes through",
    "colored_objects": "the colour of one of three objects",
    "multiple_choice": "the letter, A to D, of the colour that a sentence gives",
    "multiple_choice_random_letters": "the same, with random letters before the options",
    "multiple_choice_symbols": "the same, with symbols before the options",
}
TASKS = {name: CircuitTask(name, what, embedded.VARIANTS.get(name), english.VARIANTS.get(name)) for name, what in _WHAT.items()}


def make_pairs(
    name: str | Path,
    model: LanguageModel,
    n: int | None = 100,
    seed: int = 0,
    corruption: str | None = None,
    split: str = "heldout",
    metric: str | None = None,
    one_length: bool = False,
) -> PromptPairs:
    """Return ``n`` distinct pairs of a task; clean prompts depend on seed and split, not on the corruption.

    The embedded model gets the task in its own language, any other model in English. ``corruption`` and ``metric`` default to
    those of the task. With ``one_length`` all prompts have the most common length among the first ``n`` drawn.

    A number of options may follow the name of a multiple choice task: ``multiple_choice-10``.

    ``name`` may be a file that ``read_pairs`` supports (``.jsonl``, ``.json``, ``.csv``): then ``n`` of its pairs are drawn, or
    all with ``None`` or if there are fewer, and ``split`` is ignored.

    Raises:
        ValueError: If the task does not exist in the model's language, the corruption or split is unknown, the model's
            tokenizer splits the task's words, or the task has fewer pairs.
    """
    if n is not None and n < 1:
        raise ValueError(f"n: expected at least 1, got {n}.")
    if str(name).endswith(FILES):
        return read_pairs(name, model, n, seed, corruption, metric, one_length=one_length)
    if n is None:
        raise ValueError("n: expected a number of pairs, got None, which is for files only. Give a number.")
    require_choice("split", split, SPLITS)
    variant = _variant(str(name), model)
    names = [one.name for one in variant.corruptions]
    corruption = names[0] if corruption is None else require_choice("corruption", corruption, names, f" for {name}")
    examples = variant.draw(Request(PromptEncoder(model), corruption, seed, split))
    if one_length:
        examples = same_length(examples, n)
    return assemble(distinct(examples, n, str(name)), str(name), corruption, metric or variant.metric)


def _variant(name: str, model: LanguageModel) -> Variant:
    """Return the task in the model's language, with as many options as its name says.

    Raises:
        ValueError: If there is no such task, or not with this number of options.
    """
    base, _, options = name.rpartition("-")
    if not options.isdecimal():
        variant = _task(name, model).variant(model)
        assert variant is not None
        return variant
    variant = _task(base, model).variant(model)
    if variant is None or variant.with_options is None:
        those = ", ".join(one for one, task in TASKS.items() if task.english is not None and task.english.with_options)
        raise ValueError(f"task: expected a number of options behind one of {those} only, as multiple_choice-4, got {name!r}.")
    return variant.with_options(int(options))


def _task(name: str, model: LanguageModel) -> CircuitTask:
    """Return the task of that name; ``ValueError`` if it does not exist in the model's language."""
    here = [task.name for task in TASKS.values() if task.variant(model) is not None]
    side = "in the embedded language" if model.id == "embedded" else "in English"
    where = "only in English" if model.id == "embedded" else "only in the embedded language"
    of = f" {side}, or a .jsonl, .json or .csv file"
    if name in TASKS and name not in here:
        raise ValueError(
            f"task: {name} exists {where}, and {model.id} reads another. Expected one of {', '.join(here)}{of}."
            f"{did_you_mean(name, here)}"
        )
    return TASKS[require_choice("task", name, here, of)]
