"""Automated interpretability: a language model explains latents, and ``SCORERS`` score the explanations.

- ``detection``: does the latent fire in a window? ``fuzzing``: are the marked tokens of a window those on which it fires?
- ``intervention``: does a continuation with the latent added fit the explanation (``intervention``)?
- ``surprisal``: do windows become likelier behind the explanation (``surprisal``)?

The explainer sees documents with even numbers, the scorers are tested on odd ones. Source: delphi (Paulo et al. 2024,
arXiv:2410.13928): windows of 32 tokens, tokens above 0.3 of the maximum marked, five windows per question, malformed answers
discarded and counted.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...sae.suggestions import require_choice
from .collect import Collected
from .intervention import INTERVENE, Continuations
from .llm_client import Chat
from .scores import MIN_WINDOWS
from .surprisal import surprisal
from .windows import ActivatingWindow

SCORERS = ("detection", "fuzzing", "intervention", "surprisal")
DEFAULT_SCORERS = ("detection", "fuzzing")
WINDOWS_PER_QUESTION = 5
TRAIN_WINDOWS, TEST_WINDOWS = 40, 25

EXPLAIN = """You study one neuron of a language model. You get excerpts in which it is active; the tokens on which it is most \
active stand between << and >>, and their activations, from 1 to 10, follow each excerpt. Say in one short sentence what the \
marked tokens, or the text around them, have in common. Do not list the tokens. Answer with one line that begins with \
EXPLANATION:"""
DETECT = """You get a description of what a neuron is active for, and some excerpts. Say of each excerpt whether the neuron is \
active anywhere in it. Answer with a JSON list of as many numbers as there are excerpts, 1 for active, 0 for not, and nothing \
else."""
FUZZ = """You get a description of what a neuron is active for, and some excerpts with tokens between << and >>. Say of each \
excerpt whether the tokens marked are those on which the neuron is active. Answer with a JSON list of as many numbers as there \
are excerpts, 1 for marked rightly, 0 for wrongly, and nothing else."""


@dataclass(frozen=True)
class Evidence:
    """Windows shown to the explainer, and held-out windows in which the latent does or does not fire."""

    train: list[ActivatingWindow]
    positive: list[ActivatingWindow]
    negative: list[ActivatingWindow]
    maximum: float


@dataclass
class Result:
    """Explanation of a latent, its scores by the scorers ``asked``, and the number of malformed answers.

    Each ``None`` of these has a reason.
    """

    text: str | None = None
    detection: float | None = None
    fuzzing: float | None = None
    intervention: float | None = None
    surprisal: float | None = None
    asked: tuple[str, ...] = DEFAULT_SCORERS
    details: dict[str, dict[str, float | int]] = field(default_factory=dict)
    malformed: int = 0
    questions: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """Return the fields for ``features.jsonl``."""
        return {
            "text": self.text,
            **{name: getattr(self, name) for name in self.asked},
            "details": self.details,
            "malformed": self.malformed,
            "questions": self.questions,
            "reasons": self.reasons,
        }


def evidence(collected: Collected, words: Sequence[str], latent: int) -> Evidence | str:
    """Return a latent's windows, split by document, or the reason if there are too few. No window is in both splits."""

    def window(tokens: np.ndarray, values: np.ndarray) -> ActivatingWindow:
        there = tokens >= 0
        return ActivatingWindow(tuple(words[int(token)] for token in tokens[there]), tuple(values[there].tolist()))

    def windows(examples: Any, parity: int) -> list[ActivatingWindow]:
        chosen = (examples.keys[latent] > -np.inf) & (examples.documents[latent] % 2 == parity)
        return [window(*pair) for pair in zip(examples.tokens[latent][chosen], examples.values[latent][chosen], strict=True)]

    background = collected.background
    quiet = [i for i, fires in enumerate(background.fires) if background.documents[i] % 2 == 1 and latent not in fires.tolist()]
    train = list(dict.fromkeys([*windows(collected.top, 0), *windows(collected.sample, 0)]))[:TRAIN_WINDOWS]
    shown = {example.tokens for example in train}
    positive = [example for example in windows(collected.sample, 1) if example.tokens not in shown][:TEST_WINDOWS]
    silence = np.zeros(background.tokens.shape[1], np.float32)
    # A text shown as active is not used as a negative either.
    negative = [example for i in quiet if (example := window(background.tokens[i], silence)).tokens not in shown]
    negative = negative[:TEST_WINDOWS]
    if min(len(train), len(positive), len(negative)) < MIN_WINDOWS:
        return (
            f"expected {MIN_WINDOWS} windows to explain, and to ask about with and without it, got {len(train)}, "
            f"{len(positive)} and {len(negative)}"
        )
    return Evidence(train, positive, negative, float(collected.maxima[latent]))


def require_scorers(scorers: Sequence[str]) -> tuple[str, ...]:
    """Return the scorers in the order of ``SCORERS``.

    Raises:
        ValueError: If one is unknown, or there is none.
    """
    for name in scorers:
        require_choice("--scorer", name, SCORERS)
    if not scorers:
        raise ValueError(f"--scorer: expected one or more of {', '.join(SCORERS)}, got none.")
    return tuple(name for name in SCORERS if name in scorers)


def score_explanations(
    shown: Evidence,
    explainer: Chat,
    scorer: Chat,
    seed: int = 22,
    scorers: Sequence[str] = DEFAULT_SCORERS,
    latent: int = 0,
    continuations: Continuations | str = "there is no model to continue text",
) -> Result:
    """Ask for an explanation of a latent, then score it.

    Args:
        scorers: Names of ``SCORERS``.
        latent: The latent's number, for ``intervention``.
        continuations: Text that the model writes with latents added, or the reason why there is none.
    """
    result = Result(asked=require_scorers(scorers))
    result.questions += 1
    result.text = explanation_in(explainer.answer(EXPLAIN, explain_prompt(shown)))
    if result.text is None:
        result.malformed += 1
        result.reasons = dict.fromkeys(("text", *result.asked), "the explainer's answer holds no explanation")
        return result
    if "detection" in result.asked:
        detect = [(example.text(), True) for example in shown.positive] + [
            (example.text(), False) for example in shown.negative
        ]
        result.detection = _score(result, "detection", DETECT, detect, scorer, seed)
    if "fuzzing" in result.asked:
        result.fuzzing = _score(result, "fuzzing", FUZZ, fuzzed(shown, seed), scorer, seed)
    if "intervention" in result.asked:
        result.intervention = _intervention(result, latent, continuations, scorer, seed)
    if "surprisal" in result.asked:
        found = surprisal(result.text, shown.positive, shown.negative, scorer)
        if isinstance(found, str):
            result.reasons["surprisal"] = found
        else:
            result.surprisal, result.details["surprisal"] = found
    return result


def _intervention(result: Result, latent: int, continuations: Continuations | str, scorer: Chat, seed: int) -> float | None:
    if isinstance(continuations, str):
        result.reasons["intervention"] = continuations
        return None
    try:
        items = continuations.items(latent)
    except ValueError as error:
        result.reasons["intervention"] = str(error)
        return None
    return _score(result, "intervention", INTERVENE, items, scorer, seed)


def explain_prompt(shown: Evidence) -> str:
    """Return the windows with marks, and the activations of marked tokens as ``ceil(10 a / maximum)``."""
    lines = []
    for number, example in enumerate(shown.train, 1):
        active = example.active()
        heights = [
            f"{token.strip()}: {min(10, math.ceil(10 * value / shown.maximum))}"
            for token, value, marked in zip(example.tokens, example.values, active, strict=True)
            if marked
        ]
        lines.append(f"Excerpt {number}: {example.text(active)}\nActivations: {', '.join(heights)}")
    return "\n\n".join(lines)


def fuzzed(shown: Evidence, seed: int = 22) -> list[tuple[str, bool]]:
    """Return marked windows and a flag each, True if the marks are correct; wrong marks are on random tokens of silent windows.

    The number of wrong marks per window is the mean number of correct ones, rounded up.
    """
    rng = np.random.default_rng(seed)
    count = math.ceil(float(np.mean([sum(example.active()) for example in shown.positive])))
    items = [(example.text(example.active()), True) for example in shown.positive]
    for example in shown.negative:
        marked = np.zeros(len(example.tokens), bool)
        marked[rng.permutation(len(example.tokens))[:count]] = True
        items.append((example.text(marked.tolist()), False))
    return items


def _score(result: Result, name: str, system: str, items: list[tuple[str, bool]], scorer: Chat, seed: int) -> float | None:
    """Return the balanced accuracy, ``(recall + specificity) / 2``, over the windows with valid answers."""
    order = np.random.default_rng(seed).permutation(len(items))
    counts = {"true_positives": 0, "false_negatives": 0, "true_negatives": 0, "false_positives": 0}
    discarded, questions = 0, math.ceil(len(items) / WINDOWS_PER_QUESTION)
    for begin in range(0, len(order), WINDOWS_PER_QUESTION):
        asked = [items[i] for i in order[begin : begin + WINDOWS_PER_QUESTION]]
        excerpts = "\n\n".join(f"Excerpt {number}: {text}" for number, (text, _) in enumerate(asked, 1))
        result.questions += 1
        said = labels_in(scorer.answer(system, f"Description: {result.text}\n\n{excerpts}"), len(asked))
        if said is None:
            discarded += 1
            continue
        for (_, true), claim in zip(asked, said, strict=True):
            counts[("true_" if claim == true else "false_") + ("positives" if claim else "negatives")] += 1
    result.malformed += discarded
    positives = counts["true_positives"] + counts["false_negatives"]
    negatives = counts["true_negatives"] + counts["false_positives"]
    result.details[name] = {**counts, "discarded": discarded}
    if not positives or not negatives:
        result.reasons[name] = f"{discarded} of {questions} answers could not be parsed"
        return None
    claimed = counts["true_positives"] + counts["false_positives"]
    recall, specificity = counts["true_positives"] / positives, counts["true_negatives"] / negatives
    result.details[name] |= {
        "recall": recall,
        "specificity": specificity,
        "f1": 2 * counts["true_positives"] / (claimed + positives),
    }
    return (recall + specificity) / 2


def explanation_in(answer: str) -> str | None:
    """Return the first line after the last ``EXPLANATION:``, or else the last line that is not empty."""
    _, _, said = answer.rpartition("EXPLANATION:")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return None
    return (lines[0] if "EXPLANATION:" in answer else lines[-1])[:500]


def labels_in(answer: str, count: int) -> list[bool] | None:
    """Return the list of ``count`` zeros and ones in an answer as booleans, or ``None`` if it is malformed."""
    match = re.search(r"\[[^\[\]]*\]", answer)
    if match is None:
        return None
    try:
        values = json.loads(match[0])
    except json.JSONDecodeError:
        return None
    if len(values) != count or any(isinstance(value, bool) or value not in (0, 1) for value in values):
        return None
    return [value == 1 for value in values]
