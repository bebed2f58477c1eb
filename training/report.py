"""Training logs: JSON lines, a progress bar on a terminal and, on request, Weights & Biases. Only this file imports wandb."""

import io
import json
import logging
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..sae.errors import writing
from ..sae.extras import needs
from ..sae.files import json_number
from .objective import Terms
from .recipe import Recipe
from .state import TrainState

METRICS_FILE = "metrics.jsonl"
# wandb's own files in the run's directory.
WANDB_FOLDER = "wandb"

log = logging.getLogger(__name__)


class TrainingLog:
    """Log of one run, called every ``log_every`` steps.

    Each call appends a line to ``metrics.jsonl``; a resumed run first truncates the file to its length in the saved state.
    ``progress`` is the terminal's progress bar, shared by all runs of the process.
    """

    def __init__(self, recipe: Recipe, directory: Path, keep_bytes: int, tokens_before: int, progress: Progress):
        self.path = directory / METRICS_FILE
        with writing(self.path):
            self.path.touch()
            with self.path.open("r+b") as handle:
                handle.truncate(keep_bytes)
            self.handle = self.path.open("a", encoding="utf-8")
        self.total = recipe.tokens
        self.tokens_before = tokens_before
        self.started = time.perf_counter()
        self.last = (self.started, tokens_before)
        self.latest: dict[str, Any] = {}
        self.progress, self.name = progress, directory.name
        self.task = progress.add_task(self.name, total=recipe.tokens, completed=tokens_before, stats="")
        self.wandb = _start_wandb(recipe, directory) if recipe.wandb else None

    def __call__(self, state: TrainState, terms: Terms, lr: float, waited_seconds: float) -> None:
        now = time.perf_counter()
        speed = (state.tokens - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, state.tokens)
        row = {name: json_number(float(value)) for name, value in terms.named.items()}
        row["dead"] = float(state.dead.double().mean())
        row |= {
            "step": state.step,
            "tokens": state.tokens,
            "lr": lr,
            "tokens_per_second": speed,
            "data_wait_share": waited_seconds / max(now - self.started, 1e-9),
        }
        self.latest = row
        with writing(self.path):
            self.handle.write(json.dumps(row) + "\n")
        stats = f"fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  dead {row['dead']:.3f}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=state.tokens, stats=stats)
        if not self.progress.console.is_terminal:
            log.info("%s: %d of %d tokens  %s", self.name, state.tokens, self.total, stats)
        if (run := self.wandb) is not None:
            self._tell_wandb(lambda: run.log(row, step=state.step))

    def _tell_wandb(self, tell: Callable[[], Any]) -> None:
        """Call wandb; if it fails, the run continues without it, since ``metrics.jsonl`` holds everything."""
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - wandb's own errors, its service's and the connection's
            reason = " ".join(str(error).split())[:300]
            log.warning("wandb: the run goes on without it (%s: %s); all is in %s.", type(error).__name__, reason, self.path)
            self.wandb = None

    def flush(self) -> int:
        """Flush the lines to disk and return the length of the file in bytes."""
        with writing(self.path):
            self.handle.flush()
            return self.handle.tell()

    def close(self) -> None:
        # Lines lost here belong to no saved state, and the error that ended the run gives the reason.
        with suppress(OSError):
            self.handle.close()
        if self.wandb is not None:
            self._tell_wandb(self.wandb.finish)


def progress_bar() -> Progress:
    """Return a context manager: one progress bar per run on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[stats]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal)


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
        raise ValueError(f"wandb: the server takes no login from here ({reason}). {remedy}") from None
    # If the environment disables wandb but the recipe enables it, a failed login here is not conclusive.
    if not logged_in and from_environment in ("online", "run", "shared"):
        raise ValueError(f"wandb: not logged in. {remedy}")


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
            "wandb.mode: offline, or leave wandb out; what was harvested is kept, the same command goes on."
        ) from error
