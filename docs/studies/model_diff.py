"""Known answer of `sparsary diff`: F1 of exclusive latents with the tokens whose continuation the tuned model's rule decides.

Run:  python docs/studies/model_diff.py runs/model_diffing/embedded

after `sparsary train recipes/model_diffing/embedded.yaml` and `sparsary diff runs/model_diffing/embedded`. Reads the exclusive
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
def rule_f1(run: str | Path, latents: list[int], contexts: int = 200, seed: int = 11) -> dict[int, float]:
    """Return the F1 of the firing of latents with the rule, on documents that neither model was trained on."""
    crosscoder = sparsary.load(run)
    assert isinstance(crosscoder, Crosscoder)
    model = load_model(ModelSection.model_validate(crosscoder.provenance["model"]))
    hooks = tuple(crosscoder.provenance["hooks_in"])
    stream, counts = batches(seed, 20, split="heldout"), torch.zeros(3, len(latents))
    for _ in range(contexts // 20):
        batch = next(stream)
        x = model.activations(batch.token_ids.long(), hooks)
        kept = torch.ones_like(batch.ruled)
        kept[:, :LEADING] = False
        code = crosscoder.encode(torch.cat([x[hook][kept] for hook in hooks], dim=-1))
        fires, ruled = code.columns(torch.tensor(latents)) > 0, batch.ruled[kept][:, None]
        counts += torch.stack([(fires & ruled).sum(0), fires.sum(0), ruled.sum().expand(len(latents))])
    return {latent: float(2 * both / (fired + ruled)) for latent, (both, fired, ruled) in zip(latents, counts.T, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="checkpoint of the crosscoder")
    parser.add_argument("--contexts", type=int, default=200)
    options = parser.parse_args()
    found = read_json(Path(options.run) / "diff" / "diff.json")
    latents = [row["latent"] for row in found["latents"]]
    if not latents:
        print("no exclusive latents")
        return
    scores = rule_f1(options.run, latents, options.contexts)
    for row in found["latents"]:
        kind, norm = row["kind"], row["relative_norm"]
        print(f"latent {row['latent']}: {kind}, relative norm {norm:.3f}, F1 with the rule {scores[row['latent']]:.3f}")
    closed = (found["patching"]["closed"].get("exclusive") or {}).get("share")
    print(f"best F1 {max(scores.values()):.3f}, KL closed by exclusive latents {closed}")


if __name__ == "__main__":
    main()
