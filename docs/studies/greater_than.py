"""Transcoder latents that implement the greater-than task of the embedded model.

    python docs/studies/replaced_mlps.py embedded          # trains the stacks
    python docs/studies/greater_than.py                   # the three seeds' stacks of transcoders

Prompts are "The EVENT lasted from the year 17YY to the year 17"; the preference is the probability of the years after YY minus
that of the others. With transcoders spliced in and their errors added back, the model's outputs are unchanged, and a latent's
input-dependent attribution is its activation times the gradient of the preference with respect to it, summed over positions
and averaged over prompts. The latents with the largest attributions on one set of prompts are ablated (set to 0 everywhere)
on another, as are equally many random latents that fire on the first, drawn twenty times. The tuning of a latent is its
activation as a function of YY, and the share of its variance over prompts that YY explains. Writes
docs/results/greater-than.json and docs/greater_than.png.
"""

import argparse
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from results import write_results

from sparsary.training.activations.insertions import Insertion, Intervention
from sparsary.training.activations.model import LanguageModel, load_model
from sparsary.training.activations.splice import model_spliced
from sparsary.training.embedded.corpus import task_prompts
from sparsary.training.recipe import ModelSection
from sparsary.transcoders import Stack, load_stack
from sparsary.transcoders.stack import hooks_of_provenance

COUNTS = (1, 2, 4, 8, 16, 32)
DRAWS = 20
SHOWN = 12


class Task:
    """Prompts of one length, and the preference computed from logits."""

    def __init__(self, model: LanguageModel, n: int, seed: int):
        found = task_prompts("greater_than", n, seed=seed)
        ids = model.tokenizer.convert_tokens_to_ids
        self.token_ids = torch.tensor([[model.tokenizer.bos_token_id, *ids(list(prompt.words))] for prompt in found])
        self.years = torch.tensor([next(f["year"] for f in prompt.factors if f["role"] == "start_year") for prompt in found])
        self.right = torch.zeros(n, model.module.config.vocab_size)
        self.wrong = torch.zeros_like(self.right)
        for row, prompt in enumerate(found):
            self.right[row, ids(list(prompt.answers))] = 1
            self.wrong[row, ids(list(prompt.foils))] = 1

    def preference(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1].softmax(-1) * (self.right - self.wrong)).sum(-1)


def insertions(stack: Stack) -> list[Insertion]:
    return [Insertion(stack[hook], *hooks_of_provenance(stack.provenances[hook])) for hook in stack]


def attributions(model: LanguageModel, stack: Stack, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean attribution and the number of prompts with activation of every latent, ``(layers, n_latents)``."""
    attribution, firing = [], []
    with model_spliced(model, insertions(stack), add_error=True) as run:
        task.preference(model.run(task.token_ids)).sum().backward()
        for index, hook in enumerate(stack):
            code, n = run.codes[index, 0], stack[hook].n_latents
            effect = (code.values * code.values.grad).detach()
            attribution.append(torch.zeros(n).index_add_(0, code.latents, effect) / len(task.years))
            prompt = code.token_ids() // task.token_ids.shape[1]
            cells = torch.zeros(len(task.years), n).index_put(
                (prompt, code.latents), (code.values > 0).float(), accumulate=True
            )
            firing.append((cells > 0).sum(0))
    return torch.stack(attribution), torch.stack(firing)


@torch.no_grad()
def without(model: LanguageModel, stack: Stack, task: Task, latents: list[tuple[int, int]]) -> float:
    """Return the mean preference with these (layer, latent) pairs set to 0 everywhere."""
    edits = [
        Intervention("set", [latent for layer, latent in latents if layer == index], 0.0, insertion=index)
        for index in {layer for layer, _ in latents}
    ]
    with model_spliced(model, insertions(stack), add_error=True, edits=edits):
        return float(task.preference(model.run(task.token_ids)).mean())


@torch.no_grad()
def tuning(model: LanguageModel, stack: Stack, task: Task, layer: int, latent: int) -> dict:
    """Return a latent's mean activation by start year, at the position where it fires most."""
    with model_spliced(model, insertions(stack), add_error=True) as run:
        model.run(task.token_ids)
        values = run.codes[layer, 0].columns(torch.tensor([latent]))[:, 0].view(len(task.years), -1)
    position = int(values.sum(0).argmax())
    here = values[:, position]
    means = torch.stack(
        [here[task.years == year].mean() if (task.years == year).any() else torch.tensor(0.0) for year in range(100)]
    )
    counts = torch.bincount(task.years, minlength=100)
    between = (counts * (means - here.mean()).pow(2)).sum()
    spread = (here - here.mean()).pow(2).sum()
    return {
        "layer": layer,
        "latent": latent,
        "position": position,
        "from_end": values.shape[1] - 1 - position,
        "explained_by_year": float(between / spread) if spread > 0 else None,
        "means": [round(float(mean), 4) if count else None for mean, count in zip(means, counts, strict=True)],
    }


def study(model: LanguageModel, directory: Path, n: int) -> dict:
    stack = load_stack(directory)
    for transcoder in stack.values():
        transcoder.requires_grad_(False)
    chosen, judged = Task(model, n, 0), Task(model, n, 1)
    attribution, firing = attributions(model, stack, chosen)
    order = attribution.flatten().argsort(descending=True)
    top = [divmod(int(place), attribution.shape[1]) for place in order[: max(COUNTS)]]
    alive = [tuple(place) for place in (firing >= n // 20).nonzero().tolist()]
    clean = float(judged.preference(model.logits(judged.token_ids)).mean())
    curve = []
    for count in COUNTS:
        draw = random.Random(count)
        others = [
            without(model, stack, judged, draw.sample([a for a in alive if a not in top[:count]], count)) for _ in range(DRAWS)
        ]
        curve.append({"count": count, "top": without(model, stack, judged, top[:count]), "random": others})
    tuned = [tuning(model, stack, judged, *place) for place in top[:SHOWN]]
    # Control: the same figure for random latents that fire on the prompts.
    draw = random.Random(0)
    control = [tuning(model, stack, judged, *place)["explained_by_year"] for place in draw.sample(alive, 60)]
    return {
        "stack": str(directory),
        "prompts": n,
        "clean": clean,
        "alive": len(alive),
        "curve": curve,
        "top": [part | {"attribution": float(attribution[part["layer"], part["latent"]])} for part in tuned],
        "control_explained_by_year": [value for value in control if value is not None],
    }


def plot(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")
    for rank, part in enumerate(result["top"][:6]):
        years = [year for year, mean in enumerate(part["means"]) if mean is not None]
        label = f"layer {part['layer']}, latent {part['latent']} ({part['explained_by_year']:.2f})"
        axes[0].plot(years, [part["means"][year] for year in years], color=colours(rank / 6), label=label, linewidth=1.4)
    axes[0].set(xlabel="start year YY", ylabel="activation, mean over prompts", title="Largest attributions: tuned to years")
    axes[0].legend(title="share explained by YY", frameon=False, fontsize=8)
    counts = [point["count"] for point in result["curve"]]
    axes[1].axhline(result["clean"], color="0.6", linewidth=1, label="nothing ablated")
    axes[1].plot(counts, [point["top"] for point in result["curve"]], "o-", color="#2f6fde", label="largest attributions")
    axes[1].fill_between(
        counts,
        [min(p["random"]) for p in result["curve"]],
        [max(p["random"]) for p in result["curve"]],
        color="#e08a1e",
        alpha=0.3,
    )
    means = [sum(point["random"]) / len(point["random"]) for point in result["curve"]]
    axes[1].plot(counts, means, "o-", color="#e08a1e", label=f"random, {DRAWS} draws (mean, range)")
    axes[1].set(xscale="log", xlabel="latents ablated", ylabel="p(later years) - p(others)", title="Preference without them")
    axes[1].set_xticks(counts, [str(count) for count in counts])
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stacks", nargs="*", default=[f"runs/transcoders/embedded/study/transcoder/seed-{seed}" for seed in range(3)]
    )
    parser.add_argument("--prompts", type=int, default=500)
    options = parser.parse_args()
    model = load_model(ModelSection())
    results = [study(model, Path(directory), options.prompts) for directory in options.stacks]
    write_results(Path("docs/results/greater-than.json"), {"results": results})
    plot(results[0], Path("docs/greater_than.png"))
    for result in results:
        print(json.dumps({key: result[key] for key in ("stack", "clean", "alive")}))
        for point in result["curve"]:
            low, high = min(point["random"]), max(point["random"])
            print(f"  {point['count']:3d} ablated: {point['top']:.3f}; random {low:.3f} to {high:.3f}")
        print("  explained by the year:", [round(part["explained_by_year"], 2) for part in result["top"]])
        control = sorted(result["control_explained_by_year"])
        print(f"  of random latents: median {control[len(control) // 2]:.2f}")


if __name__ == "__main__":
    main()
