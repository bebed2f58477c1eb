"""InfoMEC: modularity, compactness, and explicitness of a code with respect to the known factors of its tokens."""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.special import log_softmax, xlogy
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..bootstrap import interval, resamples
from .datasets import NameFactors, Tokens, halves
from .probes import ProbeInputs

# Quantiles of a latent's activations, beside the tokens on which it is silent.
QUANTILES = 8
# Circular shifts of a source along the tokens; what the largest NMI of a shift explains is chance.
SHIFTS = 5
RESAMPLED = 50
# Rows of a multinomial probe, its inverse penalties from strongest to weakest, and its iterations for each.
PROBE_ROWS, PENALTIES, ITERATIONS = 3000, (0.01, 1.0, 100.0), 100
METRICS = ("modularity", "compactness", "matched_compactness")


@dataclass(frozen=True)
class Source:
    """A factor with several values: of every token the number of its value, or -1 where the token has none."""

    name: str
    values: list[str]
    of_token: Int[np.ndarray, " tokens"]


def sources_of(known: Tokens, named: NameFactors, fitted: np.ndarray, least: int) -> list[Source]:
    """Return the factors of which two values or more occur ``least`` times in each half of the documents.

    Args:
        named: Names of a token's factors, as ``source=value``.
        fitted: Mask of the tokens in the first half.
    """
    places: dict[str, dict[str, list[int]]] = {}
    for token, factors in enumerate(known.factors):
        seen: set[str] = set()
        for name in named(factors):
            source, _, value = name.partition("=")
            if source not in seen:
                seen.add(source)
                places.setdefault(source, {}).setdefault(value, []).append(token)
    found = []
    for name, values in sorted(places.items()):
        frequent = [
            value
            for value, tokens in sorted(values.items())
            if min(fitted[tokens].sum(), len(tokens) - fitted[tokens].sum()) >= least
        ]
        of_token = np.full(len(known.factors), -1)
        for number, value in enumerate(frequent):
            of_token[values[value]] = number
        if len(frequent) > 1:
            found.append(Source(name, frequent, of_token))
    return found


def infomec(
    known: Tokens, codes: ProbeInputs, named: NameFactors, seed: int = 0, least: int = 30
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return InfoMEC of codes as a flat summary, and one row per source.

    ``NMI[s, j]`` is the mutual information of source s and latent j, over the tokens that have a value of s, as a share of
    the entropy of s. Modularity is the mean over latents of ``max_s NMI / sum_s NMI``, compactness the mean over sources of
    ``max_j NMI / sum_j NMI``; both are rescaled from ``[1 / n, 1]`` to ``[0, 1]``, n the number of sources, or of latents.
    Explicitness is the share of a source's entropy that a multinomial logistic regression on all latents explains on documents
    that it was not fitted on. Source: Hsu et al. 2023, arXiv:2305.18378.

    Ours: mutual information is counted from activations in nine bins (silent, and eight quantiles of the rest), corrected by
    Miller and Madow; NMI not above the largest of five circular shifts of the source along the tokens, which keep the order
    of the text, is 0; latents without any are left out. In an overcomplete code thousands of rare latents share a source, so
    that compactness is close to 0 by construction: ``matched_compactness`` counts the latents only that detect one value
    of a source best. Intervals are over documents; bins, floors, and matched latents stay as they are.

    Args:
        codes: Nonzero entries, ``(tokens, n_latents)``.
        least: Occurrences of a value in each half of the documents.

    Raises:
        ValueError: If fewer than two sources have two frequent values.

    Example::

        report, rows = infomec(tokens, sparse_codes(subject, tokens.x), names_of)
        report["infomec_modularity"], report["infomec_explicitness"]
    """
    fitted = halves(known.documents, seed)
    sources = sources_of(known, named, fitted, least)
    if len(sources) < 2:
        raise ValueError(
            f"--task infomec: expected two factors with two values that occur {least} times in each half of the documents, "
            f"got {[source.name for source in sources]} in {len(known.factors)} tokens. Raise --tokens, or label more factors."
        )
    binned = Binned(codes)
    generator = np.random.default_rng(seed)
    floors = np.array([_floor(source, binned, generator) for source in sources])
    nmi = _all_nmi(sources, binned, np.ones(len(known.factors)), floors)
    informative = nmi.sum(0) > 0
    matched = sorted(set().union(*(_matched(source, binned, informative) for source in sources))) if informative.any() else []
    found = _ratios(nmi, matched)
    owners = np.unique(known.documents, return_inverse=True)[1]
    again = [
        _ratios(_all_nmi(sources, binned, draws[owners].astype(float), floors), matched)
        for draws in itertools.islice(resamples(int(owners.max()) + 1, seed), RESAMPLED)
    ]
    report: dict[str, Any] = {
        "infomec_tokens": len(known.factors),
        "infomec_sources": len(sources),
        "infomec_latents": int(informative.sum()),
    }
    for name in METRICS:
        ends = interval(found[name], np.array([some[name] for some in again]))
        report |= {f"infomec_{name}": ends.mean, f"infomec_{name}_low": ends.low, f"infomec_{name}_high": ends.high}
    rows = []
    for number, source in enumerate(sources):
        best = int(nmi[number].argmax())
        rows.append(
            {
                "source": source.name,
                "values": len(source.values),
                "tokens": int((source.of_token >= 0).sum()),
                "entropy_nats": _entropy(np.bincount(source.of_token[source.of_token >= 0])),
                "latent": best if nmi[number, best] > 0 else None,
                "nmi": float(nmi[number, best]),
                "nmi_floor": float(floors[number]),
                "latents": int((nmi[number] > 0).sum()),
                "explicitness": _explicitness(codes, source, fitted, generator),
                "activation_explicitness": _explicitness(known.x, source, fitted, generator),
            }
        )
    for key in ("explicitness", "activation_explicitness"):
        report[f"infomec_{key}"] = float(np.mean([row[key] for row in rows]))
    for row in rows:
        report |= {f"infomec_source_{row['source']}_{key}": value for key, value in row.items() if key != "source"}
    return report, rows


class Binned:
    """Bins of a code's entries: 0 to 7 by quantile of their latent's activations; silence is all that is no entry."""

    def __init__(self, codes: ProbeInputs):
        self.n_latents = codes.shape[1]
        bins = np.zeros(codes.nnz, np.int64)
        for latent in range(self.n_latents):
            entries = slice(codes.indptr[latent], codes.indptr[latent + 1])
            some = codes.data[entries]
            if len(some):
                edges = np.quantile(some, np.arange(1, QUANTILES) / QUANTILES)
                bins[entries] = np.searchsorted(edges, some, side="right")
        columns = np.repeat(np.arange(self.n_latents), np.diff(codes.indptr)) * QUANTILES + bins
        shape = (codes.shape[0], self.n_latents * QUANTILES)
        self.entries = sparse.csr_array((np.ones(codes.nnz), (codes.indices, columns)), shape=shape)

    def counts(self, source: Source, weights: np.ndarray) -> tuple[Float[np.ndarray, "values latents bins"], np.ndarray]:
        """Return weighted numbers of tokens by value, latent and bin, silence last, and by value alone."""
        has = source.of_token >= 0
        tokens = np.flatnonzero(has)
        cells = (weights[has], (source.of_token[has], tokens))
        chosen = sparse.csr_array(cells, shape=(len(source.values), len(has)))
        product: Any = chosen @ self.entries
        fires = product.toarray().reshape(len(source.values), self.n_latents, QUANTILES)
        totals = np.bincount(source.of_token[has], weights[has], minlength=len(source.values))
        # Sums of weights are exact: they are whole numbers.
        return np.concatenate([fires, (totals[:, None] - fires.sum(-1))[..., None]], -1), totals


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-xlogy(shares, shares).sum())


def _information(joint: Float[np.ndarray, "values latents bins"], total: float) -> Float[np.ndarray, " latents"]:
    """Return the mutual information of values and bins in nats by latent, corrected by Miller and Madow, at least 0."""
    by_value, by_bin = joint.sum(-1), joint.sum(0)

    def entropy(counts: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        shares = counts / total
        return -xlogy(shares, shares).sum(axes) + ((counts > 0).sum(axes) - 1) / (2 * total)

    return np.maximum(entropy(by_value, (0,)) + entropy(by_bin, (1,)) - entropy(joint, (0, 2)), 0)


def _nmi(source: Source, binned: Binned, weights: np.ndarray) -> Float[np.ndarray, " latents"]:
    """Return the NMI of a source with every latent."""
    joint, totals = binned.counts(source, weights)
    return _information(joint, float(totals.sum())) / max(_entropy(totals), 1e-12)


def _matched(source: Source, binned: Binned, informative: np.ndarray) -> set[int]:
    """Return the latents that tell most about whether the source has one of its values, of those that say anything."""
    joint, totals = binned.counts(source, np.ones(len(source.of_token)))
    whole = joint.sum(0)
    single = (_information(np.stack([own, whole - own]), float(totals.sum())) for own in joint)
    return {int(np.where(informative, own, -1.0).argmax()) for own in single}


def _floor(source: Source, binned: Binned, generator: np.random.Generator) -> float:
    """Return the largest NMI with any latent when the source is shifted along the tokens that have it."""
    has = np.flatnonzero(source.of_token >= 0)
    largest = 0.0
    for _ in range(SHIFTS):
        shifted = source.of_token.copy()
        shifted[has] = np.roll(source.of_token[has], int(generator.integers(len(has) // 4, 3 * len(has) // 4 + 1)))
        nmi = _nmi(Source(source.name, source.values, shifted), binned, np.ones(len(shifted)))
        largest = max(largest, float(nmi.max(initial=0)))
    return largest


def _all_nmi(
    sources: list[Source], binned: Binned, weights: np.ndarray, floors: np.ndarray
) -> Float[np.ndarray, "sources latents"]:
    """Return the NMI of all pairs, 0 where it is not above the source's floor."""
    nmi = np.stack([_nmi(source, binned, weights) for source in sources])
    return np.where(nmi > floors[:, None], nmi, 0.0)


def _ratios(nmi: Float[np.ndarray, "sources latents"], matched: list[int]) -> dict[str, float]:
    """Return modularity, compactness, and compactness over the matched latents alone."""
    informative = nmi[:, nmi.sum(0) > 0]
    return {
        "modularity": _concentration(informative, 0),
        "compactness": _concentration(informative, 1),
        "matched_compactness": _concentration(nmi[:, matched], 1),
    }


def _concentration(nmi: np.ndarray, axis: int) -> float:
    """Return the mean share of the largest entry along an axis, rescaled so that equal entries have 0; 0 without entries."""
    n = nmi.shape[axis]
    if nmi.size == 0:
        return 0.0
    share = nmi.max(axis) / np.maximum(nmi.sum(axis), 1e-30)
    return float(np.mean((share - 1 / n) / (1 - 1 / n))) if n > 1 else float(np.mean(share))


def _explicitness(x: ProbeInputs, source: Source, fitted: np.ndarray, generator: np.random.Generator) -> float:
    """Return the share of a source's entropy, on the second half of the documents, that a probe of the first explains.

    A third of the fitted rows chooses the penalty.
    """
    has = source.of_token >= 0
    rows = [generator.permutation(np.flatnonzero(has & half))[:PROBE_ROWS] for half in (fitted, ~fitted)]
    inner, chosen = rows[0][len(rows[0]) // 3 :], rows[0][: len(rows[0]) // 3]
    matrix = x if isinstance(x, np.ndarray) else sparse.csr_array(x)
    scaler = StandardScaler(with_mean=isinstance(x, np.ndarray)).fit(matrix[inner])
    fit, choose, judge = (scaler.transform(matrix[part]) for part in (inner, chosen, rows[1]))
    y = source.of_token
    if len(np.unique(y[inner])) < len(source.values):
        return 0.0
    # The penalties from strong to weak, each from the weights of the last.
    probe = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    best, least = np.inf, 1.0
    with warnings.catch_warnings():
        # More iterations change the cross-entropy in the third digit; the penalty is chosen on other rows anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for penalty in PENALTIES:
            probe.set_params(C=penalty).fit(fit, y[inner])
            loss = probe_cross_entropy(probe, choose, y[chosen])
            if loss < best:
                best, least = loss, probe_cross_entropy(probe, judge, y[rows[1]])
    entropy = _entropy(np.bincount(y[rows[1]]))
    return float(np.clip(1 - least / entropy, 0, 1))


def probe_cross_entropy(probe: LogisticRegression, x: Any, y: np.ndarray) -> float:
    """Return the mean cross-entropy of classes 0, 1, ... in nats; finite where a probability underflows to zero."""
    scores = probe.decision_function(x)
    if scores.ndim == 1:
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    return float(-log_softmax(scores, axis=1)[np.arange(len(y)), y].mean())


def infomec_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the terminal's table: one row per source."""
    lines = [
        [
            row["source"],
            str(row["values"]),
            str(row["tokens"]),
            "-" if row["latent"] is None else str(row["latent"]),
            f"{row['nmi']:.3f}",
            str(row["latents"]),
            f"{row['explicitness']:.3f}",
            f"{row['activation_explicitness']:.3f}",
        ]
        for row in rows
    ]
    return ["source", "values", "tokens", "best latent", "its NMI", "latents", "explicit", "in activation"], lines
