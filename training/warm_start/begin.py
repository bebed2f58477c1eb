"""The dictionary that a run with a start begins with, and the record of its start."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from ...sae import SparseDictionary
from ...sae.encoders import encoder_spec
from ...sae.metrics import Moments
from ..activations.stream import ActivationBatch, ActivationStream
from ..recipe import Recipe
from ..recipe.encoder_checks import with_budget
from .alignment import aligned
from .judge import Usage, figures, judged_on, told
from .source import StartSource
from .take_over import TakeOver

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """Dictionary to train, the recipe with its encoder's budget, and the record of its start for the checkpoint."""

    dictionary: SparseDictionary
    recipe: Recipe
    record: dict[str, Any]


def warm_start(
    source: StartSource,
    recipe: Recipe,
    widths: dict[str, int],
    stream: ActivationStream,
    sample: ActivationBatch,
    moments: tuple[Moments, Moments],
) -> WarmStart:
    """Return the dictionary that a run of the recipe begins with, from its start.

    Args:
        source: The start, as it was read.
        widths: Width of every hook of the recipe's dictionary.
        stream: Source of the held-out activations that the dictionary is judged on.
        sample: Activations that decide which latents are kept, the directions of new ones, and calibration.
        moments: Moments of inputs and targets.

    Raises:
        ValueError: If the start does not fit, or the activations are constant.
    """
    section = recipe.dictionary
    source.require_fit(section, widths)
    source = source.fitted(sample)
    read, found = source.dictionary, None
    if source.alignment is not None:
        found = aligned(source.alignment, read, recipe, stream)
        source = replace(source, dictionary=found.dictionary)
    usage = Usage.of(source.dictionary, sample.x)
    completed = with_budget(section.known_encoder, usage.l0 / source.dictionary.n_sites)
    recipe = recipe.model_copy(update={"dictionary": section.model_copy(update={"encoder": completed})})
    taken = TakeOver(source, recipe, widths, sample, moments, usage)
    dictionary = taken.dictionary.eval()
    judged, split = judged_on(stream, recipe)
    record = {
        "path": source.place,
        "content": source.content(),
        "kind": source.kind,
        "encoder": encoder_spec(source.dictionary.encoder),
        "n_latents": source.n_latents,
        "changes": taken.changes,
        "judged_on": split,
        "judged_tokens": len(judged.x),
        "as_read": figures(read, judged),
        "before": figures(dictionary, judged),
    } | ({} if found is None else {"alignment": found.record})
    log.info("%s: starts from %s.", recipe.out_dir, source.words(section))
    if found is not None:
        log.info("%s: %s.", recipe.out_dir, found.words())
    for line in taken.changes:
        log.warning("%s: %s.", recipe.out_dir, line)
    log.info("%s: before training: %s", recipe.out_dir, told(record, "before"))
    return WarmStart(dictionary, recipe, record)
