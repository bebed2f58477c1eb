"""Training logs: JSON lines, the progress of a run and, on request, Weights & Biases. Only this file imports wandb."""

import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from ..sae.errors import writing
from ..sae.extras import needs
from ..sae.files import file_crc32, json_number
from .objective import Terms
from .recipe import Recipe
from .stages import StageProgress
from .state import Logged, TrainState, saved_log

METRICS_FILE = "metrics.jsonl"
# wandb's own files in the run's directory.
WANDB_FOLDER = "wandb"

DAMAGED_LOG = "%s: differs from what the run has logged: damaged or edited. The run's curve and speed may be wrong."

log = logging.getLogger(__name__)


class TrainingLog:
    """Log of one run, called every ``log_every`` steps.

    Each call appends a line to ``metrics.jsonl``; a resumed run first truncates the file to its length in the saved state.

    Args:
        keep: What the file held when the state was saved that the run continues.
        written: False for the ranks of a run whose figures another rank logs.
    """

    # Set by `start`. The benchmark's steps run without.
    stage: StageProgress | None = None

    def __init__(self, recipe: Recipe, directory: Path, keep: Logged, tokens_before: int, written: bool = True):
        self.path = directory / METRICS_FILE if written else Path(os.devnull)
        with writing(self.path):
            self.crc32 = zlib.crc32(_cut(self.path, keep)) if written else 0
            self.handle = self.path.open("a", encoding="utf-8")
        self.total, self.tokens_before = recipe.tokens, tokens_before
        self.started = time.perf_counter()
        self.last = (self.started, tokens_before)
        self.latest: dict[str, Any] = {}
        self.name = directory.name
        self.wandb = _start_wandb(recipe, directory) if recipe.wandb and written else None

    def start(self) -> None:
        """Show the run's progress from now on."""
        self.stage = StageProgress(f"training {self.name}", self.total, done=self.tokens_before)

    def advance(self, tokens: int) -> None:
        """Record the number of tokens trained on, after every step."""
        if self.stage is not None:
            self.stage.update(tokens)

    def __call__(self, state: TrainState, terms: Terms, lr: float, waited_seconds: float) -> None:
        now = time.perf_counter()
        speed = (state.tokens - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, state.tokens)
        row = {name: json_number(float(value)) for name, value in terms.named.items()}
        row["dead"] = state.dead_share()
        row |= {
            "step": state.step,
            "tokens": state.tokens,
            "lr": lr,
            "tokens_per_second": speed,
            "data_wait_share": waited_seconds / max(now - self.started, 1e-9),
        }
        self.latest = row
        line = json.dumps(row) + "\n"
        self.crc32 = zlib.crc32(line.encode(), self.crc32)
        with writing(self.path):
            self.handle.write(line)
        if self.stage is not None:
            self.stage.update(state.tokens, f"fvu {row['fvu']:.4g}  l0 {row['l0']:.4g}  dead {row['dead']:.3g}")
            if state.tokens >= self.total:
                self.stage.close()
        if (run := self.wandb) is not None:
            self._tell_wandb(lambda: run.log(row, step=state.step))

    def _tell_wandb(self, tell: Callable[[], Any]) -> None:
        """Call wandb; if it fails, the run continues without it, since ``metrics.jsonl`` holds everything."""
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - wandb's own errors, its service's and the connection's
            reason = " ".join(str(error).split())[:300]
            log.warning(
                "wandb: logging to it failed, the run continues without it (%s: %s); all is in %s.",
                type(error).__name__,
                reason,
                self.path,
            )
            self.wandb = None

    def flush(self) -> Logged:
        """Flush the lines to disk and return what the file holds."""
        with writing(self.path):
            self.handle.flush()
            return Logged(self.handle.tell(), f"{self.crc32:08x}")

    def close(self) -> None:
        if self.stage is not None:
            self.stage.close(failed=self.stage.done < self.total)
        # Lines lost here belong to no saved state, and the error that ended the run gives the reason.
        with suppress(OSError):
            self.handle.close()
        if self.wandb is not None:
            self._tell_wandb(self.wandb.finish)


def require_wandb(recipe: Recipe) -> None:
    """Check, before any work, that a recipe's run can be logged to Weights & Biases.

    Raises:
        ValueError: If the package is missing, or the run would go to a server that accepts no login from this machine.
    """
    if recipe.wandb is None:
        return
    wandb = _wandb()
    from_environment = wandb.setup().settings.mode
    if (recipe.wandb.mode or from_environment) not in ("online", "run", "shared"):
        return
    # Without a prompt, a missing key fails here and not after the harvest.
    quietly = {"prompt": False} if "prompt" in signature(wandb.login).parameters else {}
    remedy = "Run `wandb login` or set WANDB_API_KEY; or set wandb.mode: offline (or WANDB_MODE=offline)."
    try:
        with redirect_stderr(io.StringIO()):
            logged_in = wandb.login(**quietly, verify=True)
    except Exception as error:  # noqa: BLE001 - wandb's own errors, the connection's, the library's for requests
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"wandb: the server rejected the login ({reason}). {remedy}") from None
    # If the environment disables wandb but the recipe enables it, a failed login here is not conclusive.
    if not logged_in and from_environment in ("online", "run", "shared"):
        raise ValueError(f"wandb: not logged in. {remedy}")


def _cut(path: Path, keep: Logged) -> bytes:
    """Shorten a file of lines to what was saved, or to the whole lines before it if some were lost, and return what is left."""
    path.touch()
    with path.open("r+b") as handle:
        found = handle.read(keep.bytes)
        whole = found.rfind(b"\n") + 1
        if whole < keep.bytes:
            log.warning(
                "%s: expected %d bytes of whole lines, got %d: lines were lost since the last save.", path, keep.bytes, whole
            )
        elif keep.crc32 not in (None, f"{zlib.crc32(found):08x}"):
            log.warning(DAMAGED_LOG, path)
        handle.truncate(whole)
    return found[:whole]


def check_log(directory: Path) -> None:
    """Log a warning if a run's ``metrics.jsonl`` differs from what was written until its state was saved."""
    path = directory / METRICS_FILE
    try:
        keep = saved_log(directory)
        if keep.crc32 not in (None, file_crc32(path, keep.bytes)):
            log.warning(DAMAGED_LOG, path)
    except (ValueError, OSError):
        # Without a state nobody knows what was logged.
        return


def _wandb() -> Any:
    # Imported lazily: it takes a second, and most runs do not use it.
    with needs("wandb in a recipe"):
        import wandb
    return wandb


def _start_wandb(recipe: Recipe, directory: Path) -> Any:
    assert recipe.wandb is not None
    try:
        return _wandb().init(
            project=recipe.wandb.project,
            name=recipe.wandb.name,
            # Otherwise the second run of a process would end the first.
            reinit="create_new",
            # None leaves the mode to the environment's WANDB_MODE.
            mode=recipe.wandb.mode,
            dir=str(directory),
            config=recipe.model_dump(mode="json"),
            # The same directory continues the same wandb run.
            id=directory.resolve().as_posix().replace("/", "-").strip("-")[-64:],
            resume="allow",
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"wandb: the run could not be started ({type(error).__name__}: {reason}). Check the login and the connection, set "
            "wandb.mode: offline, or leave wandb out; harvested activations are kept, and the same command continues."
        ) from error
