"""sparsary's training steps, run by its own training loop in a benchmarked process.

    python -m sparsary.training.bench.steps '{"library": "sparsary", "family": "topk", "tokens": 2048, ...}'

The loop's activation stream waits for an order before it returns a batch, so a step is everything between two batches:
forward, backward, projection, clipping, Adam, decoder normalization, counters. Nothing is logged or saved.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor

from ...sae import pursuit
from ...sae.checkpoint import build_dictionary
from ...sae.encoders import ENCODERS
from ...sae.encoders.feature_choice import FeatureChoice
from ...sae.encoders.jumprelu import JumpReLU
from ...sae.metrics import Moments
from ...sae.screen import Screen
from ...sae.sparse_code import SparseCode
from ..activations.stream import ActivationBatch, ActivationStream, moments_of
from ..checkpoints import Checkpoints
from ..fused_adam import build_optimizer
from ..initialize import SAMPLE_TOKENS, initialize
from ..loop import Group, TrainedMember, train_loop
from ..objective import AuxSettings, Objective
from ..optim import Schedule
from ..phases import Phases
from ..recipe import Recipe, check_recipe, override
from ..report import TrainingLog
from ..resolve_hooks import dictionary_arguments
from ..signals import StopRequest
from ..state import Randomness, TrainState
from .environment import sparsary_version
from .worker import BATCHES, BenchTask, Turns, activations, held_bytes, planted_directions

HOOK = "activations:out"
# Long enough that no schedule ends during the measurement.
STEPS = 1_000_000
# Steps whose codes are counted: none of them is timed.
WARMUP_STEPS = 2
# Encoder arguments without a default.
ARGUMENTS = {"gradient_topk": {"beta": 27.0}}
# Pursuit algorithms measured on a fixed dictionary (inference only).
PURSUITS = ("gradient_pursuit", "orthogonal_matching_pursuit")
TAKEN = {
    "batch_tokens": "--shape",
    "dictionary.n_latents": "--shape",
    "dictionary.encoder.k": "--shape",
    "dictionary.encoder.target_l0": "--shape",
    "dictionary.encoder.name": "--family",
    "dictionary.encoder": "--family",
}


def recipe_of(task: BenchTask) -> Recipe:
    """Return the recipe whose training step the task measures.

    Raises:
        ValueError: If the task's overrides or sizes give no valid recipe, or set a key given by a bench option.
    """
    where = f"bench, {task.family}"
    # Encoders without a fixed k get it as their target L0 if they have one.
    arguments = {name: task.k for name in ("k", "target_l0") if name in ENCODERS[task.family].parameters_of()}
    encoder = {"name": task.family, **arguments, **ARGUMENTS.get(task.family, {})}
    values: dict[str, Any] = {
        "harvest": {"hooks": [HOOK], "gradients": ENCODERS[task.family].needs_gradient},
        "dictionary": {"hook": HOOK, "n_latents": task.n_latents, "encoder": encoder},
        "tokens": STEPS * task.tokens,
        "batch_tokens": task.tokens,
        "log_every": STEPS,
        "save_every": STEPS,
        "out_dir": "nowhere",
    }
    for key, value in task.overrides.items():
        if key in TAKEN:
            raise ValueError(f"{where}: {key}: expected the value from {TAKEN[key]}, got {value!r}.")
        override(values, key, value)
    recipe = check_recipe(values, where)
    if recipe.uses_kl:
        raise ValueError(f"{where}: objective: expected reconstruction, got 'kl', whose step is mostly the model's.")
    return recipe


class Following(ActivationStream):
    """Activation stream without a background thread, which would read ahead of the orders."""

    def __init__(self, batches: Iterator[ActivationBatch], batch_tokens: int):
        super().__init__(batch_tokens)
        self.source = batches

    def __next__(self) -> ActivationBatch:
        batch = next(self.source)
        self.batches += 1
        return batch

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        raise NotImplementedError

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        raise NotImplementedError

    def moments(self) -> Moments:
        raise NotImplementedError

    def target_moments(self) -> Moments:
        raise NotImplementedError


class BenchRun:
    """Dictionary ready to be trained, with everything the training loop requires."""

    def __init__(self, recipe: Recipe, sample: Float[Tensor, "tokens d_in"]):
        # Mirrors `training.run`, without the stream and the files.
        moments, section = moments_of(sample), recipe.dictionary
        self.recipe = recipe
        self.dictionary = build_dictionary(dictionary_arguments(recipe, {HOOK: sample.shape[1]}))
        initialize(self.dictionary, ActivationBatch(sample), moments, moments, section.normalize, section.init)
        AcceleratorState._reset_state(True)
        precision = "bf16" if recipe.precision == "bf16" else "no"
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision)
        latents = recipe.auxk_latents or max(1, self.dictionary.d_out // 2)
        aux = AuxSettings(recipe.auxk_weight, latents, recipe.aux_zipf_tau, recipe.aux_zipf_absolute)
        self.phases = Phases(self.dictionary, recipe)
        if recipe.screen != "none":
            self.dictionary.screen = Screen(recipe.screen, recipe.screen_floor, if_faster=True)
        self.optimizer = build_optimizer(self.dictionary, self.phases, recipe)
        self.state = TrainState(
            self.dictionary.n_latents, recipe.dead_after_tokens, torch.device("cpu"), Randomness(recipe.seed)
        )
        objective = Objective(self.dictionary, self.dictionary.error_scale(moments), aux, None, self.phases.weights(0))
        self.objective = cast(Objective, self.accelerator.prepare_model(objective, evaluation_mode=True))
        self.dictionary.train()

    def follow(self, batches: Iterator[ActivationBatch]) -> None:
        """Run the training loop on ``batches`` until they end."""
        schedule = Schedule(self.optimizer, self.dictionary, self.phases, self.recipe)
        checkpoints = Checkpoints(Path(self.recipe.out_dir), {}, self.phases)
        # Created without a log file: the loop ends before anything is logged or saved.
        report = object.__new__(TrainingLog)
        member = TrainedMember(
            self.recipe, self.objective, self.dictionary, self.optimizer, schedule, self.state, report, checkpoints
        )
        stream = Following(batches, self.recipe.batch_tokens)
        stream.batches = self.state.step
        group = Group(stream, [member])
        with suppress(StopIteration):
            train_loop([group], self.accelerator, StopRequest())

    def batches(
        self, x: Iterable[Float[Tensor, "tokens d_in"]], gradients: list[Float[Tensor, "tokens d_in"]]
    ) -> Iterator[ActivationBatch]:
        """Yield batches for the loop, with ``gradients`` repeated in a cycle."""
        for number, (rows, grad) in enumerate(zip(x, itertools.cycle(gradients), strict=False)):
            # Zipf budgets, as in most of a run, from the densities of the first batch; no step is counted yet.
            if number == 1 and isinstance(self.dictionary.encoder, FeatureChoice):
                self.dictionary.encoder.rerank()
            yield ActivationBatch(rows, grad=grad)

    @torch.no_grad()
    def settle(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Give every latent a direction that the activations ``x`` are made of, and thresholds at which the target L0 fires."""
        encoder, weights = self.dictionary.encoder, self.dictionary.blocks[0].weights
        directions = planted_directions(*weights.W_enc.shape)
        weights.W_enc.copy_(directions)
        weights.W_dec.copy_(directions)
        if isinstance(encoder, JumpReLU):
            encoder.started.fill_(1)
        self.dictionary.eval()
        self.dictionary.calibrate([x])
        self.dictionary.train()

    def count_first(self, steps: int) -> dict[str, float]:
        """Return figures that the codes of the first steps fill in: mean L0, and entries per token.

        Entries are the latents that take part in a step: those that fire, and those near their thresholds that train them.
        """
        counted: dict[str, float] = {}

        def count(module: Any, arguments: Any, code: SparseCode) -> None:
            entries = len(code.values)
            if code.window is not None:
                fired = (code.values - code.window.theta[code.latents]).detach()
                entries = int(code.window.counts.sum()) + int((fired >= code.window.bandwidth / 2).sum())
            counted["l0"] = float(code.firings(self.dictionary.n_latents).sum()) / code.n_tokens
            counted["entries"] = entries / code.n_tokens
            counted["steps"] = counted.get("steps", 0) + 1
            if counted["steps"] >= steps:
                hook.remove()

        hook = self.dictionary.encoder.register_forward_hook(count)
        return counted

    def held_bytes(self) -> int:
        """Return the size of parameters and optimizer state in bytes."""
        return held_bytes([*self.dictionary.parameters(), *self.phases.parameters()], self.optimizer.state)


def sample_of(task: BenchTask, generator: torch.Generator) -> Float[Tensor, "tokens d_in"]:
    """Return enough rows to initialize the decoder."""
    return activations(task, min(SAMPLE_TOKENS, 2 * task.n_latents), generator)


def _train(task: BenchTask, turns: Turns) -> None:
    """Serve training steps, and the encoder product if the task includes it."""
    gradients = [torch.randn(task.tokens, task.d_in, generator=turns.generator) for _ in range(BATCHES)]
    buffer = torch.zeros(task.tokens, task.n_latents).add_(1) if task.product else None
    _compile(task)
    turns.build_from_here()
    run = BenchRun(recipe_of(task), sample_of(task, turns.generator))
    if task.settled:
        run.settle(turns.batches[0])
    counted = run.count_first(WARMUP_STEPS)
    others = (
        {} if buffer is None else {"product": lambda: product(turns.batches[0], run.dictionary.blocks[0].weights.W_enc, buffer)}
    )
    run.follow(run.batches(turns.steps(run.held_bytes, sparsary_version(), others, counted), gradients))


def _compile(task: BenchTask) -> None:
    """Run two steps of a quarter of the size, so that compiler memory is not attributed to the step."""
    part = replace(task, tokens=max(1, task.tokens // 4), n_latents=max(task.k, task.n_latents // 4))
    generator = torch.Generator().manual_seed(0)
    x = [activations(part, part.tokens, generator) for _ in range(2)]
    # Sizes too small for the encoder are left to the warm-up.
    with suppress(ValueError):
        run = BenchRun(recipe_of(part), sample_of(part, generator))
        if part.settled:
            run.settle(x[0])
        run.follow(run.batches(x, x))


@torch.no_grad()
def product(
    x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "n_latents d_in"], out: Float[Tensor, "tokens n_latents"]
) -> None:
    """Compute the encoder product, which every exact training step needs."""
    torch.mm(x, weights.T, out=out)


def pursue(task: BenchTask, turns: Turns) -> None:
    """Serve pursuit of a batch with a random unit-norm dictionary (inference only)."""
    find = getattr(pursuit, task.family)
    buffer = torch.zeros(task.tokens, task.n_latents).add_(1) if task.product else None
    small = torch.nn.functional.normalize(torch.randn(max(task.k, task.n_latents // 4), task.d_in), dim=-1)
    find(turns.batches[0][: max(1, task.tokens // 4)], small, task.k)
    turns.build_from_here()
    atoms = torch.nn.functional.normalize(torch.randn(task.n_latents, task.d_in), dim=-1)
    others = {} if buffer is None else {"product": lambda: product(turns.batches[0], atoms, buffer)}
    for x in turns.steps(lambda: held_bytes([atoms], {}), sparsary_version(), others):
        find(x, atoms, task.k)


def _main() -> None:
    task = BenchTask(**json.loads(sys.argv[1]))
    turns = Turns(task)
    (pursue if task.family in PURSUITS else _train)(task, turns)


if __name__ == "__main__":
    _main()
