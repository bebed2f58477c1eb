"""Training runs from recipe to finished checkpoint: preflight, harvest, initialization or resume, training, calibration."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ..sae.errors import WriteError, doing
from ..sae.ranks import ALONE, Ranks
from ..transcoders.load import RecipeValue
from .activations.context_stream import ContextStream
from .activations.harvest import harvest_activations, require_shared_store
from .activations.live import Buffers, LiveStream
from .activations.model import LanguageModel, resolve_device
from .activations.remote_store import store_place
from .activations.shards import MANIFEST_FILE, ActivationStore
from .activations.store_stream import StoreStream
from .activations.stream import ActivationStream, BatchPart
from .activations.tensor_stream import Activations, TensorStream
from .bad_rows import counted
from .calibrate import finish
from .checkpoints import RECIPE_FILE, claimed
from .content import pinned
from .divided import whole_dictionary
from .locks import OneRun
from .loop import Group, TrainedMember, train_loop
from .members import build_group, needs_gradient, precision_of
from .mix import shares_in_words
from .optim import averages
from .preflight import plan_all, preflight_all, recipe_shortfalls, repeated
from .processes import from_first, mesh, own_ranks, patient_ranks, require_agreement
from .recipe import NAMES_OF_HOOKS, Recipe, RecipeSource, calibrated_on, read_values
from .recipe.grid import check_grid, load_grid, told_together, unshared
from .resolve_hooks import ResolvedRecipe, resolve_recipes
from .same_run import require_same_run_on_all, same_on_all
from .shortfalls import Shortfall, shortfall, shortfalls_together
from .signals import Stopped, StopRequest
from .training_plan import TrainingPlan
from .warm_start.judge import after_training
from .warm_start.source import StartSource

log = logging.getLogger(__name__)
ONE_RUN = OneRun()


def run_harvest(member: ResolvedRecipe, plan: TrainingPlan | None = None) -> ActivationStore:
    """Fill the recipe's activation store, or check a complete one. Any member of a grid will do, because they share the store.

    The ranks of this run share the work.

    Args:
        plan: Existing plan of the recipe; made here if ``None``.

    Raises:
        ValueError: If ``harvest.store`` is null, or the store belongs to another recipe.
    """
    recipe = member.recipe
    if recipe.harvest.files:
        raise ValueError("harvest.files: vectors are read where they are, and not harvested. Run: sparsary train RECIPE.")
    if recipe.harvest.store is None:
        raise ValueError(
            "harvest.store: expected a directory to harvest into, got null, which streams from the model and stores "
            "nothing. Set harvest.store."
        )
    # Checks sizes and identity, but not memory: training may run on a larger machine.
    plan = plan or plan_all([member])[0]
    place, ranks = store_place(recipe.harvest), own_ranks()
    place.fetch()
    require_shared_store(ranks, place.directory)
    if (place.directory / MANIFEST_FILE).exists():
        store = ActivationStore.open(place.directory)
        # The plan checked that the store is this recipe's; if it is complete, the model need not be loaded.
        if store.manifest["complete"] and store.tokens("train") + store.tokens("heldout") >= plan.stored_tokens:
            return _named(store, recipe)
    # Gradients come from the loss, at the model's end.
    outline, hooks = member.outline, recipe.harvest.hooks
    model = outline.loaded() if recipe.harvest.gradients else outline.loaded_for(hooks)
    local = recipe.harvest.model_copy(update={"store": str(place.directory)})
    # The first rank uploads the shards of all.
    with place.publishing() if ranks.rank == 0 else nullcontext():
        return _named(harvest_activations(model, recipe.text, local, patient_ranks()), recipe)


def _named(store: ActivationStore, recipe: Recipe) -> ActivationStore:
    """Return a store under the address that its recipe gives it."""
    return ActivationStore(store.directory, store.manifest, recipe.harvest.store)


def harvest(recipe: RecipeSource, /, **overrides: RecipeValue) -> ActivationStore:
    """Cache the activations that a recipe file asks for, and return their store. An interrupted harvest resumes.

    Members of a grid share one store. Processes started by ``torchrun`` share the work; all of them return. For example::

        store = sparsary.harvest("recipe.yaml", harvest__tokens=20_000, harvest__store="activations")
        print(store.tokens("train"), store.tokens("heldout"))

    Args:
        recipe: YAML file.
        overrides: As in ``train``.

    Raises:
        ValueError: If the recipe is invalid or has no store, or the store holds another recipe's activations.
    """
    grid = load_grid(recipe, _dotted(overrides))
    if own_ranks().size > 1:
        require_agreement(own_ranks(), same_on_all(grid.recipes))
    return run_harvest(resolve_recipes(grid.recipes)[0])


def train(
    recipe: RecipeSource,
    activations: Activations | None = None,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
    **overrides: RecipeValue,
) -> Path:
    """Train the dictionary of a recipe, or resume its training, and return the checkpoint's directory.

    With a ``grid`` all members are trained, and the directory returned is the one above theirs.

    >>> import tempfile, torch
    >>> import sparsary
    >>> recipe = {"dictionary": {"n_latents": 32, "encoder": {"name": "topk", "k": 4}}, "tokens": 4096}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = sparsary.train(recipe, torch.randn(4096, 16), out_dir=f"{folder}/sae", dictionary__n_latents=64)
    ...     sparsary.load(checkpoint).n_latents
    64

    Args:
        recipe: YAML file, or the same keys as a mapping.
        activations: Activations to train on in place of a language model's; see ``train_all``. No hook needs to be named.
        model: Language model in memory, in place of the one that the recipe names: a ``LanguageModel``, a module of
            transformers, or a wrapper of one (PEFT, nnsight). The checkpoint names it by its weights.
        tokenizer: Tokenizer of a model object, if it has none itself.
        overrides: Recipe keys to change. Nested keys have double underscores in place of dots, or are passed as
            ``**{"dotted.key": value}``.

    Raises:
        ValueError: For every error that the user can fix; the message says how.
        Stopped: If SIGINT or SIGTERM ended the run; its state is saved.
    """
    if activations is not None and model is not None:
        raise ValueError("model: expected none with activations, which take its place. Leave one of them out.")
    changed = _dotted(overrides)
    if model is not None:
        model = model if isinstance(model, LanguageModel) else LanguageModel.from_pretrained(model, tokenizer)
        model = model.named_by_weights()
        # What the checkpoint says of its model.
        changed["model"] = model.as_section()
    values = read_values(recipe, changed)
    section = values.get("dictionary")
    if activations is not None and isinstance(section, dict) and not section.keys() & NAMES_OF_HOOKS:
        pair = {"hook_in": "inputs:out", "hook_out": "targets:out"}
        section |= pair if section.get("kind") == "transcoder" else {"hook": "inputs:out"}
    grid = check_grid(values, "recipe" if isinstance(recipe, Mapping) else str(recipe))
    train_all(resolve_recipes(grid.recipes, model), activations)
    return Path(grid.out_dir)


def _dotted(overrides: Mapping[str, RecipeValue]) -> dict[str, RecipeValue]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


def train_recipe(recipe: ResolvedRecipe, activations: Activations | None = None, plan: TrainingPlan | None = None) -> Path:
    """Train one recipe, or resume it, and return ``out_dir``; see ``train_all``."""
    return train_all([recipe], activations, None if plan is None else [plan])[0]


def train_all(
    members: Sequence[ResolvedRecipe],
    activations: Activations | None = None,
    plans: Sequence[TrainingPlan] | None = None,
) -> list[Path]:
    """Train recipes together, or resume them, and return their ``out_dir``s.

    A batch is read once for all recipes that train on it. Everything else is separate: on the CPU each result is bit-identical
    to that of its recipe trained alone. Recipes must agree on the keys in ``grid.SHARED``.

    Args:
        activations: Replacement for the language model: a tensor or array ``(tokens, d_in)``, or an iterable of these (a list,
            ``DataLoader`` or generator), of pairs with the loss gradients (for transcoders, with the targets), or of mappings
            with ``x``, ``target`` (for transcoders) and ``grad``. The recipe's ``model``, ``text``, ``harvest`` and hooks are
            then only labels.
        plans: Result of ``preflight_all`` for these recipes; computed here if ``None`` and there are no ``activations``.

    Raises:
        ValueError: For every error that the user can fix; the message says how. One is a second run in the same process.
        Stopped: If SIGINT or SIGTERM ended the run; its state is saved.
    """
    recipes, ranks = [member.recipe for member in members], own_ranks()
    assert not unshared({recipe.out_dir: recipe for recipe in recipes})
    with ONE_RUN.training(recipes[0].out_dir):
        require_same_run_on_all(ranks, recipes)
        _train_all(members, recipes, activations, plans, ranks)
    return [Path(recipe.out_dir) for recipe in recipes]


def _train_all(
    members: Sequence[ResolvedRecipe],
    recipes: Sequence[Recipe],
    activations: Activations | None,
    plans: Sequence[TrainingPlan] | None,
    ranks: Ranks,
) -> None:
    vectors = members[0].vectors
    if activations is not None and vectors is not None:
        raise ValueError("activations: expected none with harvest.files, which take their place. Leave one of them out.")
    if activations is None:
        plans = preflight_all(members) if plans is None else plans
        activations = vectors
    elif any(recipe.uses_kl for recipe in recipes):
        raise ValueError("activations: expected none with objective kl, which trains through the model. Leave them out.")
    for above in {Path(recipe.out_dir).parent for recipe in recipes if len(recipes) > 1}:
        if (above / RECIPE_FILE).exists():
            raise ValueError(
                f"out_dir: {above}: expected a directory for a grid, got one of a single run. Choose another out_dir."
            )
    with ExitStack() as stack:
        contents = [member.content if activations is vectors else None for member in members]
        # The first rank's alone: the others write nothing.
        claims = zip(recipes, contents, strict=True) if ranks.rank == 0 else ()
        earlier = {
            recipe.out_dir: stack.enter_context(claimed(Path(recipe.out_dir), recipe, content)) for recipe, content in claims
        }
        earlier = from_first(ranks, earlier)
        known = [tuple(recipe_shortfalls(recipe)) for recipe in recipes] if plans is None else [p.shortfalls for p in plans]
        _tell([Path(recipe.out_dir).name for recipe in recipes], known)
        together = stack.enter_context(open_streams(members, activations, plans))
        dirs = [recipe.out_dir for recipe in recipes]
        sources = {member.recipe.out_dir: member.source for member in members if member.source is not None}
        resumed = {name: old for name, old in earlier.items() if old}
        _train(together, resumed, sources, dict(zip(dirs, known, strict=True)))


@contextmanager
def open_streams(
    members: Sequence[ResolvedRecipe],
    activations: Activations | None,
    plans: Sequence[TrainingPlan] | None,
) -> Iterator[list[tuple[ActivationStream, list[Recipe]]]]:
    """Yield the recipes' batch streams, each with the recipes that share it; harvest first if they read from a store."""
    together: dict[tuple[Any, ...], list[Recipe]] = {}
    ranks = own_ranks()
    for member in members:
        # A user's tensors depend on neither hooks nor seeds.
        recipe = member.recipe
        key = member.stream_key if activations is None else (recipe.batch_tokens, recipe.dictionary.two_sided)
        together.setdefault(key, []).append(recipe)
    groups, first = list(together.values()), members[0].recipe
    batch = mesh(first.distributed.latents).batch
    parts = [BatchPart(batch.rank, batch.size, group[0].accumulate) for group in groups]
    with ExitStack() as stack:
        if activations is not None:
            if len(groups) > 1 and isinstance(activations, Iterator):
                raise ValueError(
                    "activations: expected a list for recipes of several batch_tokens "
                    f"({', '.join(str(group[0].batch_tokens) for group in groups)}), got an iterator. Give a list, or use one "
                    "batch_tokens."
                )
            streams: list[ActivationStream] = [
                TensorStream(activations, group[0].batch_tokens, group[0].dictionary.two_sided, first.harvest, part)
                for group, part in zip(groups, parts, strict=True)
            ]
        elif first.harvest.store is None:
            hooks = tuple(dict.fromkeys(hook for member in members for hook in member.recipe.dictionary.all_hooks))
            outline = members[0].outline
            whole = first.harvest.gradients or any(member.recipe.uses_kl for member in members)
            model = outline.loaded() if whole else outline.loaded_for(hooks)
            # Two buffers: the first stream may be one buffer ahead of the last.
            keep, ranks = min(len(groups), 2), own_ranks()
            buffers = Buffers(model, pinned(first.text), first.harvest, hooks, keep, ranks)
            streams = [_live_stream(buffers, group[0], part) for group, part in zip(groups, parts, strict=True)]
        else:
            store = run_harvest(members[0], plans[0] if plans else None)
            if first.harvest.verify:
                store.verify(ranks)
            streams = [_store_stream(store, group, stack, part) for group, part in zip(groups, parts, strict=True)]
        for stream in streams:
            stack.callback(stream.close)
        yield list(zip(streams, groups, strict=True))


def _live_stream(buffers: Buffers, recipe: Recipe, part: BatchPart) -> ActivationStream:
    section = recipe.dictionary
    moments = calibrated_on(recipe)
    over = mesh(recipe.distributed.latents)
    rows = LiveStream(buffers, section.hooks_in, recipe.batch_tokens, recipe.seed, section.hooks_out, moments, part, over)
    return ContextStream(rows) if recipe.uses_kl else rows


def _store_stream(store: ActivationStore, group: list[Recipe], stack: ExitStack, part: BatchPart) -> ActivationStream:
    recipe = group[0]
    gradients = any(needs_gradient(each) for each in group)
    section, size, seed = recipe.dictionary, recipe.batch_tokens, recipe.seed
    stream = StoreStream(store, section.hooks_in, size, seed, hooks_out=section.hooks_out, gradients=gradients, part=part)
    stack.callback(stream.release)
    return stream


def _tell(names: Sequence[str], found: Sequence[Sequence[Shortfall]]) -> None:
    """Log the shortfalls of runs, once if all share them."""
    for line in told_together({name: list(map(str, each)) for name, each in zip(names, found, strict=True)}, len(names)):
        log.warning("%s.", line)


def _train(
    together: list[tuple[ActivationStream, list[Recipe]]],
    earlier: Mapping[str, Recipe],
    sources: Mapping[str, StartSource],
    known: Mapping[str, Sequence[Shortfall]],
) -> None:
    """Train on streams, then calibrate.

    Args:
        earlier: Recipes of the saved states to resume, by ``out_dir``.
        sources: What new runs with a start begin with, by ``out_dir``.
        known: Shortfalls known before training, by ``out_dir``.
    """
    first = together[0][1][0]
    device = resolve_device(first.model.device)
    # accelerate keeps one state per process and refuses a second run with another precision.
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision_of(first, device))
    ranks = own_ranks()
    stop = StopRequest(ranks.largest)
    with ExitStack() as stack:
        # One thread, which has ended when this block is left, however it is.
        writer = stack.enter_context(ThreadPoolExecutor(1, "sparsary-save"))
        groups = [build_group(stream, recipes, earlier, sources, accelerator, writer, stack) for stream, recipes in together]
        stack.enter_context(_telling_what_is_kept(groups))
        for member in (member for group in groups for member in group.members):
            member.checkpoints.shortfalls = tuple(known[member.recipe.out_dir])
            if not member.done:
                member.report.start()
        try:
            with stop.signals_deferred(), doing(f"training {first.out_dir}"):
                train_loop(groups, accelerator, stop)
        except StopIteration:
            tokens, wanted = max((m.state.tokens, m.recipe.tokens) for group in groups for m in group.members if not m.done)
            raise ValueError(
                f"activations: the iterator ended after {tokens} of {wanted} tokens. Lower tokens, or give an "
                "iterable that can be passed over again, such as a list."
            ) from None
    unfinished = [member.state.step for group in groups for member in group.members if not member.done]
    if stop.signal_number is not None and unfinished:
        raise Stopped(stop.signal_number, f"at step {min(unfinished)}; everything is saved.")
    for group in groups:
        # Stops prefetching, because calibration reads from the same source.
        group.stream.close()
    for group in groups:
        for member in group.members:
            with _telling_what_is_kept(groups), doing(f"calibrating {member.recipe.out_dir}"):
                # Only the loadable dictionary is calibrated; the saved state stays as training left it.
                # Every rank has the whole dictionary, reads the same tokens and gets the same thresholds.
                dictionary = whole_dictionary(member.dictionary, averages(member.dictionary, member.optimizer))
                dictionary.ranks = ALONE
                found = finish(dictionary, group.stream, calibrated_on(member.recipe), member.recipe.batch_tokens)
                found = _passes(member, group.stream) + found
                if member.state.start is not None:
                    member.state.start = after_training(dictionary, member.state.start, group.stream, member.recipe)
                before = set(map(str, member.checkpoints.shortfalls))
                _tell([member.recipe.out_dir], [[each for each in found if str(each) not in before]])
                member.checkpoints.shortfalls = shortfalls_together(member.checkpoints.shortfalls, found)
                # Always saved: a kill may have come between the last state and its dictionary.
                member.checkpoints.save_finished(member.state, dictionary, group.stream)
    ranks.wait()
    for shares in {shares_in_words((group.stream.content() or {}).get("text") or {}) for group in groups} - {""}:
        log.info("Read %s.", shares)
    for skipped in {counted(group.stream.skipped) for group in groups if group.stream.skipped}:
        log.warning("Excluded from training, or repaired: %s.", skipped)


@contextmanager
def _telling_what_is_kept(groups: Sequence[Group]) -> Iterator[None]:
    """Add to errors of writing files which saved states are on disk."""
    try:
        yield
    except WriteError as error:
        for member in (member for group in groups for member in group.members):
            member.checkpoints.close()
        steps = sorted({member.state.saved_step for group in groups for member in group.members})
        span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        raise error.keeping(f"The state of {span} is kept." if steps[-1] else "No state had been saved.") from None


def _passes(member: TrainedMember, stream: ActivationStream) -> list[Shortfall]:
    """Return a shortfall if a source other than a store had fewer tokens than were trained on."""
    tokens, have = member.recipe.tokens, stream.distinct_tokens
    return shortfall("tokens", tokens, have, "tokens", repeated(tokens, have)) if have else []
