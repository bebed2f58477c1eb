"""Per-document sums behind a report's figures: ``documents.safetensors`` next to ``report.json``, for comparisons of runs.

The file holds one float64 tensor per quantity, with an entry for each scored document, and ``documents``, their indices in the
text (int64). Figures are ratios and differences of these sums, so several runs can be bootstrapped over the same documents.
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
# Per-document sums by quantity; ``documents`` holds the document indices.
Sums = Mapping[str, np.ndarray]


def _recovered(name: str) -> Callable[[Totals], np.ndarray]:
    return lambda sums: (sums[f"ce_{name}"] - sums["ce_spliced"]) / (sums[f"ce_{name}"] - sums["ce_clean"])


# Report entries that follow from the scored half's sums. `deviation` is scaled so that fvu matches the report exactly.
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
    """Return the sums of several metric groups over the union of their documents, 0 where a group did not count one."""
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
    """Write the sums next to a report, atomically."""
    write_tensors(directory / SUMS_FILE, {name: torch.from_numpy(values) for name, values in sums.items()}, {}, sealed=True)


def read_sums(directory: Path) -> dict[str, np.ndarray] | None:
    """Return the sums next to a report, or ``None`` if there are none (reports older than this file).

    Raises:
        ValueError: If the file is damaged.
    """
    path = directory / SUMS_FILE
    return {name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()} if path.exists() else None
