"""From a recipe to a finished run: preflight, harvest, build, resume, loop."""

import logging
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from sae.checkpoint import build_dictionary
from sae.encoders import ENCODERS
from sae.screen import Screen

from .activations.harvest import harvest
from .activations.model import load_model, resolve_device
from .activations.shards import MANIFEST_FILE, Store
from .activations.stream import ContextStream, LiveStream, StoreStream, Stream, TensorStream
from .checkpoints import Checkpoints, claimed
from .finish import finish
from .fused import build_optimizer
from .initialize import SAMPLE_TOKENS, initialize
from .loop import train_loop
from .objective import AuxSettings, Divergence, Objective
from .optim import Schedule
from .phases import Phases
from .preflight import preflight
from .recipe import Recipe
from .report import Report
from .state import TrainState
from .stopping import Stopped

log = logging.getLogger(__name__)


def run_harvest(recipe: Recipe, progress: Callable[[int], None] = lambda tokens: None) -> Store:
    """Fill the recipe's store; a complete one is only checked.

    Raises:
        ValueError: If ``harvest.store`` is null, or the store belongs to another recipe.
    """
    if recipe.harvest.store is None:
        raise ValueError("harvest.store: null streams from the model and stores nothing. Give a directory to harvest into.")
    plan = preflight(recipe)
    if (Path(recipe.harvest.store) / MANIFEST_FILE).exists():
        store = Store.open(recipe.harvest.store)
        # Complete and this recipe's (preflight saw to that): the model is not needed, nor loaded.
        if store.manifest["complete"] and store.tokens("train") + store.tokens("heldout") >= plan.stored_tokens:
            return store
    return harvest(load_model(recipe.model), recipe.text, recipe.harvest, progress)


def train(
    recipe: Recipe,
    activations: Iterable[Tensor | tuple[Tensor, Tensor]] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Path:
    """Run a recipe to its end, or go on with it, and return ``out_dir``.

    ``activations`` takes the place of the model: any iterable of ``(tokens, d_in)`` tensors, or of pairs of such tensors and
    the loss's gradients at them; ``model``, ``text`` and
    ``harvest`` of the recipe are then only labels. ``progress`` hears of harvested tokens.

    Raises:
        ValueError: If the user can mend it.
        Stopped: If SIGINT or SIGTERM ended the run; its state is saved.
    """
    directory = Path(recipe.out_dir)
    if activations is None:
        preflight(recipe)
    elif recipe.objective == "kl":
        raise ValueError("activations: expected none with objective kl, which trains through the model. Leave them out.")
    with claimed(directory, recipe) as resuming, open_stream(recipe, activations, progress) as stream:
        return _train(recipe, directory, stream, resuming)


@contextmanager
def open_stream(
    recipe: Recipe, activations: Iterable[Tensor | tuple[Tensor, Tensor]] | None, progress: Callable[[int], None]
) -> Iterator[Stream]:
    """The recipe's source of batches, harvested first where it is a store."""
    hook = recipe.dictionary.hook
    with ExitStack() as stack:
        if activations is not None:
            stream: Stream = TensorStream(activations, recipe.batch_tokens)
        elif recipe.harvest.store is None:
            kind = ContextStream if recipe.objective == "kl" else LiveStream
            stream = kind(load_model(recipe.model), recipe.text, recipe.harvest, hook, recipe.batch_tokens, recipe.seed)
        else:
            store = run_harvest(recipe, progress)
            if recipe.harvest.verify:
                store.verify()
            stream = StoreStream(store, hook, recipe.batch_tokens, recipe.seed, gradients=needs_gradient(recipe))
            stack.callback(stream.release)
        stack.callback(stream.close)
        yield stream


def _train(recipe: Recipe, directory: Path, stream: Stream, resuming: bool) -> Path:
    torch.manual_seed(recipe.seed)
    device = resolve_device(recipe.model.device)
    sample = stream.sample(SAMPLE_TOKENS)
    moments = stream.moments()
    section = recipe.dictionary
    arguments = {"kind": section.kind, "d_in": sample.shape[1], "n_latents": section.n_latents, "encoder": section.encoder}
    dictionary = build_dictionary(arguments)
    if not resuming:
        initialize(dictionary, sample, moments, section.normalize, section.init)
    # accelerate keeps one state per process and refuses a second run with another precision.
    AcceleratorState._reset_state(True)
    precision = _precision(recipe, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=precision, gradient_accumulation_steps=recipe.accumulate
    )
    auxk_latents = recipe.auxk_latents or max(1, dictionary.d_out // 2)
    aux = AuxSettings(recipe.auxk_weight, auxk_latents, recipe.aux_zipf_tau, recipe.aux_zipf_absolute)
    divergence = Divergence(stream.model, recipe.dictionary.hook) if isinstance(stream, ContextStream) else None
    weight = recipe.reconstruction_weight if recipe.reconstruction_weight is not None else float(divergence is None)
    objective = Objective(dictionary, moments.variance(), aux, divergence, weight).to(accelerator.device)
    phases = Phases(dictionary, recipe).to(accelerator.device)
    if recipe.screen != "none":
        dictionary.screen = Screen(recipe.screen, recipe.screen_floor, accelerator.device)
    optimizer = build_optimizer(dictionary, phases, recipe, accelerator.num_processes)
    state = TrainState(dictionary.n_latents, recipe.dead_after_tokens, accelerator.device)
    keep_bytes = state.restore(directory, dictionary, phases, optimizer, stream) if resuming else 0
    if resuming:
        log.info("Continuing %s at step %d.", directory, state.step)
    objective, wrapped = accelerator.prepare(objective, optimizer)
    checkpoints = Checkpoints(directory, provenance(recipe, stream), phases)
    report = Report(recipe, directory, keep_bytes, state.tokens)
    schedule = Schedule(optimizer, dictionary, phases, recipe)
    dictionary.train()
    try:
        with checkpoints.signals_deferred():
            train_loop(recipe, objective, wrapped, schedule, stream, state, accelerator, report, checkpoints)
    except StopIteration:
        raise ValueError(
            f"activations: the iterator ended after {state.tokens} of {recipe.tokens} tokens. Lower tokens, or give an "
            "iterable that can be passed over again, such as a list."
        ) from None
    finally:
        report.close()
    if checkpoints.stop_signal is not None and state.tokens < recipe.tokens:
        raise Stopped(checkpoints.stop_signal, state.step)
    # Nothing reads ahead any more: calibration goes through the same source.
    stream.close()
    # The state keeps what training left; what others load is made ready for use.
    if finish(dictionary, stream, recipe.calibration_tokens, recipe.batch_tokens):
        checkpoints.save_dictionary(state, dictionary)
    return directory


def needs_gradient(recipe: Recipe) -> bool:
    """Whether an encoder of the run chooses its latents by the loss's gradient."""
    specs = [recipe.dictionary.encoder, *(phase.encoder for phase in recipe.phases)]
    return any(ENCODERS[spec["name"]].needs_gradient for spec in specs)


def _precision(recipe: Recipe, device: torch.device) -> str:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = recipe.precision if recipe.precision != "auto" else ("bf16" if has_bf16 else "float32")
    return "bf16" if wanted == "bf16" else "no"


def provenance(recipe: Recipe, stream: Stream) -> dict[str, Any]:
    """Where a dictionary comes from: enough to evaluate it on the same model, hook and held-out documents."""
    resolved = recipe.model_dump(mode="json")
    model = resolved["model"]
    if isinstance(stream, StoreStream):
        model = model | {"revision": stream.store.manifest["model"]["revision"]}
    return {
        "model": None if isinstance(stream, TensorStream) else model,
        "hook": recipe.dictionary.hook,
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


def git_commit() -> str | None:
    """The commit this source is checked out at, if it is."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=False
        )
    except OSError:
        return None
    # Installed into another project's environment, git would name that project's commit.
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None
