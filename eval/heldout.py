"""Held-out text, and what a model has at its hooks there: what every evaluation on a model starts from."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ..training.activations.contexts import context_batches
from ..training.activations.limits import context_problems, tokenizer_problems
from ..training.activations.model import LanguageModel, load_model
from ..training.bad_rows import BadTexts, BadTokens
from ..training.recipe import HarvestSection, ModelSection, TextSection
from ..training.shortfalls import Shortfall, recorded, shortfall, shortfalls_together
from ..training.text import Cursor

log = logging.getLogger(__name__)

# Logits over a large vocabulary dominate memory; eight contexts of 128 tokens and GPT-2's vocabulary are 0.2 GB.
BATCH_CONTEXTS = 8
DEFAULT_TOKENS = 200_000
FRUITLESS_CONTEXTS = 1000
# Text too short for what was asked is read in batches so small that there are as many as this.
FEWEST_BATCHES = 16
# The least part of it that is to be left to score when documents are kept whole.
LEAST_SCORED = 0.25


@dataclass(frozen=True)
class TextBatch:
    """A few contexts on the model's device: what the model saw, and which positions count."""

    token_ids: Tensor
    kept: Tensor
    # Kept positions whose next token is of the same document.
    counted: Tensor
    cursor: Cursor
    documents: set[int]
    # The document of every position, -1 at special ones; on the host.
    document_ids: np.ndarray


@dataclass(frozen=True)
class EvalData:
    """What a checkpoint's provenance says about where to judge it: the model, the text, what is left out of it."""

    model: LanguageModel
    text: TextSection
    exclusions: HarvestSection

    @cached_property
    def bad_texts(self) -> BadTexts:
        """Rows of the text that could not be read."""
        return BadTexts(self.text)

    @cached_property
    def bad_tokens(self) -> BadTokens:
        """Tokens at which the model's activations are not finite."""
        return BadTokens(self.exclusions)

    def pieces(self, start: Cursor, tokens: int, size: int = BATCH_CONTEXTS) -> Iterator[TextBatch]:
        """Held-out contexts from ``start`` on, ``size`` at a time, until so many tokens were kept."""
        return text_batches(self.model, self.text, self.exclusions, start, tokens, size, self.bad_texts)

    def halves(self, tokens: int) -> "Halves":
        """Cut ``tokens`` held-out tokens, or all there are if they are fewer, in one half to fit on and one to score."""
        half = tokens // 2
        # The embedded corpus has no end, and of other text there is mostly enough.
        ends = [] if self.text.source == "embedded" else self._ends(half, tokens - half)
        if not ends:
            return Halves(self, tokens, half, tokens - half, BATCH_CONTEXTS)
        have, size = sum(kept for kept, _ in ends), BATCH_CONTEXTS
        if have < tokens:
            # No batch may hold so much that nothing is left for the other half.
            half, size = have // 2, min(BATCH_CONTEXTS, max(1, len(ends) // FEWEST_BATCHES))
        score = min(have, tokens) - half
        return Halves(self, tokens, half, score, size, within=_after(ends, half, size) < LEAST_SCORED * score)

    def _ends(self, fit: int, score: int) -> list[tuple[int, Cursor]]:
        """Of every held-out context the tokens kept and where it ends; empty if there are as many as are to be scored."""
        found: list[tuple[int, Cursor]] = []
        kept = 0
        for batch in context_batches(self.model, self.text, self.exclusions, 1, heldout=True):
            found.append((int(batch.kept.sum()), batch.cursor))
            kept += found[-1][0]
            if len(found) % BATCH_CONTEXTS == 0 and kept >= fit + score and _after(found, fit, BATCH_CONTEXTS) >= score:
                return []
            if not kept and len(found) >= FRUITLESS_CONTEXTS:
                break
        return found


def _after(ends: Sequence[tuple[int, Cursor]], fit: int, size: int) -> int:
    """Tokens behind the document in which the first ``fit`` tokens end, read in batches of ``size`` contexts."""
    before = np.cumsum([kept for kept, _ in ends])
    place = min(len(ends), -(-(int(np.searchsorted(before, fit)) + 1) // size) * size)
    document = ends[place - 1][1].document
    return sum(kept for (_, begin), (kept, _) in itertools.pairwise(ends[place - 1 :]) if begin.document > document)


class Halves:
    """Held-out text in two parts: ``fit`` is to be read first, then ``score``; each may be read again.

    No document is in both, unless documents are so few that hardly anything would be left to score: ``within`` then says that
    one is cut. ``fitted`` and ``scored`` count the tokens that were read.
    """

    def __init__(self, data: EvalData, asked: int, fit_tokens: int, score_tokens: int, size: int, within: bool = False):
        self.data, self.asked, self.size, self.within = data, asked, size, within
        self.fit_tokens, self.score_tokens = fit_tokens, score_tokens
        self.fitted = self.scored = 0
        self.scored_from = Cursor(0, 0)

    def fit(self) -> Iterator[TextBatch]:
        """Read the part to fit on.

        Raises:
            ValueError: After it, if there was no token in it.
        """
        self.fitted = 0
        for piece in self.data.pieces(Cursor(0, 0), self.fit_tokens, self.size):
            self.fitted += int(piece.kept.sum())
            yield piece
            self.scored_from = piece.cursor if self.within else Cursor(piece.cursor.document + 1, 0)
        if not self.fitted:
            raise ValueError(
                "text: no held-out document was found. Raise harvest.heldout, give longer text, or name another: --text FILE."
            )

    def score(self) -> Iterator[TextBatch]:
        """Read the part to score.

        Raises:
            ValueError: After it, if there was no token in it.
        """
        self.scored = 0
        for piece in self.data.pieces(self.scored_from, self.score_tokens, self.size):
            self.scored += int(piece.kept.sum())
            yield piece
        if not self.scored:
            raise ValueError(
                f"text: the held-out documents hold only {self.fitted} tokens, not the {self.asked} asked for, and none was "
                "left to score. Raise harvest.heldout, give longer text, or name another: --text FILE."
            )


def eval_data(provenance: dict[str, Any], hooks: Sequence[str]) -> EvalData:
    """Where a dictionary is judged that was trained at these hooks.

    Raises:
        ValueError: If the model cannot be had, or contexts or tokenizer do not fit it.
    """
    text = TextSection.model_validate(provenance["text"])
    exclusions = HarvestSection(hooks=tuple(dict.fromkeys(hooks)), tokens=1, **provenance["harvest"])
    model = load_model(ModelSection.model_validate(provenance["model"]))
    problems = [*context_problems(model, text.context_length), *tokenizer_problems(model, model.tokenizer, text)]
    if problems:
        raise ValueError("\n".join(problems))
    return EvalData(model, text, exclusions)


def text_batches(
    model: LanguageModel,
    text: TextSection,
    section: HarvestSection,
    start: Cursor,
    tokens: int,
    size: int = BATCH_CONTEXTS,
    bad: BadTexts | None = None,
) -> Iterator[TextBatch]:
    """Held-out contexts from ``start`` on, ``size`` at a time, until so many tokens were kept."""
    kept_tokens = seen = 0
    for batch in context_batches(model, text, section, size, start, heldout=True, bad=bad):
        at = batch.on(model.device)
        yield TextBatch(at.token_ids, at.kept, at.counted, batch.cursor, batch.documents, batch.document_ids)
        kept_tokens += int(batch.kept.sum())
        seen += len(batch.token_ids)
        if kept_tokens == 0 and seen >= FRUITLESS_CONTEXTS:
            # Text may be endless; without any token that counts, so would be the search.
            raise ValueError(
                f"text: expected tokens to judge on, got none in {seen} contexts: all are special or excluded. Lower "
                "harvest.exclude_leading, raise text.context_length, or give other text."
            )
        if kept_tokens >= tokens:
            return


def logits_and_activations(
    model: LanguageModel, token_ids: Int[Tensor, "contexts positions"], hooks: Sequence[str]
) -> tuple[Float[Tensor, "contexts positions vocabulary"], dict[str, Tensor]]:
    """What the untouched model predicts, and what it has at each hook, in one pass."""
    seen: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], None]:
        # Modules above may write into what they get; the copy is ours.
        return lambda x: seen.update({hook: x.clone()})

    with model.hooked({hook: keep(hook) for hook in hooks}):
        logits = model.logits(token_ids)
    return logits, seen


def require_widths(model: LanguageModel, hooks: Sequence[str], widths: Sequence[int], name: str) -> None:
    """Raise ``ValueError`` unless the model's tensors have the widths that a dictionary's ``name`` (d_in, d_out) says."""
    found = model.widths(tuple(dict.fromkeys(hooks)))
    for hook, width in zip(hooks, widths, strict=True):
        if found[hook] != width:
            raise ValueError(f"{hook}: expected width {width}, the dictionary's {name}, got {found[hook]} from {model.id}.")


def wanted_tokens(provenance: dict[str, Any], tokens: int | None) -> int:
    """How many tokens to judge on: as asked for, else as the recipe says."""
    return tokens or provenance.get("recipe", {}).get("eval_tokens", DEFAULT_TOKENS)


def eval_shortfalls(asked: int, scored: int, shared_documents: int) -> list[Shortfall]:
    """Return what an evaluation had too little of.

    Args:
        asked: The tokens asked for, half of them to be scored.
        scored: The tokens that were.
        shared_documents: Documents of which one part was fitted on and another scored.
    """
    wanted = asked - asked // 2
    found = shortfall("eval_tokens", wanted, scored, "scored tokens", f"half of {asked:,}, but the held-out text is short")
    if shared_documents:
        words = "there are too few, and one is partly fitted on and partly scored"
        found.append(Shortfall("harvest.heldout", 2, 1, "held-out documents at least", words, serious=True))
    return found


def told_shortfalls(name: str, sources: Sequence[Mapping[str, Any]], found: Sequence[Shortfall]) -> dict[str, list[str]]:
    """What there was too little of, in training and in evaluation: logged, and as entries of a report."""
    # What training foresaw for an evaluation has come, or not.
    trained = [[each for each in recorded(source) if each.key != "eval_tokens"] for source in sources]
    every = shortfalls_together(*trained, found)
    for each in every:
        log.warning("%s: %s.", name, each)
    return {"shortfalls": list(map(str, every)), "doubts": [str(each) for each in every if each.doubtful]}
