"""Sparse probing: accuracy of logistic probes on the k most informative latents."""

from typing import Any

import numpy as np

from ...bootstrap import bootstrap_mean
from ...pages.numbers import show
from ..datasets import Pooled
from ..probes import ProbeInputs, logistic
from ..subject import ProbeTarget
from .datasets import balanced_rows, split_texts, submatrix
from .output import SaebenchResult

K_VALUES = (1, 2, 5, 10, 20)


def sparse_probing(subject: ProbeTarget, data: list[Pooled], seed: int = 0) -> SaebenchResult:
    """Compute the accuracy of probes on the k latents (or dimensions) whose means differ most between a class and the others.

    Each class is compared with equally many texts of the others, so chance is 0.5. Dead latents are not excluded.
    """
    details, correct, unstructured = [], {}, {}
    for one in data:
        split = split_texts(one, one.labels, seed)
        scores: dict[str, list[float]] = {}
        for name in split.classes:
            generator = np.random.default_rng(seed)
            train, test = (balanced_rows(one.labels, rows, name, generator) for rows in (split.train, split.test))
            y, truth = one.labels[train] == name, one.labels[test] == name
            for side, columns in (("llm", one.x), ("sae", one.codes)):
                known = submatrix(columns, train)
                order = _largest_difference(known, y)
                width = known.shape[1]
                for k in (None, *(k for k in K_VALUES if k <= width)):
                    some = None if k is None else order[:k]
                    key = f"{side}_test_accuracy" if k is None else f"{side}_top_{k}_test_accuracy"
                    probe = logistic(submatrix(columns, train, some), y)
                    hits = (probe.scores(submatrix(columns, test, some)) > 0) == truth
                    scores.setdefault(key, []).append(float(hits.mean()))
                    correct.setdefault(key, []).append(hits)
        details.append({"dataset_name": one.name} | {key: float(np.mean(values)) for key, values in scores.items()})
        unstructured[one.name] = {key: dict(zip(split.classes, values, strict=True)) for key, values in scores.items()}
    summary: dict[str, Any] = {"sparse_probing_chance": 0.5, "sparse_probing_datasets": len(data)}
    metrics: dict[str, dict[str, Any]] = {"llm": {}, "sae": {}}
    for key in details[0]:
        if key == "dataset_name":
            continue
        value = float(np.mean([detail[key] for detail in details]))
        metrics[key[:3]][key] = value
        spread = bootstrap_mean(np.concatenate(correct[key]).astype(float), seed)
        summary |= {f"sparse_probing_{key}": value}
        # The interval is of the mean over texts, shifted to the mean over data sets.
        summary |= {f"sparse_probing_{key}_low": value + spread.low - spread.mean}
        summary |= {f"sparse_probing_{key}_high": value + spread.high - spread.mean}
    keys = {f"top {k}": f"top_{k}_test_accuracy" for k in K_VALUES} | {"all": "test_accuracy"}
    keys = {head: key for head, key in keys.items() if f"sae_{key}" in metrics["sae"] or f"llm_{key}" in metrics["llm"]}
    rows = [
        [name, *(show(metrics[side].get(f"{side}_{key}"), "-", digits=3) for key in keys.values())]
        for side, name in (("sae", "latents"), ("llm", "dimensions"))
    ]
    config = {
        "random_seed": seed,
        "dataset_names": [one.name for one in data],
        "probe_train_set_size": max(len(split_texts(one, one.labels, seed).train) for one in data),
        "probe_test_set_size": max(len(split_texts(one, one.labels, seed).test) for one in data),
        "context_length": subject.text.context_length,
        "model_name": subject.model.id,
        "k_values": list(K_VALUES),
    }
    return SaebenchResult(summary, metrics, details, config, (["sparse probing accuracy", *keys], rows))


def _largest_difference(columns: ProbeInputs, y: np.ndarray) -> np.ndarray:
    """Return column indices by descending |mean where true - mean where false|."""
    yes, no = (np.asarray(submatrix(columns, np.flatnonzero(side)).mean(0)).ravel() for side in (y, ~y))
    return np.argsort(-np.abs(yes - no), kind="stable")
