"""Comparison of calibrated thresholds with batch-wide selection, on held-out rows of a store.

    .venv/bin/python docs/studies/calibration.py runs/embedded/activations RUN_DIRECTORY...

For each run of a batch-wide encoder: l0 and fvu per token (eval mode, thresholds) and as in training (batches of 2048).
"""

import argparse

import numpy as np
import torch

from sparsary.sae import load_dictionary
from sparsary.sae.batch_encoder import BatchWide
from sparsary.sae.checkpoint_files import read_config
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.shards import ActivationStore, RowReader

BATCH = 2048


@torch.no_grad()
def judged(directory: str, store: ActivationStore) -> dict[str, float]:
    """Return l0 and fvu in both modes."""
    sae = load_dictionary(directory)
    assert isinstance(sae.encoder, BatchWide), f"{directory}: not a batch-wide family"
    rows = RowReader(store, "heldout", f"x:{read_config(directory)['provenance']['hook']}")
    order = np.random.default_rng(0).permutation(len(rows))
    found = {}
    for mode in ("per token", "batch"):
        sae.train(mode == "batch")
        fvu, entries, tokens = RunningFvu(sae.d_out), 0, 0
        for start in range(0, len(order) - BATCH + 1, BATCH):
            x = rows.gather(np.sort(order[start : start + BATCH]))
            code = sae.encode(x)
            fvu.update(x, sae.decode(code))
            entries, tokens = entries + int((code.values > 0).sum()), tokens + BATCH
        found |= {f"{mode} fvu": float(fvu.value()), f"{mode} l0": entries / tokens}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("runs", nargs="+")
    options = parser.parse_args()
    store = ActivationStore.open(options.store)
    for directory in options.runs:
        row = judged(directory, store)
        print(f"{directory}: " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
