"""Members of a run: the dictionaries over one stream and everything that is their own, built anew or from a saved state."""

import logging
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..sae.checkpoint import build_dictionary
from ..sae.encoders import ENCODERS
from ..sae.files import write_text
from ..sae.metrics import Moments
from ..sae.screen import Screen
from .activations.context_stream import ContextStream
from .activations.store_stream import StoreStream
from .activations.stream import ActivationBatch, ActivationStream
from .activations.tensor_stream import TensorStream
from .checkpoints import RECIPE_FILE, Checkpoints
from .divided import own_part
from .fused_adam import build_optimizer
from .initialize import SAMPLE_TOKENS, initialize
from .loop import Group, TrainedMember
from .objective import AuxSettings, Divergence, Objective
from .optim import Schedule, lr_share
from .phases import Phases
from .processes import mesh
from .recipe import DictionarySection, Recipe, dump_recipe
from .recipe.schema import total_steps
from .report import TrainingLog
from .resolve_hooks import dictionary_arguments
from .state import Logged, Randomness, TrainState
from .versions import git_commit, own_version
from .warm_start.begin import warm_start
from .warm_start.source import StartSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Initialization data of the dictionaries over one stream; ``medians`` caches the sample's medians, by side and scale."""

    stream: ActivationStream
    sample: ActivationBatch
    moments: Moments
    target_moments: Moments
    medians: dict[tuple[str, bytes], Tensor]

    def widths(self, section: DictionarySection) -> dict[str, int]:
        """Return the width of every hook; those of a user's tensors are equally wide at each side.

        Raises:
            ValueError: If a user's tensors cannot be split into that many hooks.
        """
        target = self.sample.x if self.sample.target is None else self.sample.target
        found = self.stream.hook_widths()
        if found.keys() >= set(section.all_hooks):
            return found
        for name, hooks, rows in (("activations", section.hooks_in, self.sample.x), ("targets", section.hooks_out, target)):
            width, rest = divmod(rows.shape[1], len(hooks))
            if rest:
                raise ValueError(f"{name}: expected a width divisible by the {len(hooks)} hooks, got {rows.shape[1]}.")
            found |= dict.fromkeys(hooks, width)
        return found


def build_group(
    stream: ActivationStream,
    recipes: list[Recipe],
    earlier: Mapping[str, Recipe],
    sources: Mapping[str, StartSource],
    accelerator: Accelerator,
    writer: Executor,
    stack: ExitStack,
) -> Group:
    """Build all members over one stream, and move it to where the first unfinished member resumes.

    Args:
        earlier: Recipes of the saved states to resume, by ``out_dir``.
        sources: What new members with a start begin with, by ``out_dir``.
    """
    # For user iterables that generate random tensors.
    torch.manual_seed(recipes[0].seed)
    # A resumed run takes from the sample only its width. Other sources than a store may draw random numbers for it.
    resumed = isinstance(stream, StoreStream) and all(recipe.out_dir in earlier for recipe in recipes)
    stream.needed = max(map(total_steps, recipes))
    sample = stream.start_sample(1 if resumed else SAMPLE_TOKENS)
    start = Start(stream, sample, stream.moments(), stream.target_moments(), {})
    members = []
    for recipe in recipes:
        with Randomness(recipe.seed) as randomness:
            place = recipe.out_dir
            member = _member(recipe, start, earlier.get(place), sources.get(place), randomness, accelerator, writer)
        stack.callback(member.report.close)
        members.append(member)
    state = min((member.state for member in members if not member.done), key=lambda state: state.step, default=members[0].state)
    if state.stream_position is not None:
        stream.seek(state.stream_position)
    return Group(stream, members)


def _member(
    recipe: Recipe,
    start: Start,
    earlier: Recipe | None,
    source: StartSource | None,
    randomness: Randomness,
    accelerator: Accelerator,
    writer: Executor,
) -> TrainedMember:
    """Build a member; ``earlier`` is the recipe of the saved state to resume, if there is one."""
    directory, stream, section = Path(recipe.out_dir), start.stream, recipe.dictionary
    moments, warm = (start.moments, start.target_moments), None
    # A start is always read where there is nothing to resume.
    assert earlier is not None or (source is None) == (section.start is None)
    if earlier is None and source is not None:
        warm = warm_start(source, recipe, start.widths(section), stream, start.sample, moments)
        recipe = warm.recipe
    whole = build_dictionary(dictionary_arguments(recipe, start.widths(section))) if warm is None else warm.dictionary
    if earlier is None and warm is None:
        initialize(whole, start.sample, *moments, section.normalize, section.init, start.medians)
    ranks = mesh(recipe.distributed.latents)
    dictionary = own_part(whole, ranks.shards)
    dictionary.ranks = ranks.batch
    # The default is half the width of one output hook.
    auxk_latents = recipe.auxk_latents or max(1, dictionary.d_out // len(section.hooks_out) // 2)
    zipf = (recipe.aux_zipf_tau, recipe.aux_zipf_absolute)
    aux = AuxSettings(recipe.auxk_weight, auxk_latents, *zipf, section.orthogonality)
    splices = isinstance(stream, ContextStream)
    divergence = Divergence(stream.model, section.hooks_out[0], ranks.shards) if splices else None
    phases = Phases(dictionary, recipe).to(accelerator.device)
    objective = Objective(dictionary, dictionary.error_scale(start.target_moments), aux, divergence, phases.weights(0)).to(
        accelerator.device
    )
    if recipe.screen != "none":
        dictionary.screen = Screen(recipe.screen, recipe.screen_floor, accelerator.device, if_faster=True)
    optimizer = build_optimizer(dictionary, phases, recipe)
    layers, device = len(dictionary.blocks), accelerator.device
    state = TrainState(dictionary.n_latents, recipe.dead_after_tokens, device, randomness, ranks.shards, layers)
    state.budget = recipe.tokens
    state.start = None if warm is None else warm.record
    logged = Logged() if earlier is None else state.restore(directory, dictionary, phases, optimizer)
    if earlier is not None:
        log.info("Continuing %s at step %d.%s", directory, state.step, _lengthened(state, earlier, recipe))
    # Evaluation mode adds the precision only: gradients are summed over ranks by the optimizer. Everything is on the device.
    schedule = Schedule(optimizer, dictionary, phases, recipe, objective)
    objective = cast(Objective, accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True))
    if warm is not None and ranks.world.rank == 0:
        # With the budget that was measured. A resume takes it from there.
        write_text(directory / RECIPE_FILE, dump_recipe(recipe))
    checkpoints = Checkpoints(directory, _provenance(recipe, stream), phases, ranks, writer)
    report = TrainingLog(recipe, directory, logged, state.tokens, written=ranks.world.rank == 0)
    dictionary.train()
    return TrainedMember(recipe, objective, dictionary, optimizer, schedule, state, report, checkpoints)


def _lengthened(state: TrainState, earlier: Recipe, recipe: Recipe) -> str:
    """Record that a run was lengthened, and return a message on its schedules; empty if it was not."""
    if earlier.tokens == recipe.tokens:
        return ""
    state.lengthened.append([state.step, earlier.tokens])
    last = lr_share(earlier, state.step - 1) if state.step else 0.0
    moved = ["phases"] * bool(recipe.phases) + ["schedules"] * bool(recipe.schedules)
    return (
        f" tokens was raised from {earlier.tokens:,} to {recipe.tokens:,}. lr, {last:.1%} of its peak so far, "
        f"continues at {lr_share(recipe, state.step):.1%} and falls to 0 over the last {recipe.lr_decay:.0%} of the longer run"
        + "".join(f"; {name} are shares of the longer run from here on" for name in moved)
        + "."
    )


def needs_gradient(recipe: Recipe) -> bool:
    """Return True if an encoder of the run selects latents by the loss gradient."""
    return any(ENCODERS[spec["name"]].needs_gradient for spec in recipe.encoders)


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """Return the precision of a run's products, in accelerate's words."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = recipe.precision if recipe.precision != "auto" else ("bf16" if has_bf16 else "float32")
    return "bf16" if wanted == "bf16" else "no"


def _provenance(recipe: Recipe, stream: ActivationStream) -> dict[str, Any]:
    """Return a dictionary's provenance: enough to evaluate it on the same model, hooks and held-out documents."""
    resolved = recipe.model_dump(mode="json")
    model = resolved["model"]
    commit = ((stream.content() or {}).get("model") or {}).get("commit")
    if isinstance(stream, StoreStream):
        model = model | {"revision": stream.store.manifest["model"]["revision"]}
    elif commit is not None:
        model = model | {"revision": commit}
    section = recipe.dictionary
    hooks = {"hooks_in": list(section.hooks_in), "hooks_out": list(section.hooks_out)}
    return {
        "model": None if isinstance(stream, TensorStream) else model,
        **({"hook": section.hook} if section.kind == "sae" else {}),
        **hooks,
        "text": resolved["text"],
        "harvest": {
            key: resolved["harvest"][key]
            for key in ("dtype", "heldout", "exclude_special", "exclude_leading", "exclude")
            if key != "exclude" or recipe.harvest.exclude.given
        },
        "recipe": resolved,
        "sparsary_version": own_version(),
        "git_commit": git_commit(),
    }
