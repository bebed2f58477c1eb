"""Preflight: checks and resource estimates of a recipe, or of all members of its grid, before any work."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..sae.batch_encoder import Calibrated
from ..sae.checkpoint import build_dictionary
from ..sae.encoders import build_encoder
from ..sae.penalised import Penalised
from ..sae.tiled_scores import LEAST_WIDTH, TILE_NUMBERS_CPU
from .activations.harvest import recipe_identity, require_store_folder
from .activations.model import resolve_device
from .activations.model_source import RemoteCodeRefused, require_quantization
from .activations.remote_store import store_place
from .activations.shards import MANIFEST_FILE, ActivationStore, gradient_dtype
from .calibrate import calibration_shortfall
from .checkpoints import require_same_run
from .initialize import SAMPLE_TOKENS
from .locks import existing_parent, require_writable
from .memory import free_bytes
from .optim import lr_share
from .recipe import Recipe, calibrated_on, total_steps
from .recipe.encoder_checks import with_budget
from .recipe.grid import told_together
from .report import require_wandb
from .resolve_hooks import ResolvedRecipe, dictionary_arguments
from .shortfalls import Shortfall, shortfall, shortfalls_together
from .text_size import TextSize, measure_text
from .training_plan import TrainingPlan, byte_words, memory_together, stream_memory

STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
LABEL_BYTES = 16

log = logging.getLogger(__name__)


def preflight(recipe: ResolvedRecipe) -> TrainingPlan:
    """Run ``preflight_all`` on one recipe."""
    return preflight_all([recipe])[0]


def preflight_all(recipes: Sequence[ResolvedRecipe]) -> list[TrainingPlan]:
    """Check recipes that train together, as far as possible without work, and estimate what they need.

    Raises:
        ValueError: If a hook does not exist, contexts or tokenizer do not fit the model, an existing store or run belongs to
            another recipe, a folder is not writable, the text cannot be loaded or is too short, the disk is too full, all
            recipes together need more memory than is free, or wandb is requested without a valid login. The message has one
            line for each affected member, or one for all.
    """
    plans, problems, size = [], [], None
    try:
        size = None if recipes[0].vectors is not None else _text_size(recipes[0])
    except RemoteCodeRefused:
        raise
    except ValueError as error:
        problems.append(str(error))
    try:
        plans = plan_all(recipes, size)
    except ValueError as error:
        problems.append(str(error))
    problems += _unwritable(recipes)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    # Guessed sizes are no reason to refuse a run.
    if not any(plan.assumed for plan in plans):
        require_memory(recipes, plans)
        plans = [replace(plan, waits_for_saves=not snapshots_fit(recipes, plans)) for plan in plans]
    for member in recipes:
        for line in [] if member.source is None else member.source.differences(member.recipe):
            log.warning("%s: %s.", member.recipe.out_dir, line)
    # All members of a grid log to the same place.
    require_wandb(recipes[0].recipe)
    return plans


def plan_all(recipes: Sequence[ResolvedRecipe], size: TextSize | None = None) -> list[TrainingPlan]:
    """Plan recipes that train together, without checking their memory."""
    first = recipes[0]
    require_quantization(first.recipe.model)
    assumed = frozenset[str]()
    # The hook only has a name: no model has it.
    widths = _stored_widths(first) if first.vectors is None else dict.fromkeys(first.recipe.harvest.hooks, first.vectors.width)
    if widths is None:
        widths, assumed = first.widths, frozenset(first.outline.assumed & first.widths.keys())
        if unfit := first.outline.text_problems(first.recipe.text):
            raise ValueError("\n".join(unfit))
        _require_same_store(first)
    plans, problems = [], {}
    for member in recipes:
        recipe = member.recipe
        try:
            if member.source is not None and not assumed:
                member.source.require_fit(recipe.dictionary, widths)
            if member.source is not None and member.source.alignment is not None:
                member.source.alignment.require_fit(recipe, member.source.dictionary)
            plan = _plan(recipe, widths, assumed, size)
            if first.vectors is not None:
                plan = replace(plan, training_tokens=first.vectors.training_rows, vectors=tuple(first.vectors.lines()))
            plans.append(replace(plan, shortfalls=shortfalls_together(_falls_short(recipe, plan))))
        except ValueError as error:
            problems[Path(recipe.out_dir).name] = [str(error)]
    if problems:
        raise ValueError("\n".join(told_together(problems, len(recipes))))
    return plans


def _stored_widths(member: ResolvedRecipe) -> dict[str, int] | None:
    """Return the width of every hook in a complete store of the same model and text; ``None`` if there is no such store.

    The harvest has shown that the model has these hooks and takes these contexts, so that it need not be built again: that
    takes most of the time in which a run resumes.
    """
    recipe, store = member.recipe, _existing(member.recipe, complete=True)
    if store is None or store.manifest.get("content") is None:
        return None
    try:
        recipe_identity(recipe.model, recipe.text, recipe.harvest).check(store, member.outline.content, recipe.text)
    except ValueError:
        # Reported after what the model shows to be wrong.
        return None
    return {hook: store.width(hook) for hook in recipe.harvest.hooks}


def _require_same_store(member: ResolvedRecipe) -> None:
    """Raise ``ValueError`` if the existing store, which all members share, was harvested from something else."""
    recipe, store = member.recipe, _existing(member.recipe)
    if store is not None:
        recipe_identity(recipe.model, recipe.text, recipe.harvest).check(store, member.outline.content, recipe.text)


def _text_size(member: ResolvedRecipe) -> TextSize | None:
    """Return the size of the text; ``None`` if it is endless, or if it is gone but already harvested."""
    recipe = member.recipe
    if recipe.text.source == "embedded":
        return None
    try:
        size = measure_text(recipe.text, member.outline.tokenizer, recipe.harvest)
    except ValueError:
        if _existing(recipe, complete=True) is not None:
            return None
        raise
    if size.whole and not size.train:
        raise ValueError(
            f"text: expected tokens to train on, got none from {size.documents} document{'s' * (size.documents != 1)} "
            f"({size.heldout_documents} held out) in contexts of {recipe.text.context_length} tokens. Give "
            "longer text, or lower text.context_length, harvest.heldout or harvest.exclude_leading."
        )
    return size


def _unwritable(members: Sequence[ResolvedRecipe]) -> list[str]:
    """Return one line for each folder that is not writable or holds another run."""
    found, store = [], members[0].recipe.harvest.store
    for key, folder in (("harvest.store", store), *(("out_dir", member.recipe.out_dir) for member in members)):
        try:
            if folder is not None:
                if key == "harvest.store":
                    place = store_place(members[0].recipe.harvest)
                    place.require_writable()
                    require_store_folder(place.directory)
                else:
                    require_writable(Path(folder), key)
        except ValueError as error:
            found.append(str(error))
    for member in members if not found else ():
        try:
            require_same_run(Path(member.recipe.out_dir), member.recipe, member.content)
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def recipe_shortfalls(recipe: Recipe) -> list[Shortfall]:
    """Return the shortfalls that follow from the recipe's numbers alone, whatever its activations."""
    steps, n_latents = total_steps(recipe), recipe.dictionary.known_n_latents
    shares = [lr_share(recipe, step) for step in range(min(steps, recipe.lr_warmup_steps))]
    most = max(shares, default=1.0)
    # If warm-up overlaps the decay or lasts for the whole run, the rate turns back before it reaches its peak.
    warmed = shares.index(most) + 1 if most < 1 else recipe.lr_warmup_steps
    found = shortfall(
        "lr_warmup_steps", recipe.lr_warmup_steps, warmed, "steps", f"the learning rate reaches only {most:.1%} of lr"
    )
    found += shortfall(
        "dead_after_tokens",
        recipe.dead_after_tokens,
        steps * recipe.batch_tokens,
        "tokens",
        "no latent is ever counted as dead, so AuxK stays inactive",
    )
    if recipe.auxk_latents is not None and recipe.auxk_weight:
        found += shortfall("auxk_latents", recipe.auxk_latents, n_latents, "latents", "the dictionary has no more")
    if recipe.harvest.heldout == 0:
        found += shortfall(
            "eval_tokens", recipe.eval_tokens, 0, "tokens", "harvest.heldout is 0, so sparsary eval needs another text (--text)"
        )
    return found


def _falls_short(recipe: Recipe, plan: TrainingPlan) -> list[Shortfall]:
    """Return all shortfalls that are known before the run."""
    found, size, have = recipe_shortfalls(recipe), plan.text, plan.training_tokens
    if have is not None and recipe.harvest.store is None:
        found += shortfall("tokens", recipe.tokens, have, "tokens", repeated(recipe.tokens, have))
    held = None if size is None else size.estimate(size.train + size.heldout)
    existing = _existing(recipe, complete=True)
    if recipe.harvest.store is not None and (existing is not None or held is not None):
        held = held if existing is None else existing.tokens("train") + existing.tokens("heldout")
        assert held is not None
        found += shortfall("harvest.tokens", recipe.harvest.tokens or 0, held, "tokens", "the text is shorter")
    if have is not None and _calibrates(recipe):
        found += calibration_shortfall(calibrated_on(recipe), have)
    judged = None if size is None or not recipe.harvest.heldout else size.estimate(size.heldout)
    if size is not None and judged is not None:
        found += shortfall("eval_tokens", recipe.eval_tokens, judged, "tokens", _judged_on(size))
    return found


def repeated(tokens: int, have: int) -> str:
    """Return the consequence of training on more tokens than there are, as text."""
    return f"the tokens are repeated: each is trained on {tokens / max(have, 1):.1f} times"


def _judged_on(size: TextSize) -> str:
    one = "the text is one document (see text.separator)" if size.whole and size.documents == 1 else "its documents are too few"
    if size.heldout:
        return "sparsary eval uses held-out documents; raise harvest.heldout, or give longer text"
    return f"{one}: sparsary eval has no held-out text; raise harvest.heldout, give more documents, or evaluate with --text"


def _calibrates(recipe: Recipe) -> bool:
    """Return True if thresholds are calibrated on training tokens at the end of the run."""
    encoder = build_encoder(with_budget(recipe.encoders[-1]))
    penalised = isinstance(encoder, Penalised) and encoder.target_l0 is not None
    budgeted = isinstance(encoder, Calibrated) and encoder.has_thresholds
    return recipe.dictionary.joint or budgeted or penalised


def _existing(recipe: Recipe, complete: bool = False) -> ActivationStore | None:
    """Return the recipe's store if it holds shards and, with ``complete``, only if it is complete."""
    if recipe.harvest.store is None:
        return None
    place = store_place(recipe.harvest)
    place.look()
    if not (place.directory / MANIFEST_FILE).exists():
        return None
    store = ActivationStore.open(place.directory)
    return store if store.manifest["shards"] and (store.manifest["complete"] or not complete) else None


def require_memory(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> None:
    """Raise ``ValueError``, with sizes, if training needs more memory than is free on its device."""
    for where, needed in memory_needs(recipes, plans).items():
        free = free_bytes(where)
        if needed > free:
            parameters = sum(plan.parameters for plan in plans)
            weights = sum(plan.weights_bytes for plan in plans)
            raise ValueError(
                f"memory: training needs about {byte_words(needed)} on {where}, {byte_words(weights)} of them for "
                f"{parameters:,} parameters and optimizer state; {byte_words(free)} are free. {_remedies(recipes)}."
            )


def memory_needs(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> dict[torch.device, int]:
    """Return the bytes that training needs on its device and in main memory, without the copies that are saved."""
    device, cpu = resolve_device(recipes[0].recipe.model.device), torch.device("cpu")
    if device.type == "cpu":
        return {cpu: memory_together(recipes, plans)}
    # Batches are queued, and dictionaries initialized, in main memory.
    starts = max(plan.start_bytes + 4 * plan.parameters for plan in plans)
    weights = sum(plan.weights_bytes for plan in plans)
    return {device: weights + max(plan.step_bytes for plan in plans), cpu: starts + stream_memory(recipes, plans)}


def snapshots_fit(recipes: Sequence[ResolvedRecipe], plans: Sequence[TrainingPlan]) -> bool:
    """Return True if main memory also has room for the copies of the states that are saved while training continues."""
    cpu = torch.device("cpu")
    return memory_needs(recipes, plans)[cpu] + sum(plan.snapshot_bytes for plan in plans) <= free_bytes(cpu)


def _remedies(members: Sequence[ResolvedRecipe]) -> str:
    recipes = [member.recipe for member in members]
    ways = ["Lower dictionary.n_latents or batch_tokens"]
    if any(recipe.dictionary.built_kind == "cross_layer_transcoder" for recipe in recipes):
        ways.append("name fewer layers, because each one's decoders go to every later one")
    if recipes[0].harvest.store is None:
        ways.append("lower harvest.live_buffer_tokens")
    if len(recipes) > 1:
        ways.append("train fewer members at once")
    return ", or ".join(ways)


def _plan(recipe: Recipe, widths: dict[str, int], assumed: frozenset[str], size: TextSize | None) -> TrainingPlan:
    harvest, wanted = recipe.harvest, recipe.harvest.tokens or 0
    text = None if size is None else size.estimate(size.train)
    training = round(wanted * (1 - harvest.heldout))
    training = training if text is None else min(training, text)
    existing = _existing(recipe)
    if existing is not None and existing.manifest["complete"]:
        training = existing.tokens("train")
    if harvest.store is not None and recipe.batch_tokens > training:
        raise ValueError(
            f"batch_tokens: expected at most the {training} training tokens of the store, got {recipe.batch_tokens}. "
            f"Lower batch_tokens or {'raise harvest.tokens' if text is None or text > training else 'give longer text'}."
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
    # Inputs and targets are concatenated in one row.
    row = dictionary.d_in + (dictionary.d_out if recipe.dictionary.hooks_out != recipe.dictionary.hooks_in else 0)
    buffer = 2 * harvest.live_buffer_tokens * 4 * row if live else 0
    return TrainingPlan(
        widths=widths,
        assumed=assumed,
        steps=total_steps(recipe),
        passes=None if live else recipe.tokens / training,
        training_tokens=text if live else training,
        parameters=parameters,
        # Weights, Adam's two moments and, unless fused, gradients; averaged weights if they are kept.
        weights_bytes=((12 if fused else 16) + (4 if recipe.weight_average else 0)) * parameters,
        step_bytes=_step_bytes(recipe, dictionary.d_in + dictionary.d_out),
        # The sample, raw and normalized, and the workspace of the geometric median.
        start_bytes=3 * 4 * row * min(SAMPLE_TOKENS, harvest.live_buffer_tokens if live else training),
        # Prefetched batches.
        stream_bytes=12 * recipe.batch_tokens * (4 * row + 16) + buffer,
        stored_tokens=0 if live else wanted,
        disk_bytes=disk,
        shuffle_tokens=harvest.live_buffer_tokens if live else training,
        text=size,
        # Weights, moments, and two counters of each latent.
        snapshot_bytes=12 * parameters + 16 * dictionary.n_latents,
    )


def _step_bytes(recipe: Recipe, row: int) -> int:
    """Return the peak bytes of a step: scores (one tile or all) and about four copies of inputs and outputs."""
    tokens, n = recipe.batch_tokens // recipe.accumulate, recipe.dictionary.known_n_latents
    # Without a budget, about half of the latents may be active at first.
    budgeted = "k" in with_budget(recipe.dictionary.known_encoder)
    scores = min(tokens * n, max(TILE_NUMBERS_CPU, LEAST_WIDTH * tokens)) if budgeted else 2 * tokens * n
    if not budgeted and recipe.dictionary.built_kind == "cross_layer_transcoder":
        # Layers are encoded one after another, and all codes are kept.
        scores *= len(recipe.dictionary.hooks_in)
    return 4 * (scores + 4 * tokens * row)


def _require_disk(recipe: Recipe, needed: int) -> None:
    if recipe.harvest.store is None:
        return
    folder = existing_parent(store_place(recipe.harvest).directory)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"harvest.store: {recipe.harvest.store} needs about {byte_words(needed)}, {byte_words(free)} are free. "
            "Lower harvest.tokens, use harvest.dtype: int8, or choose another disk."
        )
