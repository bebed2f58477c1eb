"""Spurious correlation removal (SCR) and targeted probe perturbation (TPP)."""

from typing import Any

import numpy as np
from scipy import sparse

from ...pages.numbers import show
from ..datasets import Pooled
from ..probes import LinearProbe, logistic
from ..subject import ProbeTarget, latent_writes
from .datasets import LEAST_TEXTS, balanced_rows, split_texts
from .output import PENALTY, SaebenchResult

# Shown with the scores in probing.json and on the terminal, so that they are not quoted without it.
UNRELIABLE = "a later study of SAEBench's metrics found SCR and TPP unreliable and advises against their use (arXiv:2605.18229)"
N_VALUES = (2, 5, 10, 20, 50, 100, 500)


def _without(x: np.ndarray, codes: sparse.csr_array, writes: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Return mean activations with some latents ablated and the dictionary's error kept."""
    return x - codes[:, latents] @ writes[latents] if len(latents) else x


def _effects(one: Pooled, rows: np.ndarray, y: np.ndarray, probe: LinearProbe, writes: np.ndarray) -> np.ndarray:
    """Return each latent's difference of means between the classes, and its decoder direction's projection on the probe."""
    codes = sparse.csr_array(one.codes)[rows]
    difference = np.asarray(codes[np.flatnonzero(y)].mean(0)).ravel() - np.asarray(codes[np.flatnonzero(~y)].mean(0)).ravel()
    return np.stack([difference, writes @ probe.weights])


def _top(effects: np.ndarray, n: int) -> np.ndarray:
    order = np.argsort(-effects, kind="stable")[:n]
    return order[effects[order] != 0]


def scr(subject: ProbeTarget, data: list[Pooled], seed: int = 0) -> SaebenchResult:
    """Compute spurious correlation removal: ablate latents of one of two labels that coincide in a probe's training data.

    Direction 1 ablates latents of the spurious label and reads the true one, direction 2 the reverse. The score is the
    fraction of the accuracy lost to the bias that is recovered, or 0 if none was lost. ``metric`` is the direction in which
    the biased probe was less accurate. After SHIFT (Marks et al. 2024), in SAEBench's form.

    Raises:
        ValueError: If no data set has both a binary label and a binary spurious label.
    """
    subject.require_in_place("scr")
    usable = [one for one in data if one.spurious is not None and _two(one.labels) and _two(one.spurious)]
    if not usable:
        raise ValueError(
            "--task scr: expected labelled text with two labels and a second key, spurious, of two values, got none. "
            'Add "spurious" to every line of --labels, or leave the task out.'
        )
    writes = latent_writes(subject)
    details, accuracies = [], []
    for one in usable:
        assert one.spurious is not None
        groups = np.array([f"{a} and {b}" for a, b in zip(one.labels, one.spurious, strict=True)])
        split = split_texts(one, groups, seed)
        if len(split.classes) < 4:
            raise ValueError(
                f"{one.name}: expected at least {LEAST_TEXTS} texts for each of the four pairs of label and spurious, got them "
                f"for {', '.join(split.classes)} only."
            )
        truth = {"label": one.labels == sorted(set(one.labels.tolist()))[0]}
        truth["spurious"] = one.spurious == sorted(set(one.spurious.tolist()))[0]
        agree = truth["label"] == truth["spurious"]
        probes = {key: logistic(one.x[split.train], truth[key][split.train], PENALTY * len(split.train)) for key in truth}
        biased_rows = split.train[agree[split.train]]
        biased = logistic(one.x[biased_rows], truth["label"][biased_rows], PENALTY * len(biased_rows))
        codes = sparse.csr_array(one.codes)[split.test]
        x = one.x[split.test]
        clean = {key: _accuracy(probes[key], x, truth[key][split.test]) for key in truth}
        before = {key: _accuracy(biased, x, truth[key][split.test]) for key in truth}
        detail: dict[str, Any] = {"dataset_name": one.name}
        for direction, silenced, read in ((1, "spurious", "label"), (2, "label", "spurious")):
            difference, along = _effects(one, split.train, truth[silenced][split.train], probes[silenced], writes)
            effects = np.abs(difference * along)
            for n in _counts(len(effects)):
                after = _accuracy(biased, _without(x, codes, writes, _top(effects, n)), truth[read][split.test])
                lost = clean[read] - before[read]
                score = 0.0 if lost < 0.001 else (after - before[read]) / lost
                detail[f"scr_dir{direction}_threshold_{n}"] = score
                if (direction == 1) == (before["label"] < before["spurious"]):
                    detail[f"scr_metric_threshold_{n}"] = score
        details.append(detail)
        accuracies.append({"clean": clean, "biased": before})
    metrics = {"scr_metrics": _means(details)}
    summary = metrics["scr_metrics"] | {
        "scr_clean_accuracy": float(np.mean([value for found in accuracies for value in found["clean"].values()])),
        "scr_biased_accuracy": float(np.mean([value for found in accuracies for value in found["biased"].values()])),
        "scr_datasets": len(usable),
        "scr_warning": UNRELIABLE,
    }
    counts = _counts(len(writes))[:5]
    cells = [show(summary[f"scr_metric_threshold_{n}"], digits=3) for n in counts]
    table = (["SCR, latents ablated", *map(str, counts)], [["fraction of the gap closed", *cells]])
    config = _interventions_config(subject, usable, seed, True)
    return SaebenchResult(summary, metrics, details, config, table, (("SCR, doubt", UNRELIABLE),))


def _two(values: np.ndarray) -> bool:
    return len(set(values.tolist())) == 2


def _accuracy(probe: LinearProbe, x: np.ndarray, truth: np.ndarray) -> float:
    """Return the balanced accuracy of a probe."""
    right = (probe.scores(x) > 0) == truth
    return float((right[truth].mean() + right[~truth].mean()) / 2)


def _counts(n_latents: int) -> list[int]:
    return [n for n in N_VALUES if n <= n_latents]


def _means(details: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([d[key] for d in details])) for key in details[0] if key not in ("dataset_name", "classes")}


def _interventions_config(subject: ProbeTarget, data: list[Pooled], seed: int, perform_scr: bool) -> dict[str, Any]:
    config = {
        "random_seed": seed,
        "dataset_names": [one.name for one in data],
        "perform_scr": perform_scr,
        "context_length": subject.text.context_length,
        "model_name": subject.model.id,
        "n_values": list(N_VALUES),
    }
    if perform_scr:
        config["column1_vals_lookup"] = {one.name: [sorted(set(one.labels.tolist()))] for one in data}
    return config


def tpp(subject: ProbeTarget, data: list[Pooled], seed: int = 0) -> SaebenchResult:
    """Compute targeted probe perturbation: the accuracy loss of a class's probe, minus that of other classes' probes.

    The loss is caused by ablating the class's most important latents.

    Raises:
        ValueError: If no data set has three classes: with two, one probe is the other's negative.
    """
    subject.require_in_place("tpp")
    usable = [one for one in data if len(set(one.labels.tolist())) > 2]
    if not usable:
        raise ValueError("--task tpp: expected labelled text of at least three classes, got two. Leave the task out.")
    writes = latent_writes(subject)
    details = []
    for one in usable:
        split = split_texts(one, one.labels, seed)
        if len(split.classes) < 3:
            raise ValueError(f"{one.name}: expected three classes with {LEAST_TEXTS} texts or more, got {split.classes}.")
        probes, tests = {}, {}
        for name in split.classes:
            generator = np.random.default_rng(seed)
            train, tests[name] = (balanced_rows(one.labels, rows, name, generator) for rows in (split.train, split.test))
            probes[name] = (logistic(one.x[train], one.labels[train] == name, PENALTY * len(train)), train)
        csr = sparse.csr_array(one.codes)

        def accuracies(
            silenced: np.ndarray, one: Pooled = one, probes: dict = probes, tests: dict = tests, csr: Any = csr
        ) -> dict[str, float]:
            return {
                name: _accuracy(probe, _without(one.x[rows], csr[rows], writes, silenced), one.labels[rows] == name)
                for (name, (probe, _)), rows in zip(probes.items(), tests.values(), strict=True)
            }

        clean = accuracies(np.zeros(0, dtype=int))
        found: dict[str, list[float]] = {}
        for name, (probe, train) in probes.items():
            difference, along = _effects(one, train, one.labels[train] == name, probe, writes)
            effects = np.maximum(difference, 0) * along
            for n in _counts(len(effects)):
                after = accuracies(_top(effects, n))
                lost = {other: clean[other] - after[other] for other in clean}
                own, rest = lost.pop(name), float(np.mean(list(lost.values())))
                for key, value in (("total_metric", own - rest), ("intended_diff_only", own), ("unintended_diff_only", rest)):
                    found.setdefault(f"tpp_threshold_{n}_{key}", []).append(value)
        details.append({"dataset_name": one.name} | {key: float(np.mean(values)) for key, values in found.items()})
    metrics = {"tpp_metrics": _means(details)}
    summary = metrics["tpp_metrics"] | {"tpp_datasets": len(usable), "tpp_warning": UNRELIABLE}
    counts = _counts(len(writes))[:5]
    cells = [show(summary[f"tpp_threshold_{n}_total_metric"], digits=3) for n in counts]
    table = (["TPP, latents ablated", *map(str, counts)], [["accuracy lost, own - other probes", *cells]])
    config = _interventions_config(subject, usable, seed, False)
    return SaebenchResult(summary, metrics, details, config, table, (("TPP, doubt", UNRELIABLE),))
