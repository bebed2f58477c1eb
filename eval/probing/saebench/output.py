"""Result files of the SAEBench tasks that run offline: k-sparse probing, SCR, TPP and absorption.

The tasks run on the embedded corpus or on the user's labelled text. Probes are penalized logistic regressions fitted to
convergence (SAEBench takes a fixed number of steps), and training and test texts come from the same file. Scores are therefore
comparable between dictionaries evaluated here, not with published ones.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ....sae.formats.hooks import layer_of
from ....sae.formats.origin import public_model
from ..subject import ProbeTarget
from .adapter import SaeBenchAdapter, transformer_lens_hook

# L2 penalty per text, on standardized dimensions, of the probes in SCR and TPP. It acts like SAEBench's early stopping: a
# biased probe then reads all correlated directions and not only the best separating one.
PENALTY = 0.1


@dataclass(frozen=True)
class SaebenchResult:
    """Results of a task: a flat summary, the contents of SAEBench's result file, and a table and notes for the terminal."""

    summary: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    details: list[dict[str, Any]]
    config: dict[str, Any]
    table: tuple[list[str], list[list[str]]]
    notes: tuple[tuple[str, str], ...] = ()


def result_file(subject: ProbeTarget, checkpoint: str, eval_type: str, task: SaebenchResult) -> dict[str, Any]:
    """Return a task's results in SAEBench's format; repeated runs differ only in the time."""
    identity = f"{checkpoint}/{eval_type}/{task.config['random_seed']}"
    return {
        "eval_type_id": eval_type,
        "eval_config": task.config,
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": task.metrics,
        "eval_result_details": task.details,
        "sae_bench_commit_hash": "sparsary",
        "sae_lens_id": None,
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": _config(subject),
        "eval_result_unstructured": None,
    }


def _config(subject: ProbeTarget) -> dict[str, Any]:
    """Return the adapter's configuration; a hook unknown to TransformerLens keeps its sparsary name."""
    try:
        layer, name = transformer_lens_hook(subject.hook, subject.model.id)
    except ValueError:
        layer, name = layer_of(subject.hook) or 0, subject.hook
    model = public_model(subject.model.id) or ""
    return SaeBenchAdapter(subject.dictionary, model, subject.hook, layer, name).cfg.to_dict()
