"""Detection of known factors by single latents, neurons, dimensions and linear probes."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import sparse

from ...training.embedded import lexicon
from ...training.embedded.corpus import Factors
from ..bootstrap import bootstrap_f1, interval
from .absorption import absorbed
from .datasets import NameFactors, Tokens, embedded_tokens, halves
from .probes import (
    LinearProbe,
    ProbeInputs,
    Search,
    auroc,
    best_threshold,
    f1_of,
    group_counts,
    logistic,
    ranking,
    split_latents,
)
from .subject import ProbeTarget, sparse_codes

DEFAULT_TOKENS = 60_000
# With fewer positives in either half, F1 is noise.
LEAST_POSITIVES = 30
# Training rows of a probe; more change its F1 by less than its confidence interval.
PROBE_POSITIVES, PROBE_NEGATIVES = 1000, 2000
# Below it the model does not represent the factor linearly, and absorption is undefined (SAEBench's threshold).
LEAST_PROBE_F1 = 0.6
DETECTORS = ("latent", "probe", "neuron", "dimension")
CLASSES: dict[str, frozenset[str]] = {
    "name": frozenset(lexicon.NAMES),
    "place": frozenset(lexicon.PLACES),
    "object": frozenset(lexicon.OBJECTS),
    "argument": frozenset(lexicon.ARGUMENTS),
    "event": frozenset(lexicon.EVENTS),
    "noun": frozenset(word for pair in lexicon.NOUNS for word in pair),
}


def names_of(factors: Factors) -> list[str]:
    """Return the binary factors of a token, as ``family=value``."""
    found = [f"task={factors['task']}", f"role={factors['task']}/{factors['role']}"]
    plain = ("entity", "number", "gender", "subject_number", "order", "topic", "place")
    found += [f"{key}={factors[key]}" for key in plain if key in factors]
    if "entity" in factors:
        found += [f"class={name}" for name, words in CLASSES.items() if factors["entity"] in words]
    if "year" in factors:
        year = int(factors["year"])
        found.append(f"century={year // 100}" if year >= 100 else f"decade={year // 10}")
    if "rank" in factors:
        found.append(f"rank=2^{int(math.log2(int(factors['rank']) + 1))}")
    return found


@dataclass(frozen=True)
class FactorLabels:
    """Labels of the binary factors that are frequent enough in both halves to be scored."""

    names: list[str]
    values: Bool[np.ndarray, "tokens factors"]

    @property
    def families(self) -> list[str]:
        return [name.partition("=")[0] for name in self.names]


def labels_of(
    factors: list[Factors],
    fitted: Bool[np.ndarray, " tokens"],
    least: int = LEAST_POSITIVES,
    named: NameFactors = names_of,
) -> FactorLabels:
    """Return the binary factors with at least ``least`` positive and negative tokens in each half."""
    where: dict[str, list[int]] = defaultdict(list)
    cache: dict[tuple, list[str]] = {}
    for token, known in enumerate(factors):
        key = tuple(known.items())
        if key not in cache:
            cache[key] = named(known)
        for name in cache[key]:
            where[name].append(token)
    names, columns = [], []
    for name in sorted(where):
        column = np.zeros(len(factors), dtype=bool)
        column[where[name]] = True
        counts = [np.count_nonzero(column[half]) for half in (fitted, ~fitted)]
        if min(counts) >= least and min(fitted.sum() - counts[0], (~fitted).sum() - counts[1]) >= least:
            names.append(name)
            columns.append(column)
    return FactorLabels(names, np.stack(columns, 1) if columns else np.zeros((len(factors), 0), dtype=bool))


def factor_scores(
    subject: ProbeTarget,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    known: Tokens | None = None,
    named: NameFactors = names_of,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a flat summary and one row per factor; detectors are selected on half of the documents and scored on the rest.

    Args:
        tokens: Number of tokens to read of the embedded corpus.
        known: Tokens with factors, in place of the embedded corpus.
        named: Names of the factors of such a token.

    Raises:
        ValueError: If the factors are not known, or no factor is frequent enough to be scored.
    """
    known = embedded_tokens(subject, tokens) if known is None else known
    codes = sparse_codes(subject, known.x)
    dictionary = subject.dictionary
    writes, bias = None, None
    if subject.in_place:
        scale = dictionary.out_scale
        writes = (dictionary.atoms * scale[..., None] if scale.ndim else dictionary.atoms * scale).detach().cpu().numpy()
        bias = (dictionary.bypass() * scale).detach().cpu().numpy()
    return score_factors(known, codes, writes, bias, seed, named=named)


def score_factors(
    known: Tokens,
    codes: sparse.csc_array,
    writes: np.ndarray | None,
    bias: np.ndarray | None,
    seed: int = 0,
    least: int = LEAST_POSITIVES,
    named: NameFactors = names_of,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score factors from activations and codes; absorption also needs the decoder ``(n_latents, d)`` and its bias ``(d,)``."""
    fitted = halves(known.documents, seed)
    labels = labels_of(known.factors, fitted, least, named)
    if not labels.names:
        raise ValueError(
            f"--tokens: expected a factor that occurs {least} times in each half of the documents, got none in "
            f"{len(known.factors)} tokens. Raise --tokens, for example to {DEFAULT_TOKENS}."
        )
    owners = np.unique(known.documents[~fitted], return_inverse=True)[1]
    y_fit, y = labels.values[fitted], labels.values[~fitted]
    judged = _Judged(labels, y, owners)
    searches: dict[str, Search] = {}
    for name, columns in {"latent": codes, "neuron": known.neurons, "dimension": known.x}.items():
        if columns is not None:
            searches[name] = Search(_rows(columns, fitted), y_fit)
            judged.add_columns(name, searches[name], _rows(columns, ~fitted))
    probes = judged.add_probes(known.x[fitted], known.x[~fitted], y_fit, seed)
    codes_fit, codes_scored = _rows(codes, fitted), _rows(codes, ~fitted)
    x_scored = known.x[~fitted]
    dead = codes.nnz == 0
    for index, row in enumerate(judged.rows):
        row["latent_firing_f1"] = 0.0
        row |= {"split": None, "absorption_fraction": None, "full_absorption": None, "absorption_why": None}
        candidates = searches["latent"].candidates[:, index].tolist()
        main = [] if dead else split_latents(codes_fit, y_fit[:, index], candidates)
        if main:
            row["split"] = len(main)
            row["latent_firing_f1"] = f1_of(np.asarray(codes_scored[:, [main[0]]].toarray()[:, 0] > 0), y[:, index])
        right = y[:, index] & (probes[index].scores(x_scored) > 0)
        if not main:
            row["absorption_why"] = "no latent fires on it"
        elif writes is None or bias is None:
            row["absorption_why"] = "the dictionary writes elsewhere"
        elif row["probe_f1"] < LEAST_PROBE_F1 or not right.any():
            row["absorption_why"] = f"the probe's F1 is below {LEAST_PROBE_F1}"
        else:
            rows = sparse.csr_array(codes_scored[right])
            found = absorbed(x_scored[right] - bias, rows, writes, probes[index].weights, np.array(main))
            row["absorption_fraction"] = float(found.fraction.mean())
            row["full_absorption"] = float(found.full.mean())
    summary = judged.summary(seed)
    summary |= {
        "factors_tokens": len(known.factors),
        "factors_documents": len(np.unique(known.documents)),
        "factors_no_latent_fires": bool(dead),
    }
    return summary, judged.rows


def _rows(columns: Any, mask: np.ndarray) -> ProbeInputs:
    return columns[mask] if isinstance(columns, np.ndarray) else sparse.csc_array(sparse.csr_array(columns)[mask])


class _Judged:
    """Result rows (one per factor, filled detector by detector), and counts per document for the confidence intervals."""

    def __init__(self, labels: FactorLabels, y: np.ndarray, owners: np.ndarray):
        self.y, self.owners, self.n_owners = y, owners, int(owners.max()) + 1
        share = y.mean(0)
        self.rows: list[dict[str, Any]] = [
            {
                "factor": name,
                "family": family,
                "positives": int(y[:, index].sum()),
                # F1 of a detector that always fires.
                "chance_f1": float(2 * share[index] / (1 + share[index])),
            }
            for index, (name, family) in enumerate(zip(labels.names, labels.families, strict=True))
        ]
        self.counts: dict[str, list[np.ndarray]] = {}

    def _note(self, name: str, index: int, detected: np.ndarray, scores: np.ndarray) -> None:
        y = self.y[:, index]
        hits = max(np.count_nonzero(detected & y), 0)
        self.rows[index] |= {
            f"{name}_f1": f1_of(detected, y),
            f"{name}_precision": hits / max(np.count_nonzero(detected), 1),
            f"{name}_recall": hits / np.count_nonzero(y),
            f"{name}_auroc": auroc(scores, y),
        }
        self.counts.setdefault(name, []).append(group_counts(detected, y, self.owners, self.n_owners))

    def add_columns(self, name: str, search: Search, scored: ProbeInputs) -> None:
        """Score the best single column of each factor, selected on the other half."""
        for index in range(len(self.rows)):
            detector = search.best(index)
            scores = detector.scores(scored)
            self.rows[index][name] = (
                detector.column * (1 if detector.sign > 0 else -1) if name == "dimension" else detector.column
            )
            self._note(name, index, scores > detector.threshold, scores)

    def add_probes(self, x_fit: np.ndarray, x: np.ndarray, y_fit: np.ndarray, seed: int) -> list[LinearProbe]:
        """Fit and score a logistic probe per factor, with the threshold of best F1 on the half that it was fitted on."""
        generator = np.random.default_rng(seed)
        probes = []
        for index in range(len(self.rows)):
            positive, negative = np.flatnonzero(y_fit[:, index]), np.flatnonzero(~y_fit[:, index])
            chosen = np.concatenate(
                [generator.permutation(positive)[:PROBE_POSITIVES], generator.permutation(negative)[:PROBE_NEGATIVES]]
            )
            probe = logistic(x_fit[chosen], y_fit[chosen, index])
            threshold = best_threshold(ranking(probe.scores(x_fit)), y_fit[:, index])[1]
            if math.isfinite(threshold):
                probe = LinearProbe(probe.weights, probe.offset - threshold)
            scores = probe.scores(x)
            self._note("probe", index, scores > 0, scores)
            probes.append(probe)
        return probes

    def summary(self, seed: int) -> dict[str, Any]:
        """Return means over factors, overall and by family, with 95% bootstrap intervals over documents."""
        report: dict[str, Any] = {"factors_count": len(self.rows)}
        report["factors_chance_f1"] = _mean(self.rows, "chance_f1")
        resampled: dict[str, np.ndarray] = {}
        for name in DETECTORS:
            if name not in self.counts:
                report |= {f"factors_{name}_f1": None, f"factors_{name}_why": "the model has no neurons by a known name"}
                continue
            resampled[name] = bootstrap_f1(np.stack(self.counts[name], 1), seed)
            mean = interval(_mean(self.rows, f"{name}_f1"), resampled[name].mean(-1))
            report |= {
                f"factors_{name}_f1": mean.mean,
                f"factors_{name}_f1_low": mean.low,
                f"factors_{name}_f1_high": mean.high,
            }
            report[f"factors_{name}_auroc"] = _mean(self.rows, f"{name}_auroc")
            report[f"factors_{name}_found_08"] = float(np.mean([row[f"{name}_f1"] >= 0.8 for row in self.rows]))
        gap = (resampled["probe"] - resampled["latent"]).mean(-1)
        behind = interval(report["factors_probe_f1"] - report["factors_latent_f1"], gap)
        report |= {"factors_gap_f1": behind.mean, "factors_gap_f1_low": behind.low, "factors_gap_f1_high": behind.high}
        report["factors_latent_firing_f1"] = _mean(self.rows, "latent_firing_f1")
        for key in ("split", "absorption_fraction", "full_absorption"):
            rows = [row for row in self.rows if row[key] is not None]
            report[f"factors_{key}"] = _mean(rows, key) if rows else None
            if not rows:
                report[f"factors_{key}_why"] = self.rows[0]["absorption_why"]
        report["factors_absorption_count"] = sum(row["absorption_fraction"] is not None for row in self.rows)
        for family in sorted({row["family"] for row in self.rows}):
            rows = [row for row in self.rows if row["family"] == family]
            report[f"factors_{family}_count"] = len(rows)
            for name in self.counts:
                report[f"factors_{family}_{name}_f1"] = _mean(rows, f"{name}_f1")
        return report


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def factors_table(report: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the terminal's table: one row per family, and one for all factors."""
    names = [name for name in DETECTORS if report.get(f"factors_{name}_f1") is not None]
    lines = []
    for family in sorted({row["family"] for row in rows}):
        some = [row for row in rows if row["family"] == family]
        cells = [f"{_mean(some, f'{name}_f1'):.3f}" for name in names]
        lines.append([family, str(len(some)), f"{_mean(some, 'chance_f1'):.3f}", *cells, *_absorption_cells(some)])
    cells = [f"{report[f'factors_{name}_f1']:.3f}" for name in names]
    lines.append(["all", str(len(rows)), f"{report['factors_chance_f1']:.3f}", *cells, *_absorption_cells(rows)])
    return ["factors", "count", "chance F1", *(f"{name} F1" for name in names), "split", "absorbed"], lines


def _absorption_cells(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for key in ("split", "absorption_fraction"):
        some = [row for row in rows if row[key] is not None]
        cells.append(f"{_mean(some, key):.2f}" if some else "-")
    return cells
