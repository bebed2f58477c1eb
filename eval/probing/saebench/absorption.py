"""SAEBench's absorption task: latents that fail to fire where another latent has absorbed their feature."""

from typing import Any

import numpy as np
from scipy import sparse

from ...pages.numbers import show
from ..absorption import absorbed
from ..datasets import Pooled, embedded_tokens, halves
from ..factors import LEAST_PROBE_F1, labels_of
from ..probes import f1_of, logistic, split_latents
from ..subject import ProbeTarget, latent_writes, sparse_codes
from .datasets import split_texts, submatrix
from .output import SaebenchResult

ABSORPTION_TOKENS = 30_000
# Marks scores computed on the activation minus the dictionary's bias, which no latent writes. SAEBench leaves it in.
LESS_BIAS = "less_bias"
# Factor families expressed by specific words, whose own latents may absorb them.
ABSORBABLE = ("class", "gender", "number", "century")


def absorption(
    subject: ProbeTarget, data: list[Pooled] | None, seed: int = 0, tokens: int = ABSORPTION_TOKENS
) -> SaebenchResult:
    """Measure absorption of the embedded corpus's word classes (per token) or of text labels (per text).

    SAEBench measures first letters only; its result file's ``first_letter`` is therefore ``label`` here, and the type
    is ``absorption``. Scores with ``less_bias`` in their names are not SAEBench's: they compare the latents' contributions
    with the activation minus the dictionary's bias.

    Raises:
        ValueError: If the dictionary does not write at its own hook, or no label is frequent enough.
    """
    subject.require_in_place("absorption")
    rows: list[dict[str, Any]] = []
    if data is None:
        known = embedded_tokens(subject, tokens, neurons=False)
        fitted = halves(known.documents, seed)
        labels = labels_of(known.factors, fitted)
        some = [i for i, family in enumerate(labels.families) if family in ABSORBABLE]
        if not some:
            raise ValueError(
                f"--tokens: expected a label that occurs often enough, got none in {tokens} tokens. Raise --tokens."
            )
        codes = sparse_codes(subject, known.x)
        rows = [_absorption_row(subject, known.x, codes, labels.values[:, i], fitted, labels.names[i], seed) for i in some]
    for one in data or []:
        split = split_texts(one, one.labels, seed)
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
        f"absorption_fraction_{LESS_BIAS}_score": f"mean_absorption_fraction_{LESS_BIAS}",
        f"full_absorption_{LESS_BIAS}_score": f"full_absorption_rate_{LESS_BIAS}",
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
    # SAEBench's result file holds SAEBench's own scores only.
    own = {key: value for key, value in mean.items() if LESS_BIAS not in key}
    details = [{key: value for key, value in row.items() if key != "why" and LESS_BIAS not in key} for row in scored]
    config = {"random_seed": seed, "model_name": subject.model.id, "min_GT_probe_f1": LEAST_PROBE_F1}
    columns = {"fraction": "absorption_fraction_score", "full": "full_absorption_score", "latents": "num_split_features"}
    cells = [show(mean.get(f"mean_{key}") if scored else None, digits=3) for key in columns.values()]
    table = (["absorption", "labels", *columns], [["mean over labels", str(len(scored)), *cells]])
    return SaebenchResult(summary, {"mean": own}, details, config, table)


def _absorption_row(
    subject: ProbeTarget, x: np.ndarray, codes: sparse.csc_array, y: np.ndarray, fitted: np.ndarray, name: str, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"label": name, "mean_absorption_fraction": None, "full_absorption_rate": None, "why": None}
    generator = np.random.default_rng(seed)
    yes, no = np.flatnonzero(y & fitted), np.flatnonzero(~y & fitted)
    train = np.concatenate([generator.permutation(yes)[:1000], generator.permutation(no)[:2000]])
    probe = logistic(x[train], y[train])
    right = probe.scores(x) > 0
    probe_f1 = f1_of(right[~fitted], y[~fitted])
    fires = submatrix(codes, np.flatnonzero(fitted))
    both = np.asarray((fires > 0).T.astype(np.float32) @ y[fitted].astype(np.float32))
    f1 = 2 * both / np.maximum(np.asarray((fires > 0).sum(0)).ravel() + y[fitted].sum(), 1)
    main = split_latents(fires, y[fitted], np.argsort(-f1, kind="stable")[:10].tolist())
    rows = np.flatnonzero(~fitted & y & right)
    if not main:
        return row | {"why": "no latent fires on it"}
    if probe_f1 < LEAST_PROBE_F1 or not len(rows):
        return row | {"why": f"the probe's F1 is below {LEAST_PROBE_F1}"}
    bias = (subject.dictionary.bypass() * subject.dictionary.out_scale).detach().float().cpu().numpy()
    rest = (sparse.csr_array(codes)[rows], latent_writes(subject), probe.weights, np.array(main))
    found, less_bias = absorbed(x[rows], *rest), absorbed(x[rows] - bias, *rest)
    return row | {
        f"mean_absorption_fraction_{LESS_BIAS}": float(less_bias.fraction.mean()),
        f"full_absorption_rate_{LESS_BIAS}": float(less_bias.full.mean()),
        "mean_absorption_fraction": float(found.fraction.mean()),
        "full_absorption_rate": float(found.full.mean()),
        "num_full_absorption": int(found.full.sum()),
        "num_probe_true_positives": len(rows),
        "num_split_features": len(main),
    }
