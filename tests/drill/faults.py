"""Faults of the drill: each is a function that injects one into a folder of its own and returns how it ended.

``FAULTS`` is the registry: kind, stage of the work, number of processes, function. What must hold afterwards is the same for
all: the command ends in the right result, or with one clear message; then the same command, once the cause is removed,
gives the right result, from the last save on.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import Sabotage
from runs import (
    DICTIONARY,
    RECIPE,
    STEPS,
    Attempt,
    Tmpfs,
    Workshop,
    difference,
    report_difference,
    state_of,
    step_of,
    store_difference,
)

RIGHT, CLEAR, LOST, WRONG = "right result", "clear error", "lost", "wrong"
# Statuses that say what happened: mistakes and the machine (2), lost ranks (1), stopped by a signal.
TOLD = {1, 2, 130, 143}


@dataclass(frozen=True)
class Outcome:
    """Result of one fault: one of the four words, and why."""

    word: str
    why: str = ""


Inject = Callable[[Workshop, Path, random.Random], Outcome]


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one stage of the work."""

    kind: str
    stage: str
    processes: int
    inject: Inject


FAULTS: list[Fault] = []


def fault(kind: str, stage: str, processes: int = 1) -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        FAULTS.append(Fault(kind, stage, processes, inject))
        return inject

    return register


def unclear(attempt: Attempt, several: bool = False) -> str:
    """Return what is wrong with the message of a failed command; empty if it is one clear message."""
    lines = [line for line in attempt.message.splitlines() if line.startswith(("sparsary: ", "Stopped"))]
    if "Traceback" in attempt.message:
        return "a traceback"
    if len(lines) != 1 and not (several and lines and len(set(lines)) == 1):
        return f"{len(lines)} messages"
    if "log: " in lines[0] and "nobody foresaw" not in lines[0] and "MemoryError" not in lines[0]:
        return f"an error nobody foresaw: {lines[0][:300]}"
    if unexpected := [status for status in attempt.statuses if status is not None and status >= 0 and status not in TOLD | {3}]:
        return f"exit status {unexpected}"
    return ""


def settled(first: Attempt, differs: Callable[[], str], again: Callable[[], Attempt], silent: bool = False) -> Outcome:
    """Return the outcome of a disturbed command: judge it, then repeat it without the disturbance.

    Args:
        differs: Returns how the result differs from the right one.
        again: Repeats the command.
        silent: True if the command was killed, so that nobody could say anything.
    """
    if first.succeeded:
        return Outcome(WRONG, why) if (why := differs()) else Outcome(RIGHT)
    if not silent and (why := unclear(first)):
        return Outcome(WRONG, f"{why}: {first.message[-600:]}")
    second = again()
    if not second.succeeded:
        return Outcome(LOST, f"then: {second.statuses} {second.message[-600:]}")
    if why := differs():
        return Outcome(LOST, f"the repeated command: {why}")
    return Outcome(RIGHT if silent else CLEAR)


# Files that are damaged.


def tear(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(content))


def blank(path: Path, generator: random.Random) -> None:
    """Zero the file from somewhere on, as a power failure may."""
    content = path.read_bytes()
    begin = generator.randrange(len(content))
    path.write_bytes(content[:begin] + bytes(len(content) - begin))


def append(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randrange(1, 100)))


def remove(path: Path, _generator: random.Random) -> None:
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "torn file": tear,
    "flipped bit": flip,
    "zeroed file": blank,
    "garbage appended": append,
    "missing file": remove,
}
RUN_FILES = ("state.safetensors", DICTIONARY, "usage.safetensors", "dictionary.json", "recipe.yaml", "metrics.jsonl")


def _damage_run(name: str) -> None:
    """Damage a file of a run before it is resumed; afterwards the file comes back from a backup."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        run = workshop.copy(workshop.halfway[1], folder / "run")
        path = run / generator.choice(RUN_FILES)
        whole = path.read_bytes()
        DAMAGE[name](path, generator)
        arguments = workshop.train(run)
        first = workshop.command(arguments)
        if not first.succeeded:
            # Damage from outside is undone from outside; what the program left must fit the backup.
            path.write_bytes(whole)
        outcome = settled(first, lambda: difference_but(path.name, run, workshop.right[1]), lambda: workshop.command(arguments))
        return Outcome(outcome.word, outcome.why and f"{path.name}: {outcome.why}")

    fault(name, "resume")(inject)


def difference_but(damaged: str, run: Path, right: Path) -> str:
    """Return how a run differs from the right one; what stood in a damaged log is not known."""
    return difference(run, right) if damaged != "metrics.jsonl" else _tensors_differ(run, right)


def _tensors_differ(run: Path, right: Path) -> str:
    with mock.patch("runs.figures", return_value=[]):
        return difference(run, right)


def _damage_store(name: str, size: int = 1) -> None:
    """Damage a shard or the manifest before training."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        store = workshop.copy(workshop.store, folder / "store")
        path = generator.choice(sorted(path for path in store.iterdir() if not path.name.startswith(".")))
        whole = path.read_bytes()
        DAMAGE[name](path, generator)
        arguments = workshop.train(folder / "run", store)
        first = workshop.ranks(arguments, size) if size > 1 else workshop.command(arguments)
        if not first.succeeded:
            path.write_bytes(whole)
        again = lambda: workshop.ranks(arguments, size) if size > 1 else workshop.command(arguments)  # noqa: E731
        outcome = settled(first, lambda: difference(folder / "run", workshop.right[size]), again)
        return Outcome(outcome.word, outcome.why and f"{path.name}: {outcome.why}")

    fault(name, "train", size)(inject)


def _damage_checkpoint(name: str) -> None:
    """Damage a finished checkpoint before it is evaluated."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        run = workshop.copy(workshop.right[1], folder / "run")
        path = run / generator.choice((DICTIONARY, DICTIONARY, "dictionary.json", "usage.safetensors"))
        whole = path.read_bytes()
        DAMAGE[name](path, generator)
        first = workshop.evaluate(run, folder / "report")
        path.write_bytes(whole)
        differs = lambda: report_difference(folder / "report", workshop.report)  # noqa: E731
        if first.succeeded and path.name == "usage.safetensors" and "dead latents in training are not known" in first.message:
            return Outcome(CLEAR)
        outcome = settled(first, differs, lambda: workshop.evaluate(run, folder / "report"))
        return Outcome(outcome.word, outcome.why and f"{path.name}: {outcome.why}")

    fault(name, "eval")(inject)


def _damage_report(name: str) -> None:
    """Damage a report, or its sums by document, before it is compared with another one."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        workshop.copy(workshop.reports, folder)
        # A report without sums is an earlier version's, and has no intervals.
        files = ("report.json",) if name == "missing file" else ("report.json", "report.json", "documents.safetensors")
        path = folder / "a" / generator.choice(files)
        whole = path.read_bytes()
        DAMAGE[name](path, generator)
        first = workshop.compare(folder)
        path.write_bytes(whole)
        differs = lambda: report_difference(folder / "comparison", workshop.reports / "comparison", "comparison.json")  # noqa: E731
        outcome = settled(first, differs, lambda: workshop.compare(folder))
        return Outcome(outcome.word, outcome.why and f"{path.name}: {outcome.why}")

    fault(name, "compare")(inject)


for _name in DAMAGE:
    _damage_run(_name)
    _damage_report(_name)
    _damage_store(_name)
    _damage_checkpoint(_name)
_damage_store("missing file", 2)
_damage_store("flipped bit", 2)


# Disks that are full, folders that cannot be written.


def _on_disk(workshop: Workshop, folder: Path, generator: random.Random, what: str, work: str) -> Outcome:
    """Run a command on a small disk, or on one that becomes read-only; then repeat it with room."""
    with Tmpfs(folder / "disk") as disk:
        run, store, report = (disk.folder / name for name in ("run", "store", "report"))
        if work == "resume":
            workshop.copy(workshop.halfway[1], run)
        before = step_of(run)
        arguments, differs = {
            "train": (workshop.train(run), lambda: difference(run, workshop.right[1])),
            "resume": (workshop.train(run), lambda: difference(run, workshop.right[1])),
            "harvest": (workshop.harvest(store), lambda: store_difference(store, workshop.store)),
            "eval": (workshop.evaluation(workshop.right[1], report), lambda: report_difference(report, workshop.report)),
        }[work]
        used = sum(path.stat().st_blocks * 512 for path in disk.folder.rglob("*"))
        if what == "full disk":
            need = {"train": 600_000, "resume": 400_000, "harvest": 900_000, "eval": 300_000}[work]
            disk.limit(used + generator.randrange(4096, need))
            first = workshop.command(arguments)
        else:
            disk.read_only(True)
            first = workshop.command(arguments)
            disk.read_only(False)
        disk.limit(64 << 20)
        if step_of(run) < before:
            return Outcome(LOST, f"the state of step {before} is gone")
        return settled(first, differs, lambda: workshop.command(arguments))


def _disks(what: str, work: str) -> None:
    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        return _on_disk(workshop, folder, generator, what, work)

    fault(what, work)(inject)


for _work in ("train", "resume", "harvest", "eval"):
    _disks("full disk", _work)
    _disks("read-only folder", _work)


# What happens to the process.


def _ended_at_a_step(what: str, size: int) -> None:
    """End, stop or confuse one rank after a step, then repeat the command."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        run = folder / "run"
        arguments = workshop.train(run)
        step = generator.randrange(1, STEPS)
        sabotage = Sabotage(what, generator.randrange(size), step)
        first = workshop.ranks(arguments, size, sabotage)
        others = [status for rank, status in enumerate(first.statuses) if rank != sabotage.rank]
        if None in others:
            return Outcome(WRONG, f"other ranks hang: {first}")
        if what in ("terminate", "interrupt") and step_of(run) != step:
            return Outcome(LOST, f"stopped at step {step}, saved {step_of(run)}: {first}")
        # The fault comes before the save of its own step. The save before that may still be written by the first rank, which
        # begins a save only when the one before is on disk.
        cut_off = sabotage.rank == 0 and what in ("kill", "leave_early", "hang", "sleep")
        if step_of(run) < ((step - 1) // RECIPE["save_every"] - cut_off) * RECIPE["save_every"]:
            return Outcome(LOST, f"at step {step} the state was of step {step_of(run)}")
        silent = size == 1 and what in ("kill", "leave_early")
        must_name = not first.succeeded and size > 1 and what in ("kill", "hang", "sleep", "leave_early")
        if must_name and f"rank {sabotage.rank} of {size} ended or does not answer" not in first.message:
            return Outcome(WRONG, f"rank {sabotage.rank} is not named: {first.message[-600:]}")
        return settled(first, lambda: difference(run, workshop.right[size]), lambda: workshop.ranks(arguments, size), silent)

    named = {"kill": "SIGKILL", "hang": "hanging rank", "sleep": "hanging rank", "terminate": "SIGTERM", "interrupt": "SIGINT"}
    named |= {"fail": "unforeseen exception", "no_memory": "no memory", "leave_early": "silent exit"}
    named |= {"cut_connections": "network partition", "disturb_weights": "diverging rank"}
    fault(named[what], "train", size)(inject)


for _what in ("kill", "terminate", "interrupt", "fail", "no_memory", "leave_early"):
    _ended_at_a_step(_what, 1)
for _what in ("kill", "kill", "hang", "sleep", "terminate", "interrupt", "fail", "no_memory", "leave_early"):
    _ended_at_a_step(_what, 2)
_ended_at_a_step("cut_connections", 2)
_ended_at_a_step("disturb_weights", 2)


def _killed_while_writing(work: str, size: int = 1) -> None:
    """SIGKILL between writing a file, syncing it and renaming it; then the command again."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        run, store, report = (folder / name for name in ("run", "store", "report"))
        if work == "resume":
            workshop.copy(workshop.halfway[size], run)
        arguments, differs, most = {
            "train": (workshop.train(run), lambda: difference(run, workshop.right[size]), 36),
            "resume": (workshop.train(run), lambda: difference(run, workshop.right[size]), 20),
            "harvest": (workshop.harvest(store), lambda: store_difference(store, workshop.store), 16),
            "eval": (workshop.evaluation(workshop.right[1], report), lambda: report_difference(report, workshop.report), 4),
        }[work]
        before = step_of(run)
        sabotage = Sabotage("kill", 0, generator.randrange(1, most + 1), where=generator.choice(("sync", "write")))
        first = workshop.ranks(arguments, size, sabotage)
        if step_of(run) < before:
            return Outcome(LOST, f"the state of step {before} is gone")
        again = lambda: workshop.ranks(arguments, size)  # noqa: E731
        return settled(first, differs, again, silent=size == 1 and first.killed)

    fault("SIGKILL", "save" if work == "train" else work, size)(inject)


for _work in ("train", "resume", "harvest", "eval"):
    _killed_while_writing(_work)
_killed_while_writing("train", 2)


def _ended_in_harvest(what: str, size: int) -> None:
    """End or stop one rank when it runs a batch of text; then harvest again."""

    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        store = folder / "store"
        arguments = workshop.harvest(store)
        sabotage = Sabotage(what, generator.randrange(size), generator.randrange(1, 4), where="batch")
        first = workshop.ranks(arguments, size, sabotage)
        if None in [status for rank, status in enumerate(first.statuses) if rank != sabotage.rank]:
            return Outcome(WRONG, f"other ranks hang: {first}")
        if what == "terminate" and not first.succeeded and set(first.statuses) != {143}:
            return Outcome(WRONG, f"not all ranks stopped: {first}")
        must_name = not first.succeeded and size > 1 and what in ("kill", "hang", "sleep")
        if must_name and f"rank {sabotage.rank} of {size} ended or does not answer" not in first.message:
            return Outcome(WRONG, f"rank {sabotage.rank} is not named: {first.message[-600:]}")
        differs = lambda: store_difference(store, workshop.store)  # noqa: E731
        return settled(first, differs, lambda: workshop.ranks(arguments, size), size == 1 and what == "kill")

    named = {"kill": "SIGKILL", "hang": "hanging rank", "sleep": "hanging rank", "terminate": "SIGTERM"}
    fault(named[what], "harvest", size)(inject)


_ended_in_harvest("terminate", 1)
for _what in ("kill", "hang", "sleep", "terminate"):
    _ended_in_harvest(_what, 2)


# Rows, clocks, and what else may be wrong.


@fault("NaN rows", "train")
def _nan_in_store(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
    """A shard with a NaN whose checksum fits, as a harvest with a fault in it would leave."""
    from safetensors.torch import load_file, save_file

    from sparsary.sae.files import sha256

    store = workshop.copy(workshop.store, folder / "store")
    path = store / "train-00001.safetensors"
    whole, listed = path.read_bytes(), (store / "manifest.json").read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("x:"))
    tensors[name][generator.randrange(len(tensors[name])), generator.randrange(128)] = float("nan")
    save_file(tensors, path, {"split": "train"})
    manifest = json.loads(listed)
    entry = next(entry for entry in manifest["shards"] if entry["name"] == path.name)
    entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    workshop.write_manifest(store, manifest)
    arguments = workshop.train(folder / "run", store)
    first = workshop.command(arguments)
    path.write_bytes(whole)
    (store / "manifest.json").write_bytes(listed)
    if first.succeeded:
        return Outcome(WRONG, "trained on a row that is not finite")
    return settled(first, lambda: difference(folder / "run", workshop.right[1]), lambda: workshop.command(arguments))


@fault("NaN rows", "harvest")
def _nan_from_model(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
    """A model whose activations are not finite at some tokens: they are left out and counted."""
    from sparsary.training.activations.model import LanguageModel

    real, store, count = LanguageModel.activations, folder / "store", generator.randrange(1, 8)

    def spoiled(model: Any, ids: Any, hooks: Any) -> Any:
        values = real(model, ids, hooks)
        # Of a whole batch; the width is found on a shorter input.
        if not done and len(ids) == RECIPE["harvest"]["batch_contexts"]:
            done.append(True)
            for x in values.values():
                # Leading tokens are excluded anyway.
                x[0, 5 : 5 + count] = generator.choice([float("nan"), float("inf")])
        return values

    done: list[bool] = []
    with mock.patch.object(LanguageModel, "activations", spoiled):
        first = workshop.command(workshop.harvest(store))
    if not first.succeeded:
        return Outcome(WRONG, f"{first.message[-600:]}")
    manifest = json.loads((store / "manifest.json").read_text())
    found = sum(manifest.get("skipped", {}).values())
    if found != count:
        return Outcome(WRONG, f"{count} tokens not finite, counted {found}")
    return Outcome(RIGHT)


@contextmanager
def jumping_clock(generator: random.Random) -> Iterator[None]:
    """Let the wall clock jump by up to ten years, back and forth."""
    real, jumps = time.time, [generator.uniform(-3e8, 3e8) for _ in range(5)]

    def jumped() -> float:
        return real() + generator.choice(jumps)

    with mock.patch("time.time", jumped):
        yield


def _clock(work: str) -> None:
    def inject(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
        run, store = folder / "run", folder / "store"
        if work == "resume":
            workshop.copy(workshop.halfway[1], run)
        if work == "harvest":
            with jumping_clock(generator):
                first = workshop.command(workshop.harvest(store))
            return settled(first, lambda: store_difference(store, workshop.store), lambda: first)
        if work == "eval":
            with jumping_clock(generator):
                first = workshop.evaluate(workshop.right[1], folder / "report")
            return settled(first, lambda: report_difference(folder / "report", workshop.report), lambda: first)
        with jumping_clock(generator):
            first = workshop.command(workshop.train(run))
        return settled(first, lambda: difference(run, workshop.right[1]), lambda: first)

    fault("clock jump", work)(inject)


for _work in ("train", "resume", "harvest", "eval"):
    _clock(_work)


@fault("clock jump", "train", 2)
def _clocks_apart(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
    """Ranks whose clocks are days apart."""
    clocks = (0.0, generator.uniform(-1e6, 1e6))
    first = workshop.ranks(workshop.train(folder / "run"), 2, clocks=clocks)
    return settled(first, lambda: difference(folder / "run", workshop.right[2]), lambda: first)


@fault("folder in use", "resume")
def _in_use(workshop: Workshop, folder: Path, _generator: random.Random) -> Outcome:
    """Another process that holds the run's folder."""
    from sparsary.training.locks import locked

    run = workshop.copy(workshop.halfway[1], folder / "run")
    arguments = workshop.train(run)
    with locked(run, "out_dir"):
        first = workshop.command(arguments)
    return settled(first, lambda: difference(run, workshop.right[1]), lambda: workshop.command(arguments))


@fault("loss not finite", "train")
def _not_finite(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
    """A loss that overflows at one step: the last good state is kept, and the run goes on from it."""
    from sparsary.training.objective import Objective

    real, run, left = Objective.forward, folder / "run", [generator.randrange(6, STEPS)]
    at = left[0]

    def spoiled(objective: Any, batch: Any, usage: Any) -> Any:
        loss, terms = real(objective, batch, usage)
        left[0] -= 1
        if left[0] == 0:
            loss = loss * float("inf")
            terms.named["loss"] = loss.detach()
        return loss, terms

    with mock.patch.object(Objective, "forward", spoiled):
        first = workshop.command(workshop.train(run))
    if first.succeeded:
        return Outcome(WRONG, f"the loss of step {at} was infinite")
    state = state_of(run)
    if state is None or not all(bool(torch.isfinite(tensor.float()).all()) for tensor in state.values()):
        return Outcome(LOST, "the state")
    return settled(first, lambda: difference(run, workshop.right[1]), lambda: workshop.command(workshop.train(run)))


@fault("other recipe on a rank", "train", 2)
def _other_recipe(workshop: Workshop, folder: Path, generator: random.Random) -> Outcome:
    """One rank whose recipe differs: all end with status 2 and one message that names it; nothing is begun."""
    run, rank = folder / "run", generator.randrange(2)
    arguments = workshop.train(run)
    lists = [[*arguments, "lr=0.0005"] if rank == own else arguments for own in range(2)]
    ended = workshop.server.run(lists, folder)
    first = Attempt(ended.statuses, ended.output)
    if first.statuses != [2, 2] or "lr: " not in first.message:
        return Outcome(WRONG, f"{first}")
    return settled(first, lambda: difference(run, workshop.right[2]), lambda: workshop.ranks(arguments, 2))


@fault("resumed on another number", "resume", 2)
def _other_number(workshop: Workshop, folder: Path, _generator: random.Random) -> Outcome:
    """A run of one process that continues on two, to the same weights within rounding."""
    run = workshop.copy(workshop.halfway[1], folder / "run")
    first = workshop.ranks(workshop.train(run), 2)

    def differs() -> str:
        found, right = state_of(run), state_of(workshop.right[1])
        assert found is not None
        assert right is not None
        distance = float((found["dictionary/W_dec"] - right["dictionary/W_dec"]).abs().max())
        return f"W_dec by {distance}" if distance > 1e-3 else ""

    return settled(first, differs, lambda: first)


def choose(
    count: int, generator: random.Random, only: Sequence[str] = (), mounts: bool = True, two: bool = True
) -> list[Fault]:
    """Return ``count`` faults: all of the registry in turn, in a new random order each time."""
    able = [each for each in FAULTS if any(part in f"{each.kind} {each.stage} {each.processes}" for part in only or [""])]
    able = [each for each in able if two or each.processes == 1]
    able = [each for each in able if mounts or each.kind not in ("full disk", "read-only folder")]
    chosen: list[Fault] = []
    while len(chosen) < count:
        chosen += generator.sample(able, min(len(able), count - len(chosen)))
    return chosen
