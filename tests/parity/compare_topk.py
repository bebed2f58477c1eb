"""TopK here against the peers' TopK at equal budget: the same activations in the same order, the same schedule.

    make peers
    .venv/bin/python tests/parity/compare_topk.py stories3M --model DIR --train FILE.jsonl --heldout FILE.jsonl
    .venv/bin/python tests/parity/compare_topk.py quickstart

``stories3M``: output of block 3, contexts of 128 tokens, positions from 8 on, BOS left out, 3072 latents, k 16, a million
tokens.
``quickstart``: hook, width, k and budget of recipes/quickstart.yaml on the embedded model. Both: batches of 2048, learning
rate 1e-3, 100 steps of warm-up, linear decay over the last fifth, three seeds here, one for each peer.

Everything runs with the same number of threads, ours and the peers one after the other. Held-out fvu is the ratio of
sums about the mean. The table goes to stdout, all figures to ``--out``.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sparsary.sae import SparseDictionary, load_dictionary
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.harvest import harvest_activations
from sparsary.training.activations.model import load_model
from sparsary.training.activations.store_stream import StoreStream
from sparsary.training.recipe import HarvestSection, ModelSection, Recipe, TextSection, check_recipe, load_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
from sparsary.training.versions import git_commit

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
BATCH, LR, WARMUP, DECAY = 2048, 1e-3, 100, 0.2
SEEDS = (0, 1, 2)


def stories3m(model: Path, train_text: Path, heldout_text: Path, folder: Path) -> tuple[Recipe, torch.Tensor, torch.Tensor]:
    """The recipe and both sets of activations of the stories3M case."""
    section = ModelSection(id=str(model))
    hook = "model.layers.3:out"
    stores = []
    for name, text in (("train", train_text), ("heldout", heldout_text)):
        source = TextSection(source="files", files=(str(text),), context_length=128)
        options = HarvestSection(hooks=(hook,), tokens=1_000_000, store=str(folder / name), heldout=0.0)
        stores.append(harvest_activations(load_model(section), source, options))
    values = {
        "harvest": {"hooks": [hook], "tokens": 1_000_000},
        "dictionary": {"hook": hook, "n_latents": 3072, "encoder": {"name": "topk", "k": 16}},
        "tokens": 1_000_000 // BATCH * BATCH,
        "dead_after_tokens": 200_000,
        "out_dir": str(folder / "run"),
    }
    recipe = check_recipe(values, "stories3M")
    return recipe, in_order(stores[0], hook, recipe.tokens), in_order(stores[1], hook, 100_000)


def quickstart(folder: Path) -> tuple[Recipe, torch.Tensor, torch.Tensor]:
    """The recipe and both sets of activations of the quickstart."""
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", {"out_dir": str(folder / "run")})
    hook = recipe.dictionary.hook
    store = harvest_activations(
        load_model(recipe.model), recipe.text, recipe.harvest.model_copy(update={"store": str(folder / "store")})
    )
    budget = recipe.tokens // BATCH * BATCH
    x = in_order(store, hook, budget)
    return recipe.model_copy(update={"tokens": budget}), x, in_order(store, hook, store.tokens("heldout"), "heldout")


def in_order(store: Any, hook: str, tokens: int, split: str = "train") -> torch.Tensor:
    """The first ``tokens`` rows of the shuffled stream; a second pass begins where the store is smaller."""
    stream = StoreStream(store, (hook,), 1, seed=0, split=split)
    rows = np.concatenate([stream.order(i, min(BATCH, tokens - i)) for i in range(0, tokens, BATCH)])
    x = stream.rows["x"].gather(rows)
    stream.release()
    return x


@torch.no_grad()
def judge(dictionary: SparseDictionary, x: torch.Tensor) -> dict[str, float]:
    running, firings, l0 = RunningFvu(dictionary.d_out), torch.zeros(dictionary.n_latents, dtype=torch.long), 0.0
    for rows in x.split(4096):
        code = dictionary.encode(rows)
        running.update(rows, dictionary.decode(code))
        firings += code.firings(dictionary.n_latents)
        l0 += float(code.l0().sum())
    return {"fvu": float(running.value()), "l0": l0 / x.shape[0], "dead": int((firings == 0).sum())}


def run_ours(recipe: Recipe, x: torch.Tensor, heldout: torch.Tensor) -> list[dict[str, float]]:
    results = []
    schedule = {"batch_tokens": BATCH, "lr": LR, "lr_warmup_steps": WARMUP, "lr_decay": DECAY}
    for seed in SEEDS:
        config = recipe.model_copy(update=schedule | {"seed": seed, "out_dir": f"{recipe.out_dir}-{seed}"})
        started = time.perf_counter()
        directory = train_recipe(resolve_recipe(config), [x])
        seconds = time.perf_counter() - started
        results.append(judge(load_dictionary(directory), heldout) | {"seed": seed, "seconds": seconds})
    return results


def run_peers(recipe: Recipe, x: torch.Tensor, heldout: torch.Tensor, folder: Path) -> dict[str, Any]:
    if not PEERS_PYTHON.exists():
        raise SystemExit("The peers' environment is missing. Make it with: make peers")
    save_file({"x": x}, folder / "train.safetensors")
    save_file({"x": heldout}, folder / "heldout.safetensors")
    command = [
        PEERS_PYTHON,
        ROOT / "tests" / "parity" / "train_peers.py",
        "--activations",
        folder,
        "--out",
        folder / "peers.json",
    ]
    command += ["--latents", recipe.dictionary.n_latents, "--k", recipe.dictionary.encoder["k"], "--batch", BATCH, "--lr", LR]
    command += ["--warmup", WARMUP, "--decay-fraction", DECAY, "--threads", torch.get_num_threads()]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "peers.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("stories3M", "quickstart"))
    parser.add_argument("--model", type=Path, help="stories3M: the model's directory")
    parser.add_argument("--train", type=Path, help="stories3M: .jsonl to train on")
    parser.add_argument("--heldout", type=Path, help="stories3M: .jsonl to judge on")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    if arguments.case == "stories3M" and not (arguments.model and arguments.train and arguments.heldout):
        parser.error("stories3M needs --model, --train and --heldout")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.case == "stories3M":
            recipe, x, heldout = stories3m(arguments.model, arguments.train, arguments.heldout, folder)
        else:
            recipe, x, heldout = quickstart(folder)
        ours = run_ours(recipe, x, heldout)
        peers = run_peers(recipe, x, heldout, folder)
    settings = {"tokens": len(x), "heldout": len(heldout), "threads": torch.get_num_threads(), "commit": git_commit()}
    mean = statistics.mean(result["fvu"] for result in ours)
    spread = statistics.stdev(result["fvu"] for result in ours)
    print(f"{'':32}{'held-out fvu':>14}{'dead':>8}")
    print(f"{f'sparsary ({len(SEEDS)} seeds, +- {spread:.4f})':32}{mean:14.4f}{ours[0]['dead']:8d}")
    for peer, result in sorted(peers.items(), key=lambda item: item[1]["fvu"]):
        print(f"{peer:32}{result['fvu']:14.4f}{result['dead']:8d}")
    if arguments.out:
        report = {"case": arguments.case, "settings": settings, "sparsary": ours, "peers": peers}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
