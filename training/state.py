"""Training state: everything a resume needs, in one object and one file.

``state.safetensors`` holds weights, optimizer moments, counters, random-generator states, stream position and the length of
``metrics.jsonl``. It is replaced by a rename, so a kill at any moment leaves either the old state or the new one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..sae import SparseDictionary
from ..sae.break_even import known_break_evens, restore_break_evens
from ..sae.files import read_tensors, require_finite, write_tensors
from ..sae.ranks import UNDIVIDED, Shards
from ..sae.training_usage import TrainingUsage
from .activations.stream import ActivationStream
from .divided import own_tensors, whole_tensors
from .objective import LatentUsage, Terms
from .optim import AVERAGE
from .phases import Phases, density_half_life

STATE_FILE = "state.safetensors"
FORMAT_VERSION = 2


class Logged(NamedTuple):
    """Length and CRC-32 of what a run has written to ``metrics.jsonl``; earlier versions kept no checksum."""

    bytes: int = 0
    crc32: str | None = None


class NotFinite(ValueError):  # noqa: N818 - said like this it reads as what happened
    """Raised when a run's loss is not finite."""


class Randomness:
    """Random-generator states of one run, active while entered, so that runs trained together draw the same numbers as alone.

    Entered while a dictionary is built, and not during its steps, which draw nothing: the prefetching thread may then be
    drawing the random activations of a user's iterable.
    """

    def __init__(self, seed: int):
        outer = _random_state()
        torch.manual_seed(seed)
        self.own = _random_state()
        _set_random_state(outer)

    def __enter__(self) -> "Randomness":
        self.outer = _random_state()
        _set_random_state(self.own)
        return self

    def __exit__(self, *_error: object) -> None:
        self.own = _random_state()
        _set_random_state(self.outer)


class TrainState:
    """Counters of a run.

    ``silent_for`` is the number of tokens since each latent last fired, ``density`` the running share of tokens it fires on.
    """

    def __init__(
        self,
        n_latents: int,
        dead_after_tokens: int,
        device: torch.device,
        randomness: Randomness,
        shards: Shards = UNDIVIDED,
        layers: int = 1,
    ):
        self.randomness, self.shards, self.layers = randomness, shards, layers
        self.step = 0
        self.tokens = 0
        self.saved_step = 0
        # Tokens to train on; set by the trainer.
        self.budget: int | None = None
        # [step, tokens]: the step at which the run was lengthened, and its token budget before.
        self.lengthened: list[list[int]] = []
        # Record of the dictionary that a warm start began with, for the checkpoint.
        self.start: dict[str, Any] | None = None
        self.stream_position: dict[str, Any] | None = None
        self.silent_for: Int[Tensor, " n_latents"] = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.density: Float[Tensor, " n_latents"] = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.dead_after_tokens, self.half_life = dead_after_tokens, density_half_life(dead_after_tokens)
        self.finite: Bool[Tensor, ""] = torch.ones((), dtype=torch.bool, device=device)

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        return self.silent_for >= self.dead_after_tokens

    @property
    def usage(self) -> LatentUsage:
        return LatentUsage(self.dead, self.density, self.step)

    def dead_share(self) -> float:
        """Return the share of all shards' latents that are dead."""
        return float(self.shards.mean(self.dead.double().mean()))

    def training_usage(self) -> TrainingUsage:
        """Return the usage of all shards' latents, as stored in checkpoints."""
        return TrainingUsage(self.shards.joined(self.silent_for, self.layers).cpu(), self.dead_after_tokens, self.tokens)

    def advance(self, tokens: int, terms: Terms) -> None:
        """Count one step, without synchronizing with the device."""
        self.step += 1
        self.tokens += tokens
        self.silent_for = torch.where(terms.firings > 0, 0, self.silent_for + tokens)
        # A plain mean at first, until the history is as long as the decaying average remembers.
        share = max(1 - 0.5 ** (tokens / self.half_life), tokens / self.tokens)
        self.density = self.density.lerp(terms.firings.double() / tokens, share)
        self.finite = self.finite & torch.isfinite(terms.named["loss"])

    def require_finite(self, directory: str | Path) -> None:
        """Raise ``NotFinite``, naming the run's directory, if the loss was not finite in any step so far."""
        if not bool(self.finite):
            raise NotFinite(
                f"{directory}: loss: not finite between steps {self.saved_step} and {self.step}. The run stops; the state of "
                f"step {self.saved_step} is kept. Lower lr, raise lr_warmup_steps or set precision: float32, in a new out_dir."
            )

    def contents(
        self,
        dictionary: SparseDictionary,
        phases: Phases,
        optimizer: torch.optim.Optimizer,
        stream: ActivationStream,
        logged: Logged,
    ) -> "StateContents":
        """Return what a state of this step consists of; the tensors are those of the run, which the next step changes.

        Args:
            logged: What the run has written to ``metrics.jsonl``.
        """
        active = next(number for number, encoder in enumerate(phases.encoders) if encoder is dictionary.encoder)
        counters = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "tokens": self.tokens,
            "stream": stream.position(),
            "metrics_bytes": logged.bytes,
            "metrics_crc32": logged.crc32,
            "budget": self.budget,
            "lengthened": self.lengthened,
            # A resumed run takes the same paths; measured again, they might differ.
            "break_evens": known_break_evens(),
        } | ({} if self.start is None else {"start": self.start})
        return StateContents(self.tensors(dictionary, phases, optimizer), counters, active)

    def tensors(self, dictionary: SparseDictionary, phases: Phases, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return all tensors of the state, by the name they are saved under; ``restore_tensors`` puts them back.

        They have the latents of all shards, which all take part.
        """
        tensors: dict[str, Tensor] = {}
        for part, module in _parts(dictionary, phases).items():
            tensors |= {f"{part}/{name}": t for name, t in _own(module.state_dict()).items()}
            for name, parameter in _own(dict(module.named_parameters())).items():
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer/{part}/{name}/{key}"] = value
        if dictionary.screen is not None:
            tensors |= {f"screen/{name}": value for name, value in dictionary.screen.state().items()}
        tensors["silent_for"], tensors["density"] = self.silent_for, self.density
        tensors |= {f"random/{device}": values for device, values in self.randomness.own.items()}
        return whole_tensors(tensors, dictionary.n_latents, dictionary.shards, len(dictionary.blocks))

    def restore(
        self,
        directory: Path,
        dictionary: SparseDictionary,
        phases: Phases,
        optimizer: torch.optim.Optimizer,
    ) -> Logged:
        """Restore everything that a state contains, and return what ``metrics.jsonl`` held at that time.

        The stream is shared with other runs, so only its position is kept, in ``stream_position``. Random-generator states
        are set in torch's current generators, which are the run's own while its ``Randomness`` is entered.

        Raises:
            ValueError: If the file is damaged or does not fit the run.
        """
        path = directory / STATE_FILE
        tensors, metadata = read_tensors(path)
        try:
            counters = _counters(metadata)
            require_finite(path, {name: t for name, t in tensors.items() if name.startswith(("dictionary/", "encoder-"))})
            self.restore_tensors(tensors, dictionary, phases, optimizer)
            self.step, self.tokens = counters["step"], counters["tokens"]
            self.stream_position = counters["stream"]
            # Missing in states of earlier versions, whose runs could not be lengthened.
            self.lengthened = counters.get("lengthened", [])
            self.start = counters.get("start")
            restore_break_evens(_break_evens(counters))
        except (KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: expected the state of this run ({reason}). Delete the out_dir to start over.") from None
        phases.select(dictionary, max(self.step - 1, 0))
        self.saved_step = self.step
        return _logged(counters)

    def restore_tensors(
        self, tensors: dict[str, Tensor], dictionary: SparseDictionary, phases: Phases, optimizer: torch.optim.Optimizer
    ) -> None:
        """Put back what ``tensors`` returned.

        Raises:
            KeyError: If a tensor is missing or not expected.
            RuntimeError: If a tensor has another shape.
        """
        shards = dictionary.shards
        tensors = own_tensors(tensors, dictionary.n_latents * shards.size, shards, len(dictionary.blocks))
        for part, module in _parts(dictionary, phases).items():
            own = _below(f"{part}/", tensors)
            if own.keys() != _own(module.state_dict()).keys():
                raise KeyError(f"{part}: {sorted(own)}")
            module.load_state_dict(own, strict=False)
            for name, parameter in _own(dict(module.named_parameters())).items():
                saved = _below(f"optimizer/{part}/{name}/", tensors)
                # Adam keeps its step counter on the CPU unless it is fused on a GPU; it goes where the weights are.
                # A parameter without a gradient so far has no state.
                if saved:
                    optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in saved.items()}
        if dictionary.screen is not None:
            dictionary.screen.restore(_below("screen/", tensors))
        self.silent_for = tensors["silent_for"].to(self.silent_for.device)
        self.density = tensors["density"].to(self.density.device)
        _set_random_state(_below("random/", tensors))


@dataclass(frozen=True)
class StateContents:
    """Tensors and counters of one step of a run, as ``state.safetensors`` holds them.

    Args:
        active: Number of the encoder that is in the dictionary.
    """

    tensors: dict[str, Tensor]
    counters: dict[str, Any]
    active: int

    @property
    def dictionary_tensors(self) -> dict[str, Tensor]:
        """Tensors of the dictionary's ``state_dict()``, with averaged weights if they are kept."""
        found = {}
        for part, prefix in (("dictionary", ""), (f"encoder-{self.active}", "encoder.")):
            averages = _below(f"optimizer/{part}/", self.tensors)
            for name, tensor in _below(f"{part}/", self.tensors).items():
                found[f"{prefix}{name}"] = averages.get(f"{name}/{AVERAGE}", tensor)
        return found

    def write(self, directory: Path) -> None:
        """Replace the saved state. If it cannot be written, raise ``WriteError`` and keep the old one."""
        write_tensors(directory / STATE_FILE, self.tensors, {"counters": json.dumps(self.counters)}, sealed=True)


def saved_step(directory: Path) -> int:
    """Return the step of a run's saved state, reading only the file's metadata.

    Raises:
        ValueError: If the file is damaged.
    """
    return _saved_counters(directory)["step"]


def saved_budget(directory: Path) -> int | None:
    """Return the number of tokens that a saved run was to train on; ``None`` if an earlier version wrote the state.

    A damaged file has none either: ``restore`` names the damage.
    """
    try:
        found = _saved_counters(directory).get("budget")
    except ValueError:
        return None
    return found if isinstance(found, int) else None


def saved_log(directory: Path) -> Logged:
    """Return what ``metrics.jsonl`` held when a run's state was saved.

    Raises:
        ValueError: If the state's file is damaged or missing.
    """
    return _logged(_saved_counters(directory))


def _logged(counters: Mapping[str, Any]) -> Logged:
    crc32 = counters.get("metrics_crc32")
    return Logged(counters["metrics_bytes"], crc32 if isinstance(crc32, str) else None)


def _saved_counters(directory: Path) -> dict[str, Any]:
    path = directory / STATE_FILE
    try:
        with safe_open(path, "pt") as handle:
            return _counters(handle.metadata() or {})
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the state of a run ({error}). Delete the out_dir to start over.") from None


def _counters(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the counters in a state's metadata.

    Raises:
        KeyError, TypeError, RecursionError, json.JSONDecodeError: If they are missing or of another type.
    """
    counters = json.loads(metadata["counters"])
    for key in ("step", "tokens", "metrics_bytes"):
        if not isinstance(counters[key], int) or counters[key] < 0:
            raise TypeError(f"{key}: {str(counters[key])[:80]}")
    return counters


def _break_evens(counters: dict[str, Any]) -> dict[str, float]:
    """Return the measured densities in a state's counters; states of earlier versions have none.

    Raises:
        TypeError: If they are not shares by name.
    """
    found = counters.get("break_evens", {})
    if not isinstance(found, dict) or not all(isinstance(share, float) and 0 < share <= 1 for share in found.values()):
        raise TypeError(f"break_evens: {str(found)[:80]}")
    return found


def _parts(dictionary: SparseDictionary, phases: Phases) -> dict[str, nn.Module]:
    """Return all modules with weights or buffers, by the name they are saved under."""
    return {"dictionary": dictionary} | {f"encoder-{i}": encoder for i, encoder in enumerate(phases.encoders)}


def _own(named: dict[str, Any]) -> dict[str, Any]:
    """Return a module's tensors without those of a dictionary's encoder, which is saved as a phase of its own."""
    return {name: value for name, value in named.items() if not name.startswith("encoder.")}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _random_state() -> dict[str, Tensor]:
    """Return the states of torch's generators, by device type."""
    here = {"cpu": torch.get_rng_state()}
    return here | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else here


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
