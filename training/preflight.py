"""What a recipe will do and need, before anything is done."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae.checkpoint import build_dictionary

from .activations.harvest import recipe_identity
from .activations.model import hook_widths
from .activations.shards import MANIFEST_FILE, Store
from .recipe import Recipe, total_steps

STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
LABEL_BYTES = 16


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens, bytes and steps. ``widths`` is the width at every hook."""

    widths: dict[str, int]
    steps: int
    passes: float | None
    parameters: int
    memory_bytes: int
    stored_tokens: int
    disk_bytes: int
    shuffle_tokens: int

    def lines(self, recipe: Recipe) -> list[tuple[str, str]]:
        """What to show a person: pairs of a name and a value."""
        d = self.widths[recipe.dictionary.hook]
        live = recipe.harvest.store is None
        store = "none: straight from the model" if live else f"{recipe.harvest.store}  ({_bytes(self.disk_bytes)} to write)"
        reach = "the whole store" if not live else "one buffer"
        passes = "" if self.passes is None else f", {self.passes:.1f} passes over the training split"
        return [
            ("model", f"{recipe.model.id}  {recipe.model.dtype}"),
            ("text", f"{recipe.text.source}, contexts of {recipe.text.context_length} tokens, bos: {recipe.text.bos}"),
            ("hooks", ", ".join(f"{hook} ({width})" for hook, width in self.widths.items())),
            ("store", store),
            (
                "harvest",
                f"{self.stored_tokens:,} tokens in {recipe.harvest.dtype}, {recipe.harvest.heldout:.0%} of documents held out",
            ),
            ("shuffle", f"{self.shuffle_tokens:,} tokens: {reach}"),
            (
                "dictionary",
                f"{recipe.dictionary.kind} {d} -> {recipe.dictionary.n_latents}, {_words(recipe.dictionary.encoder)}, "
                f"{self.parameters:,} parameters",
            ),
            *[
                (f"from {phase.start:.0%}", f"{_words(phase.encoder)}, over {phase.blend:.0%} of the run")
                for phase in recipe.phases
            ],
            *[
                (f"{name} moves", ", ".join(f"{value} at {share:.0%}" for share, value in knots))
                for name, knots in recipe.schedules.items()
            ],
            ("objective", recipe.objective),
            ("training", f"{recipe.tokens:,} tokens in {self.steps:,} steps of {recipe.batch_tokens:,}{passes}"),
            ("memory", f"about {_bytes(self.memory_bytes)} for training, beside the model's own"),
            ("output", recipe.out_dir),
        ]


def _words(encoder: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in encoder.items())


def _bytes(n: int | float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def preflight(recipe: Recipe) -> Plan:
    """Check what can be checked without work, and estimate the rest.

    Raises:
        ValueError: If a hook does not exist, an existing store is another one's, the store would be smaller than a batch,
            or the disk is too full.
    """
    widths = hook_widths(recipe.model, recipe.harvest.hooks)
    d = widths[recipe.dictionary.hook]
    harvest, wanted = recipe.harvest, recipe.harvest.tokens or 0
    training = round(wanted * (1 - harvest.heldout))
    existing = Store.open(harvest.store) if harvest.store and (Path(harvest.store) / MANIFEST_FILE).exists() else None
    if existing is not None:
        recipe_identity(recipe.model, recipe.text, harvest).check(existing)
        if existing.manifest["complete"]:
            training = existing.tokens("train")
    if harvest.store is not None and recipe.batch_tokens > training:
        raise ValueError(
            f"batch_tokens: expected at most the {training} training tokens of the store, got {recipe.batch_tokens}. "
            "Lower batch_tokens or raise harvest.tokens."
        )
    done = 0 if existing is None else existing.tokens("train") + existing.tokens("heldout")
    per_token = sum(widths.values()) * STORED_BYTES[harvest.dtype] * (2 if harvest.gradients else 1) + LABEL_BYTES
    if harvest.dtype == "int8":
        per_token += sum(-(-width // harvest.block) * 2 for width in widths.values())
    disk = 0 if harvest.store is None else round(max(wanted - done, 0) * per_token)
    _require_disk(recipe, disk)
    n = recipe.dictionary.n_latents
    with torch.device("meta"):
        arguments = {"kind": recipe.dictionary.kind, "d_in": d, "n_latents": n, "encoder": recipe.dictionary.encoder}
        parameters = sum(p.numel() for p in build_dictionary(arguments).parameters())
    # Weights, gradients and Adam's two moments; the encoder's output and its gradient; batches read ahead.
    memory = 16 * parameters + 8 * recipe.batch_tokens // recipe.accumulate * n + 12 * recipe.batch_tokens * (4 * d + 16)
    live = harvest.store is None
    return Plan(
        widths=widths,
        steps=total_steps(recipe),
        passes=None if live else recipe.tokens / training,
        parameters=parameters,
        memory_bytes=memory,
        stored_tokens=0 if live else wanted,
        disk_bytes=disk,
        shuffle_tokens=harvest.live_buffer_tokens if live else training,
    )


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
