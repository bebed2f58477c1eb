"""Tasks after SAEBench that need no hub and no API: k-sparse probing, spurious correlations, targeted perturbation, absorption.

On passages of the embedded corpus, or on labelled text of the user's. Probes are penalised logistic regressions fitted to the
optimum, where SAEBench takes a fixed number of steps, and train and test texts are drawn from the same file: figures are
comparable between dictionaries judged here, not with published ones.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ....sae.formats.hooks import layer_of
from ....sae.formats.origin import public_model
from ..subject import ProbeTarget
from .adapter import SaeBenchAdapter, transformer_lens_hook

# Per text, on standardised dimensions, for the probes that interventions are to change: as if stopped early, like SAEBench's,
# so that a biased probe reads all that coincides and not only what separates best.
PENALTY = 0.1


@dataclass(frozen=True)
class SaebenchResult:
    """A task's figures, flat; what belongs in SAEBench's result file; and lines for a terminal."""

    summary: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    details: list[dict[str, Any]]
    config: dict[str, Any]
    lines: list[tuple[str, str]]


def result_file(subject: ProbeTarget, checkpoint: str, eval_type: str, task: SaebenchResult) -> dict[str, Any]:
    """A task's results as SAEBench writes them; only the time differs from one run to the next."""
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
    """The adapter's configuration; a hook that TransformerLens has no name for goes by our name."""
    try:
        layer, name = transformer_lens_hook(subject.hook, subject.model.id)
    except ValueError:
        layer, name = layer_of(subject.hook) or 0, subject.hook
    model = public_model(subject.model.id) or ""
    return SaeBenchAdapter(subject.dictionary, model, subject.hook, layer, name).cfg.to_dict()
