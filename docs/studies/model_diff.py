"""Known answer of `sparsary diff`: F1 of changed latents with the tokens whose continuation the tuned model's rule decides.

Run:  python docs/studies/model_diff.py runs/model_diffing/embedded
      python docs/studies/model_diff.py --seeds 3

The first, after `sparsary train recipes/model_diffing/embedded.yaml` and `sparsary diff runs/model_diffing/embedded`, reads the
changed latents of `diff.json` (and the largest ones of the SAE on the difference, if `--difference-sae` trained one), encodes
held-out documents with both models, and prints the F1 of each with the rule. The second tunes, trains and compares anew for
every seed, into runs/model_diffing/seeds, and writes docs/results/model-diff.json; three seeds take 10 minutes of a core,
and an interrupted command goes on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

import sparsary
from sparsary.sae.files import read_json, write_json
from sparsary.training.activations.model import load_model
from sparsary.training.embedded.tune import batches, tune_embedded
from sparsary.training.recipe import ModelSection
from sparsary.transcoders.crosscoder import Crosscoder

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "model-diff.json"
LEADING = 8
TOKENS = 40_000

# From the activations of base and tuned model to those of latents, (tokens, latents).
Codes = Callable[[Tensor, Tensor], Tensor]


def crosscoder_codes(run: str | Path, latents: list[int]) -> Codes:
    """Return the activations of a crosscoder's latents."""
    crosscoder = sparsary.load(run)
    return lambda base, tuned: crosscoder.encode(torch.cat([base, tuned], dim=-1)).columns(torch.tensor(latents))


def difference_codes(folder: str | Path, latents: list[int]) -> Codes:
    """Return the activations of latents of an SAE on the difference."""
    sae = sparsary.load(folder)
    return lambda base, tuned: sae.encode(tuned - base).columns(torch.tensor(latents))


def rule_f1(run: str | Path, latents: list[int], contexts: int = 400, seed: int = 11) -> dict[int, float]:
    """Return the F1 of a crosscoder's latents with the rule, on documents that neither model was trained on."""
    return f1_of_codes(run, crosscoder_codes(run, latents), latents, contexts, seed)


@torch.no_grad()
def f1_of_codes(run: str | Path, codes: Codes, latents: list[int], contexts: int = 400, seed: int = 11) -> dict[int, float]:
    """Return the F1 of latents with the rule.

    A latent says yes above the activation that is best on the first half of the documents; the second half is scored.
    """
    crosscoder = sparsary.load(run)
    assert isinstance(crosscoder, Crosscoder)
    model = load_model(ModelSection.model_validate(crosscoder.provenance["model"]))
    hooks = tuple(crosscoder.provenance["hooks_in"])
    stream, values, ruled = batches(seed, 20, split="heldout"), [], []
    for _ in range(contexts // 20):
        batch = next(stream)
        x = model.activations(batch.token_ids.long(), hooks)
        kept = torch.ones_like(batch.ruled)
        kept[:, :LEADING] = False
        base, tuned = (x[hook][kept] for hook in hooks)
        values.append(codes(base, tuned))
        ruled.append(batch.ruled[kept])
    half = len(values) // 2
    fitted, judged = ((torch.cat(values[part]), torch.cat(ruled[part])) for part in (slice(half), slice(half, None)))
    found = {}
    for column, latent in enumerate(latents):
        levels = fitted[0][:, column].unique()
        levels = levels[torch.linspace(0, len(levels) - 1, min(len(levels), 200)).long()]
        best = max(levels.tolist(), key=lambda level, column=column: _f1(fitted[0][:, column] > level, fitted[1]))
        found[latent] = _f1(judged[0][:, column] > best, judged[1])
    return found


def _f1(fires: torch.Tensor, ruled: torch.Tensor) -> float:
    return 2 * float((fires & ruled).sum()) / max(1.0, float(fires.sum() + ruled.sum()))


def read_run(run: Path, contexts: int) -> dict[str, Any]:
    """Print the F1 of the latents of a run's `diff.json`, and return the figures."""
    path = run / "diff" / "diff.json"
    found = read_json(path)
    scores = rule_f1(run, latents, contexts) if (latents := [row["latent"] for row in found["latents"]]) else {}
    for row in found["latents"]:
        kind, norm = row["kind"], row["relative_norm"]
        print(f"latent {row['latent']}: {kind}, relative norm {norm:.3f}, F1 with the rule {scores[row['latent']]:.3f}")
    figures: dict[str, Any] = {
        "fvu": found["fvu"],
        "counts": found["counts"],
        "best_f1": max(scores.values(), default=0.0),
        "f1": list(scores.values()),
        "closed": {name: entry["share"] for name, entry in found["patching"]["closed"].items() if entry is not None},
        "kl_base": found["patching"]["kl_base"],
    }
    if "difference_sae" in found:
        of_sae = [row["latent"] for row in found["difference_sae"]["latents"]]
        codes = difference_codes(path.parent / found["difference_sae"]["folder"], of_sae)
        of_difference = f1_of_codes(run, codes, of_sae, contexts)
        print("SAE on the difference:", ", ".join(f"latent {latent} F1 {value:.3f}" for latent, value in of_difference.items()))
        figures |= {"best_f1_difference_sae": max(of_difference.values()), "f1_difference_sae": list(of_difference.values())}
    closed = ", ".join(f"{name} {share:.3f}" for name, share in figures["closed"].items())
    print(f"best F1 {figures['best_f1']:.3f}, KL closed by {closed}")
    return figures


def run_seed(seed: int, folder: Path, contexts: int) -> dict[str, Any]:
    """Tune, train, and compare for one seed, unless its figures are there from before, and return them."""
    figures = folder / "figures.json"
    if figures.exists():
        return read_json(figures)
    if not (folder / "tuned" / "config.json").exists():
        tune_embedded(seed=seed).save_pretrained(folder / "tuned")
        sparsary.LanguageModel.from_pretrained("embedded", device="cpu").tokenizer.save_pretrained(folder / "tuned")
    run = sparsary.train(
        ROOT / "recipes" / "model_diffing" / "embedded.yaml",
        models=["embedded", str(folder / "tuned")],
        harvest__store=str(folder / "activations"),
        out_dir=str(folder / "run"),
        seed=seed,
    )
    if not (Path(run) / "diff" / "diff.json").exists():
        sparsary.diff(run, tokens=TOKENS, seed=seed, difference_sae=True)
    found = {"seed": seed} | read_run(Path(run), contexts)
    write_json(figures, found)
    return found


def run_seeds(seeds: int, out: Path, contexts: int) -> None:
    """Run several seeds; write the figures of each, and their means with 95 % intervals."""
    runs = [run_seed(seed, out / str(seed), contexts) for seed in range(seeds)]
    columns = {name: [run["closed"].get(name) for run in runs] for name in runs[0]["closed"]}
    columns |= {name: [run[name] for run in runs] for name in ("best_f1", "best_f1_difference_sae")}
    columns |= {kind: [run["counts"][kind] for run in runs] for kind in ("tuned_only", "base_only", "rotated")}
    table = {}
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        few = len(known) < 2
        half = 0.0 if few else float(student.ppf(0.975, len(known) - 1) * np.std(known, ddof=1)) / len(known) ** 0.5
        table[name] = {"mean": round(float(np.mean(known)), 4), "half": round(half, 4), "runs": len(known)}
        print(f"| {name} | {table[name]['mean']:.3f} +- {table[name]['half']:.3f} |")
    # A neighbor of this script: the test that runs it by path imports no neighbors.
    from results import write_results

    write_results(RESULTS, {"tokens": TOKENS, "contexts": contexts, "over_seeds": table, "runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="checkpoint of the crosscoder")
    parser.add_argument("--contexts", type=int, default=400)
    parser.add_argument("--seeds", type=int, help="tune, train and compare for so many seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/model_diffing/seeds"))
    options = parser.parse_args()
    if options.seeds:
        run_seeds(options.seeds, options.out, options.contexts)
    elif options.run:
        read_run(Path(options.run), options.contexts)
    else:
        parser.error("expected a run, or --seeds")


if __name__ == "__main__":
    main()
