"""Concept bottleneck: a sparse linear classifier on all latents, its concepts by class, and the effect of zeroing one.

After the concept bottleneck of Discover-then-Name (Rao et al. 2024, arXiv:2407.14499): a linear probe on the code. Here it is
one logistic regression for each class with an L1 penalty, along a path of penalties: the sparsest one whose validation accuracy
is within one standard error of the best is refitted and tested, beside a dense probe of the activation.

A class's concept is the latent that adds most to its score: weight times mean value on the class's training rows; with it, the
latents that ``sparsary name`` gave the same name, since a dictionary may split a concept over several. Zeroing takes them out
of the code of the test rows, and nothing is refitted; the control is as many random latents of about the same densities.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from .datasets import Pooled
from .probes import ProbeInputs, logistic
from .saebench.datasets import split_texts

# Penalties: 1 / C as a share of the smallest that keeps every weight at 0.
PATH = tuple(2.0**-power for power in range(1, 11))
# liblinear penalises the intercept, too: a large constant column makes that negligible.
INTERCEPT_SCALING = 10
VALIDATION_SHARE = 0.25
DENSE_PENALTIES = (1.0, 30.0, 300.0)
CONCEPTS = 5


class ClassWeights(NamedTuple):
    """Weights and offsets of one linear score for each class."""

    weights: Float[np.ndarray, "classes columns"]
    offsets: Float[np.ndarray, " classes"]

    def scores(self, columns: ProbeInputs) -> Float[np.ndarray, "rows classes"]:
        return np.asarray(columns @ self.weights.T) + self.offsets


def bottleneck(
    data: Sequence[Pooled], seed: int, names: Mapping[int, str] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report's entries, means over the sets of data, and a row for each class.

    Args:
        names: Names of latents; those with one name are one concept.

    Raises:
        ValueError: If a set has fewer than two classes with enough rows.
    """
    classes: list[dict[str, Any]] = []
    found: list[dict[str, float]] = []
    for each in data:
        entries, own = _one_set(each, seed, names or {})
        found.append(entries)
        classes += own
    report = {f"bottleneck_{key}": float(np.mean([entries[key] for entries in found])) for key in found[0]}
    return report | {"bottleneck_sets": len(found), "bottleneck_classes": len(classes)}, classes


def with_names(classes: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return rows of classes with the names of their concepts, empty where they are not known."""
    return [
        {**row, "concepts": [concept | {"name": names.get(concept["latent"], "")} for concept in row["concepts"]]}
        for row in classes
    ]


def bottleneck_table(classes: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the classes as a table for the console: head and rows."""
    head = ["set", "class", "concepts", "strongest", "recall", "zeroed", "others", "zeroed"]
    rows = []
    for row in classes:
        first = row["concepts"][0] if row["concepts"] else {"latent": "-"}
        figures = (row["recall"], row["recall_zeroed"], row["others"], row["others_zeroed"])
        strongest = f"{first['latent']} {first.get('name', '')}".strip()
        rows.append([row["set"], row["class"], str(row["n_concepts"]), strongest, *(f"{x:.3f}" for x in figures)])
    return head, rows


def bottleneck_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    return [
        (
            "bottleneck",
            f"accuracy {report['bottleneck_accuracy']:.3f} with {report['bottleneck_concepts']:.1f} concepts a class, dense "
            f"probe {report['bottleneck_dense_accuracy']:.3f}",
        ),
        (
            "zeroing one",
            f"recall of its class falls by {report['bottleneck_zeroed_own']:.3f}, of the others by "
            f"{report['bottleneck_zeroed_others']:.3f}; with a random one by {report['bottleneck_zeroed_random_own']:.3f}",
        ),
    ]


def _one_set(data: Pooled, seed: int, names: Mapping[int, str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    generator = np.random.default_rng(seed)
    split = split_texts(data, data.labels, seed)
    labels = np.array([split.classes.index(label) if label in split.classes else -1 for label in data.labels.tolist()])
    own = [generator.permutation(split.train[labels[split.train] == number]) for number in range(len(split.classes))]
    check = np.concatenate([rows[: round(VALIDATION_SHARE * len(rows))] for rows in own])
    fit = np.concatenate([rows[round(VALIDATION_SHARE * len(rows)) :] for rows in own])
    codes = sparse.csr_array(data.codes)
    # Latents on one scale, without a shift that would fill the zeros.
    scale = 1 / np.maximum(np.asarray(abs(codes[split.train]).max(0).todense()).ravel(), 1e-30)
    scaled = sparse.csr_array(codes @ sparse.diags_array(scale))
    # liblinear reads no wider indices; codes of texts and of at most some thousand vectors fit.
    scaled.indices, scaled.indptr = scaled.indices.astype(np.int32), scaled.indptr.astype(np.int32)
    entries: dict[str, float] = {}
    accuracies = []
    for step, share in enumerate(PATH, 1):
        found = _fitted(scaled[fit], labels[fit], len(split.classes), share, seed)
        accuracies.append(_accuracy(found.scores(scaled[check]), labels[check]))
        entries[f"path_{step}_accuracy"] = accuracies[-1]
        entries[f"path_{step}_concepts"] = float((found.weights != 0).sum(1).mean())
    best = max(accuracies)
    enough = best - (best * (1 - best) / len(check)) ** 0.5
    chosen = next(place for place, accuracy in enumerate(accuracies) if accuracy >= enough)
    sparse_probe = _fitted(scaled[split.train], labels[split.train], len(split.classes), PATH[chosen], seed)
    test = scaled[split.test]
    truth = labels[split.test]
    accuracy = _accuracy(sparse_probe.scores(test), truth)
    dense = _dense_accuracy(data.x, labels, (fit, check, split.train, split.test), len(split.classes))
    classes: list[dict[str, Any]] = [
        _class_row(number, sparse_probe, scaled, (split.train, split.test), labels, names, generator)
        | {"set": data.name, "class": label}
        for number, label in enumerate(split.classes)
    ]
    # A class that is the absence of all others has no concept to zero.
    zeroed = [row for row in classes if row["concepts"]]

    def lost(key: str, after: str) -> float:
        return float(np.mean([row[key] - row[after] for row in zeroed])) if zeroed else 0.0

    entries |= {
        "accuracy": accuracy,
        "dense_accuracy": dense,
        "gap": dense - accuracy,
        "concepts": float((sparse_probe.weights != 0).sum(1).mean()),
        "used_latents": float((sparse_probe.weights != 0).any(0).sum()),
        "chance": float(np.bincount(truth).max() / len(truth)),
        "zeroed_own": lost("recall", "recall_zeroed"),
        "zeroed_others": lost("others", "others_zeroed"),
        "zeroed_random_own": lost("recall", "recall_random"),
    }
    return entries, classes


def _fitted(columns: ProbeInputs, labels: np.ndarray, classes: int, share: float, seed: int) -> ClassWeights:
    weights, offsets = np.zeros((classes, columns.shape[1])), np.zeros(classes)
    for number in range(classes):
        y = labels == number
        # Below this C every weight is 0 (the intercept alone is fitted).
        least = np.abs(np.asarray(columns.T @ (y - y.mean()))).max()
        probe = LogisticRegression(
            l1_ratio=1.0,
            C=1 / max(share * least, 1e-12),
            solver="liblinear",
            intercept_scaling=INTERCEPT_SCALING,
            random_state=seed,
            max_iter=300,
            tol=1e-3,
        )
        with warnings.catch_warnings():
            # The weights that count are there long before; accuracy is measured, not assumed.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(columns, y)
        weights[number], offsets[number] = probe.coef_[0], np.atleast_1d(probe.intercept_)[0]
    return ClassWeights(weights, offsets)


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


def _dense_accuracy(x: np.ndarray, labels: np.ndarray, parts: tuple[np.ndarray, ...], classes: int) -> float:
    fit, check, train, test = parts

    def probe(rows: np.ndarray, penalty: float) -> ClassWeights:
        found = [logistic(x[rows], labels[rows] == number, penalty) for number in range(classes)]
        return ClassWeights(np.stack([each.weights for each in found]), np.array([each.offset for each in found]))

    best = max(DENSE_PENALTIES, key=lambda penalty: _accuracy(probe(fit, penalty).scores(x[check]), labels[check]))
    return _accuracy(probe(train, best).scores(x[test]), labels[test])


def _class_row(
    number: int,
    probe: ClassWeights,
    codes: Any,
    rows: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    names: Mapping[int, str],
    generator: np.random.Generator,
) -> dict[str, Any]:
    train, test = rows
    own = train[labels[train] == number]
    contribution = probe.weights[number] * np.asarray(codes[own].mean(0)).ravel()
    strongest = [int(latent) for latent in np.argsort(-contribution, kind="stable")[:CONCEPTS] if contribution[latent] > 0]
    code, truth = codes[test], labels[test]
    before = probe.scores(code).argmax(1) == truth
    mine = truth == number
    row: dict[str, Any] = {
        "rows": int(mine.sum()),
        "n_concepts": int((probe.weights[number] != 0).sum()),
        "concepts": [
            {
                "latent": latent,
                "weight": round(float(probe.weights[number, latent]), 5),
                "contribution": round(float(contribution[latent]), 5),
            }
            for latent in strongest
        ],
        "recall": float(before[mine].mean()),
        "others": float(before[~mine].mean()),
    }
    concept = strongest[:1]
    if concept and concept[0] in names:
        concept += sorted(latent for latent, name in names.items() if name == names[concept[0]] and latent != concept[0])
    for key, latents in (("zeroed", concept), ("random", _like(codes[train], concept, generator))):
        after = probe.scores(without(code, latents)).argmax(1) == truth
        row |= {f"recall_{key}": float(after[mine].mean()), f"others_{key}": float(after[~mine].mean())}
        row[f"{key}_latents"] = latents
    return row


def without(codes: Any, latents: Sequence[int]) -> Any:
    """Return sparse codes with some latents silent."""
    kept = np.ones(codes.shape[1])
    kept[list(latents)] = 0
    return sparse.csr_array(codes @ sparse.diags_array(kept))


def _like(codes: Any, latents: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Return as many random latents, each among the ten others whose density is nearest to that of one of them."""
    density = np.bincount(codes.indices[codes.data != 0], minlength=codes.shape[1]) / codes.shape[0]
    found: list[int] = []
    for latent in latents:
        distance = np.abs(density - density[latent])
        distance[[*latents, *found]] = np.inf
        near = [int(other) for other in np.argsort(distance, kind="stable")[:10] if np.isfinite(distance[other])]
        found += [int(generator.choice(near))] if near else []
    return found
