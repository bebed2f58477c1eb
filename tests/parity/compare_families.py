"""Quality of every family here and in the libraries that train it: the same activations in the same order, at equal l0.

    make peers
    .venv/bin/python tests/parity/compare_families.py --out docs/results/peer-families.json --page docs/peers.md
    .venv/bin/python docs/studies/results.py docs/results/peer-families.json

Each trained dictionary is a file in ``--work``, so an interrupted comparison continues with the same command. ``--table``
prints what is there, and trains nothing; ``--page docs/peers.md`` replaces the tables of that page.

- ``embedded``: the output of block 2 of the embedded model and, for transcoders, the MLP of layer 1; recipes of
  ``recipes/embedded`` and ``recipes/transcoders/embedded``, but 512 latents; 16 on a token; 586 steps of 512 tokens.
- ``faster``: the SAEs of ``embedded`` with a learning rate of 3e-3 for all.
- ``planted``: the small set of SynthSAEBench; 128 latents, 3 on a token; 600 steps of 1024 tokens; judged on 200,000.
- ``stories3M``: the output of block 3 of that model or its MLP, as recipes/stories3M/base.yaml, with 1024 latents; else as
  ``embedded``, but judged on a million tokens of stories sampled from the model. Needs ``models`` and ``data`` where it is run.

All: 100 steps of warm-up, linear decay over the last fifth; learning rates of 1e-3 for SAEs and 3e-3 for planted features;
transcoders have their recipe's here, and the best of three in sparsify. Three seeds. No family is tuned
here. Where a library has ``VARIANTS`` (its own learning rate or optimizer, its normalization of activations), the one with the
least held-out fvu on seed 0 of the embedded model is kept, which is in its favour.

What sets a dictionary's sparsity is adjusted until its l0 is within 2 % of the target, or until two values lie on both sides
of it within 25 % of each other: figures are then interpolated (linearly in log l0, fvu in its log). Where a budget is a whole
number, one equal to the target is within 5 % close enough. Other rows are marked.

``dead``: latents that the trained dictionary leaves silent on the last 100,000 tokens of training. ``CE recovered``: share of
the loss between mean ablation and the unmodified model. ``peer_families.py`` says how each library is run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from family_cases import DEAD_TOKENS, DECAY, RECOVERY, ROOT, TRANSCODERS, WARMUP, Case, OfModel, PlantedCase
from safetensors.torch import load_file
from torch import Tensor

from sparsary.eval.compare.statistics import decide, difference
from sparsary.eval.pages.differences import verdict_words
from sparsary.sae import load_dictionary
from sparsary.sae.files import write_text
from sparsary.sae.metrics import RunningFvu
from sparsary.training.bench.environment import environment
from sparsary.training.recipe import Recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe

ROWS = 4096
OURS = "sparsary"
SEEDS = 3
TOLERANCE = 0.02
# The same for a whole budget equal to the target, of which negative values are dropped, if the next one is too far.
OF_BUDGET = 0.05
# Two runs this near each other in l0 are interpolated.
NEAR = 1.25
TRIES = 8
# A change of log l0, by a factor of 8 in a penalty, that is no change.
STUCK = 0.03

# What sets the sparsity: a whole number per token, a number per token, or the weight of a penalty; and where to begin.
WHOLE, REAL, PENALTY = "whole", "real", "penalty"
KNOBS: dict[tuple[str, str], tuple[str, float]] = {
    **{(library, "relu"): (PENALTY, start) for library, start in (("saelens", 1.0), ("dictionary_learning", 0.1))},
    ("overcomplete", "relu"): (PENALTY, 1e-5),
    ("saelens", "gated"): (PENALTY, 1.0),
    ("dictionary_learning", "gated"): (PENALTY, 0.1),
    ("saelens", "jumprelu"): (PENALTY, 0.1),
    ("overcomplete", "jumprelu"): (PENALTY, 1e-4),
    ("dictionary_learning", "jumprelu"): (REAL, 0),
    **{("saelens", family): (REAL, 0) for family in ("batch_topk", "matryoshka")},
    ("overcomplete", "batch_topk"): (REAL, 0),
    **{(OURS, family): (REAL, 0) for family in ("relu", "gated", "jumprelu")},
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "topk": ("saelens", "dictionary_learning", "sparsify", "overcomplete"),
    "batch_topk": ("saelens", "dictionary_learning", "overcomplete"),
    "matryoshka": ("saelens", "dictionary_learning"),
    "jumprelu": ("saelens", "dictionary_learning", "overcomplete"),
    "gated": ("saelens", "dictionary_learning"),
    "relu": ("saelens", "dictionary_learning", "overcomplete"),
    "transcoder": ("sparsify",),
    "skip_transcoder": ("sparsify",),
    "matching_pursuit": ("saelens", "overcomplete"),
}


class Variant(NamedTuple):
    """Settings of a peer; ``lr`` 0 is the learning rate used here."""

    name: str
    lr: float = 0.0
    optimizer: str = "adam"
    normalize: bool = False
    family: str = ""


EQUAL = Variant("our rate")
SCALED = Variant("our rate, normalized", normalize=True)
VARIANTS: dict[tuple[str, str], tuple[Variant, ...]] = {
    ("saelens", "topk"): (EQUAL, Variant("its rate", 3e-4)),
    ("saelens", "jumprelu"): (SCALED,),
    ("dictionary_learning", "topk"): (EQUAL, SCALED),
    **{("dictionary_learning", family): (SCALED,) for family in ("relu", "gated", "jumprelu")},
    ("overcomplete", "jumprelu"): (Variant("our rate, standardized", normalize=True),),
    ("sparsify", "topk"): (Variant("Adam, our rate"), Variant("Signum, its rate", -1.0, "signum")),
    # The rate of SAEs, that of the transcoders here, and one between them.
    **{
        ("sparsify", family): (Variant("rate of SAEs"), Variant("3e-3", 3e-3), Variant("our rate", 5e-3))
        for family in TRANSCODERS
    },
}


class Peers:
    """The peers' process, started at the first order."""

    def __init__(self, python: Path):
        self.python = python

    @cached_property
    def process(self) -> "subprocess.Popen[str]":
        if not self.python.exists():
            raise SystemExit(f"--peers: expected a Python with the other libraries, got {self.python}. Make it: make peers")
        command = [str(self.python), str(Path(__file__).with_name("peer_families.py"))]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def train(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an order of ``peer_families.py``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(dict(order)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"{order['library']}, {order['family']}: training failed. Give the order to peer_families.py: {order}"
            )
        return json.loads(answer)


@torch.no_grad()
def outputs_here(case: Case, recipe: Recipe, codes: bool) -> dict[str, Tensor]:
    """Train here, and return what ``peer_families.py`` writes for another library."""
    item = {"x": case.train["x"]} | ({"target": case.train["y"]} if "y" in case.train else {})
    with torch.enable_grad():
        dictionary = load_dictionary(train_recipe(resolve_recipe(recipe), [item])).eval()
    rows, latents, values, y_hat, start, entries = [], [], [], [], 0, torch.zeros((), dtype=torch.long)
    for x in case.heldout["x"].split(ROWS):
        dense = dictionary.encode(x).to_dense(dictionary.n_latents)
        token, latent = dense.nonzero(as_tuple=True)
        entries += len(token)
        if codes:
            rows.append(token + start)
            latents.append(latent)
            values.append(dense[token, latent])
        y_hat.append(dictionary(x))
        start += len(x)
    silent = torch.ones(dictionary.n_latents, dtype=torch.bool)
    for x in case.train["x"][-DEAD_TOKENS:].split(ROWS):
        silent &= dictionary.encode(x).firings(dictionary.n_latents) == 0
    parts = {"y_hat": y_hat} | ({"rows": rows, "latents": latents, "values": values} if codes else {})
    whole = {"entries": entries, "dead": silent, "W_dec": dictionary.atoms.detach()}
    return {name: torch.cat(part) for name, part in parts.items()} | whole


class Comparison:
    """Trained dictionaries of a folder, and the training of those that are missing."""

    def __init__(self, work: Path, peers: Path, threads: int, training: bool):
        self.work, self.peers, self.threads, self.training = work, Peers(peers), threads, training
        size: dict[str, Any] = {"n_latents": 512, "k": 16, "lr": 1e-3, "batch": 512, "steps": 586}
        planted: dict[str, Any] = {"n_latents": 128, "k": 3, "lr": 3e-3, "batch": 1024, "steps": 600}
        mlp = ("transformer.h.1.mlp:in", "transformer.h.1.mlp:out")
        block = ("model.layers.3:out",) * 2
        stories: dict[str, Any] = {"n_latents": 1024, "hooks": block, "recipes": "stories3M", "stored": 1.2}
        stories |= {"scored": 1_000_000, "sampled": work / "stories3M" / "sampled.jsonl"}
        stories_mlp = ("model.layers.3.mlp:in", "model.layers.3.mlp:out")
        self.cases = {
            "embedded": OfModel("embedded", work / "embedded", **size),
            "faster": OfModel("faster", work / "embedded", **{**size, "lr": 3e-3}),
            "mlp": OfModel("mlp", work / "mlp", **size, hooks=mlp),
            "stories3M": OfModel("stories3M", work / "stories3M", **{**size, **stories}),
            "stories3M-mlp": OfModel("stories3M-mlp", work / "stories3M-mlp", **{**size, **stories, "hooks": stories_mlp}),
            "planted": PlantedCase("planted", work / "planted", **planted),
        }

    def case(self, name: str, family: str) -> Case:
        """Return a case, prepared."""
        case = self.cases[OF_MLPS[name] if family in TRANSCODERS else name]
        if self.training and not (case.folder / "heldout.safetensors").exists():
            case.folder.mkdir(parents=True, exist_ok=True)
            case.prepare()
        return case

    def run(self, case: Case, family: str, library: str, variant: Variant, seed: int, knob: float) -> dict[str, Any] | None:
        """Return the figures of one dictionary; ``None`` if it is missing and nothing is to be trained."""
        name = "-".join([case.name, family, library, variant.name, str(seed), f"{knob:.6g}"])
        path = self.work / "runs" / f"{name.replace(' ', '_').replace(',', '')}.json"
        if path.exists():
            return json.loads(path.read_text())
        if not self.training:
            return None
        record = {"case": case.name, "family": family, "library": library, "variant": variant.name, "seed": seed, "knob": knob}
        if library == OURS:
            outputs = outputs_here(case, case.recipe(family, knob, seed, self.work / "sae" / path.stem), case.judges_codes)
        else:
            # A file of this process, as another may train other families in the same folder.
            out = self.work / f"outputs-{os.getpid()}.safetensors"
            # sparsify's own rate for its Signum: lr None.
            lr = None if variant.lr < 0 else variant.lr or case.lr
            record |= self.peers.train(
                {
                    "library": library,
                    "family": variant.family or family,
                    "data": str(case.folder),
                    "n_latents": case.n_latents,
                    "batch": case.batch,
                    "warmup": WARMUP,
                    "decay": round(DECAY * case.steps),
                    "dead_tokens": DEAD_TOKENS,
                    "seed": seed,
                    "knob": knob,
                    "lr": lr,
                    "optimizer": variant.optimizer,
                    "normalize": variant.normalize,
                    "prefixes": case.prefixes,
                    "threads": self.threads,
                    "codes": case.judges_codes,
                    "out": str(out),
                }
            )
            outputs = load_file(out)
            out.unlink()
        y = case.heldout.get("y", case.heldout["x"])
        running = RunningFvu(y.shape[1])
        running.update(y, outputs["y_hat"])
        figures = {
            "fvu": float(running.value()),
            "l0": int(outputs["entries"]) / len(y),
            "dead": float(outputs["dead"].double().mean()),
        }
        record |= figures | case.judge(outputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        return record

    def at_l0(
        self, case: Case, family: str, library: str, variant: Variant, seed: int, start: float | None
    ) -> dict[str, Any] | None:
        """Return the figures at the target l0: of one run, or interpolated between two; marked if neither is there."""
        kind, first = KNOBS.get((library, family), (WHOLE, 0))
        knob, tried = start or first or float(case.k), {}
        while len(tried) < TRIES and knob not in tried:
            found = self.run(case, family, library, variant, seed, knob)
            if found is None:
                break
            tried[knob] = found
            if abs(found["l0"] / case.k - 1) <= TOLERANCE:
                return found | {"matched": "run"}
            last = [math.log(max(run["l0"], 1e-3)) for run in tried.values()][-2:]
            # Nothing to interpolate any more, or a penalty that no longer moves l0: thresholds that learn too slowly.
            if between(list(tried.values()), case.k) or (len(tried) > 2 and abs(last[1] - last[0]) < STUCK):
                break
            knob = next_knob({knob: run["l0"] for knob, run in tried.items()}, case.k, kind)
        if not tried:
            return None
        runs, own = list(tried.values()), tried.get(float(case.k))
        if kind == WHOLE and own is not None and abs(own["l0"] / case.k - 1) <= OF_BUDGET and between(runs, case.k) is None:
            return own | {"matched": "budget"}
        return interpolated(runs, case.k)

    def cell(self, name: str, family: str, library: str, seeds: int) -> dict[str, Any]:
        """Return the best variant's figures of every seed, and those of all variants on seed 0.

        The variant is chosen on the embedded model.
        """
        case = self.case(name, family)
        variants = VARIANTS.get((library, family), (EQUAL,))
        if name != "embedded" and library != OURS:
            chosen = self.cell("embedded", family, library, 1)["runs"]
            variants = tuple(variant for variant in variants if chosen and variant.name == chosen[0]["variant"])
        first = {v: self.at_l0(case, family, library, v, 0, None) for v in variants}
        known = {variant: found for variant, found in first.items() if found is not None}
        if not known:
            return {"runs": [], "variants": {}}
        best = min(known, key=lambda variant: (known[variant]["matched"] == "no", known[variant]["fvu"]))
        runs = [known[best]]
        for seed in range(1, seeds):
            found = self.at_l0(case, family, library, best, seed, known[best]["knob"])
            runs += [] if found is None else [found]
        return {"runs": runs, "variants": {variant.name: found for variant, found in known.items()}}


def next_knob(l0: Mapping[float, float], target: float, kind: str) -> float:
    """Return the next value to try: between the nearest ones on either side of the target, else beyond the outermost."""
    points = sorted((math.log(max(found, 1e-3)), math.log(knob)) for knob, found in l0.items())
    goal = math.log(target)
    below, above = [p for p in points if p[0] < goal], [p for p in points if p[0] >= goal]
    if below and above:
        (a, low), (b, high) = below[-1], above[0]
        # Not too near an end: the curve may be steep there.
        knob = math.exp(low + min(max((goal - a) / (b - a), 0.1), 0.9) * (high - low))
        if kind == WHOLE:
            return _between(math.exp(low), math.exp(high), knob)
        return float(f"{knob:.6g}")
    slope = -1.0 if kind == PENALTY else 1.0
    # From the outermost value, as l0 need not fall with every step of a penalty.
    upward = (goal > points[0][0]) == (slope > 0)
    found, outermost = (max if upward else min)(points, key=lambda p: p[1])
    step = max(-math.log(8), min(math.log(8), (goal - found) / slope * 1.2))
    knob = math.exp(outermost + step)
    if kind == WHOLE:
        own = round(math.exp(outermost))
        return float(max(1, max(own + 1, round(knob)) if step > 0 else min(own - 1, round(knob))))
    return float(f"{knob:.6g}")


def _between(low: float, high: float, knob: float) -> float:
    """Return a whole number strictly between two, or the nearer end if there is none."""
    ends = sorted((round(low), round(high)))
    return float(min(max(round(knob), min(ends[0] + 1, ends[1])), max(ends[1] - 1, ends[0])))


def between(runs: Sequence[dict[str, Any]], target: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the nearest runs on either side of the target if they are near enough to each other to interpolate."""
    ordered = sorted(runs, key=lambda run: run["l0"])
    below, above = [run for run in ordered if run["l0"] < target], [run for run in ordered if run["l0"] >= target]
    near = below and above and above[0]["l0"] <= NEAR * below[-1]["l0"]
    return (below[-1], above[0]) if near else None


def interpolated(runs: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """Return the figures at the target l0 between the nearest runs, or else those of the nearest one, marked."""
    nearest = min(runs, key=lambda run: abs(math.log(max(run["l0"], 1e-3) / target)))
    pair = between(runs, target)
    if pair is None:
        return nearest | {"matched": "no"}
    a, b = pair
    share = math.log(target / a["l0"]) / math.log(b["l0"] / a["l0"])
    found = nearest | {"l0": float(target), "matched": "interpolated"}
    for key in ("dead", "ce_recovered", *RECOVERY):
        if key in a:
            found[key] = (1 - share) * a[key] + share * b[key]
    for key in ("fvu", "knob"):
        found[key] = math.exp((1 - share) * math.log(a[key]) + share * math.log(b[key]))
    return found


# Cases of transcoders, beside those of SAEs of the same model.
OF_MLPS = {"embedded": "mlp", "stories3M": "stories3M-mlp"}
OF_MODEL = ("fvu", "l0", "dead", "ce_recovered")
FIGURES = {
    "embedded": OF_MODEL,
    "faster": OF_MODEL,
    "planted": (*RECOVERY, "fvu", "l0", "dead"),
    "stories3M": OF_MODEL,
}


def rows_of(cells: Mapping[tuple[str, str], dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for every family and library: means and spreads over seeds, and our difference from the library."""
    tested, lower = [], []
    rows = []
    for (family, library), cell in cells.items():
        runs = cell["runs"]
        row: dict[str, Any] = {
            "case": name,
            "family": family,
            "library": library,
            "variant": runs[0]["variant"] if library != OURS else "recipe",
            "version": runs[0].get("version"),
            "seeds": len(runs),
            "matched": sorted({run["matched"] for run in runs}),
        }
        for key in FIGURES[name]:
            values = [run[key] for run in runs]
            row[key] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
        rows.append(row)
        ours = cells.get((family, OURS))
        if library != OURS and ours is not None and len(runs) > 1 and len(ours["runs"]) > 1 and "no" not in row["matched"]:
            figure = FIGURES[name][0]
            values, reference = [run[figure] for run in ours["runs"]], [run[figure] for run in runs]
            row["difference"] = difference(figure, values, reference, None, paired=False)
            tested.append(row["difference"])
            lower.append(figure == "fvu")
    decided = iter(decide(tested, lower, [False] * len(tested)))
    for row in rows:
        if "difference" in row:
            row["difference"] = next(decided)
        yield row


def table(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Return the rows as a Markdown table."""
    labels = {"fvu": "fvu", "l0": "l0", "dead": "dead", "ce_recovered": "CE recovered", "mcc": "mcc"}
    labels |= {"latent_f1": "latent F1", "detector_f1": "matched F1", "distinct_features": "distinct"}
    head = ["family", "library", *(labels[key] for key in FIGURES[name]), "ours : its", "settings"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"`{row['family']}`", f"**{OURS}**" if row["library"] == OURS else row["library"]]
        for key in FIGURES[name]:
            mean, sd = row[key]["mean"], row[key]["sd"]
            form = {"dead": ".1%", "l0": ".2f", "fvu": ".3f" if name == "planted" else ".4f"}.get(key, ".3f")
            form = ".4f" if key == "ce_recovered" else form
            spread = f" ± {format(sd, form)}" if sd is not None and key in FIGURES[name][:1] else ""
            cells.append(format(mean, form) + spread)
        ours = next((r for r in rows if (r["family"], r["library"]) == (row["family"], OURS)), None)
        first, ratio = FIGURES[name][0], ""
        if row["library"] != OURS and ours is not None and "no" not in row["matched"]:
            ratio = f"{ours[first]['mean'] / row[first]['mean']:.2f}"
        cells.append(ratio + (f", {verdict_words(row['difference'])}" if "difference" in row else ""))
        marks = {"interpolated": "interpolated", "budget": "its budget", "no": "not at this l0"}
        notes = [row["variant"], *(marks[word] for word in row["matched"] if word in marks)]
        lines.append(f"| {' | '.join(cells)} | {', '.join(notes)} |")
    return "\n".join(lines)


def with_table(page: str, name: str, lines: str) -> str:
    """Return a page with another table between the comments that name it."""
    begin, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"--page: expected the lines {begin.strip()} and {end}. Add them where the table belongs.")
    return f"{before}{begin}\n{lines}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "peer-families", help="folder of all runs")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="the peers' Python")
    parser.add_argument("--case", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--library", nargs="+", choices=(OURS, *sorted({x for each in FAMILIES.values() for x in each})))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many seeds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and train nothing")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comparison = Comparison(options.work.resolve(), options.peers.absolute(), options.threads, not options.table)
    # All cells with one seed come first, so that an interrupted comparison has a row for each.
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for seeds in range(1, options.seeds + 1):
        for name in options.case:
            for family in options.family:
                if family in TRANSCODERS and name not in OF_MLPS:
                    continue
                for library in (OURS, *FAMILIES[family]):
                    if options.library and library not in options.library:
                        continue
                    cell = comparison.cell(name, family, library, seeds)
                    if cell["runs"]:
                        found.setdefault(name, {})[family, library] = cell
    rows = {name: list(rows_of(cells, name)) for name, cells in found.items()}
    for name in rows:
        print(f"\n{name}\n\n{table(rows[name], name)}")
        if options.page:
            write_text(options.page, with_table(options.page.read_text(encoding="utf-8"), name, table(rows[name], name)))
    if options.out:
        runs = [json.loads(path.read_text()) for path in sorted((options.work / "runs").glob("*.json"))]
        settings: dict[str, Any] = {"warmup": WARMUP, "decay": DECAY, "tolerance": TOLERANCE, "near": NEAR}
        settings["batches"] = {case.name: [case.steps, case.batch] for case in comparison.cases.values()}
        report = {"environment": environment(options.threads), "settings": settings, "rows": rows, "runs": runs}
        write_text(options.out, json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
