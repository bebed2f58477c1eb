"""Plan of a run: its estimated sizes, and how they are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .activations.model import resolve_device
from .recipe import PhaseSection, Recipe
from .recipe.grid import Grid, told_together
from .resolve_hooks import ResolvedRecipe
from .shortfalls import Shortfall
from .text_size import TextSize


@dataclass(frozen=True)
class TrainingPlan:
    """Estimated sizes of a run, in tokens, bytes and steps.

    ``snapshot_bytes`` is the copy of the state, in main memory, that is written while training continues; where it does not fit
    (``waits_for_saves``), training waits until a state is written.

    ``widths`` holds the width of every hook. At ``assumed`` hooks the width, and sizes that follow from it, are guesses: the
    model's code reveals them only when it runs. ``training_tokens`` counts the tokens of the store, or of a streamed text;
    ``None`` if unknown. ``text`` is ``None`` if the text is endless or no longer needed.
    """

    widths: dict[str, int]
    assumed: frozenset[str]
    steps: int
    passes: float | None
    training_tokens: int | None
    parameters: int
    weights_bytes: int
    step_bytes: int
    start_bytes: int
    stream_bytes: int
    stored_tokens: int
    disk_bytes: int
    shuffle_tokens: int
    text: TextSize | None = None
    shortfalls: tuple[Shortfall, ...] = ()
    # Lines on the files of vectors, if there are any in place of a model and its text.
    vectors: tuple[tuple[str, str], ...] = ()
    snapshot_bytes: int = 0
    waits_for_saves: bool = False

    @property
    def working_bytes(self) -> int:
        """Peak bytes of a training step or of initialization, whichever is larger."""
        return max(self.step_bytes, self.start_bytes)

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes + self.stream_bytes

    def lines(self, member: ResolvedRecipe) -> list[tuple[str, str]]:
        """Return the plan for display, as pairs of a name and a value."""
        recipe = member.recipe
        return [
            *self.source_lines(recipe),
            ("dictionary", f"{'sae ' if recipe.dictionary.kind == 'sae' else ''}{self.dictionary_words(recipe)}"),
            *[(f"from {phase.start:.0%}", _phase_words(phase)) for phase in recipe.phases],
            *[
                (f"{name} moves", ", ".join(f"{value} at {share:.0%}" for share, value in knots))
                for name, knots in recipe.schedules.items()
            ],
            *_start_lines(member),
            ("objective", recipe.objective),
            ("training", self.training_words(recipe)),
            ("memory", f"about {byte_words(self.memory_bytes)} for training, beside the model's own"),
            ("saving", saving_words([self])),
            ("output", recipe.out_dir),
            *[("less than asked", str(found)) for found in self.shortfalls],
        ]

    def source_lines(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Return the lines about the source of the activations, which all members of a grid share."""
        if self.vectors:
            return list(self.vectors)
        live = recipe.harvest.store is None
        store = "none: straight from the model" if live else f"{recipe.harvest.store}  ({byte_words(self.disk_bytes)} to write)"
        reach = "the whole store" if not live else "one buffer"
        return [
            ("model", f"{recipe.model.id}  {recipe.model.dtype}{_quantized(recipe)}"),
            *([] if recipe.model.tuned is None else [("tuned model", f"{recipe.model.tuned.id}  {recipe.model.tuned.dtype}")]),
            ("text", f"{recipe.text.source}, contexts of {recipe.text.context_length} tokens, bos: {recipe.text.bos}"),
            *([] if self.text is None else [("text holds", self.text.words())]),
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
        elif section.kind == "crosscoder":
            widths = [self.widths[hook] for hook in section.hooks_in]
            each = f"{d_in} each" if len(set(widths)) == 1 else " + ".join(map(str, widths))
            sizes = f"crosscoder of {len(widths)} sites, {each} -> {section.n_latents}"
            sizes += " for each, which write to it and later ones" if section.causal else ""
        return f"{sizes}, {_words(section.known_encoder)}, {self.parameters:,} parameters"

    def training_words(self, recipe: Recipe) -> str:
        passes = "" if self.passes is None else f", {self.passes:.1f} passes over the training split"
        return f"{recipe.tokens:,} tokens in {self.steps:,} steps of {recipe.batch_tokens:,}{passes}"


def grid_lines(grid: Grid, recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> list[tuple[str, str]]:
    """Return the plans of a grid for display: shared lines, one line per member, and the combined requirements."""
    if len(plans) == 1:
        return plans[0].lines(recipes[0])
    members = list(zip(grid.names, (member.recipe for member in recipes), plans, strict=True))
    streams = {member.stream_key for member in recipes}
    memory = memory_together(recipes, plans)
    trainings = {plan.training_words(recipe): name for name, recipe, plan in members}
    return [
        *plans[0].source_lines(recipes[0].recipe),
        *[(name, plan.dictionary_words(recipe)) for name, recipe, plan in members],
        *[
            (f"{name}: {key}", words)
            for name, member in zip(grid.names, recipes, strict=True)
            for key, words in _start_lines(member)
        ],
        *[("training" if len(trainings) == 1 else f"like {name}", words) for words, name in trainings.items()],
        ("members", f"{len(plans)} on {len(streams)} stream{'s' * (len(streams) > 1)} of batches"),
        ("memory", f"about {byte_words(memory)} for training, beside the model's own"),
        ("saving", saving_words(plans)),
        ("output", f"{grid.out_dir}, a directory for each member"),
        *[("less than asked", line) for line in shortfall_lines(grid.names, plans)],
    ]


def shortfall_lines(names: Sequence[str], plans: Sequence[TrainingPlan]) -> list[str]:
    """Return the shortfalls of plans: once if all share them, else under each member's name."""
    return told_together({name: list(map(str, plan.shortfalls)) for name, plan in zip(names, plans, strict=True)}, len(plans))


def saving_words(plans: Sequence[TrainingPlan]) -> str:
    """Return whether training waits for its saves, and the size of the copy that is saved, as text."""
    size = byte_words(sum(plan.snapshot_bytes for plan in plans))
    if any(plan.waits_for_saves for plan in plans):
        return f"training waits for each save, because a copy of its state ({size} more) does not fit in memory"
    return f"while training continues, from a copy of its state: {size} more"


def _start_lines(member: ResolvedRecipe) -> list[tuple[str, str]]:
    """Return what a warm start takes over, and in what the recipe differs from the start's own records."""
    if member.source is None:
        return []
    differences = member.source.differences(member.recipe)
    return [
        ("start", member.source.words(member.recipe.dictionary)),
        *[("doubtful", "; ".join(differences))] * bool(differences),
    ]


def _phase_words(phase: PhaseSection) -> str:
    """Return what a phase changes, as text."""
    words = [] if phase.encoder is None else [f"{_words(phase.encoder)}, over {phase.blend:.0%} of the run"]
    words += [] if phase.objective is None else [f"objective {phase.objective}"]
    words += [] if phase.reconstruction_weight is None else [f"reconstruction_weight {phase.reconstruction_weight}"]
    return ", ".join(words)


def _words(encoder: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in encoder.items())


def byte_words(n: int | float) -> str:
    """Return a number of bytes as text."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _quantized(recipe: Recipe) -> str:
    return "" if recipe.model.quantization is None else f", {recipe.model.quantization}"


def memory_together(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> int:
    """Return the bytes needed by all members: on a CPU as many step at a time as there are threads, and they share streams."""
    on_cpu = resolve_device(recipes[0].recipe.model.device).type == "cpu"
    at_once = torch.get_num_threads() if on_cpu and not any(member.recipe.uses_kl for member in recipes) else 1
    working = sorted((plan.working_bytes for plan in plans), reverse=True)[:at_once]
    return sum(plan.weights_bytes for plan in plans) + sum(working) + stream_memory(recipes, plans)


def stream_memory(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> int:
    """Return the bytes of the streams, each of which several members may share."""
    return sum({member.stream_key: plan.stream_bytes for member, plan in zip(recipes, plans, strict=True)}.values())
