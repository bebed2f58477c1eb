"""LISTA against BatchTopK with twice the steps, on planted data: what the second product of a LISTA step is worth.

    .venv/bin/python docs/studies/lista.py [--seeds 4] [--samples 614400] [--out docs/results/lista.json]

Data, protocol and scores are those of `sparsary bench truth --data synth_sae_bench_small`. A LISTA step costs two products with
the encoder and a BatchTopK step one, so BatchTopK is also trained for twice the steps, on twice the samples. ``k falling`` is
`schedules: {k: [[0, 2.5 k], [0.6, k]]}`. All arms of a seed share the planted data and the initial weights; no encoder was
tuned on these data. Half the samples of `sparsary bench truth` by default, to keep it short.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import write_results

from sparsary.eval.compare.statistics import decide, difference, sd_of, uncertainty
from sparsary.eval.synthetic.truth import SHOWN, TESTED, Arm, bench_truth, truth_set

DATA = "synth_sae_bench_small"
# Pairs of arms that are compared; Holm's correction runs over all of them and all metrics.
PAIRS = (
    ("batch_topk, k falling", "batch_topk"),
    ("lista", "batch_topk"),
    ("lista", "batch_topk, twice the steps"),
    ("lista, k falling", "batch_topk, k falling"),
    ("lista, k falling", "batch_topk, k falling, twice the steps"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=614_400, help="of the arms with single steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = truth_set(DATA)
    falling = {"schedules": {"k": [[0.0, round(2.5 * data.k)], [0.6, data.k]]}}
    runs: dict[str, list[dict[str, float]]] = {}
    for times, families in ((1, ("batch_topk", "lista")), (2, ("batch_topk",))):
        arms = {
            family + words + (", twice the steps" if times == 2 else ""): Arm(family, overrides)
            for family in families
            for words, overrides in (("", {}), (", k falling", falling))
        }
        report = bench_truth(replace(data, samples=times * options.samples), list(arms.values()), options.seeds)
        runs |= {name: report["arms"][arm.name]["runs"] for name, arm in arms.items()}
    tell(runs, differences(runs))
    if options.out:
        sizes = {"data": DATA, "k": data.k, "n_latents": data.n_latents, "samples": options.samples, "seeds": options.seeds}
        write_results(options.out, sizes | {"arms": runs, "differences": differences(runs)})


def differences(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return the differences of the pairs, tested together."""
    rows, lower = [], []
    for arm, against in PAIRS:
        for metric, high in TESTED.items():
            values, reference = ([run[metric] for run in runs[name]] for name in (arm, against))
            rows.append({"arm": arm, "against": against} | difference(metric, values, reference, None, paired=True))
            lower.append(not high)
    return decide(rows, lower, [False] * len(rows))


def tell(runs: dict[str, list[dict[str, float]]], rows: list[dict[str, Any]]) -> None:
    """Print both tables, means with half the 95 % interval over seeds."""
    print(f"| arm | {' | '.join(SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}")
    for name, found in runs.items():
        cells = []
        for metric in SHOWN:
            values = [run[metric] for run in found]
            half = uncertainty([(sd_of(values), len(values))], None)
            cells.append(f"{statistics.fmean(values):.3f}" + ("" if half is None else f" ± {half.half_width:.3f}"))
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| arm | against | metric | difference | 95 % interval | p (Holm) | verdict |\n|---|---|---|---|---|---|---|")
    for row in rows:
        interval = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.3f}"
        print(
            f"| {row['arm']} | {row['against']} | {row['figure']} | {row['difference']:+.4f} | {interval} | {p} | "
            f"{row['verdict']} |"
        )


if __name__ == "__main__":
    main()
