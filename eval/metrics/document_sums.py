"""Sums by document behind a report's figures: ``documents.safetensors`` beside ``report.json``, for comparisons of runs.

The file has one float64 tensor per quantity, with an entry for each scored document, and ``documents``, their numbers in the
text (int64). Figures are ratios and differences of these sums, so that documents can be drawn anew together for several runs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ...sae.files import read_tensors, write_tensors
from ..bootstrap import Totals

SUMS_FILE = "documents.safetensors"
DOCUMENTS = "documents"
ABLATIONS = ("zero", "mean", "resample")
# Sums by quantity, an entry for each document; ``documents`` are their numbers.
Sums = Mapping[str, np.ndarray]


def _recovered(name: str) -> Callable[[Totals], np.ndarray]:
    return lambda sums: (sums[f"ce_{name}"] - sums["ce_spliced"]) / (sums[f"ce_{name}"] - sums["ce_clean"])


# Figures of the report that follow from its second half's sums. The deviation is scaled so that fvu does exactly.
RECONSTRUCTION: dict[str, Callable[[Totals], np.ndarray]] = {
    "fvu": lambda sums: sums["error"] / sums["deviation"],
    "l0_mean": lambda sums: sums["nonzeros"] / sums["tokens"],
}
DOWNSTREAM: dict[str, Callable[[Totals], np.ndarray]] = {
    "ce_increase": lambda sums: (sums["ce_spliced"] - sums["ce_clean"]) / sums["count"],
    "kl_spliced": lambda sums: sums["kl_spliced"] / sums["count"],
    "top1_agreement": lambda sums: sums["agrees"] / sums["count"],
    **{f"ce_recovered_{name}": _recovered(name) for name in ABLATIONS},
}
STATISTICS = RECONSTRUCTION | DOWNSTREAM


def merged_sums(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, np.ndarray]:
    """Return the sums of several groups of metrics over all documents that one of them counted, 0 where another did not."""
    documents = np.unique(np.concatenate([np.asarray(part[DOCUMENTS], dtype=np.int64) for part in parts]))
    found: dict[str, np.ndarray] = {DOCUMENTS: documents}
    for part in parts:
        places = np.searchsorted(documents, np.asarray(part[DOCUMENTS], dtype=np.int64))
        for name, values in part.items():
            if name != DOCUMENTS:
                found[name] = np.zeros(len(documents))
                found[name][places] = values
    return found


def write_sums(directory: Path, sums: Sums) -> None:
    """Write them beside a report, whole or not at all."""
    write_tensors(directory / SUMS_FILE, {name: torch.from_numpy(values) for name, values in sums.items()}, {})


def read_sums(directory: Path) -> dict[str, np.ndarray] | None:
    """Return the sums beside a report; ``None`` where there are none, as of reports from before they were kept.

    Raises:
        ValueError: If the file is damaged.
    """
    path = directory / SUMS_FILE
    return {name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()} if path.exists() else None
