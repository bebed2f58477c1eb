"""``sparsary bench truth``: train encoders on planted data, and score how well they recover the features that generated it."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...sae import ENCODERS, load_dictionary
from ...sae.suggestions import require_choice
from ...training.bench.environment import environment
from ...training.recipe import check_recipe
from ...training.recipe.grid import override
from ...training.resolve_hooks import resolve_recipe
from ...training.run import train_recipe
from ..compare.groups import L0_TOLERANCE
from ..compare.statistics import decide, difference, sd_of, uncertainty
from ..pages.differences import verdict_words
from .planted import PLANTED, Planted
from .published import load_planted
from .synth_sae_bench import SYNTH, judge_streamed, references

HOOK = "planted:out"
# Metric, and whether a higher one is better. Differences in them are tested together.
TESTED = {"latent_f1": True, "mcc": True, "fvu": False}
SHOWN = (*TESTED, "latent_precision", "latent_recall", "l0", "dead_fraction")
# Training draws from seeds of 0 and more.
SCORED_SEED = -1
# Samples behind the mean number of features on a token.
COUNTED = 8192
# Recipe keys with an option or a meaning of their own.
TAKEN = {"dictionary.n_latents": "--n-latents", "tokens": "--samples", "seed": "--seeds", "out_dir": "--out"}


@dataclass(frozen=True)
class TruthSet:
    """Planted data and the protocol of training on it.

    ``planted`` is a function of a seed; ``fixed`` says that it ignores the seed, as a published model does. ``published`` are
    latent F1 scores of the literature at this protocol, each with its budget and source.
    """

    name: str
    planted: Callable[[int], Planted]
    n_latents: int
    k: int
    lr: float
    samples: int
    batch_tokens: int = 1024
    fixed: bool = False
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)


# SynthSAEBench-16k: 4096 latents, l0 about 25.
PUBLISHED_F1 = {
    "BatchTopK": (0.82, "200M samples, arXiv:2602.14687"),
    "Matryoshka": (0.88, "200M samples, arXiv:2602.14687"),
    "LISTA-Matryoshka": (0.97, "200M samples, Chanin 2026"),
    "best known": (0.989, "200M samples, Bussmann 2026"),
}
PUBLISHED_SIZE = (16_384, 768)


def truth_set(name: str) -> TruthSet:
    """Return a set of ours by name, or a published model by path or hub id, with its protocol.

    Raises:
        ValueError: If there is no such set or model.
    """
    if name == "synth_sae_bench_16k":
        return TruthSet(name, SYNTH[name], 4096, 25, 3e-4, 200_000_000)
    if name in SYNTH or name in PLANTED:
        make = (PLANTED | SYNTH)[name]
        planted = make(0)
        return TruthSet(name, make, planted.n_features, _true_l0(planted), 3e-3, 1_228_800)
    if "/" not in name and not Path(name).exists():
        require_choice("--data", name, (*SYNTH, *PLANTED))
    model = load_planted(name)
    if model.atoms.shape == PUBLISHED_SIZE:
        return TruthSet(name, lambda seed: model, 4096, 25, 3e-4, 200_000_000, fixed=True, published=PUBLISHED_F1)
    return TruthSet(name, lambda seed: model, model.n_features, _true_l0(model), 3e-3, 1_228_800, fixed=True)


def _true_l0(planted: Planted) -> int:
    """Return the nearest integer, at least 1, to the mean number of features on a token."""
    return max(1, round(float((planted.sample(COUNTED, SCORED_SEED).coefficients > 0).sum(-1).float().mean())))


class Samples:
    """Batches of planted activations for training, equal in every pass; with gradients if a label is planted."""

    def __init__(self, planted: Planted, samples: int, batch_tokens: int, seed: int):
        self.planted, self.batches, self.batch_tokens, self.seed = planted, -(-samples // batch_tokens), batch_tokens, seed

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for number in range(self.batches):
            sample = self.planted.sample(self.batch_tokens, self.seed * 10_000_000 + number)
            yield sample.x if sample.grad is None else (sample.x, sample.grad)


@dataclass(frozen=True)
class Arm:
    """Encoder to train, and recipe keys that differ from the protocol's."""

    family: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        return " ".join([self.family, *(f"{key}={value}" for key, value in self.overrides.items())])

    def recipe(self, data: TruthSet, seed: int, out_dir: Path) -> dict[str, Any]:
        """Return the recipe's values.

        Raises:
            ValueError: If an override names a key that an option sets, or the family selects by gradients.
        """
        encoder = ENCODERS[self.family]
        if encoder.needs_gradient and data.planted(0).decision is None:
            raise ValueError(
                f"--family {self.family}: expected data with loss gradients, got {data.name}, which has none. "
                "Use --data small_but_decisive."
            )
        # Encoders without a fixed k get it as their target L0 if they have one.
        budget = {name: data.k for name in ("k", "target_l0") if name in encoder.parameters_of()}
        values: dict[str, Any] = {
            "harvest": {"hooks": [HOOK], "tokens": 1, "gradients": encoder.needs_gradient},
            "dictionary": {
                "hook": HOOK,
                "n_latents": data.n_latents,
                "encoder": {"name": self.family} | budget,
                "init": "random",
            },
            "tokens": data.samples,
            "batch_tokens": data.batch_tokens,
            "lr": data.lr,
            "dead_after_tokens": 100 * data.batch_tokens,
            "calibration_tokens": 50 * data.batch_tokens,
            "log_every": 1000,
            "save_every": 10_000,
        }
        for key, value in self.overrides.items():
            if key in TAKEN:
                raise ValueError(f"bench truth: {key}: expected the value from {TAKEN[key]}, got {value!r}.")
            override(values, key, value)
        return values | {"seed": seed, "out_dir": str(out_dir)}


def bench_truth(
    data: TruthSet,
    arms: Sequence[Arm],
    seeds: int = 3,
    scored_tokens: int = 20_480,
    out: Path | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train every arm with every seed, and return recoveries, differences from the first arm, and baselines.

    A seed draws the planted data (unless it is a published model), the samples and the initial weights; all arms of a seed
    share them, so that differences are paired. Holm's correction runs over all tests.

    Args:
        data: The planted data and protocol.
        arms: What to train; differences are from the first.
        seeds: Number of seeds, from 0.
        scored_tokens: Fresh samples to score each dictionary on.
        out: Folder for the runs, which are kept and continued there; a temporary one if not given.
        told: Called with the number of trained dictionaries.

    Raises:
        ValueError: If two arms are the same, or a recipe is invalid.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"--family, --variant: expected different runs, got {', '.join(names)}.")
    checked = [check_recipe(arm.recipe(data, 0, Path("nowhere")), arm.name) for arm in arms]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for seed in range(seeds):
            planted = data.planted(seed)
            for arm in arms:
                place = folder / data.name.replace("/", "_") / arm.name.replace("/", "_") / f"seed-{seed}"
                recipe = resolve_recipe(check_recipe(arm.recipe(data, seed, place), arm.name))
                train_recipe(recipe, Samples(planted, recipe.recipe.tokens, recipe.recipe.batch_tokens, seed))
                runs[arm.name].append(judge_streamed(load_dictionary(place), planted, scored_tokens, SCORED_SEED))
                told(sum(map(len, runs.values())))
    budgets = {recipe_name: recipe.tokens for recipe_name, recipe in zip(names, checked, strict=True)}
    return {
        "bench": "truth",
        "environment": environment(),
        "data": {key: value for key, value in asdict(data).items() if key != "planted"},
        "seeds": seeds,
        "scored_tokens": scored_tokens,
        "arms": {name: {"samples": budgets[name], "runs": runs[name]} for name in names},
        "differences": _differences(runs, data.k),
        "baselines": references(data.planted(0), data.n_latents, data.k, min(scored_tokens, COUNTED), SCORED_SEED),
    }


def _differences(runs: Mapping[str, list[dict[str, float]]], k: int) -> list[dict[str, Any]]:
    """Return each arm's differences from the first, tested together."""
    first, *others = runs
    rows, higher, off = [], [], []
    for name in others:
        for metric, high in TESTED.items():
            values, reference = ([run[metric] for run in runs[arm]] for arm in (name, first))
            rows.append({"arm": name, "against": first} | difference(metric, values, reference, None, paired=True))
            higher.append(high)
            off.append(_off_target(runs[name], k) or _off_target(runs[first], k))
    return decide(rows, [not high for high in higher], off)


def _off_target(runs: Sequence[Mapping[str, float]], k: int) -> bool:
    """Return True if the mean l0 deviates from the budget by more than the tolerance."""
    return abs(statistics.fmean(run["l0"] for run in runs) / k - 1) > L0_TOLERANCE


def truth_tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return a report as tables: a title, a head and rows."""
    data = report["data"]
    size = f"{data['n_latents']} latents, k {data['k']}, {data['samples']:,} samples, {report['seeds']} seeds"
    recovered = [
        [name, *(_with_interval([run[metric] for run in arm["runs"]]) for metric in SHOWN)]
        for name, arm in report["arms"].items()
    ]
    recovered += [[f"({name})", *(f"{row[metric]:.3f}" for metric in SHOWN)] for name, row in report["baselines"].items()]
    recovered += [
        [f"[{name}, {source}]", f"{f1:g}", *[""] * (len(SHOWN) - 1)] for name, (f1, source) in data["published"].items()
    ]
    tables = [(f"{data['name']}: {size}; mean ± half the 95 % interval over seeds", ["", *SHOWN], recovered)]
    if report["differences"]:
        rows = [
            [row["arm"], row["figure"], f"{row['difference']:+.4f}", *_tested(row), verdict_words(row)]
            for row in report["differences"]
        ]
        head = ["", "metric", "difference", "95 % interval", "detectable", "p (Holm)", "verdict"]
        tables.append((f"against {report['differences'][0]['against']}", head, rows))
    return tables


def _with_interval(values: Sequence[float]) -> str:
    found = uncertainty([(sd_of(values), len(values))], None)
    mean = f"{statistics.fmean(values):.3f}"
    return mean if found is None else f"{mean} ± {found.half_width:.3f}"


def _tested(row: Mapping[str, Any]) -> list[str]:
    if row["low"] is None:
        return ["", "", ""]
    p = "" if row["p_holm"] is None else f"{row['p_holm']:.3f}"
    return [f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['detectable']:.4f}", p]
