"""Labelled texts for SAEBench's tasks, and balanced training and test splits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ....training.embedded import corpus
from ..datasets import Labelled, Pooled
from ..probes import ProbeInputs

# Per class; SAEBench uses 4,000 training and 1,000 test texts per task.
PASSAGES = 300
TEST_SHARE = 0.25
LEAST_TEXTS = 8


def embedded_data(seed: int = 0, passages: int = PASSAGES) -> list[Labelled]:
    """Return labelled passages of the embedded corpus: task, gender, number, order of names, and topic.

    Gender has the profession, and number the attractor's number, as its spurious label.
    """
    tasks = [passage for task in corpus.TASKS for passage in _passages(task, seed, lambda p, t=task: t, {task: passages})]
    professions = {"doctor", "nurse"}

    def person(passage: corpus.FilledPassage) -> tuple[str, str] | None:
        found = {str(w.factors["entity"]) for w in passage.words if w.factors["role"] == "profession"} & professions
        gender = next(w.factors["gender"] for w in passage.words if "gender" in w.factors)
        return (str(gender), found.pop()) if len(found) == 1 else None

    def numbers(passage: corpus.FilledPassage) -> tuple[str, str] | None:
        subject = next(w.factors["number"] for w in passage.words if w.factors["role"] == "subject")
        other = [w.factors["number"] for w in passage.words if w.factors["role"] == "attractor"]
        names = ("singular", "plural")
        return (names[int(subject)], names[int(other[0])]) if other else None

    def order(passage: corpus.FilledPassage) -> str | None:
        return next((str(w.factors["order"]) for w in passage.words if w.factors.get("order", "ABC") != "ABC"), None)

    pairs = {(gender, profession): passages for gender in ("male", "female") for profession in sorted(professions)}
    both = {(a, b): passages for a in ("singular", "plural") for b in ("singular", "plural")}
    topics = [_passages("filler", seed, lambda p, t=t: f"topic {t}", {f"topic {t}": passages}, t) for t in range(4)]
    found = [
        ("task", tasks),
        ("gender", _passages("pronoun", seed, person, pairs)),
        ("number", _passages("agreement", seed, numbers, both)),
        ("order", _passages("indirect_object", seed, order, {"ABBA": passages, "BABA": passages})),
        ("topic", [passage for some in topics for passage in some]),
    ]
    return [_labelled(name, rows) for name, rows in found]


def _passages(
    task: str, seed: int, label: Callable[[corpus.FilledPassage], Any], wanted: dict[Any, int], topic: int = 0
) -> list[tuple[str, Any]]:
    """Generate passages until every label has its ``wanted`` number."""
    left, found, index = dict(wanted), [], 0
    while any(left.values()):
        passage = corpus.FilledPassage(task)
        corpus.TASKS[task][0](corpus.DocumentChoices(f"labelled/{seed}/{task}/{topic}/{index}", "all"), passage, topic)
        index += 1
        what = label(passage)
        if left.get(what):
            left[what] -= 1
            found.append((corpus.join(passage.words), what))
    return found


def _labelled(name: str, rows: list[tuple[str, Any]]) -> Labelled:
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    if isinstance(labels[0], tuple):
        return Labelled(name, texts, [label for label, _ in labels], [second for _, second in labels])
    return Labelled(name, texts, labels)


@dataclass(frozen=True)
class TextSplit:
    """Row indices of the training and test texts, and the classes with enough texts."""

    train: np.ndarray
    test: np.ndarray
    classes: list[str]


def split_texts(data: Labelled | Pooled, groups: np.ndarray, seed: int) -> TextSplit:
    """Split texts into training and test sets, with a quarter of every group for testing.

    Raises:
        ValueError: If fewer than two classes have enough texts.
    """
    generator = np.random.default_rng(seed)
    train, test, classes = [], [], []
    for name in sorted(set(groups.tolist())):
        rows = generator.permutation(np.flatnonzero(groups == name))
        if len(rows) < LEAST_TEXTS:
            continue
        cut = max(2, math.ceil(TEST_SHARE * len(rows)))
        classes.append(name)
        test.append(rows[:cut])
        train.append(rows[cut:])
    if len(classes) < 2:
        raise ValueError(
            f"{data.name}: label: expected at least two classes with {LEAST_TEXTS} texts or more, got "
            f"{ {str(name): int((groups == name).sum()) for name in sorted(set(groups.tolist()))} }."
        )
    return TextSplit(np.concatenate(train), np.concatenate(test), classes)


def balanced_rows(labels: np.ndarray, rows: np.ndarray, positive: str, generator: np.random.Generator) -> np.ndarray:
    """Return equally many rows of the positive class and of all others, as many as both have."""
    yes, others = rows[labels[rows] == positive], rows[labels[rows] != positive]
    # Take rows from the other classes in turn.
    ranks = np.zeros(len(others))
    for name in sorted(set(labels[others].tolist())):
        where = np.flatnonzero(labels[others] == name)
        ranks[generator.permutation(where)] = np.arange(len(where))
    n = min(len(yes), len(others))
    return np.concatenate([generator.permutation(yes)[:n], others[np.argsort(ranks, kind="stable")[:n]]])


def submatrix(columns: ProbeInputs, rows: np.ndarray, some: np.ndarray | None = None) -> ProbeInputs:
    """Return the given rows and, optionally, columns; selected sparse columns are returned dense."""
    if isinstance(columns, np.ndarray):
        return columns[rows] if some is None else columns[rows][:, some]
    part = sparse.csr_array(columns)[rows]
    return sparse.csc_array(part) if some is None else sparse.csc_array(part)[:, some].toarray()
