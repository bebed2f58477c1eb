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

The old dictionary is also aligned before it is continued (``dictionary.start.align``): by 16,384 pairs of activations before
and after the drift, and without pairs. ``--only aligned`` adds these arms to the figures in ``--out``, if the old dictionaries
give the same errors there.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results
from torch import Tensor

import sparsary
from sparsary.eval.compare.statistics import sd_of, uncertainty
from sparsary.sae.metrics import fvu
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.warm_start.maps import mapped
from sparsary.training.warm_start.unpaired import unpaired_rotation

HOOK = "transformer.h.2:out"
# Rows that are paired by number: more than the 16,384 that an alignment reads.
PAIRED = 20_000


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


def figures_to_add_to(path: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the figures of a file of this study, by rotation and arm.

    Raises:
        ValueError: If there is no file, or its settings are other ones.
    """
    if path is None or not path.exists():
        raise ValueError(f"--out: expected figures to add to, got {path}. Run the study with --only all first.")
    found = json.loads(path.read_text(encoding="utf-8"))
    if {key: found[key] for key in settings} != settings:
        raise ValueError(f"--out: expected figures of {settings}, got others in {path}.")
    return found["rotations"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/quickstart-activations", help="store of recipes/quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="whole budget")
    parser.add_argument("--shares", default="0.05,0.1,0.2", help="shares of the budget of the continued dictionaries")
    parser.add_argument("--rotations", default="0.3,0.9,inf", help="angles in radians; inf: any rotation")
    parser.add_argument("--scale", type=float, default=1.3)
    parser.add_argument(
        "--reach", default="1.2,1.5,2", help="further angles at which alignment without pairs is tried, untrained"
    )
    parser.add_argument("--only", choices=("all", "aligned"), default="all", help="arms to run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of training")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every seed")
    arguments = parser.parse_args()
    store = ActivationStore.open(arguments.store)
    rows, heldout = (StoreStream(store, (HOOK,), 1, 0, split).sample(10**9).x for split in ("train", "heldout"))
    new = {"n_latents": 1024, "encoder": {"name": "topk", "k": 16}, "init": "random"}
    shares, angles, reach = (
        [float(x) for x in given.split(",") if x] for given in (arguments.shares, arguments.rotations, arguments.reach)
    )
    settings = {"tokens": arguments.tokens, "scale": arguments.scale, "seeds": arguments.seeds}
    found: dict[str, dict[str, list[float]]] = {}
    earlier = figures_to_add_to(arguments.out, settings) if arguments.only == "aligned" else None

    def noted(row: str, arm: str, value: float) -> float:
        found.setdefault(row, {}).setdefault(arm, []).append(value)
        print(f"{row}: {arm}: {value:.4f}", flush=True)
        return value

    def unchanged(row: str, value: float) -> None:
        """Raise if an old dictionary's error is another one than in the figures that are added to."""
        number = len(found[row]["before"]) - 1
        if earlier is not None and not math.isclose(value, earlier[row]["before"][number], rel_tol=1e-4):
            raise ValueError(
                f"--out: expected fvu {value} before training for seed {number}, got {earlier[row]['before'][number]}."
            )

    def briefly(share: float) -> dict[str, Any]:
        """Return what suits a short run: many small steps, warmed up in a tenth of it, and falling over most of it."""
        tokens = round(arguments.tokens * share)
        return {"tokens": tokens, "batch_tokens": 128, "lr": 2e-3, "lr_warmup_steps": max(1, tokens // 1280), "lr_decay": 0.7}

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            here = Path(folder) / str(seed)
            common: dict[str, Any] = {"tokens": arguments.tokens, "seed": seed}
            old = trained(here, "old", rows, dictionary=new, **common)
            unchanged("none", noted("none", "before", judged(old, heldout)))
            if earlier is None:
                small = trained(here, "small", rows, dictionary=new, **(common | briefly(1.0)))
                noted("none", "scratch, all, small batches", judged(small, heldout))
            np.save(here / "own.npy", rows[:PAIRED].numpy())
            for angle in angles:
                A, name = drift(rows.shape[1], angle, arguments.scale), f"{angle:g}"
                x, y = rows @ A.T, heldout @ A.T
                unchanged(name, noted(name, "before", judged(old, y)))
                if earlier is None:
                    whole = noted(name, "scratch, all", judged(trained(here, f"whole-{name}", x, dictionary=new, **common), y))
                    few = trained(here, f"few-{name}", x, dictionary=new, **(common | briefly(shares[0])))
                    noted(name, f"scratch, {shares[0]:g}", judged(few, y))
                else:
                    whole = earlier[name]["scratch, all"][seed]
                for way, align in (("pairs", {"files": [str(here / "own.npy")]}), ("unpaired", "unpaired")):
                    start = {"start": {"path": str(here / "old"), "align": align}}
                    run = trained(here, f"{way}-{name}", x, dictionary=start, **(common | briefly(shares[0])))
                    noted(name, f"{way}, before", run.provenance["start"]["before"]["fvu"])
                    after = noted(name, f"{way}, continued, {shares[0]:g}", judged(run, y))
                    noted(name, f"{way}, continued, {shares[0]:g} : scratch, all", after / whole)
                for share in shares if earlier is None else ():
                    start = {"start": str(here / "old")}
                    run = trained(here, f"warm-{name}-{share:g}", x, dictionary=start, **(common | briefly(share)))
                    warm = noted(name, f"continued, {share:g}", judged(run, y))
                    noted(name, f"continued, {share:g} : scratch, all", warm / whole)
            for angle in reach:
                A, name = drift(rows.shape[1], angle, arguments.scale), f"{angle:g}"
                noted(name, "before", judged(old, heldout @ A.T))
                maps = unpaired_rotation(old, rows[:12_288] @ A.T, torch.device("cpu"))
                noted(name, "unpaired, untrained", judged(mapped(old, maps, maps), heldout @ A.T))
    if earlier is not None:
        found = {row: earlier.get(row, {}) | arms for row, arms in found.items()}
    arms = list(found[f"{angles[0]:g}"])
    print(f"\n| rotation | {' | '.join(arms)} |\n|{'---|' * (len(arms) + 1)}")
    for angle in angles:
        cells = [with_interval(found[f"{angle:g}"][arm], 3 if ":" in arm else 4) for arm in arms]
        print(f"| {angle:g} | {' | '.join(cells)} |")
    for angle in reach:
        told = ", ".join(f"{arm}: {with_interval(values, 4)}" for arm, values in found[f"{angle:g}"].items())
        print(f"{angle:g} rad, {told}")
    for arm, values in found["none"].items():
        print(f"without a drift, {arm}: {with_interval(values, 4)}")
    if arguments.out:
        write_results(arguments.out, settings | {"rotations": found})


if __name__ == "__main__":
    main()
