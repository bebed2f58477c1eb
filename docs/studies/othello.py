"""Othello layer by layer: do SAE latents stand for what is on the board, and from which layer on?

    python docs/studies/othello_model.py                # the model, if it is not there yet
    python docs/studies/othello.py
    python docs/studies/othello.py --tables             # tables and plot of the results that are there

A GPT-2 of four layers that plays 6x6 Othello (othello_model.py) reads random legal games. Facts of every position are
known: each square's colour (mine, yours, empty), discs that the last move flipped, and stable discs. At the output of every
block, for the trained model and for the same model untrained: a linear probe of all facts, trained on other games; SAEs of
three families and two seeds; random dictionaries; single dimensions. The best latent of every fact is chosen on one half of
the games and scored on the other. Runs and layers that are finished are reused. Writes docs/results/othello.json and
docs/othello.png and prints the tables of docs/othello.md; intervals at 95 % are over games.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from othello_detectors import COLOURS, KINDS, LEADING, Bench, BoardProbe, Judged, Positions, accuracy, disentanglement, unit
from othello_model import GOAL, LAYERS, build_model, build_tokenizer
from othello_rules import PASS, SQUARES, random_games
from results import write_results
from scipy import sparse

import sparsary
from sparsary.eval.bootstrap import interval
from sparsary.eval.pages.plots import ACCENT, BAD, INK, MUTED, STYLE
from sparsary.sae import SparseDictionary, load_dictionary
from sparsary.sae.encoders import build_encoder
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.model import LanguageModel

HOOKS = [f"transformer.h.{layer}:out" for layer in range(LAYERS)]
K = 16
FAMILIES = {
    "topk": {"name": "topk", "k": K},
    "jumprelu": {"name": "jumprelu", "target_l0": K},
}
SEEDS = (0, 1)
# Games of the probes and of the figures; their seeds and that of the dictionaries' text differ from those of the model's games.
PROBE_GAMES, JUDGED_GAMES = 2_000, 400
# Tokens of a game that dictionaries are trained on, rounded down.
GAME_TOKENS = 25
TEXT_SEED, PROBE_SEED, JUDGED_SEED = 101, 102, 103


def codes_of(dictionary: SparseDictionary, x: np.ndarray) -> tuple[sparse.csc_array, dict[str, float]]:
    """Return the codes of activations, with L0, fvu, and the share of latents that never fire on them."""
    parts, fvu = [], RunningFvu(dictionary.d_out)
    with torch.no_grad():
        for rows in torch.from_numpy(x).split(8192):
            code = dictionary.encode(rows)
            fvu.update(rows, dictionary.decode(code))
            parts.append(sparse.csr_array(code.to_dense(dictionary.n_latents).numpy()))
    codes = sparse.csc_array(sparse.vstack(parts))
    figures = {"fvu": float(fvu.value()), "l0": codes.nnz / len(x), "dead": float((np.diff(codes.indptr) == 0).mean())}
    return codes, figures


def random_like(x: np.ndarray, latents: int, seed: int) -> SparseDictionary:
    """Return TopK of random unit directions about the activations' mean, scaled by their spread."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(latents, x.shape[1], generator=generator), dim=1)
    sae = sparsary.SAE(x.shape[1], latents, build_encoder({"name": "topk", "k": K}))
    with torch.no_grad():
        for name, value in {"W_enc": atoms, "W_dec": atoms, "b_dec": torch.from_numpy(x.mean(0))}.items():
            getattr(sae, name).copy_(value)
        assert sae.b_enc is not None
        sae.b_enc.copy_(-atoms @ torch.from_numpy(x.mean(0)))
    return sae.requires_grad_(False).eval()


def train_dictionaries(runs: Path, latents: int, tokens: int, members: list[dict[str, Any]]) -> None:
    """Train dictionaries of the model in ``runs``, all on one pass over random games."""
    text = runs / "games.jsonl"
    if not text.exists():
        games = random_games(tokens // GAME_TOKENS, np.random.default_rng(TEXT_SEED))
        words = [*SQUARES, "pass"]
        lines = (" ".join(words[token] for token in game if token <= PASS) for game in games.tokens.tolist())
        text.with_suffix(".part").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        text.with_suffix(".part").replace(text)
    sparsary.train(
        {
            "model": {"id": str(runs / "model"), "device": "cpu"},
            "text": {"source": "files", "files": [str(text)], "packing": "separate", "context_length": 40},
            "harvest": {"hooks": HOOKS, "heldout": 0.02, "exclude_leading": LEADING},
            "dictionary": {"hook": HOOKS[0], "n_latents": latents, "encoder": FAMILIES["topk"]},
            "tokens": tokens,
            "batch_tokens": 2048,
            "lr": 1e-3,
            "dead_after_tokens": tokens // 10,
            # Thresholds are calibrated again below, on activations that are in memory.
            "calibration_tokens": 2048,
            "out_dir": str(runs / "model-dictionaries"),
            "grid": members,
        }
    )


def member(layer: int, family: str, seed: int) -> dict[str, Any]:
    """Return a member of the grid of dictionaries."""
    changes = {"dictionary.hook": HOOKS[layer], "dictionary.encoder": FAMILIES[family], "seed": seed}
    return {"name": run_name(layer, family, seed), **changes}


def run_name(layer: int, family: str, seed: int) -> str:
    return f"block{layer}-{family}-seed{seed}"


def judge_layer(runs: Path, name: str, layer: int, bench: Bench, others: Positions, latents: int) -> dict[str, Any]:
    """Return all figures of one block of the trained or the untrained model, or read them."""
    done = runs / f"{name}-block{layer}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    model = LanguageModel.from_pretrained(runs / name, device="cpu")
    x = bench.positions.activations(model, HOOKS[layer])
    x_others = others.activations(model, HOOKS[layer])
    probe = BoardProbe.fitted(x_others, others, 0)
    likeliest, odds = probe.log_odds(x)
    directions, means = probe.directions()[bench.chosen], bench.differences(x)
    scored = ~bench.fitted
    by_probe = bench.own_columns(odds)
    found: dict[str, Any] = {
        "accuracy": accuracy(likeliest[scored], bench.positions.colours[scored], bench.owners),
        "probe": by_probe.summary(bench.kinds) | bench.directions(directions, directions, means),
        "dimension": bench.best_columns(x).summary(bench.kinds),
        "dictionaries": [],
    }
    runs_of = [(family, seed) for family in FAMILIES for seed in SEEDS] if name == "model" else []
    saes = [(*each, load_dictionary(runs / "model-dictionaries" / run_name(layer, *each))) for each in runs_of]
    saes.append(("random", 0, random_like(x, latents, 0)))
    for family, seed, sae in saes:
        sae.calibrate(torch.from_numpy(x_others).split(4096))
        codes, row = codes_of(sae, x)
        judged = bench.best_columns(codes)
        atoms = unit(sae.atoms.detach().float().numpy().reshape(sae.n_latents, -1))[judged.columns]
        row |= {"family": family, "seed": seed} | judged.summary(bench.kinds)
        row |= gap(by_probe, judged, bench.kinds) | bench.directions(atoms, directions, means)
        row["distinct_board_latents"] = len(set(np.array(judged.columns)[np.isin(bench.kinds, COLOURS)].tolist()))
        if name == "model" and seed == 0 and family != "random":
            row |= disentanglement(bench.positions, codes, x if family == "topk" else None)
        found["dictionaries"].append(row)
        print(f"{name}, block {layer}, {family}, seed {seed}: board F1 {row['board_f1']:.3f}", flush=True)
    if name == "model":
        sure = np.where(odds > 0, 1 / (1 + np.exp(-odds)), 0)[:, : len(COLOURS) * PASS]
        found["probe"] |= disentanglement(bench.positions, sparse.csc_array(sure))
    write_results(done, found)
    return found


def gap(probe: Judged, latents: Judged, kinds: np.ndarray) -> dict[str, float]:
    """Return probe less latent, mean F1 over the board's factors, with its interval over games."""
    board = np.isin(kinds, COLOURS)
    draws = (probe.resampled - latents.resampled)[:, board].mean(-1)
    ends = interval(float((probe.f1 - latents.f1)[board].mean()), draws)
    return {"gap_f1": ends.mean, "gap_f1_low": ends.low, "gap_f1_high": ends.high}


def run_study(runs: Path, latents: int, tokens: int) -> dict[str, Any]:
    """Train what is not there yet, and return all figures."""
    training = json.loads((runs / "model" / "training.json").read_text(encoding="utf-8"))
    if not (runs / "untrained").exists():
        build_model(training["seed"]).save_pretrained(runs / "untrained")
        build_tokenizer().save_pretrained(runs / "untrained")
    layers = range(LAYERS)
    members = [member(layer, family, seed) for layer in layers for family in FAMILIES for seed in SEEDS]
    train_dictionaries(runs, latents, tokens, members)
    bench = Bench(Positions.of(JUDGED_GAMES, JUDGED_SEED))
    others = Positions.of(PROBE_GAMES, PROBE_SEED)
    found = {
        name: [judge_layer(runs, name, layer, bench, others, latents) for layer in layers] for name in ("model", "untrained")
    }
    positions = bench.positions
    counts = {kind: int((bench.kinds == kind).sum()) for kind in KINDS}
    truth = disentanglement(
        positions, sparse.csc_array(bench.labels[:, np.isin(bench.kinds, COLOURS)].astype(np.float32)), None
    )
    about = {"goal": GOAL, "latents": latents, "k": K, "tokens": tokens, "games": JUDGED_GAMES, "factors": counts}
    about |= {"scored_tokens": int((~bench.fitted).sum()), "scored_games": int(bench.owners.max()) + 1}
    about |= {"probe_tokens": len(others.documents), "chance_f1": chance(bench)}
    return {"about": about, "training": training, "truth": truth, **found}


def chance(bench: Bench) -> dict[str, float]:
    """Return the mean F1 of a detector that always says yes, by kind."""
    share = bench.labels[~bench.fitted].mean(0)
    f1 = 2 * share / (1 + share)
    return {"board": float(f1[np.isin(bench.kinds, COLOURS)].mean())} | {
        kind: float(f1[bench.kinds == kind].mean()) for kind in KINDS
    }


def write_factors(path: Path, games: int) -> None:
    """Write games with the factors of their tokens for ``sparsary probe --factors``."""
    positions = Positions.of(games, JUDGED_SEED, leading=0)
    factors = iter(positions.factors())
    words = [*SQUARES, "pass"]
    with path.open("w", encoding="utf-8") as handle:
        for ids, kept in zip(positions.ids, positions.kept, strict=True):
            tokens = [words[token] for token in ids[kept].tolist()]
            handle.write(json.dumps({"tokens": tokens, "factors": [next(factors) for _ in tokens]}) + "\n")


def shown(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.3f} ({row[f'{key}_low']:.3f} to {row[f'{key}_high']:.3f})"


def pick(layer: dict[str, Any], family: str) -> list[dict[str, Any]]:
    return [row for row in layer["dictionaries"] if row["family"] == family]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def both(rows: list[dict[str, Any]], key: str) -> str:
    """Return a figure of each seed, the first with its interval over games."""
    return "; ".join([shown(rows[0], key), *(f"{row[key]:.3f}" for row in rows[1:])])


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def tables(found: dict[str, Any]) -> str:
    """Return the tables of docs/othello.md."""
    parts, blocks = [], [str(layer) for layer in range(LAYERS)]
    training = found["training"]
    rows = [
        [f"{row[key]:,}" if key in ("step", "tokens") else f"{row[key]:.4f}" for key in HISTORY] for row in training["history"]
    ]
    chosen = sorted({*range(0, len(rows), max(1, len(rows) // 8)), len(rows) - 1})
    parts.append(table(list(HISTORY), [rows[number] for number in chosen]))
    lines = []
    for name in ("model", "untrained"):
        for what, key in (("squares right", "square"), ("whole boards right", "board")):
            lines.append([f"{name}, {what}", *(shown(layer["accuracy"], key) for layer in found[name])])
    parts.append(table(["probe accuracy", *(f"block {block}" for block in blocks)], lines))
    for kind in ("board", *KINDS):
        lines = [["probe", *(shown(layer["probe"], f"{kind}_f1") for layer in found["model"])]]
        lines += [[family, *(both(pick(layer, family), f"{kind}_f1") for layer in found["model"])] for family in FAMILIES]
        lines.append(["dimension", *(shown(layer["dimension"], f"{kind}_f1") for layer in found["model"])])
        lines.append(["random dictionary", *(both(pick(layer, "random"), f"{kind}_f1") for layer in found["model"])])
        lines.append(
            ["untrained: random dictionary", *(both(pick(layer, "random"), f"{kind}_f1") for layer in found["untrained"])]
        )
        lines.append(["untrained: probe", *(shown(layer["probe"], f"{kind}_f1") for layer in found["untrained"])])
        lines.append(["always yes", *[f"{found['about']['chance_f1'][kind]:.3f}"] * LAYERS])
        parts.append(table([f"F1, {kind}", *(f"block {block}" for block in blocks)], lines))
    lines = []
    for layer in range(LAYERS):
        for what in ("probe", *FAMILIES, "random"):
            here = found["model"][layer]
            some = [here["probe"]] if what == "probe" else pick(here, what)
            keys = ("board_auroc", "board_auroc_09", "board_found_08", "stable_auroc_09", "stable_found_08")
            lines.append([str(layer), what, *(f"{mean(some, key):.3f}" for key in keys)])
    header = [
        "block",
        "detector",
        "AUROC, board",
        "share with AUROC 0.9",
        "share with F1 0.8",
        "stable: AUROC 0.9",
        "stable: F1 0.8",
    ]
    parts.append(table(header, lines))
    lines, keys = [], [f"infomec_{name}" for name in ("modularity", "matched_compactness", "compactness", "explicitness")]
    for layer in range(LAYERS):
        for what in ("probe", *FAMILIES):
            own = found["model"][layer]["probe"] if what == "probe" else pick(found["model"][layer], what)[0]
            lines.append([str(layer), what, *(f"{own[key]:.3f}" for key in keys)])
    lines.append(["-", "truth", *(f"{found['truth'][key]:.3f}" for key in keys)])
    parts.append(table(["block", "code", "modularity", "matched compactness", "compactness", "explicitness"], lines))
    lines = []
    for layer in range(LAYERS):
        for what in ("probe", *FAMILIES, "random"):
            here = found["model"][layer]
            some = [here["probe"]] if what == "probe" else pick(here, what)
            lines.append(
                [
                    str(layer),
                    what,
                    *(f"{mean(some, key):.3f}" for key in ("to_probe", "to_others", "to_means", "between_squares")),
                ]
            )
    parts.append(
        table(
            ["block", "directions", "to own probe", "to others' probes", "to own difference of means", "between squares"], lines
        )
    )
    lines = []
    for layer in range(LAYERS):
        for family in FAMILIES:
            some = pick(found["model"][layer], family)
            figures = (f"{mean(some, key):.3f}" for key in ("fvu", "l0", "dead", "distinct_board_latents"))
            lines.append([str(layer), family, *figures, both(some, "gap_f1")])
    parts.append(table(["block", "family", "fvu", "l0", "dead", "latents behind the board", "probe less latent, F1"], lines))
    return "\n".join(parts)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw F1 by block of the board, of flips, and of stable discs."""
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 3, sharey=True), ("board", "flipped", "stable"), strict=True):
            colours = dict(zip(FAMILIES, (ACCENT, BAD), strict=True))
            lines = {"probe": (INK, "-", [[layer["probe"]] for layer in found["model"]])}
            lines |= {each: (colours[each], "-", [pick(layer, each) for layer in found["model"]]) for each in FAMILIES}
            lines["random dictionary"] = (MUTED, ":", [pick(layer, "random") for layer in found["model"]])
            lines["untrained: probe"] = (INK, ":", [[layer["probe"]] for layer in found["untrained"]])
            for label, (colour, style, rows) in lines.items():
                values = [mean(row, f"{kind}_f1") for row in rows]
                ends = np.abs([[row[0][f"{kind}_f1_{end}"] - row[0][f"{kind}_f1"] for row in rows] for end in ("low", "high")])
                axes.errorbar(
                    range(LAYERS), values, yerr=ends, color=colour, linestyle=style, marker="o", markersize=4, label=label
                )
            axes.axhline(found["about"]["chance_f1"][kind], color=MUTED, linewidth=1)
            axes.set(title=kind, xlabel="block", xticks=range(LAYERS), ylim=(0, 1))
        figure.axes[0].set_ylabel("mean F1 of the best detector")
        figure.axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=110)


HISTORY = ("step", "tokens", "loss", "legal_moves", "legal_mass", "passes_and_ends", "excess_nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/othello"), help="the folder of model/, and of all runs")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens that every dictionary is trained on")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--tables", action="store_true", help="tables and plot of the results that are there, nothing else")
    parser.add_argument("--factors", type=Path, help="only write 100 games for sparsary probe --factors to this file")
    options = parser.parse_args()
    results = options.docs / "results" / "othello.json"
    if options.factors:
        write_factors(options.factors, 100)
        return
    if not options.tables:
        if not (options.runs / "model" / "training.json").exists():
            raise SystemExit(f"{options.runs}/model: expected a trained model. Run: python docs/studies/othello_model.py")
        write_results(results, run_study(options.runs, options.latents, options.tokens))
    found = json.loads(results.read_text(encoding="utf-8"))
    draw(found, options.docs / "othello.png")
    print(tables(found))


if __name__ == "__main__":
    main()
