"""Scores of each latent that need no language model: agreement of its firings with simple descriptions.

A score is a number, or ``None`` with a reason; never NaN. Choices (a predicate, a threshold, a mean) are made on documents with
even numbers and scored on odd ones, so that choosing among many is not rewarded.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array
from sklearn.metrics import roc_auc_score

from .collect import Collected, TokenSample
from .logit_lens import Unembedding
from .neighbours import BLOCK_ENTRIES, Matrix
from .predicates import Predicates

# With fewer firings, or windows, on either side a score is undefined.
MIN_FIRINGS, MIN_WINDOWS = 10, 5
MIN_TRUE = 5
# Firing thresholds, as fractions of a latent's maximum; the best is chosen together with the predicate.
THRESHOLDS = (0.0, 0.25, 0.5)


class Score(NamedTuple):
    """Score of a latent, or the reason why it is undefined; with details."""

    value: float | None
    reason: str | None = None
    details: dict[str, object] | None = None


def activation_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive has the larger value, ties counted half. Both must be non-empty."""
    truth = np.repeat([True, False], [len(positive), len(negative)])
    return float(roc_auc_score(truth, np.concatenate([positive, negative])))


def predicate_f1(sample: TokenSample, codes: Matrix, known: Predicates) -> list[Score]:
    """Return each latent's F1 with the predicate that describes its firings best: ``2 tp / (fires + true)``.

    Predicate and threshold are chosen on one half of the documents; the value is the F1 on the other. ``chance`` in the details
    is the F1 of a latent that fires equally often, but independently of the predicate. Source: the F1 test of features against
    attributes in Makelov, Lange and Nanda 2024, arXiv:2405.08366; the bank of predicates is original to sparsary.
    """
    n = codes.shape[1]
    fit, score = (np.flatnonzero(sample.documents % 2 == parity) for parity in (0, 1))
    if not len(fit) or not len(score) or not known.names:
        return [Score(None, "the sample's documents do not fill both halves")] * n
    true = [csc_array(known.true.tocsr()[rows]) for rows in (fit, score)]
    totals = [np.asarray(matrix.sum(0)).ravel() for matrix in true]
    halves = [csc_array(codes.tocsr()[rows]) for rows in (fit, score)]
    maxima = codes.max(axis=0).toarray().ravel()
    found: list[Score] = []
    step = max(1, BLOCK_ENTRIES // len(known.names))
    for begin in range(0, n, step):
        latents = np.arange(begin, min(n, begin + step))
        best = np.full(len(latents), -1.0)
        chosen, cut = np.zeros(len(latents), np.int64), np.zeros(len(latents))
        for threshold in THRESHOLDS:
            fires = _above(halves[0], latents, threshold * maxima)
            values = _f1(fires, true[0], totals[0])
            values[:, totals[0] < MIN_TRUE] = -1.0
            at = values.argmax(1)
            value = values[np.arange(len(latents)), at]
            # A threshold that leaves too few firings does not describe the latent.
            better = (value > best) & (np.asarray(fires.sum(0)).ravel() >= MIN_FIRINGS)
            best, chosen, cut = np.where(better, value, best), np.where(better, at, chosen), np.where(better, threshold, cut)
        fires = _above(halves[1], latents, cut * maxima[latents], own=True)
        heldout = _f1(fires, true[1], totals[1])[np.arange(len(latents)), chosen]
        counts = np.asarray(fires.sum(0)).ravel()
        found += [
            Score(None, f"fires on fewer than {MIN_FIRINGS} sampled tokens of one half of the documents")
            if best[i] < 0 or counts[i] < MIN_FIRINGS
            else _described(known.names[chosen[i]], heldout[i], counts[i], float(totals[1][chosen[i]]), len(score), cut[i])
            for i in range(len(latents))
        ]
    return found


def _described(name: str, value: Any, fires: Any, true: float, tokens: int, threshold: Any) -> Score:
    chance = 2 * fires * true / tokens / (fires + true)
    return Score(float(value), None, {"predicate": name, "chance": float(chance), "threshold": float(threshold)})


def _above(codes: Matrix, latents: np.ndarray, levels: np.ndarray, own: bool = False) -> Matrix:
    """Return ones where latents exceed their level. ``levels`` covers all latents, or with ``own`` only these."""
    some: Any = csc_array(codes[:, latents])
    level = np.repeat(levels if own else levels[latents], np.diff(some.indptr))
    some.data = (some.data > level).astype(np.float64)
    return some


def _f1(fires: Matrix, true: Matrix, totals: np.ndarray) -> np.ndarray:
    both = (fires.T @ true).toarray()
    return 2 * both / np.maximum(np.asarray(fires.sum(0)).ravel()[:, None] + totals[None], 1.0)


def example_embedding(collected: Collected, vocabulary: int) -> list[Score]:
    """Return each latent's AUROC of a nearest-mean classifier of windows in which it fires.

    A window's embedding is its TF-IDF vector of token ids, of length 1. A test window's score is its cosine with the mean of
    the positive training windows minus that with the mean of the negative ones. Positives are drawn uniformly from the contexts
    in which a latent fires, negatives from all text in which it does not. No explanation is needed, but only shared words are
    seen, unlike with a sentence encoder. Source: the example-embedding scorer of delphi (Paulo et al. 2024, arXiv:2410.13928),
    with TF-IDF in place of its sentence encoder.
    """
    background, sample = collected.background, collected.sample
    idf = _idf(background.tokens, vocabulary)
    negatives = _tf_idf(background.tokens, idf, vocabulary)
    silent = np.ones((len(background.fires), collected.n_latents), bool)
    for window, latents in enumerate(background.fires):
        silent[window, latents] = False
    found: list[Score] = []
    for latent in range(collected.n_latents):
        there = sample.keys[latent] > -np.inf
        positives = _tf_idf(sample.tokens[latent][there], idf, vocabulary)
        odd = sample.documents[latent][there] % 2 == 1
        quiet = silent[:, latent]
        odd_quiet = background.documents % 2 == 1
        counts = (np.sum(~odd), np.sum(odd), np.sum(quiet & ~odd_quiet), np.sum(quiet & odd_quiet))
        if min(counts) < MIN_WINDOWS:
            found.append(Score(None, f"fewer than {MIN_WINDOWS} windows, with or without it, in one half of the documents"))
            continue
        direction = _unit_mean(positives[~odd]) - _unit_mean(negatives[quiet & ~odd_quiet])
        value = activation_auroc(positives[odd] @ direction, negatives[quiet & odd_quiet] @ direction)
        found.append(Score(value, None, {"positives": int(counts[1]), "negatives": int(counts[3])}))
    return found


def _idf(windows: np.ndarray, vocabulary: int) -> np.ndarray:
    """Return each token's rarity among windows, by scikit-learn's smooth definition: ``log((1 + n) / (1 + df)) + 1``."""
    df = np.zeros(vocabulary)
    for window in windows:
        df[np.unique(window[window >= 0])] += 1
    return np.log((1 + len(windows)) / (1 + df)) + 1


def _tf_idf(windows: np.ndarray, idf: np.ndarray, vocabulary: int) -> Matrix:
    rows, columns = np.nonzero(windows >= 0)
    ids = windows[rows, columns]
    matrix: Any = csr_array((idf[ids], (rows, ids)), shape=(len(windows), vocabulary))
    norms = np.sqrt(np.asarray(matrix.power(2).sum(1)).ravel())
    matrix.data /= np.repeat(np.maximum(norms, 1e-30), np.diff(matrix.indptr))
    return matrix


def _unit_mean(rows: Matrix) -> np.ndarray:
    mean = np.asarray(rows.mean(0)).ravel()
    return mean / max(float(np.linalg.norm(mean)), 1e-30)


def logit_lens(sample: TokenSample, codes: Matrix, lens: Unembedding | str) -> list[Score]:
    """Return each latent's AUROC of its logit effect on the actual next token, firing against silent tokens.

    This is the probability that the token after a firing is promoted more than the token after a position without one; 0.5 is
    no agreement, and below 0.5 the latent suppresses the token that follows. The definition is original, after the logit lens
    (nostalgebraist 2020) as applied to latents' decoder directions.
    """
    n = codes.shape[1]
    if isinstance(lens, str):
        return [Score(None, lens)] * n
    known = np.flatnonzero(sample.following >= 0)
    ids, places = np.unique(sample.following[known], return_inverse=True)
    totals = np.bincount(places, minlength=len(ids))
    next_is = csr_array((np.ones(len(places)), places, np.arange(len(places) + 1)), shape=(len(places), len(ids)))
    fires = codes.tocsr()[known].astype(bool).astype(np.float64)
    counts: Any = csr_array(csc_array(fires).T @ next_is)
    sides = np.repeat([True, False], len(ids))
    found: list[Score] = []
    for effects in lens.blocks():
        for row in effects[:, ids].float().cpu().numpy():
            positive = counts[[len(found)]].toarray().ravel()
            negative = totals - positive
            if positive.sum() < MIN_FIRINGS or negative.sum() < MIN_FIRINGS:
                found.append(Score(None, f"fires, or is silent, on fewer than {MIN_FIRINGS} sampled tokens"))
            else:
                # Each token id is listed once per side, weighted by its count there.
                often = np.concatenate([positive, negative])
                found.append(Score(float(roc_auc_score(sides, np.tile(row, 2), sample_weight=often))))
    return found
