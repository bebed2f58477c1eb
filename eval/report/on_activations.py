"""Evaluation of a dictionary on activations that are given."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.rows import as_rows
from ...training.activations.tensor_stream import Activations, TensorStream
from ..metrics import GROUPS
from ..metrics.base import DictionaryOutputs, Setting
from ..metrics.inference import DEFAULT_INFERENCE, InferenceMode
from ..sanity import ROWS_AT_ONCE
from ..undefined import settled
from .cache import GroupResult, merged_entries


def given_rows(activations: Activations, dictionary: SparseDictionary) -> tuple[Tensor, Tensor | None]:
    """Return the caller's inputs, and a transcoder's targets, as one tensor each."""
    pair = isinstance(activations, tuple | list) and len(activations) == 2 and not isinstance(activations[0], tuple | list)
    targets = dictionary.arguments()["kind"] not in ("sae", "crosscoder")
    if pair and (targets or isinstance(activations, tuple)):
        x, y = (as_rows(side, "activations") for side in activations)
        return x, y
    if isinstance(activations, Mapping) and "y" in activations:
        activations = {"x": activations["x"], "target": activations["y"]}
    rows = TensorStream(activations, 1, targets).sample(sys.maxsize)
    if not len(rows.x):
        raise ValueError("activations: expected finite numbers, got none: every token has a value that is not finite.")
    return rows.x, rows.target


@torch.no_grad()
def evaluate_tensor(
    dictionary: SparseDictionary, x: Tensor, selection: InferenceMode = DEFAULT_INFERENCE, y: Tensor | None = None
) -> dict[str, Any]:
    """Evaluate a dictionary on given activations: the first half fits, the second half is scored.

    Without ``y``, the targets are ``x``.

    Raises:
        ValueError: If there are fewer than two rows, or targets are missing, superfluous or of the wrong shape.
    """
    half = x.shape[0] // 2
    if half == 0:
        raise ValueError(f"activations: expected at least 2 tokens, got {x.shape[0]}.")
    kind = dictionary.arguments()["kind"]
    if (y is None) != (kind in ("sae", "crosscoder")):
        raise ValueError(f"activations: expected {'a pair (x, y)' if y is None else 'x alone'} for a {kind}.")
    targets = x if y is None else y
    if x.shape[1] != dictionary.d_in:
        raise ValueError(f"activations: expected width {dictionary.d_in}, the dictionary's d_in, got {x.shape[1]}.")
    if targets.shape != (x.shape[0], dictionary.d_out):
        raise ValueError(f"activations: y: expected {(x.shape[0], dictionary.d_out)}, got {tuple(targets.shape)}.")
    for name, rows in (("x", x), ("y", targets)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"activations: {name}: expected finite numbers, got NaN or infinite ones. Leave those rows out.")
    setting = Setting(dictionary, torch.device("cpu"), selection, fit_tokens=half)
    groups = [group(setting) for group in GROUPS if not group.reads_model]
    for rows, wanted in zip(x[:half].float().split(ROWS_AT_ONCE), targets[:half].float().split(ROWS_AT_ONCE), strict=True):
        piece = DictionaryOutputs(setting, None, (rows, wanted))
        for group in groups:
            group.fit(piece)
    for rows, wanted in zip(x[half:].float().split(ROWS_AT_ONCE), targets[half:].float().split(ROWS_AT_ONCE), strict=True):
        piece = DictionaryOutputs(setting, None, (rows, wanted))
        for group in groups:
            group.score(piece)
    return merged_entries(GroupResult(*settled(group.report())) for group in groups)
