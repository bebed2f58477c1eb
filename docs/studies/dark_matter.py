"""SAE dark matter as a function of width: the parts of the error, their predictors, their cost and their remedies.

    .venv/bin/python docs/studies/dark_matter.py recipes/dark_matter/embedded.yaml --earlier transformer.h.1:out
    .venv/bin/python docs/studies/dark_matter.py recipes/dark_matter/stories3M.yaml --earlier model.layers.2:out

The recipe is a grid over ``dictionary.n_latents`` and ``seed``. In addition, for every seed a dictionary of the earlier hook
is trained, and three dictionaries on the error of the middle width and its two parts. Finished runs are reused. Writes
docs/results/dark-matter-NAME.json and docs/dark_matter_NAME.png and prints the tables of docs/dark_matter.md; intervals are
Student's t over seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from results import write_results
from scipy.stats import t

from sparsary.eval.heldout import EvalData, eval_data
from sparsary.eval.metrics.dark_matter.remedies import PARTS, ErrorParts, parts_of
from sparsary.eval.metrics.dark_matter.widths import Judged, WidthLaw, evaluate_widths, fit_width_law
from sparsary.eval.pages.plots import ACCENT, BAD, INK, MUTED, STYLE, WARN
from sparsary.sae import SparseDictionary, load_dictionary
from sparsary.sae.checkpoint_files import read_config
from sparsary.sae.metrics import RunningFvu
from sparsary.training.activations.shards import ActivationStore, RowReader
from sparsary.training.recipe import Recipe, check_recipe, override, read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipe, resolve_recipes
from sparsary.training.run import train_all, train_recipe

ROWS = 4096
# Recipe keys that a run on errors copies from the run whose errors it is trained on.
COMMON = ("tokens", "batch_tokens", "lr", "lr_warmup_steps", "dead_after_tokens", "log_every", "save_every", "seed")
TABLE = ("fvu_total", "fvu_nonlinear", "absent_share", "linear_error_share", "err_vec_r2_mean_dim", "err_norm_r2")
TABLE = (*TABLE, "ce_recovered_by_linear_error", "ce_recovered_by_nonlinear_error")

Seed = dict[str, Any]
# Claim, measured quantity, and its value for one seed.
Statement = tuple[str, str, Callable[[Seed], float]]


class StoredRows:
    """Training activations of a store, in batches of a fixed random order; can be iterated repeatedly."""

    def __init__(self, store: ActivationStore, hook: str):
        self.rows = RowReader(store, "train", f"x:{hook}")

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(0).permutation(len(self.rows))
        for start in range(0, len(order) - ROWS + 1, ROWS):
            yield self.rows.gather(np.sort(order[start : start + ROWS]))


def trained(path: str, earlier: str) -> tuple[dict[int, dict[int, Recipe]], dict[int, Recipe]]:
    """Train and return the members of the grid by seed and width, and those of the earlier hook by seed."""
    members = list(check_grid(read_values(path), path).recipes)
    seeds = list(dict.fromkeys(recipe.seed for recipe in members))
    widths = sorted({recipe.dictionary.known_n_latents for recipe in members})
    values = read_values(path) | {"grid": {"seed": seeds}}
    override(values, "dictionary.hook", earlier)
    override(values, "dictionary.n_latents", widths[len(widths) // 2])
    values["out_dir"] = f"{values['out_dir']}-earlier"
    before = list(check_grid(values, path).recipes)
    train_all(resolve_recipes(members))
    train_all(resolve_recipes(before))
    found = {seed: {r.dictionary.n_latents: r for r in members if r.seed == seed} for seed in seeds}
    return found, {recipe.seed: recipe for recipe in before}


def on_errors(sae: SparseDictionary, judged: Judged, recipe: Recipe, where: EvalData) -> dict[str, float]:
    """Train dictionaries on the error and its parts; return their held-out fvu, and the total fvu with them added."""
    (hook,), matter, store = recipe.dictionary.hooks_out, judged.maps[str(sae.n_latents)], recipe.harvest.store
    assert store is not None
    rows = StoredRows(ActivationStore.open(store), hook)
    held = [
        where.model.activations(piece.token_ids, (hook,))[hook][piece.kept]
        for piece in where.pieces(judged.scored_from, recipe.eval_tokens // 4)
    ]
    found: dict[str, float] = {}
    for part in PARTS:
        values = {key: value for key, value in recipe.model_dump(mode="json").items() if key in COMMON} | {
            "harvest": {"hooks": [f"{part}:out"], "tokens": 1},
            "dictionary": {"hook": f"{part}:out", "n_latents": sae.n_latents, "encoder": recipe.dictionary.encoder},
            "out_dir": f"{Path(recipe.out_dir).parent}-of-{part}/seed={recipe.seed}",
        }
        own = load_dictionary(train_recipe(resolve_recipe(check_recipe(values, part)), ErrorParts(rows, sae, matter, part)))
        alone, together = RunningFvu(sae.d_out), RunningFvu(sae.d_out)
        with torch.no_grad():
            for x in held:
                x_hat = sae(x)
                error = parts_of(x, x, x_hat, matter)[part].float()
                found_error = own(error)
                alone.update(error, found_error)
                together.update(x, x_hat + found_error)
        found |= {f"fvu_of_{part}": float(alone.value()), f"fvu_total_with_{part}": float(together.value())}
    return found


def one_seed(members: dict[int, Recipe], before: Recipe) -> Seed:
    """Return all results of one seed."""
    first = next(iter(members.values()))
    (hook,), (earlier,) = first.dictionary.hooks_out, before.dictionary.hooks_out
    where = eval_data(read_config(Path(first.out_dir))["provenance"], (earlier, hook))
    saes = {str(width): load_dictionary(recipe.out_dir) for width, recipe in members.items()}
    there = load_dictionary(before.out_dir)
    judged = evaluate_widths(where, (hook, hook), saes, first.eval_tokens, (there, (earlier, earlier)))
    middle = members[sorted(members)[len(members) // 2]]
    reports = judged.reports
    law = fit_width_law([int(width) for width in reports], [report["fvu_total"] for report in reports.values()])
    for width, report in reports.items():
        report["absent_share"] = law.absent_share(int(width))
    return {
        "widths": reports,
        "scaling": judged.scaling,
        "law": {"c": law.c, "a": law.a, "m": law.m},
        "on_errors": on_errors(saes[str(middle.dictionary.n_latents)], judged, middle, where),
    }


def of(width: str, key: str) -> Callable[[Seed], float]:
    return lambda seed: seed["widths"][width][key]


def across(key: str, choose: Callable[[list[float]], float]) -> Callable[[Seed], float]:
    """Reduce a figure over all pairs of a smaller dictionary, which predicts, and a larger one."""
    return lambda seed: choose([seed["scaling"][key][i][j] for j in range(len(seed["widths"])) for i in range(j)])


def taken(width: str, remedy: str) -> Callable[[Seed], float]:
    """Return the share of the nonlinear error that a remedy removes."""
    return lambda seed: 1 - of(width, f"{remedy}_fvu_nonlinear")(seed) / of(width, "fvu_nonlinear")(seed)


def excess(width: str, part: str) -> Callable[[Seed], float]:
    """Return the share of the loss minus the share of the variance."""
    return lambda seed: (
        of(width, f"ce_recovered_by_{part}_error")(seed) - of(width, f"variance_recovered_by_{part}_error")(seed)
    )


def ratio(large: str, small: str, figure: Callable[[dict[str, Any]], float]) -> Callable[[Seed], float]:
    return lambda seed: figure(seed["widths"][large]) / figure(seed["widths"][small])


def statements(widths: list[str]) -> list[Statement]:
    """Return the claims of the paper with the figures that test them."""
    small, middle, large = widths[0], widths[len(widths) // 2], widths[-1]
    span = f"{large} latents over {small}"
    rows: list[Statement] = [
        ("about half of the error vector is linear in x", f"linear share, {width} latents", of(width, "linear_error_share"))
        for width in (small, middle, large)
    ]
    rows += [
        ("over 90 % of the error's norm is", f"R² of the squared norm, {width} latents", of(width, "err_norm_r2"))
        for width in (small, middle, large)
    ]
    return [
        *rows,
        ("as much as of any norm?", "R² of the squared norm of x, from x", of(middle, "input_norm_r2_from_activation")),
        (
            "more than from the token?",
            f"R² from the token, held out, {middle} latents",
            of(middle, "err_norm_r2_from_token_id"),
        ),
        ("than from the norm of x?", f"R² from that norm, {middle} latents", of(middle, "err_norm_r2_from_input_norm")),
        (
            "the nonlinear part is constant in width",
            f"fvu_nonlinear, {span}",
            ratio(large, small, lambda r: r["fvu_nonlinear"]),
        ),
        ("the whole falls", f"fvu_total, {span}", ratio(large, small, lambda r: r["fvu_total"])),
        (
            "the linear part falls",
            f"total - nonlinear, {span}",
            ratio(large, small, lambda r: r["fvu_total"] - r["fvu_nonlinear"]),
        ),
        ("the same tokens are hard for all widths", "least R², squared norms", across("scaling_squared_norm_r2", min)),
        ("", "least R², norms", across("scaling_norm_r2", min)),
        ("the nonlinear norm tells more", "mean gain, squared norms", across("scaling_squared_norm_gain", statistics.mean)),
        ("pursuit takes a little nonlinear error", f"share taken, {middle} latents", taken(middle, "pursued")),
        ("an earlier layer takes more", f"share taken, {middle} latents", taken(middle, "earlier")),
        (
            "",
            "more than the pursuit",
            lambda seed: taken(middle, "earlier")(seed) - taken(middle, "pursued")(seed),
        ),
        ("the nonlinear part costs what its size says", f"share of loss - of variance, {middle}", excess(middle, "nonlinear")),
        ("the linear part too", f"share of loss - of variance, {middle}", excess(middle, "linear")),
        (
            "dictionaries of nonlinear error do worse",
            "their fvu, nonlinear - linear",
            lambda seed: seed["on_errors"]["fvu_of_nonlinear"] - seed["on_errors"]["fvu_of_linear"],
        ),
    ]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return mean and 95 % interval over seeds; for one seed, its value three times."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def shown(values: list[float]) -> str:
    mean, low, high = interval(values)
    if len(values) < 2:
        return f"{mean:.3g} (one seed)"
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def tables(seeds: list[Seed]) -> str:
    """Format the tables of docs/dark_matter.md."""
    widths = sorted(seeds[0]["widths"], key=int)
    lines = ["| latents | " + " | ".join(f"`{key}`" for key in TABLE) + " |", "|---" * (len(TABLE) + 1) + "|"]
    lines += [
        f"| {width} | " + " | ".join(shown([of(width, key)(seed) for seed in seeds]) for key in TABLE) + " |"
        for width in widths
    ]
    law = [f"{name} {shown([seed['law'][name] for seed in seeds])}" for name in ("c", "a", "m")]
    lines += ["", "fvu_total = c + a W^m: " + ", ".join(law), "", "| the paper | here | mean, 95 % interval |", "|---|---|---|"]
    lines += [f"| {words} | {what} | {shown([figure(s) for s in seeds])} |" for words, what, figure in statements(widths)]
    middle = widths[len(widths) // 2]
    lines += ["", f"| from the earlier layer's, {middle} latents | " + " | ".join(PARTS) + " |", "|---|---|---|---|"]
    for source in ("activation", "reconstruction", "linear", "nonlinear"):
        cells = [shown([of(middle, f"earlier_r2_of_{part}_from_{source}")(seed) for seed in seeds]) for part in PARTS]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    lines += ["", "| trained on the | fvu of it | fvu_total with it |", "|---|---|---|"]
    for part in PARTS:
        cells = [shown([seed["on_errors"][f"{name}_{part}"] for seed in seeds]) for name in ("fvu_of", "fvu_total_with")]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(seeds: list[Seed], path: Path) -> None:
    """Draw four plots: fvu by width with the fitted law, shares of the error, R² between widths, and cost against size."""
    widths = sorted(seeds[0]["widths"], key=int)
    numbers = [int(width) for width in widths]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 7.6), layout="constrained")
        (left, right), (below, corner) = figure.subplots(2, 2)
        for key, color, label in (("fvu_total", INK, "all of the error"), ("fvu_nonlinear", BAD, "nonlinear")):
            points = [interval([of(width, key)(seed) for seed in seeds]) for width in widths]
            left.errorbar(
                numbers,
                [p[0] for p in points],
                [(p[2] - p[1]) / 2 for p in points],
                fmt="o",
                color=color,
                label=label,
                capsize=3,
            )
        fine = np.geomspace(numbers[0], numbers[-1] * 4, 100)
        laws = [WidthLaw(**seed["law"]) for seed in seeds]
        left.plot(fine, [statistics.mean(law(w) for law in laws) for w in fine], color=INK, linewidth=1, label="c + a W^m")
        left.axhline(statistics.mean(law.c for law in laws), color=MUTED, linewidth=1, linestyle=":", label="c")
        left.set(xscale="log", xlabel="latents", ylabel="fvu", ylim=(0, None), title="The error against width")
        left.set_xticks(numbers, widths)
        left.minorticks_off()
        left.legend()
        total = [statistics.mean(of(width, "fvu_total")(seed) for seed in seeds) for width in widths]
        nonlinear = [statistics.mean(of(width, "fvu_nonlinear")(seed) for seed in seeds) for width in widths]
        absent = [statistics.mean(law.absent(number) for law in laws) for number in numbers]
        # The nonlinear part cannot be absent too, although the law does not know of the split.
        absent = [min(a, t - n) for a, t, n in zip(absent, total, nonlinear, strict=True)]
        parts = (nonlinear, [t - n - a for a, t, n in zip(absent, total, nonlinear, strict=True)], absent)
        base = np.zeros(len(widths))
        for part, color, label in zip(parts, (BAD, WARN, ACCENT), ("nonlinear", "linear, at any width", "absent"), strict=True):
            share = np.array(part) / np.array(total)
            right.bar(widths, share, bottom=base, color=color, label=label, width=0.7)
            base = base + share
        right.set(xlabel="latents", ylabel="share of the error", title="What the error is made of", ylim=(0, 1.3))
        right.legend(ncols=3, loc="upper center")
        matrix = np.mean([seed["scaling"]["scaling_norm_r2"] for seed in seeds], axis=0)
        below.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            below.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else INK)
        below.set(xticks=range(len(widths)), xticklabels=widths, yticks=range(len(widths)), yticklabels=widths)
        below.set(xlabel="error norm of", ylabel="predicted from that of", title="Are the same tokens hard? R² of norms")
        for part, color in (("linear", WARN), ("nonlinear", BAD)):
            size = [of(width, f"variance_recovered_by_{part}_error")(seed) for seed in seeds for width in widths]
            cost = [of(width, f"ce_recovered_by_{part}_error")(seed) for seed in seeds for width in widths]
            corner.plot(size, cost, "o", color=color, alpha=0.7, label=f"{part} error put back")
        corner.axline((0, 0), slope=1, color=MUTED, linewidth=1, linestyle=":")
        corner.set(xlabel="share of the error's variance undone", ylabel="share of the loss increase undone")
        corner.set(title="What a part costs", xlim=(0, 1), ylim=(min(0, corner.get_ylim()[0]), max(1, corner.get_ylim()[1])))
        corner.legend()
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--earlier", help="hook of an earlier layer, which the recipe harvests too")
    parser.add_argument("--docs", default="docs")
    parser.add_argument("--redraw", action="store_true", help="tables and plots of the results that are there, nothing else")
    options = parser.parse_args()
    name, docs = Path(options.recipe).stem, Path(options.docs)
    results = docs / "results" / f"dark-matter-{name}.json"
    if not options.redraw:
        if options.earlier is None:
            parser.error("--earlier: required, the hook of a layer below that the recipe harvests too.")
        members, before = trained(options.recipe, options.earlier)
        judged: dict[str, Seed] = {}
        for seed, recipes in members.items():
            judged[str(seed)] = one_seed(recipes, before[seed])
            print(f"seed {seed} is judged", flush=True)
        write_results(results, {"recipe": options.recipe, "seeds": judged})
    found: dict[str, Seed] = json.loads(results.read_text())["seeds"]
    draw(list(found.values()), docs / f"dark_matter_{name}.png")
    print(tables(list(found.values())))


if __name__ == "__main__":
    main()
