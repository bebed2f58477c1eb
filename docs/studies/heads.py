"""Polysemantic heads by attention-output dictionaries: are the top latents of a head about one thing?

    python docs/studies/heads.py embedded [--seeds 3]
    python docs/studies/heads.py stories3M --model MODEL_DIRECTORY --text TEXT.jsonl [--seeds 3]

Kissane et al. 2024, arXiv:2406.17759, read the ten top latents of every head by decoder-weight attribution and judged at least
90 % of GPT-2 small's heads polysemantic. This study has a criterion in place of the reader. For every head it takes the TOP
latents with the largest share of their decoder norm in the head, of those that fire at least LEAST times, and describes each by

- contexts: tokens at which it fires, and tokens that the head reads for it (largest part of its pre-activation by source);
- predictions: effect of the head's part of its direction on the logits;
- places: distance of what is read (binned), and whether it is the same token, or follows the same token.

The similarity of two latents is a cosine for predictions, and the overlap of shares (sum of square roots of products) for
contexts and places. Two are alike if theirs exceeds that of 95 % of the pairs of latents of different heads of the layer.
Clusters: average linkage, cut at this limit; single linkage, where a chain of alike latents is one cluster, is the most
lenient. A head is monosemantic if at most one of its latents is outside its largest cluster, else polysemantic. Controls: sets
of as many latents of random heads, and the parts of one and the same latent, each from other documents, in place of the
latents of a head. Dictionaries of recipes/heads are trained first (finished runs are reused). Measured on the recipe's held-
out documents. Writes docs/results/heads.json and prints the table of docs/heads.md.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results
from scipy.cluster.hierarchy import fcluster, linkage

import sparsary
from sparsary.eval.bootstrap import bootstrap_mean
from sparsary.eval.heldout import TextBatch, eval_data
from sparsary.eval.virtual_weights.attention_heads import head_shares
from sparsary.eval.virtual_weights.linear_readers import readers
from sparsary.sae.files import read_json
from sparsary.sae.metrics import Moments
from sparsary.training.activations.architecture import Architecture, LayerTrace
from sparsary.training.recipe import read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.run import train_all
from sparsary.training.text import Cursor

RESULTS = Path("docs/results/heads.json")
OUT = Path("runs/heads")
LAYERS = {"embedded": 4, "stories3M": 6}
TOP, LEAST, PARTS = 10, 100, 10
# Quantile of the similarity of latents of different heads above which two latents are alike.
ALIKE = 0.95
# Latents of a head that may be outside its largest cluster.
STRAYS = 1
DRAWS = 500
# Upper ends of the bins of distances; the first position is a bin of its own, beyond these.
DISTANCES = (0, 1, 2, 4, 8, 16, 32)
MEASURES = ("contexts", "predictions", "places")
JUDGED = (*MEASURES, "contexts or predictions", "any")
LINKAGES = ("average", "single")

Row = dict[str, Any]
# Descriptions or similarities by measure.
Vectors = dict[str, np.ndarray]


def trained(which: str, seed: int, options: argparse.Namespace) -> Path:
    """Train the dictionaries of all layers with one seed and return their folder."""
    out = OUT / which / f"seed-{seed}"
    changes: Row = {"seed": seed, "out_dir": str(out)}
    if which == "stories3M":
        changes |= {"model.id": options.model, "text.files": [options.text]}
    train_all(resolve_recipes(check_grid(read_values(f"recipes/heads/{which}.yaml", changes), which).recipes))
    return out


class Layer:
    """Dictionary of one layer: the top latents of its heads, and what is counted of them over the text.

    Items are pairs of a head and one of its top latents, head after head.
    """

    def __init__(self, dictionary: Any, hook: str, layer: int, anatomy: Architecture):
        self.dictionary, self.hook, self.layer, self.anatomy = dictionary.eval(), hook, layer, anatomy
        self.firings = torch.zeros(dictionary.n_latents)
        self.target, self.error, self.tokens = Moments(dictionary.d_in), 0.0, 0

    def tally(self, z: torch.Tensor) -> None:
        """Add the firings of all latents, and the error, on some tokens."""
        code = self.dictionary.encode(z)
        self.firings += torch.bincount(code.latents[code.values > 0], minlength=self.dictionary.n_latents)
        self.error += float((z - self.dictionary.decode(code)).double().square().sum())
        self.target.update(z)
        self.tokens += len(z)

    def choose(self) -> None:
        """Choose the top latents of every head."""
        anatomy, shares = self.anatomy, head_shares(self.dictionary, self.anatomy.n_heads)
        eligible = (self.firings >= LEAST).nonzero()[:, 0]
        if len(eligible) < 2 * TOP:
            raise ValueError(
                f"{self.hook}: expected {2 * TOP} latents that fire {LEAST} times in {self.tokens} tokens, got "
                f"{len(eligible)}. Raise --tokens."
            )
        heads = range(anatomy.n_heads)
        self.latents = torch.stack([eligible[shares[eligible, head].topk(TOP).indices] for head in heads])
        self.shares = torch.stack([shares[self.latents[head], head] for head in heads])
        size = (anatomy.n_heads, TOP, PARTS)
        self.at, self.source = (torch.zeros(*size, anatomy.W_U.shape[0]) for _ in range(2))
        self.places = torch.zeros(*size, (len(DISTANCES) + 2) * 3)

    def count(self, piece: TextBatch, trace: LayerTrace, token_ids: torch.Tensor) -> None:
        """Add the firings of the top latents in a batch."""
        z = trace.z.flatten(2)
        dense = self.dictionary.encode(z.flatten(0, 1)).to_dense(self.dictionary.n_latents).view(*z.shape[:2], -1)
        values = (dense * piece.kept[..., None])[..., self.latents]
        part = torch.from_numpy(piece.document_ids).clamp_min(0) % PARTS
        previous = torch.cat([token_ids[:, :1], token_ids[:, :-1]], 1)
        for head, latents in enumerate(self.latents):
            vectors = readers(self.dictionary, latents).vectors.unflatten(1, (self.anatomy.n_heads, -1))[:, head]
            read = trace.v[:, :, head].float() @ vectors.T.float()
            for item in range(TOP):
                context, position = (values[:, :, head, item] > 0).nonzero(as_tuple=True)
                weight = values[context, position, head, item]
                parts = trace.pattern[context, head, position].float() * read[context, :, item]
                source = parts.argmax(1)
                own, where = part[context, position], (head, item)
                here, there = token_ids[context, position], token_ids[context, source]
                distance = torch.bucketize(position - source, torch.tensor(DISTANCES))
                distance = torch.where(source == 0, len(DISTANCES) + 1, distance)
                after = (previous[context, source] == here) & (source > 0)
                relation = torch.where(there == here, 1, torch.where(after, 2, 0))
                self.at[where].index_put_((own, here), weight, accumulate=True)
                self.source[where].index_put_((own, there), weight, accumulate=True)
                self.places[where].index_put_((own, distance * 3 + relation), weight, accumulate=True)

    def profiles(self) -> Vectors:
        """Return the description of every item by measure: rows whose products are similarities."""
        anatomy, weights = self.anatomy, self.anatomy.layers[self.layer]
        reads = anatomy.final_norm.fold(anatomy.W_U).float()
        predictions = []
        for head, latents in enumerate(self.latents):
            atoms = self.dictionary.atoms[latents].unflatten(1, (anatomy.n_heads, -1))[:, head]
            predictions.append(atoms.float() @ weights.W_O[head].float() @ reads.T)
        effects = torch.cat(predictions)
        found = {"predictions": unit((effects - effects.mean(1, keepdim=True)).double().numpy())}
        found["contexts"] = np.concatenate([described(self.at.sum(2)), described(self.source.sum(2))], 1) / math.sqrt(2)
        found["places"] = described(self.places.sum(2))
        return found

    def parts(self) -> Vectors:
        """Return the description of every part of every item, ``(items, parts, width)``, for the control."""
        halves = [described(self.at), described(self.source)]
        return {"contexts": np.concatenate(halves, -1) / math.sqrt(2), "places": described(self.places)}


def described(counts: torch.Tensor) -> np.ndarray:
    """Return square roots of shares, whose product is their overlap (Bhattacharyya); zeros for what was never counted."""
    return (counts / counts.sum(-1, keepdim=True).clamp_min(1e-12)).sqrt().flatten(0, 1).double().numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def compared(profiles: Vectors, heads: np.ndarray, same: np.ndarray) -> tuple[Vectors, dict[str, float]]:
    """Return the similarities of items by measure, scaled, and the limits they are scaled by.

    0 is the similarity that 95 % of the pairs of different heads do not exceed, and 1 is equality. Of several measures, the
    largest similarity counts.

    Args:
        heads: Head of every item.
        same: Pairs of items that are the same latent, at two heads: no such pair is part of the null.
    """
    raw = {measure: profiles[measure] @ profiles[measure].T for measure in MEASURES}
    others = (heads[:, None] != heads[None]) & ~same
    limits = {measure: float(np.quantile(values[others], ALIKE)) for measure, values in raw.items()}
    found = {measure: scaled(values, limits[measure]) for measure, values in raw.items()}
    found["contexts or predictions"] = np.maximum(found["contexts"], found["predictions"])
    found["any"] = np.maximum(found["contexts or predictions"], found["places"])
    return found, limits


def scaled(similarity: np.ndarray, limit: float) -> np.ndarray:
    """Return similarities with 0 at the limit and 1 at equality."""
    return (similarity - limit) / (1 - limit)


def is_polysemantic(similarity: np.ndarray, method: str) -> bool:
    """Return True if more than ``STRAYS`` items are outside the largest cluster: ``method`` linkage, cut at similarity 0."""
    distances = 1 - similarity
    tree = linkage(distances[np.triu_indices(len(distances), 1)], method)
    labels = fcluster(tree, 1.0, "distance")
    return len(similarity) - int(np.bincount(labels).max()) > STRAYS


def judged(profiles: Vectors, parts: Vectors, heads: np.ndarray, same: np.ndarray, seed: int) -> Row:
    """Judge the heads of a layer by both linkages: an entry per measure and head, beside the two controls."""
    similar, limits = compared(profiles, heads, same)
    draw = np.random.default_rng(seed)
    size = int(np.bincount(heads)[0])
    sets = [draw.choice(len(heads), size, replace=False) for _ in range(DRAWS)]
    found: Row = {"similarity_alike": limits}
    for method in LINKAGES:
        own: Row = {"polysemantic": {}, "of_random": {}, "of_one_latent": {}}
        for measure, values in similar.items():
            of_heads = [values[np.ix_(heads == head, heads == head)] for head in np.unique(heads)]
            own["polysemantic"][measure] = [is_polysemantic(each, method) for each in of_heads]
            random = [is_polysemantic(values[np.ix_(chosen, chosen)], method) for chosen in sets]
            own["of_random"][measure] = float(np.mean(random))
        for measure, rows in parts.items():
            seen = [row[np.abs(row).sum(1) > 0] for row in rows]
            same_latent = [is_polysemantic(scaled(row @ row.T, limits[measure]), method) for row in seen if len(row) > 1]
            own["of_one_latent"][measure] = float(np.mean(same_latent))
        found[method] = own
    return found


def measure_all(which: str, folders: list[Path], tokens: int) -> list[Row]:
    """Return the judgement of every layer and seed."""
    members = [
        (seed, layer, folder / f"layer={layer}") for seed, folder in enumerate(folders) for layer in range(LAYERS[which])
    ]
    loaded = [sparsary.load(path).requires_grad_(False) for *_, path in members]
    hooks = [dictionary.provenance["hook"] for dictionary in loaded]
    data = eval_data(loaded[0].provenance, tuple(dict.fromkeys(hooks)))
    anatomy = Architecture(data.model)
    layers = [
        Layer(dictionary, hook, layer, anatomy) for dictionary, hook, (_, layer, _) in zip(loaded, hooks, members, strict=True)
    ]
    for piece in data.pieces(Cursor(0, 0), tokens):
        seen = data.model.activations(piece.token_ids, tuple(dict.fromkeys(hooks)))
        for each in layers:
            each.tally(seen[each.hook][piece.kept].float())
    for each in layers:
        each.choose()
    for piece in data.pieces(Cursor(0, 0), tokens):
        trace = anatomy.trace(piece.token_ids)
        for each in layers:
            each.count(piece, trace.layers[each.layer], piece.token_ids)
    rows = []
    for each, (seed, layer, _) in zip(layers, members, strict=True):
        heads = np.repeat(np.arange(anatomy.n_heads), TOP)
        latents = each.latents.flatten().numpy()
        found = judged(each.profiles(), each.parts(), heads, latents[:, None] == latents[None], seed)
        shares = each.shares.double().mean(1)
        about = {
            "seed": seed,
            "layer": layer,
            "heads": anatomy.n_heads,
            "fvu": each.error / float(each.target.squared_deviation()),
            "tokens": each.tokens,
        }
        rows.append(about | {"decoder_share": shares.tolist()} | found)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Return the share of polysemantic heads by linkage and measure, with its interval, and those of the controls."""
    table = []
    for method in LINKAGES:
        for measure in JUDGED:
            seeds = sorted({row["seed"] for row in rows})
            by_seed = [
                [head for row in rows if row["seed"] == seed for head in row[method]["polysemantic"][measure]] for seed in seeds
            ]
            share = bootstrap_mean(np.array(by_seed, dtype=float).mean(0), seed=0)
            own = [value for row in rows if (value := row[method]["of_one_latent"].get(measure)) is not None]
            table.append(
                {
                    "linkage": method,
                    "measure": measure,
                    "polysemantic": share.mean,
                    "low": share.low,
                    "high": share.high,
                    "by_seed": [statistics.mean(heads) for heads in by_seed],
                    "of_random": statistics.mean(row[method]["of_random"][measure] for row in rows),
                    "of_one_latent": statistics.mean(own) if own else None,
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=LAYERS)
    parser.add_argument("--model", help="stories3M's directory")
    parser.add_argument("--text", help="file of its training text, whose held-out documents are used")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60_000)
    options = parser.parse_args()
    if options.which == "stories3M" and not (options.model and options.text):
        parser.error("stories3M: expected --model DIRECTORY and --text FILE, which are not part of the repository.")
    folders = [trained(options.which, seed, options) for seed in range(options.seeds)]
    with torch.no_grad():
        rows = measure_all(options.which, folders, options.tokens)
    found = read_json(RESULTS) if RESULTS.exists() else {}
    table = summary(rows)
    write_results(RESULTS, found | {options.which: {"summary": table, "layers": rows}})
    head = f"{options.which} | linkage | polysemantic heads | by seed | random sets | parts of one latent"
    print(f"| {head} |\n|" + "---|" * 6)
    for row in table:
        seeds, one = ", ".join(f"{value:.2f}" for value in row["by_seed"]), row["of_one_latent"]
        cells = (f"{row['polysemantic']:.2f} ({row['low']:.2f} to {row['high']:.2f})", seeds, f"{row['of_random']:.2f}")
        print(f"| {row['measure']} | {row['linkage']} | {' | '.join(cells)} | {'-' if one is None else f'{one:.2f}'} |")


if __name__ == "__main__":
    main()
