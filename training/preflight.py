"""What a recipe, or each member of its grid, will do and need, before anything is done."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..sae.checkpoint import build_dictionary
from ..sae.tiled_scores import LEAST_WIDTH, TILE_NUMBERS_CPU
from .activations.harvest import recipe_identity
from .activations.model import resolve_device
from .activations.shards import MANIFEST_FILE, ActivationStore, gradient_dtype
from .initialize import SAMPLE_TOKENS
from .recipe import Recipe, total_steps
from .recipe.grid import Grid, told_together
from .report import require_wandb
from .resolve_hooks import ResolvedRecipe, dictionary_arguments

STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
LABEL_BYTES = 16


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes in tokens, bytes and steps. ``widths`` is the width at every hook.

    At hooks that are ``assumed`` it is a guess, as are the sizes: the model's code allows no more before it runs.
    """

    widths: dict[str, int]
    assumed: frozenset[str]
    steps: int
    passes: float | None
    parameters: int
    weights_bytes: int
    step_bytes: int
    start_bytes: int
    stream_bytes: int
    stored_tokens: int
    disk_bytes: int
    shuffle_tokens: int

    @property
    def working_bytes(self) -> int:
        """At the peak of a step, or at the start."""
        return max(self.step_bytes, self.start_bytes)

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes + self.stream_bytes

    def lines(self, member: ResolvedRecipe) -> list[tuple[str, str]]:
        """What to show a person: pairs of a name and a value."""
        recipe = member.recipe
        return [
            *self.source_lines(recipe),
            ("dictionary", f"{'sae ' if recipe.dictionary.kind == 'sae' else ''}{self.dictionary_words(recipe)}"),
            *[
                (f"from {phase.start:.0%}", f"{_words(phase.encoder)}, over {phase.blend:.0%} of the run")
                for phase in recipe.phases
            ],
            *[
                (f"{name} moves", ", ".join(f"{value} at {share:.0%}" for share, value in knots))
                for name, knots in recipe.schedules.items()
            ],
            ("objective", recipe.objective),
            ("training", self.training_words(recipe)),
            ("memory", f"about {_bytes(self.memory_bytes)} for training, beside the model's own"),
            ("output", recipe.out_dir),
        ]

    def source_lines(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Where activations come from: the same for all members of a grid."""
        live = recipe.harvest.store is None
        store = "none: straight from the model" if live else f"{recipe.harvest.store}  ({_bytes(self.disk_bytes)} to write)"
        reach = "the whole store" if not live else "one buffer"
        return [
            ("model", f"{recipe.model.id}  {recipe.model.dtype}"),
            ("text", f"{recipe.text.source}, contexts of {recipe.text.context_length} tokens, bos: {recipe.text.bos}"),
            (
                "hooks",
                ", ".join(
                    f"{hook} ({f'unknown until the model runs; {width} assumed' if hook in self.assumed else width})"
                    for hook, width in self.widths.items()
                ),
            ),
            ("store", store),
            (
                "harvest",
                f"{self.stored_tokens:,} tokens in {recipe.harvest.dtype}, {recipe.harvest.heldout:.0%} of documents held out",
            ),
            ("shuffle", f"{self.shuffle_tokens:,} tokens: {reach}"),
        ]

    def dictionary_words(self, recipe: Recipe) -> str:
        section = recipe.dictionary
        d_in, d_out = self.widths[section.hooks_in[0]], self.widths[section.hooks_out[0]]
        sizes = f"{d_in} -> {section.n_latents}"
        if section.kind == "transcoder":
            sizes = f"transcoder {sizes} -> {d_out}, {'with' if section.skip else 'without'} skip"
        elif section.kind == "cross_layer_transcoder":
            chosen = "over all layers" if section.joint else "in each layer"
            sizes = f"cross_layer_transcoder of {len(section.hooks_in)} layers, each {sizes} -> {d_out}, chosen {chosen}"
        return f"{sizes}, {_words(section.encoder)}, {self.parameters:,} parameters"

    def training_words(self, recipe: Recipe) -> str:
        passes = "" if self.passes is None else f", {self.passes:.1f} passes over the training split"
        return f"{recipe.tokens:,} tokens in {self.steps:,} steps of {recipe.batch_tokens:,}{passes}"


def grid_lines(grid: Grid, recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> list[tuple[str, str]]:
    """What to show a person of a grid's resolved members: what they share, each by name, and what they need together."""
    if len(plans) == 1:
        return plans[0].lines(recipes[0])
    members = list(zip(grid.names, (member.recipe for member in recipes), plans, strict=True))
    streams = {member.stream_key for member in recipes}
    memory = memory_together(recipes, plans)
    trainings = {plan.training_words(recipe): name for name, recipe, plan in members}
    return [
        *plans[0].source_lines(recipes[0].recipe),
        *[(name, plan.dictionary_words(recipe)) for name, recipe, plan in members],
        *[("training" if len(trainings) == 1 else f"like {name}", words) for words, name in trainings.items()],
        ("members", f"{len(plans)} on {len(streams)} stream{'s' * (len(streams) > 1)} of batches"),
        ("memory", f"about {_bytes(memory)} for training, beside the model's own"),
        ("output", f"{grid.out_dir}, a directory for each member"),
    ]


def _words(encoder: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in encoder.items())


def _bytes(n: int | float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def preflight(recipe: ResolvedRecipe) -> TrainingPlan:
    """``preflight_all`` of one recipe."""
    return preflight_all([recipe])[0]


def preflight_all(recipes: Sequence[ResolvedRecipe]) -> list[TrainingPlan]:
    """Check what can be checked without work, and estimate the rest, of recipes that are run side by side.

    Raises:
        ValueError: If a hook does not exist, contexts or tokenizer do not fit the model, an existing store is another one's,
            the store would be smaller than a batch, the disk is too full, all together need more memory than is free, or wandb
            is asked for and takes no login; with one line for each member it concerns, or one for all.
    """
    plans = plan_all(recipes)
    # What is only assumed refuses nothing.
    if not any(plan.assumed for plan in plans):
        require_memory(recipes, plans)
    # Of a grid all members log to the same place.
    require_wandb(recipes[0].recipe)
    return plans


def plan_all(recipes: Sequence[ResolvedRecipe]) -> list[TrainingPlan]:
    """Plan recipes that are run side by side, whatever memory they need."""
    first = recipes[0]
    widths, assumed = first.widths, frozenset(first.outline.assumed & first.widths.keys())
    if unfit := first.outline.text_problems(first.recipe.text):
        raise ValueError("\n".join(unfit))
    _require_same_store(first)
    plans, problems = [], {}
    for recipe in (member.recipe for member in recipes):
        try:
            plans.append(_plan(recipe, widths, assumed))
        except ValueError as error:
            problems[Path(recipe.out_dir).name] = [str(error)]
    if problems:
        raise ValueError("\n".join(told_together(problems, len(recipes))))
    return plans


def _require_same_store(member: ResolvedRecipe) -> None:
    """Raise ``ValueError`` if the store that is there, which all members share, was made of something else."""
    recipe, store = member.recipe, member.recipe.harvest.store
    if store is not None and (Path(store) / MANIFEST_FILE).exists():
        identity = recipe_identity(recipe.model, recipe.text, recipe.harvest)
        identity.check(ActivationStore.open(store), member.outline.content, recipe.text)


def memory_together(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> int:
    """Bytes of all members: one of them steps at a time, and streams are shared."""
    return sum(plan.weights_bytes for plan in plans) + max(plan.working_bytes for plan in plans) + _streams(recipes, plans)


def _streams(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> int:
    return sum({member.stream_key: plan.stream_bytes for member, plan in zip(recipes, plans, strict=True)}.values())


def require_memory(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> None:
    """Raise ``ValueError``, with sizes, if training would need more memory than is free where it runs."""
    device, cpu = resolve_device(recipes[0].recipe.model.device), torch.device("cpu")
    weights = sum(plan.weights_bytes for plan in plans)
    if device.type == "cpu":
        needs = {cpu: memory_together(recipes, plans)}
    else:
        # Batches wait in main memory, and dictionaries start there.
        starts = max(plan.start_bytes + 4 * plan.parameters for plan in plans)
        needs = {device: weights + max(plan.step_bytes for plan in plans), cpu: starts + _streams(recipes, plans)}
    for where, needed in needs.items():
        free = free_bytes(where)
        if needed > free:
            parameters = sum(plan.parameters for plan in plans)
            raise ValueError(
                f"memory: training needs about {_bytes(needed)} on {where}, {_bytes(weights)} of them for {parameters:,} "
                f"parameters and what the optimizer keeps; {_bytes(free)} are free. {_remedies(recipes)}."
            )


def _remedies(members: Sequence[ResolvedRecipe]) -> str:
    recipes = [member.recipe for member in members]
    ways = ["Lower dictionary.n_latents or batch_tokens"]
    if any(recipe.dictionary.kind == "cross_layer_transcoder" for recipe in recipes):
        ways.append("name fewer layers, because each one's decoders go to every later one")
    if recipes[0].harvest.store is None:
        ways.append("lower harvest.live_buffer_tokens")
    if len(recipes) > 1:
        ways.append("train fewer members at once")
    return ", or ".join(ways)


def free_bytes(device: torch.device) -> int:
    """Memory that is free where tensors of a device lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _plan(recipe: Recipe, widths: dict[str, int], assumed: frozenset[str]) -> TrainingPlan:
    harvest, wanted = recipe.harvest, recipe.harvest.tokens or 0
    training = round(wanted * (1 - harvest.heldout))
    existing = ActivationStore.open(harvest.store) if harvest.store and (Path(harvest.store) / MANIFEST_FILE).exists() else None
    if existing is not None and existing.manifest["complete"]:
        training = existing.tokens("train")
    if harvest.store is not None and recipe.batch_tokens > training:
        raise ValueError(
            f"batch_tokens: expected at most the {training} training tokens of the store, got {recipe.batch_tokens}. "
            "Lower batch_tokens or raise harvest.tokens."
        )
    done = 0 if existing is None else existing.tokens("train") + existing.tokens("heldout")
    per_number = STORED_BYTES[harvest.dtype] + (STORED_BYTES[gradient_dtype(harvest.dtype)] if harvest.gradients else 0)
    per_token = sum(widths.values()) * per_number + LABEL_BYTES
    if harvest.dtype == "int8":
        per_token += sum(-(-width // harvest.block) * 2 for width in widths.values())
    disk = 0 if harvest.store is None else round(max(wanted - done, 0) * per_token)
    if not assumed:
        _require_disk(recipe, disk)
    arguments = dictionary_arguments(recipe, widths)
    with torch.device("meta"):
        dictionary = build_dictionary(arguments)
    parameters = sum(p.numel() for p in dictionary.parameters())
    live, fused = harvest.store is None, recipe.optimizer == "auto" and recipe.accumulate == 1
    # Side by side, in one row.
    row = dictionary.d_in + (dictionary.d_out if recipe.dictionary.hooks_out != recipe.dictionary.hooks_in else 0)
    buffer = 2 * harvest.live_buffer_tokens * 4 * row if live else 0
    return TrainingPlan(
        widths=widths,
        assumed=assumed,
        steps=total_steps(recipe),
        passes=None if live else recipe.tokens / training,
        parameters=parameters,
        # Weights and Adam's two moments, and gradients where they are written out.
        weights_bytes=(12 if fused else 16) * parameters,
        step_bytes=_step_bytes(recipe, dictionary.d_in + dictionary.d_out),
        # The sample, raw and normalised, and what geometric medians are found with.
        start_bytes=3 * 4 * row * min(SAMPLE_TOKENS, harvest.live_buffer_tokens if live else training),
        # Batches that are read ahead.
        stream_bytes=12 * recipe.batch_tokens * (4 * row + 16) + buffer,
        stored_tokens=0 if live else wanted,
        disk_bytes=disk,
        shuffle_tokens=harvest.live_buffer_tokens if live else training,
    )


def _step_bytes(recipe: Recipe, row: int) -> int:
    """What a step holds at its peak: a tile of scores, or all of them, and about four tensors as large as either side."""
    tokens, n = recipe.batch_tokens // recipe.accumulate, recipe.dictionary.n_latents
    # Without a budget every second latent may be on at first.
    budgeted = "k" in recipe.dictionary.encoder
    scores = min(tokens * n, max(TILE_NUMBERS_CPU, LEAST_WIDTH * tokens)) if budgeted else 2 * tokens * n
    if not budgeted:
        # Layers are read one after another, their codes kept.
        scores *= len(recipe.dictionary.hooks_in)
    return 4 * (scores + 4 * tokens * row)


def _require_disk(recipe: Recipe, needed: int) -> None:
    if recipe.harvest.store is None:
        return
    folder = Path(recipe.harvest.store).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"harvest.store: {recipe.harvest.store} needs about {_bytes(needed)}, {_bytes(free)} are free. "
            "Lower harvest.tokens, use harvest.dtype: int8, or choose another disk."
        )
