"""What a training step of every family costs, as a multiple of TopK's step in the same run.

    .venv/bin/python tests/bench/bench_steps.py [--rounds 7] [--families topk mutual_choice ...] [--out FILE]

Steps at (2048 tokens, d 768, 12288 latents, k 32), float32, on the CPU: forward, backward, gradient projection, clipping,
Adam and renormalisation, on activations with the spectrum of real ones. Families take turns within every round, so that a
disturbance hits all of them; the figure is the median over rounds of each family's time over TopK's in the same round.
``--peers`` adds two pursuits at (2048, 512, 4096, k 32): the training step of SAELens's matching pursuit against ours, and
dictionary_learning's gradient pursuit against ours. Each runs in a process of its own, so that its peak memory is its own;
they take turns, and times are also given as multiples of the encoder product in the same process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from sae import ENCODERS, SAE
from sae.encoders.feature_choice import FeatureChoice
from training.activations.stream import Batch
from training.objective import AuxSettings, Objective, Usage

ROOT = Path(__file__).parents[2]
TOKENS, D, LATENTS, K = 2048, 768, 12288, 32
ARGUMENTS = {
    "topk": {"k": K},
    "mutual_choice": {"k": K},
    "feature_choice": {"k": K},
    "gradient_topk": {"k": K, "beta": 27.0},
    "batch_topk": {"k": K},
    "matryoshka": {"k": K},
}


class Step:
    """One family's dictionary, optimizer and step."""

    def __init__(self, name: str, d: int, n_latents: int, arguments: dict):
        torch.manual_seed(0)
        self.sae = SAE(d, n_latents, ENCODERS[name](**arguments))
        self.objective = Objective(self.sae, float(d), AuxSettings(1 / 32, d // 2))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=1e-4, fused=True)
        # Nothing is dead: AuxK has nothing to do in any family.
        self.usage = Usage(torch.zeros(n_latents, dtype=torch.bool), torch.full((n_latents,), K / n_latents).double())

    def __call__(self, batch: Batch) -> float:
        started = time.perf_counter()
        loss, _ = self.objective(batch, self.usage)
        loss.backward()
        self.sae.project_grad()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 0.003)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.renormalize()
        return time.perf_counter() - started


def batches(d: int, count: int, seed: int = 0) -> list[Batch]:
    """Activations whose variance falls off as 1 / rank, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1).float().rsqrt()
    scales *= (d / scales.pow(2).sum()).sqrt()
    draw = [torch.randn(TOKENS, d, generator=generator) for _ in range(2 * count)]
    return [Batch(draw[i] * scales, grad=draw[count + i]) for i in range(count)]


def measure(families: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, and median ratio to TopK's step of the same round."""
    data = batches(D, 4)
    product = torch.empty(TOKENS, LATENTS)
    steps = {name: Step(name, D, LATENTS, ARGUMENTS[name]) for name in families}
    for step in steps.values():
        step(data[0])
    for step in steps.values():
        # Zipf budgets, as they are for most of a run.
        if isinstance(step.sae.encoder, FeatureChoice):
            step.sae.encoder.rerank()
    times: dict[str, list[float]] = {name: [] for name in [*families, "encoder product"]}
    for number in range(rounds):
        for name, step in steps.items():
            times[name].append(step(data[number % len(data)]))
        weights = steps["topk"].sae.W_enc.detach()
        started = time.perf_counter()
        torch.mm(data[0].x, weights.T, out=product)
        times["encoder product"].append(time.perf_counter() - started)
    return {
        name: {
            "seconds": statistics.median(taken),
            "times_topk": statistics.median(a / b for a, b in zip(taken, times["topk"], strict=True)),
        }
        for name, taken in times.items()
    }


# What the peers' processes and ours share: data, the encoder product, and how they are measured.
MEASURED = """
import json, statistics, sys, time, torch
torch.manual_seed(0); torch.set_num_threads(int(sys.argv[1]))
scales = torch.arange(1, 513).float().rsqrt(); scales *= (512 / scales.pow(2).sum()).sqrt()
x = torch.randn(2048, 512) * scales
atoms = torch.nn.functional.normalize(torch.randn(4096, 512), dim=1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def timed(run):
    started = time.perf_counter(); run(); return time.perf_counter() - started
def measure(run, rounds):
    start = peak(); run()
    grown, product = (peak() - start) / 1024, torch.empty(2048, 4096)
    pairs = [(timed(run), timed(lambda: torch.mm(x, atoms.T, out=product))) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(json.dumps({"seconds": statistics.median(a for a, b in pairs), "products": ratio, "peak_mb": grown}))
"""

SAELENS = """
from sae_lens import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
sae = MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(
    d_in=512, d_sae=4096, max_iterations=32, residual_threshold=0.0, dtype="float32", device="cpu"))
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
batch = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)
def step():
    sae.training_forward_pass(batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
measure(step, 3)
"""

DICTIONARY_LEARNING = """
import runpy
from importlib.util import find_spec
# The package itself imports an interpretability library that its pursuit has no need of.
folder = find_spec("dictionary_learning").submodule_search_locations[0]
grad_pursuit = runpy.run_path(folder + "/grad_pursuit.py")["grad_pursuit"]
measure(lambda: grad_pursuit(x, atoms.T, target_l0=32), 2)
"""

OUR_STEP = """
from bench_steps import Batch, Step
step = Step("matching_pursuit", 512, 4096, {"k": 32})
measure(lambda: step(Batch(x)), 7)
"""

OUR_GRADIENT_PURSUIT = """
from sae.pursuit import gradient_pursuit
measure(lambda: gradient_pursuit(x, atoms, 32), 5)
"""


def in_turn(theirs: str, ours: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over so many processes of either kind, and how many times less ours takes."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    sides = {"peer": (str(ROOT / ".venv-peers/bin/python"), theirs, None), "sparsary": (sys.executable, ours, paths)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (python, script, path) in sides.items():
            environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
            command = [python, "-c", MEASURED + script, str(torch.get_num_threads())]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
    medians = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    medians["ratio"] = {key: value / medians["sparsary"][key] for key, value in medians["peer"].items()}
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=list(ARGUMENTS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    found: dict = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    found["steps"] = measure(["topk", *[name for name in options.families if name != "topk"]], options.rounds)
    for name, row in found["steps"].items():
        print(f"{name:20s} {row['seconds']:8.3f} s  {row['times_topk']:6.2f} x topk")
    if options.peers:
        found["matching_pursuit, SAELens"] = in_turn(SAELENS, OUR_STEP, 2)
        found["gradient_pursuit, dictionary_learning"] = in_turn(DICTIONARY_LEARNING, OUR_GRADIENT_PURSUIT, 2)
        for title in [name for name in found if "pursuit," in name]:
            for name, row in found[title].items():
                print(f"{title:40s} {name:10s} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
