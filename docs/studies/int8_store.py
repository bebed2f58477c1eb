"""Cost of an int8 store: the quickstart's dictionary, trained on float32 and on int8 rows of the same tokens.

    .venv/bin/python docs/studies/int8_store.py [--seeds 3] [--store-tokens 300000] [--tokens 600000]

Both dictionaries of a seed see the same rows in the same order and are evaluated on the same held-out float32 rows. Prints
the sizes of the stores, fvu of every run, and the mean difference int8 - float32 with its 95 % interval over seeds (Student's
t).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from sparsary.sae import load_dictionary
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.shards import ActivationStore, RowReader
from sparsary.training.recipe import load_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest, train_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@torch.no_grad()
def heldout_fvu(directory: Path, store: ActivationStore, hook: str) -> float:
    """Return the fvu of the dictionary on all held-out rows of a store."""
    sae = load_dictionary(directory).eval()
    rows = RowReader(store, "heldout", f"x:{hook}")
    running = RunningFvu(sae.d_out)
    for start in range(0, len(rows), 2048):
        x = rows.gather(np.arange(start, min(start + 2048, len(rows))))
        running.update(x, sae(x))
    return float(running.value())


def waited_share(directory: Path) -> float:
    """Return the share of a run's time spent waiting for batches."""
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["data_wait_share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store-tokens", type=int, default=300_000)
    parser.add_argument("--tokens", type=int, default=600_000, help="of training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fvu: dict[str, list[float]] = {}
        stores: dict[str, ActivationStore] = {}
        for dtype in ("float32", "int8"):
            fvu[dtype] = []
            for seed in range(options.seeds):
                out = Path(folder) / f"{dtype}-{seed}"
                values = {
                    "harvest.store": f"{folder}/store-{dtype}",
                    "harvest.dtype": dtype,
                    "harvest.tokens": options.store_tokens,
                    "tokens": options.tokens,
                    "seed": seed,
                    "out_dir": str(out),
                }
                recipe = load_recipe(QUICKSTART, values)
                stores[dtype] = run_harvest(resolve_recipe(recipe))
                train_recipe(resolve_recipe(recipe))
                fvu[dtype].append(heldout_fvu(out, stores["float32"], recipe.dictionary.hook))
                print(f"{dtype} seed {seed}: fvu {fvu[dtype][-1]:.5f}, waited {waited_share(out):.4f} of the time", flush=True)
    size = {dtype: sum(shard["bytes"] for shard in store.manifest["shards"]) for dtype, store in stores.items()}
    labels = 16 * sum(shard["tokens"] for shard in stores["int8"].manifest["shards"])
    print(
        f"bytes int8 / float32: {size['int8'] / size['float32']:.4f} with labels, "
        f"{(size['int8'] - labels) / (size['float32'] - labels):.4f} without"
    )
    differences = [ours - exact for ours, exact in zip(fvu["int8"], fvu["float32"], strict=True)]
    print(f"fvu int8 - float32: {statistics.mean(differences):+.6f}", end="")
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        print(f" +- {stats.t.ppf(0.975, len(differences) - 1) * error:.6f}", end="")
    print(f"; rounding alone: {next(iter(stores['int8'].manifest['hooks'].values()))['rounding_fvu']:.2e}")


if __name__ == "__main__":
    main()
