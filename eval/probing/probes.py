"""Label detectors (logistic probes and single thresholded columns) and their metrics.

Columns are dense (dimensions, neurons) or sparse (latents); rows are tokens or texts; labels are boolean.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse
from sklearn.metrics import roc_auc_score

# np.ndarray or scipy.sparse.csc_array; Any because scipy's stubs are incomplete.
ProbeInputs = Any
# Wider problems use L-BFGS instead of Newton's method.
NEWTON_WIDTH = 512


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier; rows with a score above 0 are positive."""

    weights: Float[np.ndarray, " d"]
    offset: float

    def scores(self, x: ProbeInputs) -> Float[np.ndarray, " rows"]:
        return np.asarray(x @ self.weights.astype(x.dtype) + self.offset)


def logistic(x: ProbeInputs, y: Bool[np.ndarray, " rows"], l2: float = 1.0, weight: bool = False) -> LinearProbe:
    """Fit a logistic regression on standardized columns with the penalty ``l2 / 2 ||w||^2``.

    Sparse columns are scaled but not centered. Constant columns get weight 0. scikit-learn's newton-cholesky finds the same
    weights to 6e-4 (2,000 rows, 128 dimensions) in eleven times the time; the stopping point changes F1 in the fifth digit.

    Args:
        weight: Weight the classes equally instead of by their frequency.

    Raises:
        ValueError: If only one class is present.
    """
    positives = int(y.sum())
    if not 0 < positives < len(y):
        raise ValueError(f"labels: expected two classes, got {positives} positive rows of {len(y)}.")
    mean, deviation = _moments(x)
    scale = np.where(deviation > 1e-7 * (1 + np.abs(mean)), 1 / np.maximum(deviation, 1e-30), 0.0)
    share = positives / len(y)
    importance = np.where(y, 0.5 / share, 0.5 / (1 - share)) if weight else np.ones(len(y))
    prior = 0.0 if weight else float(np.log(share / (1 - share)))
    if isinstance(x, np.ndarray) and x.shape[1] <= NEWTON_WIDTH:
        w, b = _newton((x - mean) * scale, y, importance, l2, prior)
        return LinearProbe(w * scale, float(b - (w * scale) @ mean))
    wide = x * scale if isinstance(x, np.ndarray) else x @ sparse.diags_array(scale)
    w, b = _quasi_newton(wide, y, importance, l2, prior)
    return LinearProbe(w * scale, b)


def _moments(x: ProbeInputs) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(x.mean(0), dtype=np.float64).ravel()
    squares = np.asarray((x * x).mean(0) if isinstance(x, np.ndarray) else x.multiply(x).mean(0), dtype=np.float64).ravel()
    return mean, np.sqrt(np.maximum(squares - mean**2, 0))


def _newton(x: np.ndarray, y: np.ndarray, importance: np.ndarray, l2: float, prior: float) -> tuple[np.ndarray, float]:
    """Minimize the loss by damped Newton steps; the last coefficient is the offset, which is not regularized.

    Uses torch because NumPy's threads busy-wait and starve other processes.
    """
    rows = torch.from_numpy(np.concatenate([x, np.ones((len(x), 1))], 1))
    # float32 halves the time of the large product; a Newton step need not be exact.
    light, target, weight = rows.float(), torch.from_numpy(y.astype(np.float64)), torch.from_numpy(importance)
    penalty = torch.full((rows.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 1e-6
    w = torch.zeros(rows.shape[1], dtype=torch.float64)
    w[-1] = prior

    def loss(z: torch.Tensor, w: torch.Tensor) -> float:
        return float(weight @ (F.softplus(z) - target * z) + 0.5 * penalty @ w**2)

    z = rows @ w
    now = loss(z, w)
    for _ in range(30):
        p = z.sigmoid()
        gradient = rows.T @ (weight * (p - target)) + penalty * w
        curvature = (light.T @ (light * (weight * p * (1 - p)).float()[:, None])).double()
        step = torch.linalg.solve(curvature + torch.diag(penalty + 1e-6), gradient)
        size, along = 1.0, rows @ step
        while size > 1e-4 and loss(z - size * along, w - size * step) > now:
            size /= 2
        w, z = w - size * step, z - size * along
        before, now = now, loss(z, w)
        if before - now < 1e-6 * (1 + abs(now)):
            break
    return w[:-1].numpy(), float(w[-1])


def _quasi_newton(x: ProbeInputs, y: np.ndarray, importance: np.ndarray, l2: float, prior: float) -> tuple[np.ndarray, float]:
    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = np.asarray(x @ w[:-1]) + w[-1]
        p = 0.5 * (1 + np.tanh(0.5 * z))
        error = importance * (p - y)
        value = importance @ (np.logaddexp(0, z) - y * z) + 0.5 * l2 * w[:-1] @ w[:-1]
        return float(value), np.append(np.asarray(x.T @ error) + l2 * w[:-1], error.sum())

    start = np.zeros(x.shape[1] + 1)
    start[-1] = prior
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return found[:-1], float(found[-1])


class Ranking(NamedTuple):
    """Rows sorted by descending score; ``ends`` are the last rows of each run of ties, where a threshold can be placed."""

    order: Int[np.ndarray, " rows"]
    scores: np.ndarray
    ends: Int[np.ndarray, " distinct"]


def ranking(scores: np.ndarray) -> Ranking:
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    return Ranking(order, ordered, np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1))


def best_threshold(ranked: Ranking, y: Bool[np.ndarray, " rows"]) -> tuple[float, float]:
    """Return the largest F1 of any threshold, and that threshold: halfway to the next score, so that it transfers."""
    hits = np.cumsum(y[ranked.order])[ranked.ends]
    f1 = 2 * hits / (ranked.ends + 1 + hits_of(y))
    best = int(np.argmax(f1))
    here = ranked.scores[ranked.ends[best]]
    below = ranked.scores[ranked.ends[best] + 1] if best + 1 < len(ranked.ends) else -np.inf
    return float(f1[best]), float((here + below) / 2)


def auroc(scores: Float[np.ndarray, " rows"], y: Bool[np.ndarray, " rows"]) -> float:
    """Return the area under the ROC curve; ties count half, and the result is 0.5 if a class is missing."""
    return float(roc_auc_score(y, scores)) if 0 < hits_of(y) < len(y) else 0.5


def hits_of(y: Bool[np.ndarray, " rows"]) -> int:
    return int(np.count_nonzero(y))


def f1_of(detected: Bool[np.ndarray, " rows"], y: Bool[np.ndarray, " rows"]) -> float:
    """Return the F1 score; 0 if nothing is detected and there are no positives."""
    return 2 * hits_of(detected & y) / max(hits_of(detected) + hits_of(y), 1)


@dataclass(frozen=True)
class Detector:
    """A single column with a threshold and a sign (-1: small values detect), and its F1 on the rows used to select it."""

    column: int
    sign: int
    threshold: float
    fitted_f1: float

    def scores(self, columns: ProbeInputs) -> np.ndarray:
        return self.sign * column(columns, self.column)

    def detects(self, columns: ProbeInputs) -> Bool[np.ndarray, " rows"]:
        return self.scores(columns) > self.threshold


def column(columns: ProbeInputs, index: int) -> np.ndarray:
    """Return one column as a dense array."""
    if isinstance(columns, np.ndarray):
        return columns[:, index]
    return columns[:, [index]].toarray()[:, 0]


class Search:
    """Search for the single column that detects each label best, among those of largest correlation and best firing F1.

    Latents (sparse columns) are tried with positive sign only. Rankings are cached because labels share candidates.
    """

    def __init__(self, columns: ProbeInputs, labels: Bool[np.ndarray, "rows labels"], candidates: int = 6):
        self.columns, self.labels = columns, labels
        self.signed = isinstance(columns, np.ndarray)
        rows = columns.shape[0]
        y = labels.astype(np.float32)
        mean, deviation = _moments(columns)
        share = y.mean(0)
        covariance = np.asarray(columns.T @ y) / rows - mean[:, None] * share
        spread = np.maximum(deviation[:, None] * np.sqrt(share * (1 - share)), 1e-12)
        self.correlation = covariance / spread
        chosen = [_largest(np.abs(self.correlation) if self.signed else self.correlation, candidates)]
        if not self.signed:
            fires = columns > 0
            both = np.asarray(fires.T.astype(np.float32) @ y)
            count = np.asarray(fires.sum(0)).ravel()
            self.firing_f1 = 2 * both / np.maximum(count[:, None] + labels.sum(0), 1)
            chosen.append(_largest(self.firing_f1, candidates))
        self.candidates = np.concatenate(chosen, 0)
        self._rankings: dict[tuple[int, int], Ranking] = {}

    def ranked(self, index: int, sign: int) -> Ranking:
        if (index, sign) not in self._rankings:
            self._rankings[index, sign] = ranking(sign * column(self.columns, index))
        return self._rankings[index, sign]

    def best(self, label: int) -> Detector:
        """Return the detector with the largest F1 for this label."""
        y = self.labels[:, label]
        found: list[Detector] = []
        for index in dict.fromkeys(self.candidates[:, label].tolist()):
            sign = -1 if self.signed and self.correlation[index, label] < 0 else 1
            f1, threshold = best_threshold(self.ranked(index, sign), y)
            found.append(Detector(index, sign, threshold, f1))
        return max(found, key=lambda detector: detector.fitted_f1)


def _largest(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the row indices of the ``n`` largest entries of every column, in descending order."""
    return np.argsort(-scores, axis=0, kind="stable")[:n]


def split_latents(
    codes: sparse.csc_array, y: Bool[np.ndarray, " rows"], candidates: list[int], jump: float = 0.03, most: int = 10
) -> list[int]:
    """Return the latents that a label is split over: greedily extended while "any of them fires" gains ``jump`` in F1.

    The stopping criterion is SAEBench's, which however orders the latents by the weights of an L1 probe.
    """
    fires = {index: column(codes, index) > 0 for index in dict.fromkeys(candidates)}
    chosen: list[int] = []
    union, now = np.zeros(len(y), dtype=bool), 0.0
    while len(chosen) < min(most, len(fires)):
        scored = [(f1_of(union | fires[index], y), -index) for index in fires if index not in chosen]
        f1, negative = max(scored)
        if f1 - now < jump:
            break
        chosen.append(-negative)
        union, now = union | fires[-negative], f1
    return chosen


def group_counts(
    detected: Bool[np.ndarray, " rows"], y: Bool[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"], n_groups: int
) -> Float[np.ndarray, "groups 3"]:
    """Return the numbers of hits, detections and positives of each group."""
    return np.stack([np.bincount(groups, what, n_groups) for what in (detected & y, detected, y)], -1)
