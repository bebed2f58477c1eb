"""Processes of a distributed run: joining the group that a launcher started, and telling which rank failed.

Any launcher of torch will do: ``torchrun``, ``accelerate launch``, or ``sparsary train --processes``, which calls torch's own.
"""

import atexit
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..sae.ranks import ALONE, UNDIVIDED, Ranks, RanksLostError, Shards, naming_lost_ranks

T = TypeVar("T")
# A collective that a rank does not reach within this time ends the run.
TIMEOUT = timedelta(seconds=float(os.environ.get("SPARSARY_RANKS_TIMEOUT", "600")))
# Keys of the ranks' store: the last beat of each, and the signal that stops all of them, 0 after a failure.
BEAT, HEED = "sparsary/beat/", "sparsary/heed"
# How long a rank that lost the others waits to learn which of them are alive.
ROLL_CALL_SECONDS = 3.0


def launched() -> bool:
    """Return True if a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_rank() -> int:
    """Return the rank that a launcher gave to this process; 0 without one."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


@cache
def own_ranks() -> Ranks:
    """Return the ranks of this run, joining their process group at the first call; without a launcher, this process alone.

    Raises:
        RanksLostError: If other ranks do not join in time.
    """
    if not launched():
        return ALONE
    if not dist.is_initialized():
        # Numbers on GPUs go through NCCL, counts on the host through gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # A launcher that restarts the ranks may offer the same store again, with the addresses of those that ended.
            store = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
            # A group that is there when Python ends may abort the process, because its threads still run.
            atexit.register(leave)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise RanksLostError(
                f"rank {own_rank()} of {os.environ['WORLD_SIZE']} could not join the others within "
                f"{TIMEOUT.total_seconds():.0f} s ({said}). Check that every process was started and reaches "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}."
            ) from None
    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD)


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, and two divisions of them: parts of the batch, and shards of the latents.

    Rank ``i`` of ``N`` has shard ``i % latents`` and part ``i // latents`` of every batch.
    """

    world: Ranks
    batch: Ranks
    shards: Shards


ONE_PROCESS = Mesh(ALONE, ALONE, UNDIVIDED)


@cache
def mesh(latents: int = 1) -> Mesh:
    """Return the division of this run's ranks into parts of the batch and ``latents`` shards.

    Raises:
        ValueError: If the number of ranks is not a multiple of the shards.
    """
    world = own_ranks()
    if world.size % latents:
        raise ValueError(
            f"distributed.latents: expected a divisor of the {world.size} processes, got {latents}. Start a multiple of it, or "
            "change it."
        )
    if latents == 1:
        return Mesh(world, world, UNDIVIDED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = init_device_mesh(device, (world.size // latents, latents), mesh_dim_names=("batch", "latents"))
    # A group of one process needs no messages.
    batch = Ranks(grid.get_group("batch")) if world.size > latents else ALONE
    return Mesh(world, batch, Shards(grid.get_group("latents"), world))


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
    own_ranks.cache_clear()
    patient_ranks.cache_clear()
    mesh.cache_clear()


def require_agreement(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raise ``ValueError`` on every rank, naming the ranks that differ, unless all ranks have the same facts.

    Args:
        facts: Text by the name it has in the message, such as a recipe or a version.
    """
    if ranks.size == 1:
        return
    everywhere = ranks.gather_objects(dict(facts))
    problems = []
    for name in facts:
        values = [each.get(name, "") for each in everywhere]
        other = [rank for rank, value in enumerate(values) if value != values[0]]
        if other:
            rank = other[0]
            mine, theirs = _difference(values[0], values[rank])
            problems.append(f"{name} of rank {', '.join(map(str, other))} differs from rank 0's: {theirs}, not {mine}")
    if problems:
        raise ValueError(
            "ranks: expected the same recipe, code and store in all processes: " + "; ".join(problems) + ". Start all of them "
            "with the same command, in the same installation."
        )


def from_first(ranks: Ranks, value: T) -> T:
    """Return rank 0's value on every rank; it must be picklable."""
    return ranks.from_first(value)


def _difference(first: str, other: str) -> tuple[str, str]:
    """Return the first lines in which two texts differ."""
    pairs = zip(first.splitlines() or [""], other.splitlines() or [""], strict=False)
    mine, theirs = next(((a, b) for a, b in pairs if a != b), (first[:80], other[:80]))
    return mine.strip() or "nothing", theirs.strip() or "nothing"


def beat(place: str) -> None:
    """Record that this rank has reached a place of its work, for the message about a rank that stops answering."""
    if dist.is_initialized():
        with naming_lost_ranks():
            _store().set(f"{BEAT}{dist.get_rank()}", f"{time.time():.0f} {place}")


def beats() -> dict[int, str]:
    """Return the last beat of every other rank; empty text before its first one."""
    if not dist.is_initialized():
        return {}
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    with naming_lost_ranks():
        store = _store()
        return {rank: store.get(key).decode() if store.check([key := f"{BEAT}{rank}"]) else "" for rank in others}


def heed(signal_number: int | None) -> int | None:
    """Return the signal that stops the run: this rank's, of which it tells the others, or that of another rank.

    For ranks that work on parts of their own, and so meet in no collective for a while.

    Raises:
        RanksLostError: If another rank has failed, or does not hear from one; this one then tells that it is alive.
    """
    if not dist.is_initialized():
        return signal_number
    with naming_lost_ranks():
        store = _store()
        if signal_number is not None:
            store.set(HEED, str(signal_number))
        if not store.check([HEED]):
            return None
        number = int(store.get(HEED))
    if not number:
        raise RanksLostError("another rank has ended the run")
    return number


@cache
def patient_ranks() -> Ranks:
    """Return the ranks of this run in a group whose collectives wait without a limit, for work on parts of their own.

    ``watch.Watch`` says how long a rank may make no progress. All ranks call this together.
    """
    if not dist.is_initialized():
        return own_ranks()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    assert not isinstance(group, int)
    return Ranks(group)


def told_by_one_rank(status: int, message: str, error: BaseException) -> tuple[int, str]:
    """Return the exit status of this rank and the message that it prints about an error: one of all ranks prints.

    A rank that fails because others are gone waits to learn which. The ranks end with the status of the first to fail.
    """
    if not dist.is_initialized():
        # All ranks make the same mistake before they meet.
        return status, message if own_rank() == 0 or isinstance(error, RanksLostError) else ""
    try:
        if isinstance(error, RanksLostError):
            return _lost(error)
        if _store().add("sparsary/failures", 1) > 1:
            return status, ""
        _store().set("sparsary/status", str(status))
        _store().set(HEED, "0")
        _outlast_others()
    except RuntimeError:
        # The store is gone with the launcher, the rank or the node that held it.
        if isinstance(error, RanksLostError):
            message = (
                f"sparsary: rank {own_rank()}: the launcher, or the rank that connected all others, has ended. What was saved "
                "is kept; the same command continues."
            )
        return status, message
    return status, message if own_rank() == 0 else message.replace("sparsary: ", f"sparsary: rank {own_rank()}: ", 1)


def _outlast_others() -> None:
    """Wait until the other ranks have asked whether to tell the same mistake, if this one holds the ranks' store."""
    if own_rank() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    deadline = time.monotonic() + ROLL_CALL_SECONDS
    while _store().add("sparsary/failures", 0) < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.05)


def _lost(error: RanksLostError) -> tuple[int, str]:
    """Return the status and message about ranks that ended or hang, without a message if they or another rank tell it."""
    store, rank, size = _store(), dist.get_rank(), dist.get_world_size()
    store.set(f"sparsary/here/{rank}", "1")
    # Ranks that are at work come to the roll call, too.
    store.set(HEED, "0")
    deadline = time.monotonic() + ROLL_CALL_SECONDS
    while True:
        here = [other for other in range(size) if store.check([f"sparsary/here/{other}"])]
        if store.check(["sparsary/status"]):
            return int(store.get("sparsary/status")), ""
        if len(here) == size or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if rank != min(here):
        return 1, ""
    missing = [other for other in range(size) if other not in here]
    if not missing:
        return 1, f"sparsary: the connection between the ranks failed ({error}). The same command continues from the last save."
    seen = [_last_seen(other) for other in missing]
    return 1, (
        f"sparsary: rank {', '.join(map(str, missing))} of {size} ended or does not answer (last seen {'; '.join(seen)}). "
        "What was saved is kept; the same command continues."
    )


def _last_seen(rank: int) -> str:
    store, key = _store(), f"{BEAT}{rank}"
    if not store.check([key]):
        return "before the first step"
    then, place = store.get(key).decode().split(maxsplit=1)
    return f"{'at ' * place.startswith('step')}{place}, {max(0, round(time.time() - float(then)))} s ago"


def _store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Return the key-value store of the process group, which outlives a rank."""
    return dist.distributed_c10d._get_default_store()
