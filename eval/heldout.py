"""Held-out text and the model's activations on it: the input of every evaluation that runs a model."""

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
from ..training.activations.model import LanguageModel, each_model, load_model
from ..training.bad_rows import BadTexts, BadTokens
from ..training.recipe import HarvestSection, ModelSection, TextSection
from ..training.shortfalls import Shortfall, recorded, shortfall, shortfalls_together
from ..training.text import Cursor, require_text

log = logging.getLogger(__name__)

# Logits dominate memory: those of eight contexts of 128 tokens with GPT-2's vocabulary take 0.2 GB.
BATCH_CONTEXTS = 8
DEFAULT_TOKENS = 200_000
FRUITLESS_CONTEXTS = 1000
# Text shorter than the requested tokens is read in batches small enough to give at least this many.
FEWEST_BATCHES = 16
# If whole documents leave less than this share of the scoring tokens, one document is cut between the halves.
LEAST_SCORED = 0.25


@dataclass(frozen=True)
class TextBatch:
    """A batch of held-out contexts, on the model's device.

    ``kept`` masks positions that are evaluated; ``counted`` masks the kept ones whose next token belongs to the same document,
    where the LM loss is defined. ``document_ids`` stays on the host and is -1 at special tokens.
    """

    token_ids: Tensor
    kept: Tensor
    counted: Tensor
    cursor: Cursor
    documents: set[int]
    document_ids: np.ndarray


@dataclass(frozen=True)
class EvalData:
    """Language model, text source, and token filters used to evaluate a checkpoint, read from its provenance."""

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
        """Yield held-out contexts from ``start`` on, ``size`` at a time, until ``tokens`` tokens are kept."""
        return text_batches(self.model, self.text, self.exclusions, start, tokens, size, self.bad_texts)

    def halves(self, tokens: int) -> "Halves":
        """Split ``tokens`` held-out tokens, or all if there are fewer, into one half to fit on and one to score."""
        half = tokens // 2
        # The embedded corpus is endless, so its documents need not be counted.
        ends = [] if self.text.source == "embedded" else self._ends(half, tokens - half)
        if not ends:
            return Halves(self, tokens, half, tokens - half, BATCH_CONTEXTS)
        have, size = sum(kept for kept, _ in ends), BATCH_CONTEXTS
        if have < tokens:
            # Small batches, so that the first half does not use up the text of the second.
            half, size = have // 2, min(BATCH_CONTEXTS, max(1, len(ends) // FEWEST_BATCHES))
        score = min(have, tokens) - half
        return Halves(self, tokens, half, score, size, within=_after(ends, half, size) < LEAST_SCORED * score)

    def _ends(self, fit: int, score: int) -> list[tuple[int, Cursor]]:
        """Return kept tokens and end position of every held-out context, or an empty list if the text is long enough."""
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
    """Return the number of tokens after the document that contains the last of the first ``fit`` tokens.

    Text is read in batches of ``size`` contexts.
    """
    before = np.cumsum([kept for kept, _ in ends])
    place = min(len(ends), -(-(int(np.searchsorted(before, fit)) + 1) // size) * size)
    document = ends[place - 1][1].document
    return sum(kept for (_, begin), (kept, _) in itertools.pairwise(ends[place - 1 :]) if begin.document > document)


class Halves:
    """Held-out text in two parts: read ``fit`` first, then ``score``; each may be read repeatedly.

    The parts share no document, unless there are so few that almost nothing would be left to score: ``within`` is then true,
    and one document is cut. ``fitted`` and ``scored`` count the tokens read.
    """

    def __init__(self, data: EvalData, asked: int, fit_tokens: int, score_tokens: int, size: int, within: bool = False):
        self.data, self.asked, self.size, self.within = data, asked, size, within
        self.fit_tokens, self.score_tokens = fit_tokens, score_tokens
        self.fitted = self.scored = 0
        self.scored_from = Cursor(0, 0)

    def fit(self) -> Iterator[TextBatch]:
        """Yield batches of the part to fit on.

        Raises:
            ValueError: At the end, if no token was kept.
        """
        self.fitted = 0
        for piece in self.data.pieces(Cursor(0, 0), self.fit_tokens, self.size):
            self.fitted += int(piece.kept.sum())
            yield piece
            self.scored_from = piece.cursor if self.within else Cursor(piece.cursor.document + 1, 0)
        if not self.fitted:
            raise ValueError(
                "text: expected held-out documents, got none. Raise harvest.heldout, or give longer or other text: --text FILE."
            )

    def score(self) -> Iterator[TextBatch]:
        """Yield batches of the part to score.

        Raises:
            ValueError: At the end, if no token was kept.
        """
        self.scored = 0
        for piece in self.data.pieces(self.scored_from, self.score_tokens, self.size):
            self.scored += int(piece.kept.sum())
            yield piece
        if not self.scored:
            raise ValueError(
                f"text: expected {self.asked} held-out tokens, got {self.fitted}, and none was left to score. Raise "
                "harvest.heldout, give longer text, or name another: --text FILE."
            )


def eval_data(provenance: dict[str, Any], hooks: Sequence[str]) -> EvalData:
    """Load the model and text on which to evaluate a dictionary trained at these hooks.

    Raises:
        ValueError: If the text or the model cannot be loaded, or the contexts or tokenizer do not fit the model.
    """
    text = TextSection.model_validate(provenance["text"])
    # Before the model, which takes longer.
    require_text(text)
    exclusions = HarvestSection(hooks=tuple(dict.fromkeys(hooks)), tokens=1, **provenance["harvest"])
    model = load_model(ModelSection.model_validate(provenance["model"]))
    problems = []
    for part in each_model(model):
        problems += [*context_problems(part, text.context_length), *tokenizer_problems(part, model.tokenizer, text)]
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
    """Yield held-out contexts from ``start`` on, ``size`` at a time, until ``tokens`` tokens are kept."""
    kept_tokens = seen = 0
    for batch in context_batches(model, text, section, size, start, heldout=True, bad=bad):
        at = batch.on(model.device)
        yield TextBatch(at.token_ids, at.kept, at.counted, batch.cursor, batch.documents, batch.document_ids)
        kept_tokens += int(batch.kept.sum())
        seen += len(batch.token_ids)
        if kept_tokens == 0 and seen >= FRUITLESS_CONTEXTS:
            # Text may be endless: give up if no token is ever kept.
            raise ValueError(
                f"text: expected tokens to evaluate on, got none in {seen} contexts: all are special or excluded. Lower "
                "harvest.exclude_leading, raise text.context_length, or give other text."
            )
        if kept_tokens >= tokens:
            return


def logits_and_activations(
    model: LanguageModel, token_ids: Int[Tensor, "contexts positions"], hooks: Sequence[str]
) -> tuple[Float[Tensor, "contexts positions vocabulary"], dict[str, Tensor]]:
    """Return the unmodified model's logits and its activations at each hook, from one forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], None]:
        # Cloned: later modules may modify the tensor in place.
        return lambda x: seen.update({hook: x.clone()})

    with model.hooked({hook: keep(hook) for hook in hooks}):
        logits = model.logits(token_ids)
    return logits, seen


def require_widths(model: LanguageModel, hooks: Sequence[str], widths: Sequence[int], name: str) -> None:
    """Raise ``ValueError`` unless the model's activations have the widths that the dictionary expects.

    Args:
        name: The dictionary's argument that the widths come from, ``d_in`` or ``d_out``, for the message.
    """
    found = model.widths(tuple(dict.fromkeys(hooks)))
    for hook, width in zip(hooks, widths, strict=True):
        if found[hook] != width:
            raise ValueError(f"{hook}: expected width {width}, the dictionary's {name}, got {found[hook]} from {model.id}.")


def wanted_tokens(provenance: dict[str, Any], tokens: int | None) -> int:
    """Return the number of tokens to evaluate on: ``tokens`` if given, else the recipe's ``eval_tokens`` or the default."""
    return tokens or provenance.get("recipe", {}).get("eval_tokens", DEFAULT_TOKENS)


def eval_shortfalls(asked: int, scored: int, shared_documents: int) -> list[Shortfall]:
    """Return the quantities of which an evaluation had fewer than requested.

    Args:
        asked: Tokens requested, half of them for scoring.
        scored: Tokens actually scored.
        shared_documents: Documents that were used both for fitting and for scoring.
    """
    wanted = asked - asked // 2
    found = shortfall("eval_tokens", wanted, scored, "scored tokens", f"half of {asked:,}, but the held-out text is short")
    if shared_documents:
        words = "there are too few, and one is partly fitted on and partly scored"
        found.append(Shortfall("harvest.heldout", 2, 1, "held-out documents at least", words, serious=True))
    return found


def told_shortfalls(name: str, sources: Sequence[Mapping[str, Any]], found: Sequence[Shortfall]) -> dict[str, list[str]]:
    """Log the shortfalls of training and evaluation, and return them as report entries."""
    # Drop what training predicted for the evaluation: `found` holds the actual shortfalls.
    trained = [[each for each in recorded(source) if each.key != "eval_tokens"] for source in sources]
    every = shortfalls_together(*trained, found)
    for each in every:
        log.warning("%s: %s.", name, each)
    return {"shortfalls": list(map(str, every)), "doubts": [str(each) for each in every if each.doubtful]}
