"""Tasks after SAEBench that need no hub and no API: k-sparse probing, spurious correlations, targeted perturbation, absorption.

On passages of the embedded corpus, or on labelled text of the user's. Probes are penalised logistic regressions fitted to the
optimum, where SAEBench takes a fixed number of steps, and train and test texts are drawn from the same file: figures are
comparable between dictionaries judged here, not with published ones.
"""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ..training.embedded import corpus
from .probing.absorption import absorbed
from .probing.datasets import Labelled, Pooled, embedded_tokens, halves
from .probing.factors import LEAST_PROBE_F1, labels_of
from .probing.probes import Columns, Probe, bootstrap_mean, f1_of, logistic, split_latents
from .probing.subject import Subject, sparse_codes
from .saebench_adapter import SaeBenchAdapter

K_VALUES = (1, 2, 5, 10, 20)
N_VALUES = (2, 5, 10, 20, 50, 100, 500)
# Of each class; SAEBench has 4,000 and 1,000 texts a task.
PASSAGES = 300
TEST_SHARE = 0.25
LEAST_TEXTS = 8
ABSORPTION_TOKENS = 30_000
# Per text, on standardised dimensions, for the probes that interventions are to change: as if stopped early, like SAEBench's,
# so that a biased probe reads all that coincides and not only what separates best.
PENALTY = 0.1
# Labels with words of their own, which a word's own latent may absorb.
ABSORBABLE = ("class", "gender", "number", "century")


@dataclass(frozen=True)
class Task:
    """A task's figures, flat; what belongs in SAEBench's result file; and lines for a terminal."""

    summary: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    details: list[dict[str, Any]]
    config: dict[str, Any]
    lines: list[tuple[str, str]]


def embedded_data(seed: int = 0, passages: int = PASSAGES) -> list[Labelled]:
    """Labelled passages: which task, whose gender (beside a profession), whose number (beside an attractor's), which order of
    names, which topic."""
    tasks = [passage for task in corpus.TASKS for passage in _passages(task, seed, lambda p, t=task: t, {task: passages})]
    professions = {"doctor", "nurse"}

    def person(passage: corpus.Passage) -> tuple[str, str] | None:
        found = {str(w.factors["entity"]) for w in passage.words if w.factors["role"] == "profession"} & professions
        gender = next(w.factors["gender"] for w in passage.words if "gender" in w.factors)
        return (str(gender), found.pop()) if len(found) == 1 else None

    def numbers(passage: corpus.Passage) -> tuple[str, str] | None:
        subject = next(w.factors["number"] for w in passage.words if w.factors["role"] == "subject")
        other = [w.factors["number"] for w in passage.words if w.factors["role"] == "attractor"]
        names = ("singular", "plural")
        return (names[int(subject)], names[int(other[0])]) if other else None

    def order(passage: corpus.Passage) -> str | None:
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
    task: str, seed: int, label: Callable[[corpus.Passage], Any], wanted: dict[Any, int], topic: int = 0
) -> list[tuple[str, Any]]:
    """Texts and labels of so many passages of each label."""
    left, found, index = dict(wanted), [], 0
    while any(left.values()):
        passage = corpus.Passage(task)
        corpus.TASKS[task][0](corpus.Draw(f"labelled/{seed}/{task}/{topic}/{index}", "all"), passage, topic)
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
class _Split:
    """Row numbers of the training and test texts, and the classes with enough of both."""

    train: np.ndarray
    test: np.ndarray
    classes: list[str]


def _split(data: Pooled, groups: np.ndarray, seed: int) -> _Split:
    """A quarter of every group is for testing.

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
    return _Split(np.concatenate(train), np.concatenate(test), classes)


def _balanced(labels: np.ndarray, rows: np.ndarray, positive: str, generator: np.random.Generator) -> np.ndarray:
    """As many rows of other classes as of the positive one, or fewer of both."""
    yes, others = rows[labels[rows] == positive], rows[labels[rows] != positive]
    # Every other class gives its part.
    ranks = np.zeros(len(others))
    for name in sorted(set(labels[others].tolist())):
        where = np.flatnonzero(labels[others] == name)
        ranks[generator.permutation(where)] = np.arange(len(where))
    n = min(len(yes), len(others))
    return np.concatenate([generator.permutation(yes)[:n], others[np.argsort(ranks, kind="stable")[:n]]])


def _take(columns: Columns, rows: np.ndarray, some: np.ndarray | None = None) -> Columns:
    if isinstance(columns, np.ndarray):
        return columns[rows] if some is None else columns[rows][:, some]
    part = sparse.csr_array(columns)[rows]
    return sparse.csc_array(part) if some is None else sparse.csc_array(part)[:, some].toarray()


def _largest_difference(columns: Columns, y: np.ndarray) -> np.ndarray:
    """Columns by falling |mean where true - mean where false|."""
    yes, no = (np.asarray(_take(columns, np.flatnonzero(side)).mean(0)).ravel() for side in (y, ~y))
    return np.argsort(-np.abs(yes - no), kind="stable")


def sparse_probing(subject: Subject, data: list[Pooled], seed: int = 0) -> Task:
    """Accuracy of probes on the k latents, or dimensions, whose means differ most between a class and the others.

    One class against as many texts of the others, so that chance is 0.5; k among all latents, dead ones included.
    """
    details, correct, unstructured = [], {}, {}
    for one in data:
        split = _split(one, one.labels, seed)
        scores: dict[str, list[float]] = {}
        for name in split.classes:
            generator = np.random.default_rng(seed)
            train, test = (_balanced(one.labels, rows, name, generator) for rows in (split.train, split.test))
            y, truth = one.labels[train] == name, one.labels[test] == name
            for side, columns in (("llm", one.x), ("sae", one.codes)):
                known = _take(columns, train)
                order = _largest_difference(known, y)
                width = known.shape[1]
                for k in (None, *(k for k in K_VALUES if k <= width)):
                    some = None if k is None else order[:k]
                    key = f"{side}_test_accuracy" if k is None else f"{side}_top_{k}_test_accuracy"
                    probe = logistic(_take(columns, train, some), y)
                    hits = (probe.scores(_take(columns, test, some)) > 0) == truth
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
        # Of the mean over texts, shifted to the mean over data sets.
        summary |= {f"sparse_probing_{key}_low": value + spread.low - spread.mean}
        summary |= {f"sparse_probing_{key}_high": value + spread.high - spread.mean}
    lines = []
    for side, name in (("sae", "latents"), ("llm", "dimensions")):
        found = metrics[side]
        cells = [
            f"{k} {found[f'{side}_top_{k}_test_accuracy']:.3f}" for k in K_VALUES if f"{side}_top_{k}_test_accuracy" in found
        ]
        cells.append(f"all {found[f'{side}_test_accuracy']:.3f}")
        lines.append(("sparse probing", f"accuracy of {name}: {'   '.join(cells)}"))
    config = {
        "random_seed": seed,
        "dataset_names": [one.name for one in data],
        "probe_train_set_size": max(len(_split(one, one.labels, seed).train) for one in data),
        "probe_test_set_size": max(len(_split(one, one.labels, seed).test) for one in data),
        "context_length": subject.text.context_length,
        "model_name": subject.model.id,
        "k_values": list(K_VALUES),
    }
    return Task(summary, metrics, details, config, lines)


def _writes(subject: Subject) -> np.ndarray:
    """What every latent's unit of value adds to the activation."""
    dictionary = subject.dictionary
    return (dictionary.atoms * dictionary.out_scale).detach().float().cpu().numpy()


def _without(x: np.ndarray, codes: sparse.csr_array, writes: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Mean activations with some latents silenced and the dictionary's error kept."""
    return x - codes[:, latents] @ writes[latents] if len(latents) else x


def _effects(one: Pooled, rows: np.ndarray, y: np.ndarray, probe: Probe, writes: np.ndarray) -> np.ndarray:
    """How much each latent moves a probe's logit between the two classes."""
    codes = sparse.csr_array(one.codes)[rows]
    difference = np.asarray(codes[np.flatnonzero(y)].mean(0)).ravel() - np.asarray(codes[np.flatnonzero(~y)].mean(0)).ravel()
    return np.stack([difference, writes @ probe.weights])


def _top(effects: np.ndarray, n: int) -> np.ndarray:
    order = np.argsort(-effects, kind="stable")[:n]
    return order[effects[order] != 0]


def scr(subject: Subject, data: list[Pooled], seed: int = 0) -> Task:
    """Spurious correlation removal: a probe trained where two labels coincide, with latents of one of them silenced.

    Direction 1 silences latents of the spurious label and reads the other off, direction 2 the reverse; the score is the
    part of the accuracy lost to the coincidence that comes back: 0 if none was lost. ``metric`` is the direction in which
    the biased probe was the less accurate. After SHIFT (Marks et al. 2024), in SAEBench's form.

    Raises:
        ValueError: If no data set has a second label of two values beside a first of two.
    """
    subject.require_in_place("scr")
    usable = [one for one in data if one.spurious is not None and _two(one.labels) and _two(one.spurious)]
    if not usable:
        raise ValueError(
            "--task scr: expected labelled text with two labels and a second key, spurious, of two values, got none. "
            'Add "spurious" to every line of --labels, or leave the task out.'
        )
    writes = _writes(subject)
    details, accuracies = [], []
    for one in usable:
        assert one.spurious is not None
        groups = np.array([f"{a} and {b}" for a, b in zip(one.labels, one.spurious, strict=True)])
        split = _split(one, groups, seed)
        if len(split.classes) < 4:
            raise ValueError(
                f"{one.name}: expected {LEAST_TEXTS} texts or more of all four pairs of label and spurious, got them of "
                f"{', '.join(split.classes)} only."
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
    }
    shown = "   ".join(f"{n} {summary[f'scr_metric_threshold_{n}']:.3f}" for n in _counts(len(writes))[:5])
    config = _interventions_config(subject, usable, seed, True)
    return Task(summary, metrics, details, config, [("SCR", f"share recovered, latents silenced: {shown}")])


def _two(values: np.ndarray) -> bool:
    return len(set(values.tolist())) == 2


def _accuracy(probe: Probe, x: np.ndarray, truth: np.ndarray) -> float:
    """Both classes count alike."""
    right = (probe.scores(x) > 0) == truth
    return float((right[truth].mean() + right[~truth].mean()) / 2)


def _counts(n_latents: int) -> list[int]:
    return [n for n in N_VALUES if n <= n_latents]


def _means(details: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([d[key] for d in details])) for key in details[0] if key not in ("dataset_name", "classes")}


def _interventions_config(subject: Subject, data: list[Pooled], seed: int, perform_scr: bool) -> dict[str, Any]:
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


def tpp(subject: Subject, data: list[Pooled], seed: int = 0) -> Task:
    """Targeted probe perturbation: how much accuracy a class's probe loses when its latents are silenced, less what the
    probes of other classes lose.

    Raises:
        ValueError: If no data set has three classes: with two, one probe is the other's negative.
    """
    subject.require_in_place("tpp")
    usable = [one for one in data if len(set(one.labels.tolist())) > 2]
    if not usable:
        raise ValueError("--task tpp: expected labelled text of at least three classes, got two. Leave the task out.")
    writes = _writes(subject)
    details = []
    for one in usable:
        split = _split(one, one.labels, seed)
        if len(split.classes) < 3:
            raise ValueError(f"{one.name}: expected three classes with {LEAST_TEXTS} texts or more, got {split.classes}.")
        probes, tests = {}, {}
        for name in split.classes:
            generator = np.random.default_rng(seed)
            train, tests[name] = (_balanced(one.labels, rows, name, generator) for rows in (split.train, split.test))
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
    summary = metrics["tpp_metrics"] | {"tpp_datasets": len(usable)}
    shown = "   ".join(f"{n} {summary[f'tpp_threshold_{n}_total_metric']:.3f}" for n in _counts(len(writes))[:5])
    config = _interventions_config(subject, usable, seed, False)
    return Task(summary, metrics, details, config, [("TPP", f"own loss less others', latents silenced: {shown}")])


def absorption(subject: Subject, data: list[Pooled] | None, seed: int = 0, tokens: int = ABSORPTION_TOKENS) -> Task:
    """Absorption of labels: of the embedded corpus's word classes, token by token, or of labelled texts, text by text.

    SAEBench asks this of first letters only, so its result file has no name for our labels but ``first_letter``: there is
    ``label`` in its place, and the type is ``absorption``.

    Raises:
        ValueError: If the dictionary writes elsewhere than at its hook, or no label is left.
    """
    subject.require_in_place("absorption")
    rows: list[dict[str, Any]] = []
    if data is None:
        known = embedded_tokens(subject, tokens, neurons=False)
        fitted = halves(known.documents, seed)
        labels = labels_of(known.factors, fitted)
        some = [i for i, family in enumerate(labels.families) if family in ABSORBABLE]
        if not some:
            raise ValueError(f"--tokens: {tokens} tokens hold none of the labels often enough. Raise --tokens.")
        codes = sparse_codes(subject, known.x)
        rows = [_absorption_row(subject, known.x, codes, labels.values[:, i], fitted, labels.names[i], seed) for i in some]
    for one in data or []:
        split = _split(one, one.labels, seed)
        fitted = np.zeros(len(one.labels), dtype=bool)
        fitted[split.train] = True
        names = split.classes if len(split.classes) > 2 else split.classes[:1]
        rows += [
            _absorption_row(subject, one.x, one.codes, one.labels == name, fitted, f"{one.name}: {name}", seed)
            for name in names
        ]
    scored = [row for row in rows if row["mean_absorption_fraction"] is not None]
    keys = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    mean: dict[str, Any] = {}
    for name, key in keys.items():
        values = np.array([row[key] for row in scored])
        mean[f"mean_{name}"] = float(values.mean()) if len(values) else None
        mean[f"std_dev_{name}"] = float(values.std(ddof=1)) if len(values) > 1 else None
    summary = {f"absorption_{key}": value for key, value in mean.items()}
    summary |= {"absorption_labels": len(scored), "absorption_skipped": len(rows) - len(scored)}
    if not scored:
        summary["absorption_why"] = rows[0]["why"]
    details = [{key: value for key, value in row.items() if key != "why"} for row in scored]
    config = {"random_seed": seed, "model_name": subject.model.id, "min_GT_probe_f1": LEAST_PROBE_F1}
    shown = "undefined" if not scored else f"fraction {mean['mean_absorption_fraction_score']:.3f}"
    shown += (
        ""
        if not scored
        else f"   full {mean['mean_full_absorption_score']:.3f}   latents {mean['mean_num_split_features']:.2f}"
    )
    return Task(summary, {"mean": mean}, details, config, [("absorption", f"{shown}   of {len(scored)} labels")])


def _absorption_row(
    subject: Subject, x: np.ndarray, codes: sparse.csc_array, y: np.ndarray, fitted: np.ndarray, name: str, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"label": name, "mean_absorption_fraction": None, "full_absorption_rate": None, "why": None}
    generator = np.random.default_rng(seed)
    yes, no = np.flatnonzero(y & fitted), np.flatnonzero(~y & fitted)
    train = np.concatenate([generator.permutation(yes)[:1000], generator.permutation(no)[:2000]])
    probe = logistic(x[train], y[train])
    right = probe.scores(x) > 0
    probe_f1 = f1_of(right[~fitted], y[~fitted])
    fires = _take(codes, np.flatnonzero(fitted))
    both = np.asarray((fires > 0).T.astype(np.float32) @ y[fitted].astype(np.float32))
    f1 = 2 * both / np.maximum(np.asarray((fires > 0).sum(0)).ravel() + y[fitted].sum(), 1)
    main = split_latents(fires, y[fitted], np.argsort(-f1, kind="stable")[:10].tolist())
    rows = np.flatnonzero(~fitted & y & right)
    if not main:
        return row | {"why": "no latent fires on it"}
    if probe_f1 < LEAST_PROBE_F1 or not len(rows):
        return row | {"why": f"the probe's F1 is below {LEAST_PROBE_F1}"}
    bias = (subject.dictionary.bypass() * subject.dictionary.out_scale).detach().float().cpu().numpy()
    found = absorbed(x[rows] - bias, sparse.csr_array(codes)[rows], _writes(subject), probe.weights, np.array(main))
    return row | {
        "mean_absorption_fraction": float(found.fraction.mean()),
        "full_absorption_rate": float(found.full.mean()),
        "num_full_absorption": int(found.full.sum()),
        "num_probe_true_positives": len(rows),
        "num_split_features": len(main),
    }


def result_file(subject: Subject, checkpoint: str, eval_type: str, task: Task) -> dict[str, Any]:
    """A task's results as SAEBench writes them; only the time differs from one run to the next."""
    identity = f"{checkpoint}/{eval_type}/{task.config['random_seed']}"
    return {
        "eval_type_id": eval_type,
        "eval_config": task.config,
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": task.metrics,
        "eval_result_details": task.details,
        "sae_bench_commit_hash": "sparsary",
        "sae_lens_id": None,
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": SaeBenchAdapter(subject.dictionary, subject.model.id, subject.hook).cfg.to_dict(),
        "eval_result_unstructured": None,
    }
