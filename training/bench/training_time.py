"""Seconds per step of whole training runs on random activations."""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..recipe.grid import check_grid
from ..report import METRICS_FILE
from ..resolve_hooks import resolve_recipes
from ..run import train_all


def seconds_per_step(values: dict[str, Any], batches: list[Tensor] | list[tuple[Tensor, Tensor]]) -> float:
    """Train a recipe or grid on a CPU and return the seconds of one of the last ``log_every`` steps, those of all members.

    The time covers reading, steps, and logging, but neither start-up nor saving.
    """
    own = {"lr_warmup_steps": 0, "save_every": 10**9, "model": {"device": "cpu"}}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        recipes = resolve_recipes(check_grid(values | own | {"out_dir": str(Path(folder) / "runs")}, "bench").recipes)
        # The first member's log: no other member saves between its entries.
        directory = train_all(recipes, batches)[0]
        last = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    return values["batch_tokens"] / last["tokens_per_second"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and log messages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
