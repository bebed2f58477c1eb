"""Known answer of `sparsary diff`: F1 of changed latents with the tokens whose continuation the tuned model's rule decides.

Run:  python docs/studies/model_diff.py runs/model_diffing/embedded

after `sparsary train recipes/model_diffing/embedded.yaml` and `sparsary diff runs/model_diffing/embedded`. Reads the changed
latents of `diff.json`, encodes held-out documents with both models, and prints the F1 of each with the rule.
"""

import argparse
from pathlib import Path

import torch

import sparsary
from sparsary.sae.files import read_json
from sparsary.training.activations.model import load_model
from sparsary.training.embedded.tune import batches
from sparsary.training.recipe import ModelSection
from sparsary.transcoders.crosscoder import Crosscoder

LEADING = 8


@torch.no_grad()
def rule_f1(run: str | Path, latents: list[int], contexts: int = 400, seed: int = 11) -> dict[int, float]:
    """Return the F1 of latents with the rule, on documents that neither model was trained on.

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
        code = crosscoder.encode(torch.cat([x[hook][kept] for hook in hooks], dim=-1))
        values.append(code.columns(torch.tensor(latents)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="checkpoint of the crosscoder")
    parser.add_argument("--contexts", type=int, default=400)
    options = parser.parse_args()
    found = read_json(Path(options.run) / "diff" / "diff.json")
    latents = [row["latent"] for row in found["latents"]]
    if not latents:
        print("no changed latents")
        return
    scores = rule_f1(options.run, latents, options.contexts)
    for row in found["latents"]:
        kind, norm = row["kind"], row["relative_norm"]
        print(f"latent {row['latent']}: {kind}, relative norm {norm:.3f}, F1 with the rule {scores[row['latent']]:.3f}")
    closed = {name: found["patching"]["closed"][name]["share"] for name in ("exclusive", "changed", "random")}
    print(f"best F1 {max(scores.values()):.3f}, KL closed by", ", ".join(f"{n} latents {x:.3f}" for n, x in closed.items()))


if __name__ == "__main__":
    main()
