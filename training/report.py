"""Numbers out: JSON lines always, a progress bar on a terminal, Weights & Biases when asked. Only this file imports wandb."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..sae.extras import needs
from ..sae.files import json_number
from .objective import Terms
from .recipe import Recipe
from .state import TrainState

METRICS_FILE = "metrics.jsonl"
# Where wandb keeps its files, in the run's directory.
WANDB_FOLDER = "wandb"

log = logging.getLogger(__name__)


class TrainingLog:
    """Called every ``log_every`` steps. ``metrics.jsonl`` grows by a line; a resume cuts it back to the saved state.

    ``progress`` is the terminal's, shared by all runs that are under way.
    """

    def __init__(self, recipe: Recipe, directory: Path, keep_bytes: int, tokens_before: int, progress: Progress):
        self.path = directory / METRICS_FILE
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
        self.handle.write(json.dumps(row) + "\n")
        stats = f"fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  dead {row['dead']:.3f}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=state.tokens, stats=stats)
        if not self.progress.console.is_terminal:
            log.info("%s: %d of %d tokens  %s", self.name, state.tokens, self.total, stats)
        if self.wandb is not None:
            self.wandb.log(row, step=state.step)

    def flush(self) -> int:
        """Bring the lines to the disk; returns the file's length."""
        self.handle.flush()
        return self.handle.tell()

    def close(self) -> None:
        self.handle.close()
        if self.wandb is not None:
            self.wandb.finish()


def progress_bar() -> Progress:
    """A bar for every run on a terminal, nothing elsewhere. To be entered."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[stats]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _start_wandb(recipe: Recipe, directory: Path) -> Any:
    # Imported here: it takes a second, and most runs do without.
    with needs("wandb in a recipe"):
        import wandb

    assert recipe.wandb is not None
    return wandb.init(
        project=recipe.wandb.project,
        name=recipe.wandb.name,
        # Without this the second run of a process would end the first.
        reinit="create_new",
        mode=recipe.wandb.mode,
        dir=str(directory),
        config=recipe.model_dump(mode="json"),
        # The same directory continues the same wandb run.
        id=directory.resolve().as_posix().replace("/", "-").strip("-")[-64:],
        resume="allow",
    )
