"""Training runs from recipe to finished checkpoint: preflight, harvest, initialization or resume, training, calibration."""

import logging
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ..sae.checkpoint import build_dictionary
from ..sae.encoders import ENCODERS, build_encoder
from ..sae.errors import WriteError, doing
from ..sae.metrics import Moments
from ..sae.ranks import ALONE, Ranks
from ..sae.screen import Screen
from ..transcoders.load import RecipeValue
from .activations.harvest import harvest_activations, require_shared_store
from .activations.live import Buffers, ContextStream, LiveStream
from .activations.model import LanguageModel, resolve_device
from .activations.remote_store import store_place
from .activations.shards import MANIFEST_FILE, ActivationStore
from .activations.store_stream import StoreStream
from .activations.stream import ActivationBatch, ActivationStream, BatchPart
from .activations.tensor_stream import Activations, TensorStream
from .bad_rows import counted
from .calibrate import finish
from .checkpoints import RECIPE_FILE, Checkpoints, claimed
from .content import pinned
from .divided import own_part, require_divisible, whole_dictionary
from .fused_adam import build_optimizer
from .initialize import SAMPLE_TOKENS, initialize
from .locks import OneRun
from .loop import Group, TrainedMember, train_loop
from .objective import AuxSettings, Divergence, Objective
from .optim import Schedule, averages, lr_share
from .phases import Phases
from .preflight import TrainingPlan, plan_all, preflight_all, recipe_shortfalls, repeated
from .processes import from_first, mesh, own_ranks, require_agreement
from .recipe import DictionarySection, Recipe, RecipeSource, calibrated_on, dump_recipe, read_values
from .recipe.grid import check_grid, load_grid, told_together, unshared
from .report import TrainingLog
from .resolve_hooks import ResolvedRecipe, dictionary_arguments, resolve_recipes
from .shortfalls import Shortfall, shortfall, shortfalls_together
from .signals import Stopped, StopRequest
from .state import Randomness, TrainState

log = logging.getLogger(__name__)
# Keys of a recipe's dictionary that say where in a model it stands.
NAMES_OF_HOOKS = {"hook", "hook_in", "hook_out", "layer", "layers", "site"}
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
            return store
    # Gradients come from the loss, at the model's end.
    outline, hooks = member.outline, recipe.harvest.hooks
    model = outline.loaded() if recipe.harvest.gradients else outline.loaded_for(hooks)
    local = recipe.harvest.model_copy(update={"store": str(place.directory)})
    # The first rank uploads the shards of all.
    with place.publishing() if ranks.rank == 0 else nullcontext():
        return harvest_activations(model, recipe.text, local, ranks)


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
        require_agreement(own_ranks(), _same_on_all(grid.recipes))
    return run_harvest(resolve_recipes(grid.recipes)[0])


def train(
    recipe: RecipeSource,
    activations: Activations | None = None,
    model: LanguageModel | None = None,
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
        model: Language model in memory, in place of the one that the recipe names.
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
        # What the checkpoint says of its model; one that was not loaded is known by its name alone.
        changed["model"] = {"id": model.id} if model.section is None else model.section.model_dump(mode="json")
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
    if activations is None:
        plans = preflight_all(members) if plans is None else plans
    elif any(recipe.objective == "kl" for recipe in recipes):
        raise ValueError("activations: expected none with objective kl, which trains through the model. Leave them out.")
    for above in {Path(recipe.out_dir).parent for recipe in recipes if len(recipes) > 1}:
        if (above / RECIPE_FILE).exists():
            raise ValueError(
                f"out_dir: {above}: expected a directory for a grid, got one of a single run. Choose another out_dir."
            )
    with ExitStack() as stack:
        contents = [None if activations is not None else member.content for member in members]
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
        _train(together, {name: old for name, old in earlier.items() if old}, dict(zip(dirs, known, strict=True)))


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
        key = member.stream_key if activations is None else (recipe.batch_tokens, recipe.dictionary.kind != "sae")
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
                TensorStream(activations, group[0].batch_tokens, group[0].dictionary.kind != "sae", first.harvest, part)
                for group, part in zip(groups, parts, strict=True)
            ]
        elif first.harvest.store is None:
            hooks = tuple(dict.fromkeys(hook for member in members for hook in member.recipe.dictionary.all_hooks))
            outline = members[0].outline
            whole = first.harvest.gradients or any(member.recipe.objective == "kl" for member in members)
            model = outline.loaded() if whole else outline.loaded_for(hooks)
            # Two buffers: the first stream may be one buffer ahead of the last.
            buffers = Buffers(model, pinned(first.text), first.harvest, hooks, keep=min(len(groups), 2))
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
    rows = LiveStream(buffers, section.hooks_in, recipe.batch_tokens, recipe.seed, section.hooks_out, moments, part)
    return ContextStream(rows) if recipe.objective == "kl" else rows


def _store_stream(store: ActivationStore, group: list[Recipe], stack: ExitStack, part: BatchPart) -> ActivationStream:
    recipe = group[0]
    gradients = any(needs_gradient(each) for each in group)
    section, size, seed = recipe.dictionary, recipe.batch_tokens, recipe.seed
    stream = StoreStream(store, section.hooks_in, size, seed, hooks_out=section.hooks_out, gradients=gradients, part=part)
    stack.callback(stream.release)
    return stream


def require_same_run_on_all(ranks: Ranks, recipes: Sequence[Recipe]) -> None:
    """Raise ``ValueError`` on all ranks unless they run the same recipes and code, which their number can share."""
    if ranks.size == 1:
        return
    require_agreement(ranks, _same_on_all(recipes))
    for recipe in recipes:
        parts = mesh(recipe.distributed.latents).batch.size * recipe.accumulate
        if recipe.batch_tokens % parts:
            raise ValueError(
                f"batch_tokens: expected a multiple of {parts} ({parts // recipe.accumulate} parts of a batch x accumulate "
                f"{recipe.accumulate}), got "
                f"{recipe.batch_tokens}. Set batch_tokens to {-(-recipe.batch_tokens // parts) * parts}."
            )
        if recipe.harvest.store is None and recipe.objective == "kl":
            raise ValueError("objective: kl trains in one process, got several. Start it without a launcher.")


def _same_on_all(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Return what must be the same on all ranks, by its name in messages."""
    code = f"sparsary {_version()}, commit {git_commit()}, torch {torch.__version__}"
    return {"recipe": "\n".join(map(dump_recipe, recipes)), "code": code}


def _tell(names: Sequence[str], found: Sequence[Sequence[Shortfall]]) -> None:
    """Log the shortfalls of runs, once if all share them."""
    for line in told_together({name: list(map(str, each)) for name, each in zip(names, found, strict=True)}, len(names)):
        log.warning("%s.", line)


def _train(
    together: list[tuple[ActivationStream, list[Recipe]]],
    earlier: Mapping[str, Recipe],
    known: Mapping[str, Sequence[Shortfall]],
) -> None:
    """Train on streams, then calibrate.

    Args:
        earlier: Recipes of the saved states to resume, by ``out_dir``.
        known: Shortfalls known before training, by ``out_dir``.
    """
    first = together[0][1][0]
    device = resolve_device(first.model.device)
    # accelerate keeps one state per process and refuses a second run with another precision.
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=_precision(first, device), gradient_accumulation_steps=first.accumulate
    )
    ranks = own_ranks()
    stop = StopRequest(ranks.largest)
    with ExitStack() as stack:
        # One thread, which has ended when this block is left, however it is.
        writer = stack.enter_context(ThreadPoolExecutor(1, "sparsary-save"))
        groups = [_group(stream, recipes, earlier, accelerator, writer, stack) for stream, recipes in together]
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
        raise Stopped(stop.signal_number, min(unfinished))
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
                before = set(map(str, member.checkpoints.shortfalls))
                _tell([member.recipe.out_dir], [[each for each in found if str(each) not in before]])
                member.checkpoints.shortfalls = shortfalls_together(member.checkpoints.shortfalls, found)
                # Always saved: a kill may have come between the last state and its dictionary.
                member.checkpoints.save_finished(member.state, dictionary, group.stream)
    ranks.wait()
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


@dataclass(frozen=True)
class Start:
    """Initialization data of the dictionaries over one stream; ``medians`` caches the sample's medians, by side and scale."""

    stream: ActivationStream
    sample: ActivationBatch
    moments: Moments
    target_moments: Moments
    medians: dict[tuple[str, bytes], Tensor]

    def widths(self, section: DictionarySection) -> dict[str, int]:
        """Return the width of every hook: a side of the sample concatenates its hooks, which are equally wide.

        Raises:
            ValueError: If a user's tensors cannot be split into that many hooks.
        """
        target = self.sample.x if self.sample.target is None else self.sample.target
        found = {}
        for name, hooks, rows in (("activations", section.hooks_in, self.sample.x), ("targets", section.hooks_out, target)):
            width, rest = divmod(rows.shape[1], len(hooks))
            if rest:
                raise ValueError(f"{name}: expected a width divisible by the {len(hooks)} layers, got {rows.shape[1]}.")
            found |= dict.fromkeys(hooks, width)
        return found


def _group(
    stream: ActivationStream,
    recipes: list[Recipe],
    earlier: Mapping[str, Recipe],
    accelerator: Accelerator,
    writer: Executor,
    stack: ExitStack,
) -> Group:
    """Build all members over one stream, and move it to where the first unfinished member resumes."""
    # For user iterables that generate random tensors.
    torch.manual_seed(recipes[0].seed)
    # A resumed run takes from the sample only its width. Other sources than a store may draw random numbers for it.
    resumed = isinstance(stream, StoreStream) and all(recipe.out_dir in earlier for recipe in recipes)
    sample = stream.start_sample(1 if resumed else SAMPLE_TOKENS)
    start = Start(stream, sample, stream.moments(), stream.target_moments(), {})
    members = []
    for recipe in recipes:
        with Randomness(recipe.seed) as randomness:
            member = _member(recipe, start, earlier.get(recipe.out_dir), randomness, accelerator, writer)
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
    randomness: Randomness,
    accelerator: Accelerator,
    writer: Executor,
) -> TrainedMember:
    """Build a member; ``earlier`` is the recipe of the saved state to resume, if there is one."""
    directory, stream, section = Path(recipe.out_dir), start.stream, recipe.dictionary
    whole = build_dictionary(dictionary_arguments(recipe, start.widths(section)))
    if earlier is None:
        moments = (start.moments, start.target_moments)
        initialize(whole, start.sample, *moments, section.normalize, section.init, start.medians)
    ranks = mesh(recipe.distributed.latents)
    require_divisible(
        whole, [whole.encoder, *map(build_encoder, (phase.encoder for phase in recipe.phases))], ranks.shards.size
    )
    dictionary = own_part(whole, ranks.shards)
    dictionary.ranks = ranks.batch
    # The default is half the width of one output hook.
    auxk_latents = recipe.auxk_latents or max(1, dictionary.d_out // len(section.hooks_out) // 2)
    zipf = (recipe.aux_zipf_tau, recipe.aux_zipf_absolute)
    aux = AuxSettings(recipe.auxk_weight, auxk_latents, *zipf, section.orthogonality)
    divergence = Divergence(stream.model, section.hooks_out[0]) if isinstance(stream, ContextStream) else None
    weight = recipe.reconstruction_weight if recipe.reconstruction_weight is not None else float(divergence is None)
    objective = Objective(dictionary, dictionary.error_scale(start.target_moments), aux, divergence, weight).to(
        accelerator.device
    )
    phases = Phases(dictionary, recipe).to(accelerator.device)
    if recipe.screen != "none":
        dictionary.screen = Screen(recipe.screen, recipe.screen_floor, accelerator.device)
    optimizer = build_optimizer(dictionary, phases, recipe)
    state = TrainState(dictionary.n_latents, recipe.dead_after_tokens, accelerator.device, randomness, ranks.shards)
    keep_bytes = 0 if earlier is None else state.restore(directory, dictionary, phases, optimizer)
    if earlier is not None:
        log.info("Continuing %s at step %d.%s", directory, state.step, _lengthened(state, earlier, recipe))
    # Evaluation mode adds the precision only: gradients are summed over ranks by the optimizer. Everything is on the device.
    objective = cast(Objective, accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True))
    wrapped = accelerator.prepare_optimizer(optimizer, device_placement=False)
    checkpoints = Checkpoints(directory, _provenance(recipe, stream), phases, ranks, writer)
    report = TrainingLog(recipe, directory, keep_bytes, state.tokens, written=ranks.world.rank == 0)
    schedule = Schedule(optimizer, dictionary, phases, recipe)
    dictionary.train()
    return TrainedMember(recipe, objective, dictionary, wrapped, schedule, state, report, checkpoints)


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
    specs = [recipe.dictionary.encoder, *(phase.encoder for phase in recipe.phases)]
    return any(ENCODERS[spec["name"]].needs_gradient for spec in specs)


def _precision(recipe: Recipe, device: torch.device) -> str:
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
        "harvest": {key: resolved["harvest"][key] for key in ("dtype", "heldout", "exclude_special", "exclude_leading")},
        "recipe": resolved,
        "sparsary_version": _version(),
        "git_commit": git_commit(),
    }


def _version() -> str | None:
    try:
        return metadata.version("sparsary")
    except metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Return the commit of this source checkout; ``None`` if it is not a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=False
        )
    except OSError:
        return None
    # For a copy installed inside another repository, git would report that repository's commit.
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None
