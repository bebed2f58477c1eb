"""Activations of the same tokens in two models: the one that a dictionary was trained on, and the one of a run.

Rows of each are those of a model that runs on the text, or of an activation store, and are matched by document and position.
Vectors from files are matched by their number. Only training documents are read, from the beginning of the text on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from ..activations.contexts import ContextBatch, context_batches, context_masks
from ..activations.harvested_rows import HarvestedRows, rows_of
from ..activations.model import LanguageModel
from ..activations.shards import LABELS, ActivationStore, RowReader
from ..activations.stream import ActivationBatch, side_by_side
from ..activations.tensor_stream import TensorStream
from ..activations.vector_files import VectorFiles
from ..recipe import AlignSection, HarvestSection, Recipe
from ..text import are_heldout

# Hooks that a dictionary reads and writes.
Sides = tuple[tuple[str, ...], tuple[str, ...]]
# Rows of a store that are searched, as a multiple of the tokens wanted: exclusions and the order of documents may differ.
SEARCHED = 4
# Largest share of rows of equal documents and positions that may hold other tokens: above it, the texts differ.
OTHER_TOKENS = 0.01


def each_once(sides: Sides) -> tuple[str, ...]:
    """Return the hooks of both sides, each once."""
    return tuple(dict.fromkeys((*sides[0], *sides[1])))


@dataclass(frozen=True)
class Pairs:
    """Activations of the same tokens: those that a dictionary was trained on, and the run's."""

    own: ActivationBatch
    runs: ActivationBatch

    def __len__(self) -> int:
        return len(self.own.x)

    def rows(self, part: slice) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(self.own.rows(part), self.runs.rows(part))

    def finite(self) -> "Pairs":
        """Return the pairs without those that have a number which is not finite."""
        both = [side for batch in (self.own, self.runs) for side in (batch.x, batch.target) if side is not None]
        good = torch.stack([torch.isfinite(side).all(1) for side in both]).all(0)
        return Pairs(*(ActivationBatch(b.x[good], None if b.target is None else b.target[good]) for b in (self.own, self.runs)))


def first_contexts(model: LanguageModel, recipe: Recipe, tokens: int) -> list[ContextBatch]:
    """Return contexts from the beginning of the text that hold that many training tokens, or all that there are."""
    found, held = [], 0
    for batch in context_batches(model, recipe.text, recipe.harvest, recipe.harvest.batch_contexts):
        found.append(batch)
        held += int((batch.kept & ~are_heldout(batch.document_ids, recipe.harvest.heldout)).sum())
        if held >= tokens:
            break
    return found


def rows_of_model(model: LanguageModel, batches: Iterable[ContextBatch], recipe: Recipe, sides: Sides) -> HarvestedRows:
    """Run a model on contexts and return the training tokens among them, with their activations at the hooks."""
    section = recipe.harvest.model_copy(update={"gradients": False})
    # Sets the model to see documents as the text is packed.
    context_masks(model, recipe.text, section)
    return HarvestedRows.join([rows_of(model, batch, section, each_once(sides))["train"] for batch in batches])


def rows_of_store(store: ActivationStore, tokens: int, sides: Sides) -> HarvestedRows:
    """Return the first training rows of a store: several times ``tokens``, of which another source may hold some."""
    rows = np.arange(min(SEARCHED * tokens, store.tokens("train")))
    found: dict[str, torch.Tensor] = {}
    for name in (*LABELS, *(f"x:{hook}" for hook in each_once(sides))):
        reader = RowReader(store, "train", name)
        found[name] = reader.gather(rows)
        reader.close()
    return HarvestedRows({name: found.pop(name) for name in LABELS}, found)


def matched_pairs(own: HarvestedRows, runs: HarvestedRows, sides: tuple[Sides, Sides], where: str) -> Pairs:
    """Return the activations of the tokens that both hold, in the order of the text.

    Args:
        sides: Hooks of ``own`` and of ``runs``.
        where: Prefix of errors.

    Raises:
        ValueError: If the tokens of equal documents and positions differ.
    """
    _, *places = np.intersect1d(_keys(own), _keys(runs), return_indices=True)
    first, second = (rows.select(torch.from_numpy(at)) for rows, at in zip((own, runs), places, strict=True))
    same = first.labels["token"] == second.labels["token"]
    if int((~same).sum()) > OTHER_TOKENS * len(first):
        raise ValueError(
            f"{where}: expected the text and the tokenizer of the recipe, got other tokens at {int((~same).sum()):,} of "
            f"{len(first):,} places. Give a store that was harvested from the recipe's text."
        )
    # Behind another context than that of the run, a token's activation is another one.
    same &= first.labels["position"] == second.labels["position"]
    return Pairs(_batch(first.select(same), sides[0]), _batch(second.select(same), sides[1])).finite()


def _keys(rows: HarvestedRows) -> Int[np.ndarray, " tokens"]:
    """Return a number for each token: of its document, and of its place there."""
    document, offset = (rows.labels[key].numpy().astype(np.int64) for key in ("document", "offset"))
    return (document << 32) + offset


def _batch(rows: HarvestedRows, sides: Sides) -> ActivationBatch:
    x, target = (side_by_side([rows.tensors[f"x:{hook}"] for hook in hooks]) for hooks in sides)
    return ActivationBatch(x, None if sides[0] == sides[1] else target)


def aligning_files(align: AlignSection, harvest: HarvestSection) -> VectorFiles:
    """Return the files of ``align.files``, divided as those of ``harvest.files`` are.

    Raises:
        ValueError: If one is missing, damaged, or of another kind.
    """
    section = harvest.model_copy(update={"files": align.files, "column": align.column})
    try:
        return VectorFiles(section)
    except ValueError as error:
        raise ValueError(str(error).replace("harvest.", "dictionary.start.align.")) from None


def pairs_of_files(files: VectorFiles, stream: TensorStream, tokens: int) -> Pairs:
    """Return the first vectors of a run, and those of the same numbers in the files.

    Raises:
        ValueError: If the files hold another number of vectors than those that the run reads, or fewer than are needed.
    """
    if isinstance(stream.tensors, VectorFiles):
        if files.rows != stream.tensors.rows:
            raise ValueError(
                f"dictionary.start.align.files: expected as many vectors as in harvest.files, {stream.tensors.rows:,}, got "
                f"{files.rows:,}. Row i of both must be the same item."
            )
        own: list[torch.Tensor] = []
        for rows in files:
            own.append(rows)
            if sum(map(len, own)) >= tokens:
                break
        first = torch.cat(own)[:tokens]
    else:
        first = files.at(np.arange(min(tokens, files.rows)))
    runs = stream.first(len(first))
    return Pairs(ActivationBatch(first[: len(runs)]), ActivationBatch(runs)).finite()
