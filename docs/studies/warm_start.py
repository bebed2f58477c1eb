"""Warm start under a planted drift: activations of the embedded model, rotated and scaled.

    OMP_NUM_THREADS=1 .venv/bin/python docs/studies/warm_start.py [--store runs/quickstart-activations] [--rotations 0.3,0.6]
    .venv/bin/python docs/studies/warm_start.py --help

A TopK SAE is trained on the activations as they are. They then drift: every plane of a random orthogonal basis turns by one
angle, all lengths grow by one factor, and the mean turns and grows with them. For every angle, prints the held-out fvu of the
old dictionary on drifted activations, of a dictionary trained on them from scratch with the whole budget, of one trained from
scratch with a share of it, and of the old one continued (``dictionary.start``) with the same share.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsary
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


def trained(folder: Path, name: str, x: Tensor, tokens: int, **keys: Any) -> sparsary.SparseDictionary:
    """Return a dictionary trained on activations."""
    values = {
        "dictionary": {"hook": HOOK} | keys.pop("dictionary"),
        "tokens": tokens,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/quickstart-activations", help="store of recipes/quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="whole budget")
    parser.add_argument("--share", type=float, default=0.05, help="share of the budget of the continued dictionaries")
    parser.add_argument("--rotations", default="0.3,0.9,inf", help="angles in radians; inf: any rotation")
    parser.add_argument("--scale", type=float, default=1.3)
    parser.add_argument("--seeds", default="0", help="seeds of training")
    arguments = parser.parse_args()
    store = ActivationStore.open(arguments.store)
    rows, heldout = (StoreStream(store, (HOOK,), 1, 0, split).sample(10**9).x for split in ("train", "heldout"))
    new = {"n_latents": 1024, "encoder": {"name": "topk", "k": 16}, "init": "random"}
    short = round(arguments.tokens * arguments.share)
    # What suits the short run: many small steps, warmed up in a tenth of it, and falling over most of it.
    brief = {"batch_tokens": 128, "lr": 2e-3, "lr_warmup_steps": max(1, short // 128 // 10), "lr_decay": 0.7}
    print("rotation  scale  seed  before  scratch, all  scratch, share  continued, share  continued : scratch, all")
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, arguments.seeds.split(",")):
            here = Path(folder) / str(seed)
            old = trained(here, "old", rows, arguments.tokens, dictionary=new, seed=seed)
            print(f"     none      1  {seed:4}  {judged(old, heldout):6.4f}")
            for angle in map(float, arguments.rotations.split(",")):
                A, name = drift(rows.shape[1], angle, arguments.scale), f"{angle}"
                x, y = rows @ A.T, heldout @ A.T
                whole = judged(trained(here, f"whole-{name}", x, arguments.tokens, dictionary=new, seed=seed), y)
                few = judged(trained(here, f"few-{name}", x, short, dictionary=new, seed=seed, **brief), y)
                start = {"start": str(here / "old")}
                warm = judged(trained(here, f"warm-{name}", x, short, dictionary=start, seed=seed, **brief), y)
                before = judged(old, y)
                print(
                    f"{angle:9.2g}  {arguments.scale:5.2g}  {seed:4}  {before:6.3f}  {whole:12.4f}  {few:14.4f}  {warm:16.4f}  "
                    f"{warm / whole:25.3f}"
                )


if __name__ == "__main__":
    main()
