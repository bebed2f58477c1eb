"""Warm start under a planted drift: activations of the embedded model, rotated and scaled.

    OMP_NUM_THREADS=1 .venv/bin/python docs/studies/warm_start.py --seeds 3 --out docs/results/warm-start-drift.json
    .venv/bin/python docs/studies/warm_start.py --help

A TopK SAE is trained on the activations as they are. They then drift: every plane of a random orthogonal basis turns by one
angle, all lengths grow by one factor, and the mean turns and grows with them. For every angle, prints the held-out fvu of the
old dictionary on drifted activations, of a dictionary trained on them from scratch with the whole budget, of one trained from
scratch with a share of it, and of the old one continued (``dictionary.start``) with that share and with larger ones; means over
seeds with half the 95 % interval. Short runs take batches of 128 tokens and a rate of 2e-3; a dictionary trained from scratch
that way on the whole budget is the last row, as small batches alone make more steps of a budget. The drift is the same for all
seeds, which draw the initial weights and the order of tokens.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import Tensor

import sparsary
from sparsary.eval.compare.statistics import sd_of, uncertainty
from sparsary.sae.metrics import fvu
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.activations.store_stream import StoreStream

HOOK = "transformer.h.2:out"


def drift(d: int, angle: float, scale: float, seed: int = 0) -> Tensor:
    """Return the matrix that turns every plane of a random basis by ``angle`` and scales; infinity is a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    if math.isinf(angle):
        return (scale * basis).float()
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return (scale * basis @ torch.block_diag(*[turn] * (d // 2)) @ basis.T).float()


def trained(folder: Path, name: str, x: Tensor, **keys: Any) -> sparsary.SparseDictionary:
    """Return a dictionary trained on activations."""
    values = {
        "dictionary": {"hook": HOOK} | keys.pop("dictionary"),
        "batch_tokens": 2048,
        "dead_after_tokens": 200_000,
        "out_dir": str(folder / name),
        "save_every": 10**9,
    }
    directory = sparsary.train(values | keys, x)
    found = sparsary.load(directory)
    assert isinstance(found, sparsary.SparseDictionary)
    return found


def judged(dictionary: sparsary.SparseDictionary, x: Tensor) -> float:
    """Return the fvu on held-out activations."""
    with torch.no_grad():
        return float(fvu(x, torch.cat([dictionary(rows) for rows in x.split(4096)])))


def with_interval(values: Sequence[float], places: int) -> str:
    """Return a mean with half its 95 % interval over seeds."""
    found = uncertainty([(sd_of(values), len(values))], None)
    mean = f"{statistics.fmean(values):.{places}f}"
    return mean if found is None else f"{mean} ± {found.half_width:.{places}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/quickstart-activations", help="store of recipes/quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="whole budget")
    parser.add_argument("--shares", default="0.05,0.1,0.2", help="shares of the budget of the continued dictionaries")
    parser.add_argument("--rotations", default="0.3,0.9,inf", help="angles in radians; inf: any rotation")
    parser.add_argument("--scale", type=float, default=1.3)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of training")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every seed")
    arguments = parser.parse_args()
    store = ActivationStore.open(arguments.store)
    rows, heldout = (StoreStream(store, (HOOK,), 1, 0, split).sample(10**9).x for split in ("train", "heldout"))
    new = {"n_latents": 1024, "encoder": {"name": "topk", "k": 16}, "init": "random"}
    shares, angles = ([float(x) for x in given.split(",")] for given in (arguments.shares, arguments.rotations))
    found: dict[str, dict[str, list[float]]] = {}

    def noted(row: str, arm: str, value: float) -> float:
        found.setdefault(row, {}).setdefault(arm, []).append(value)
        print(f"{row}: {arm}: {value:.4f}", flush=True)
        return value

    def briefly(share: float) -> dict[str, Any]:
        """Return what suits a short run: many small steps, warmed up in a tenth of it, and falling over most of it."""
        tokens = round(arguments.tokens * share)
        return {"tokens": tokens, "batch_tokens": 128, "lr": 2e-3, "lr_warmup_steps": max(1, tokens // 1280), "lr_decay": 0.7}

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            here = Path(folder) / str(seed)
            common: dict[str, Any] = {"tokens": arguments.tokens, "seed": seed}
            old = trained(here, "old", rows, dictionary=new, **common)
            noted("none", "before", judged(old, heldout))
            small = trained(here, "small", rows, dictionary=new, **(common | briefly(1.0)))
            noted("none", "scratch, all, small batches", judged(small, heldout))
            for angle in angles:
                A, name = drift(rows.shape[1], angle, arguments.scale), f"{angle:g}"
                x, y = rows @ A.T, heldout @ A.T
                noted(name, "before", judged(old, y))
                whole = noted(name, "scratch, all", judged(trained(here, f"whole-{name}", x, dictionary=new, **common), y))
                few = trained(here, f"few-{name}", x, dictionary=new, **(common | briefly(shares[0])))
                noted(name, f"scratch, {shares[0]:g}", judged(few, y))
                for share in shares:
                    start = {"start": str(here / "old")}
                    run = trained(here, f"warm-{name}-{share:g}", x, dictionary=start, **(common | briefly(share)))
                    warm = noted(name, f"continued, {share:g}", judged(run, y))
                    noted(name, f"continued, {share:g} : scratch, all", warm / whole)
    arms = list(found[f"{angles[0]:g}"])
    print(f"\n| rotation | {' | '.join(arms)} |\n|{'---|' * (len(arms) + 1)}")
    for angle in angles:
        cells = [with_interval(found[f"{angle:g}"][arm], 3 if ":" in arm else 4) for arm in arms]
        print(f"| {angle:g} | {' | '.join(cells)} |")
    for arm, values in found["none"].items():
        print(f"without a drift, {arm}: {with_interval(values, 4)}")
    if arguments.out:
        settings = {"tokens": arguments.tokens, "scale": arguments.scale, "seeds": arguments.seeds}
        write_results(arguments.out, settings | {"rotations": found})


if __name__ == "__main__":
    main()
