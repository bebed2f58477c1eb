"""Model outputs shared by all metrics: activations, logits, and predictions with a reconstruction spliced in."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...training.activations.hooked_model import next_token_loss
from ...training.activations.model import LanguageModel
from ...training.bad_rows import BadTokens
from ...training.recipe import HarvestSection
from ..heldout import TextBatch, logits_and_activations


class Predictions(NamedTuple):
    """Losses of a model variant at the counted predictions of a batch, in text order.

    ``kl`` is the divergence from the unmodified model; ``agrees`` is True where both have the same top-1 token.
    """

    loss: Float[Tensor, " predictions"]
    kl: Float[Tensor, " predictions"]
    agrees: Bool[Tensor, " predictions"]


def predictions(
    logits: Float[Tensor, "contexts positions vocabulary"],
    token_ids: Int[Tensor, "contexts positions"],
    counted: Bool[Tensor, "contexts predictions"],
    clean: Float[Tensor, "some vocabulary"],
) -> Predictions:
    """Return a variant's losses at counted predictions; ``clean`` holds the unmodified model's log-probabilities there."""
    changed = logits[:, :-1][counted].float().log_softmax(-1)
    kl = (clean.exp() * (clean - changed)).sum(-1)
    return Predictions(next_token_loss(logits, token_ids)[counted], kl, clean.argmax(-1) == changed.argmax(-1))


class ModelOutputs:
    """Model outputs on a batch of text, shared by all dictionaries evaluated together.

    Rows are the kept positions in text order; predictions are the counted ones, i.e. kept positions whose next token belongs to
    the same document. A context with a non-finite activation at a kept position (e.g. half-precision overflow) is dropped as a
    whole, because the model's outputs on it are not finite either; ``bad`` counts such tokens. ``figures`` reduce the tensor at
    a hook to one number per token while the unmodified model runs.
    """

    def __init__(
        self,
        model: LanguageModel,
        piece: TextBatch,
        hooks: tuple[str, ...],
        with_logits: bool,
        bad: BadTokens | None = None,
        figures: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ):
        self.model, self.hooks, self._with_logits, self._given = model, hooks, with_logits, piece
        self._bad = BadTokens(HarvestSection()) if bad is None else bad
        self._figures, self._of_tokens = figures or {}, dict[str, Tensor]()
        self._rows: dict[str, Tensor] = {}
        self._variants: dict[Hashable, Predictions] = {}

    @cached_property
    def _seen(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        if not self._with_logits:
            return None, self.model.activations(self._given.token_ids, self.hooks)
        with self.model.hooked({hook: self._reducing(hook) for hook in self._figures}):
            return logits_and_activations(self.model, self._given.token_ids, self.hooks)

    def _reducing(self, hook: str) -> Callable[[Tensor], None]:
        # A reader that returned a tensor would replace the model's.
        return lambda x: self._of_tokens.update({hook: self._figures[hook](x)})

    @cached_property
    def piece(self) -> TextBatch:
        """The batch of text without the dropped contexts.

        Raises:
            ValueError: If more tokens are non-finite than allowed.
        """
        given = self._given
        good = torch.ones_like(given.kept)
        for x in self._seen[1].values():
            good &= torch.isfinite(x).all(-1)
        found = int((given.kept & ~good).sum())
        where = f"{', '.join(self.hooks)}: expected finite activations, got NaN or infinite ones from {self.model.id}"
        self._bad.count(int(given.kept.sum()), found, where, "Evaluate it with model.dtype: float32 or bfloat16.")
        if not found:
            return given
        whole = ~(given.kept & ~good).any(1, keepdim=True)
        kept = given.kept & whole
        if not bool(kept.any()):
            # Every context is unusable: this is systematic, not a few bad tokens.
            self._bad.refuse()
        documents = set(given.document_ids[kept.cpu().numpy()].tolist())
        return replace(given, kept=kept, counted=given.counted & whole, documents=documents)

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        documents = torch.from_numpy(self.piece.document_ids).to(self.model.device)
        return self.model.activations_and_gradients(self.piece.token_ids, self.hooks, documents)[1]

    @cached_property
    def clean_logits(self) -> Float[Tensor, "contexts positions vocabulary"]:
        logits, _ = self._seen
        return self.model.logits(self.piece.token_ids) if logits is None else logits

    @cached_property
    def _clean(self) -> Float[Tensor, "predictions vocabulary"]:
        return self.clean_logits[:, :-1][self.piece.counted].float().log_softmax(-1)

    @cached_property
    def clean_loss(self) -> Float[Tensor, " predictions"]:
        """Cross-entropy of the unmodified model."""
        return next_token_loss(self.clean_logits, self.piece.token_ids)[self.piece.counted]

    @property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """Token id of each row."""
        return self.piece.token_ids[self.piece.kept]

    @property
    def documents(self) -> np.ndarray:
        """Document index of each row."""
        return self.piece.document_ids[self.piece.kept.cpu().numpy()]

    @property
    def prediction_documents(self) -> np.ndarray:
        """Document index of each prediction."""
        return self.piece.document_ids[:, :-1][self.piece.counted.cpu().numpy()]

    @property
    def predicting(self) -> Bool[Tensor, " tokens"]:
        """Mask of the rows at which a prediction is counted, in the order of the predictions."""
        last = torch.zeros_like(self.piece.kept[:, :1])
        return torch.cat([self.piece.counted, last], dim=1)[self.piece.kept]

    def activations(self, hook: str) -> Float[Tensor, "tokens width"]:
        """Return the unmodified model's activations at a hook."""
        if hook not in self._rows:
            self._rows[hook] = self._seen[1][hook][self.piece.kept].float()
        return self._rows[hook]

    def token_figure(self, hook: str) -> Float[Tensor, " tokens"]:
        """Return the number that ``figures`` make of the unmodified model's tensor at a hook, of each row."""
        kept = self.piece.kept
        return self._of_tokens[hook][kept]

    def gradients(self, hook: str) -> Float[Tensor, "tokens width"]:
        """Return the gradient of the summed next-token loss at a hook."""
        return self._gradients[hook][self.piece.kept].float()

    def predictions(self, variant: Callable[[], AbstractContextManager[Any]], name: Hashable | None = None) -> Predictions:
        """Return the predictions made inside a context manager; a named variant runs only once per batch."""
        if name is not None and name in self._variants:
            return self._variants[name]
        with variant():
            logits = self.model.logits(self.piece.token_ids)
        found = predictions(logits, self.piece.token_ids, self.piece.counted, self._clean)
        if name is not None:
            self._variants[name] = found
        return found
