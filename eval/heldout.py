"""Held-out text, and what a model has at its hooks there: what every evaluation on a model starts from."""

from collections.abc import Callable, Iterator, Sequence
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
from ..training.text import Cursor

# Logits over a large vocabulary dominate memory; eight contexts of 128 tokens and GPT-2's vocabulary are 0.2 GB.
BATCH_CONTEXTS = 8
DEFAULT_TOKENS = 200_000
FRUITLESS_CONTEXTS = 1000


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

    def pieces(self, start: Cursor, tokens: int) -> Iterator[TextBatch]:
        """Held-out contexts from ``start`` on until so many tokens were kept."""
        return text_batches(self.model, self.text, self.exclusions, start, tokens, self.bad_texts)


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
    bad: BadTexts | None = None,
) -> Iterator[TextBatch]:
    """Held-out contexts from ``start`` on until so many tokens were kept."""
    kept_tokens = seen = 0
    for batch in context_batches(model, text, section, BATCH_CONTEXTS, start, heldout=True, bad=bad):
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


def require_fitted(tokens: int) -> None:
    """Raise ``ValueError`` if the first half of the text had nothing to fit on."""
    if tokens == 0:
        raise ValueError("text: no held-out document was found. Raise harvest.heldout, or give longer text.")


def require_scored(scored: int, fitted: int, wanted: int) -> None:
    """Raise ``ValueError`` if the first half took all the text there is."""
    if scored == 0:
        raise ValueError(
            f"text: the held-out documents hold only {fitted} tokens, not the {wanted} asked for, and none was left to "
            "score. Lower --tokens, raise harvest.heldout, or give longer text."
        )
