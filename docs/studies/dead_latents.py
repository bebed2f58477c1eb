"""Dead latents against the length of the window: how many latents of each checkpoint stay silent on the first n tokens.

    .venv/bin/python docs/studies/sample_text.py --model PATH/stories3M --tokens 1100000 --out sampled.jsonl
    .venv/bin/python docs/studies/dead_latents.py runs/compare-stories3M --text sampled.jsonl --tokens 1000000

Reads every FAMILY/seed-N below the comparison's directory, all of one model and hook. Each latent's first activation is
kept, so that one pass over the text serves all windows. Prints the mean share over seeds with its standard deviation; --out
writes the shares of every run. Without --text the checkpoints' own held-out text is read, as far as it goes.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from sparsary.eval.checkpoint import open_checkpoint
from sparsary.sae import SparseDictionary
from sparsary.training.activations.contexts import context_batches
from sparsary.training.activations.model import load_model
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection
from sparsary.transcoders.load import CheckpointOptions
from sparsary.transcoders.stack import hooks_of_provenance

WINDOWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCH_CONTEXTS = 64
NEVER = 2**62


@torch.no_grad()
def first_activations(runs: dict[str, Path], text: tuple[str, ...], tokens: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return, for each run, the number of tokens before each latent first fires, and the number of tokens read."""
    dictionaries: dict[str, SparseDictionary] = {}
    provenance = {}
    for name, path in runs.items():
        member = open_checkpoint(path, CheckpointOptions(text=text)).completed().members[0]
        dictionaries[name], provenance = member.dictionary, member.provenance
    (hook,) = hooks_of_provenance(provenance)[0]
    model = load_model(ModelSection.model_validate(provenance["model"]))
    section = HarvestSection(hooks=(hook,), tokens=1, **(provenance["harvest"] | ({"heldout": 0.999999} if text else {})))
    first = {name: torch.full((dictionary.n_latents,), NEVER) for name, dictionary in dictionaries.items()}
    seen = 0
    source = TextSection.model_validate(provenance["text"])
    for some in context_batches(model, source, section, BATCH_CONTEXTS, heldout=True):
        x = some.kept_activations(model, (hook,))[hook][: tokens - seen]
        for name, dictionary in dictionaries.items():
            code = dictionary.encode(x)
            fires = code.values != 0
            # Entries stand in the order of tokens.
            first[name].scatter_reduce_(0, code.latents[fires].cpu(), seen + code.token_ids()[fires].cpu(), "amin")
        seen += len(x)
        if seen >= tokens:
            break
        if seen // 50_000 != (seen - len(x)) // 50_000:
            print(f"{seen:,} of {tokens:,} tokens", flush=True)
    return first, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = {
        f"{path.parent.parent.name}/{path.parent.name}": path.parent
        for path in options.comparison.glob("*/seed-*/dictionary.json")
    }
    first, seen = first_activations(dict(sorted(runs.items())), tuple(options.text), options.tokens)
    windows = [window for window in WINDOWS if window < seen] + [seen]
    shares = {name: [float((firsts >= window).double().mean()) for window in windows] for name, firsts in first.items()}
    print("| encoder | " + " | ".join(f"{window:,} tokens" for window in windows) + " |\n|" + "---|" * (1 + len(windows)))
    for family in sorted({name.split("/")[0] for name in shares}):
        seeds = [row for name, row in shares.items() if name.split("/")[0] == family]
        cells = [_cell([row[place] for row in seeds]) for place in range(len(windows))]
        print(f"| `{family}` | " + " | ".join(cells) + " |")
    if options.out:
        options.out.write_text(json.dumps({"windows": windows, "dead": shares}, indent=1) + "\n", encoding="utf-8")


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


if __name__ == "__main__":
    main()
