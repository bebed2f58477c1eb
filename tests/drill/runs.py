"""Runs that the drill disturbs: what they should give, copies of them to damage, and the command line in this process."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ranks import RankServer, Sabotage
from safetensors import SafetensorError
from safetensors.torch import load_file

HOOK = "transformer.h.2:out"
STATE, DICTIONARY = "state.safetensors", "dictionary.safetensors"
RECIPE: dict[str, Any] = {
    "text": {"context_length": 32},
    "harvest": {"hooks": [HOOK], "tokens": 1500, "shard_tokens": 500, "exclude_leading": 2, "batch_contexts": 8},
    "dictionary": {"hook": HOOK, "n_latents": 67, "encoder": {"name": "batch_topk", "k": 5}},
    "tokens": 2000,
    "batch_tokens": 100,
    "lr_warmup_steps": 5,
    "dead_after_tokens": 500,
    "calibration_tokens": 400,
    "log_every": 5,
    "save_every": 5,
    "eval_tokens": 60,
}
STEPS = RECIPE["tokens"] // RECIPE["batch_tokens"]
# Step at which the runs were stopped that faults of resuming begin with.
STOPPED_AT = 10


@dataclass(frozen=True)
class Attempt:
    """One call of the command: exit status of every rank, and what it printed on standard error."""

    statuses: list[int | None]
    message: str
    parts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def succeeded(self) -> bool:
        return all(status == 0 for status in self.statuses)

    @property
    def killed(self) -> bool:
        return any(status is not None and status < 0 for status in self.statuses)


def state_of(run: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a run's state; ``None`` if there is none."""
    path = run / STATE
    return load_file(path) if path.exists() else None


def step_of(run: Path) -> int:
    """Return the step of a run's state; 0 without one."""
    from sparsary.training.state import saved_step

    return saved_step(run) if (run / STATE).exists() else 0


def figures(run: Path) -> list[dict[str, Any]]:
    """Return what a run logged, without what depends on the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "data_wait_share")} for line in lines
    ]


def difference(run: Path, right: Path) -> str:
    """Return how a finished run differs from the right one; empty if it does not."""
    for name in (STATE, DICTIONARY, "usage.safetensors"):
        try:
            found, wanted = load_file(run / name), load_file(right / name)
        except (OSError, SafetensorError) as error:
            return f"{name}: {error}"
        if found.keys() != wanted.keys():
            return f"{name}: other tensors"
        if other := [key for key in found if not torch.equal(found[key], wanted[key])]:
            return f"{name}: {', '.join(other)}"
    return "" if figures(run) == figures(right) else "metrics.jsonl"


def shards_of(store: Path) -> list[tuple[str, str]]:
    """Return name and digest of every shard of a store, as found in the folder."""
    from sparsary.sae.files import sha256

    return [(path.name, sha256(path)) for path in sorted(store.glob("*.safetensors"))]


def store_difference(store: Path, right: Path) -> str:
    """Return how a store differs from the right one; empty if it does not."""
    if shards_of(store) != shards_of(right):
        return "shards"
    found, wanted = (json.loads((each / "manifest.json").read_text()) for each in (store, right))
    other = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key) and key != "checksum"]
    return (
        f"manifest.json: {', '.join(f'{key}: {found.get(key)}, not {wanted.get(key)}'[:300] for key in other)}" if other else ""
    )


def report_difference(report: Path, right: Path, name: str = "report.json") -> str:
    """Return how an evaluation differs from the right one; empty if it does not."""
    try:
        found, wanted = (json.loads((each / name).read_text()) for each in (report, right))
    except (OSError, ValueError) as error:
        return f"{name}: {error}"
    return "" if _results(found) == _results(wanted) else name


def _results(report: Any) -> Any:
    """Return a report without what depends on the time and the place."""
    if isinstance(report, dict):
        left_out = (
            "seconds",
            "checkpoint",
            "directory",
            "date",
            "time",
            "command",
            "hardware",
            "started",
            "out_dir",
            "report_path",
            "checksum",
        )
        return {key: _results(value) for key, value in report.items() if key not in left_out}
    return [_results(each) for each in report] if isinstance(report, list) else report


class Tmpfs:
    """A folder on a file system of its own, whose size and rights can be changed; needs root."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "Tmpfs":
        self.folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.folder)], check=True)
        return self

    def limit(self, bytes_: int) -> None:
        self._remount(f"size={max(bytes_, 4096)}")

    def read_only(self, wanted: bool) -> None:
        self._remount("ro" if wanted else "rw")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def __exit__(self, *_error: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def can_mount() -> bool:
    """Return True if this process may mount a file system."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Tmpfs(Path(folder) / "probe"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


class Workshop:
    """Everything that faults share: right results, runs stopped halfway, the store, and the server of ranks."""

    def __init__(self, folder: Path):
        self.folder, self.server = folder, RankServer()
        self.mounts = can_mount()
        self.store = folder / "store"
        self.right: dict[int, Path] = {}
        self.halfway: dict[int, Path] = {}
        self.report = folder / "report"
        # Two reports and their comparison.
        self.reports = folder / "reports"

    def prepare(self, sizes: set[int], stages: set[str]) -> None:
        """Make the right results that faults of these numbers of processes and these stages need."""
        arguments = self.train(self.folder / "right1")
        self._must(self.command(arguments))
        self.right[1] = self.folder / "right1"
        if stages & {"eval", "compare"}:
            self._must(self.evaluate(self.folder / "right1", self.report))
            for name in ("a", "b"):
                self.copy(self.report, self.reports / name)
            self._must(self.compare(self.reports))
        # A run in two processes may go on in one.
        for size in sorted(sizes | {1}) if "resume" in stages else ():
            half = self.folder / f"halfway{size}"
            stopped = self.ranks(self.train(half), size, Sabotage("terminate", size - 1, STOPPED_AT))
            assert set(stopped.statuses) == {143}, stopped
            assert step_of(half) == STOPPED_AT
            self.halfway[size] = half
        if 2 in sizes:
            self.right[2] = self.folder / "right2"
            self._must(self.ranks(self.train(self.right[2]), 2))

    def _must(self, attempt: Attempt) -> None:
        assert attempt.succeeded, attempt

    def train(self, run: Path, store: Path | None = None, *overrides: str) -> list[str]:
        """Return the arguments of ``sparsary`` that train into ``run``."""
        values = RECIPE | {"harvest": RECIPE["harvest"] | {"store": str(store or self.store)}, "out_dir": str(run)}
        path = run.with_name(f"{run.name}.recipe.yaml")
        path.write_text(json.dumps(values), encoding="utf-8")
        return ["train", str(path), *overrides]

    def harvest(self, store: Path) -> list[str]:
        """Return the arguments of ``sparsary`` that harvest into ``store``."""
        return ["harvest", self.train(store.with_name("unused"), store)[1]]

    def evaluation(self, run: Path, report: Path) -> list[str]:
        """Return the arguments of ``sparsary`` that evaluate ``run``."""
        return ["eval", str(run), "--out", str(report)]

    def evaluate(self, run: Path, report: Path) -> Attempt:
        return self.command(self.evaluation(run, report))

    def compare(self, reports: Path) -> Attempt:
        """Compare two reports, a and b."""
        return self.command(["compare", str(reports / "a"), str(reports / "b"), "--out", str(reports / "comparison")])

    def write_manifest(self, store: Path, manifest: dict[str, Any]) -> None:
        """Write a store's manifest as the harvest does."""
        from sparsary.sae.files import write_json

        write_json(store / "manifest.json", manifest)

    def clear(self, folder: Path) -> None:
        """Remove a fault's folder."""
        shutil.rmtree(folder, ignore_errors=True)

    def copy(self, source: Path, to: Path) -> Path:
        shutil.copytree(source, to, dirs_exist_ok=True)
        return to

    def command(self, arguments: Sequence[str]) -> Attempt:
        """Run the command line in this process."""
        import sparsary

        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv, status = ["sparsary", *arguments], 0
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            try:
                sparsary.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                sys.argv = before
        return Attempt([status], err.getvalue(), [err.getvalue()])

    def ranks(
        self, arguments: Sequence[str], size: int, sabotage: Sabotage | None = None, clocks: tuple[float, ...] = ()
    ) -> Attempt:
        """Run the command line in new processes, as ranks of one run if there are several."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        ended = self.server.run([list(arguments)] * size, folder, sabotage, clocks)
        shutil.rmtree(folder)
        return Attempt(ended.statuses, ended.output, ended.parts, ended.seconds)
