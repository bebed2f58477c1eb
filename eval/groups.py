"""What the suite and its groups of metrics agree on: a group sees the text piece by piece and returns flat entries.

A new group is a class with the members of ``MetricGroup``, its name in ``eval.registry.GROUPS``, and an explanation for every
entry. Everything a piece offers is computed when it is first asked for and shared, by groups and by all dictionaries that are
judged in the same pass: a group pays for nothing that it does not read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..sae import SparseCode, SparseDictionary
from ..training.activations.model import LanguageModel, next_token_loss
from ..training.activations.splice import Insertion, model_spliced
from .heldout import Piece, logits_and_activations
from .selection import PER_TOKEN, Selection


@dataclass(frozen=True)
class Setting:
    """What is judged. ``model`` and hooks are ``None`` where there are activations only.

    ``fit_tokens`` is about how many tokens ``fit`` will see. ``options`` are this group's own; they are part of what cached
    entries are found by.
    """

    dictionary: SparseDictionary
    device: torch.device
    selection: Selection = PER_TOKEN
    model: LanguageModel | None = None
    hook_in: str | None = None
    hook_out: str | None = None
    fit_tokens: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_target(self) -> bool:
        """Whether what is read is also what is to be reproduced."""
        return self.dictionary.arguments()["kind"] == "sae" if self.model is None else self.hook_in == self.hook_out


class Predictions(NamedTuple):
    """A variant of the model at the counted predictions of a piece, in the order of the text.

    Cross-entropy, KL divergence from the untouched model, and whether the likeliest token is the untouched model's.
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
    """What a variant's logits say at counted predictions; ``clean`` are the untouched model's log-probabilities there."""
    changed = logits[:, :-1][counted].float().log_softmax(-1)
    kl = (clean.exp() * (clean - changed)).sum(-1)
    return Predictions(next_token_loss(logits, token_ids)[counted], kl, clean.argmax(-1) == changed.argmax(-1))


class Passage:
    """A piece of text and what the model makes of it; one for all dictionaries that are judged together.

    Rows are the kept positions, in the order of the text; predictions are the counted ones, those of kept positions whose
    next token is of the same document.
    """

    def __init__(self, model: LanguageModel, piece: Piece, hooks: tuple[str, ...], with_logits: bool):
        self.model, self.piece, self.hooks, self._with_logits = model, piece, hooks, with_logits
        self._rows: dict[str, Tensor] = {}
        self._variants: dict[Hashable, Predictions] = {}

    @cached_property
    def _seen(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        if not self._with_logits:
            return None, self.model.activations(self.piece.token_ids, self.hooks)
        return logits_and_activations(self.model, self.piece.token_ids, self.hooks)

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        return self.model.activations_and_gradients(self.piece.token_ids, self.hooks)[1]

    @cached_property
    def clean_logits(self) -> Float[Tensor, "contexts positions vocabulary"]:
        logits, _ = self._seen
        return self.model.logits(self.piece.token_ids) if logits is None else logits

    @cached_property
    def _clean(self) -> Float[Tensor, "predictions vocabulary"]:
        return self.clean_logits[:, :-1][self.piece.counted].float().log_softmax(-1)

    @cached_property
    def clean_loss(self) -> Float[Tensor, " predictions"]:
        """Cross-entropy of the untouched model."""
        return next_token_loss(self.clean_logits, self.piece.token_ids)[self.piece.counted]

    @property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """The token of every row."""
        return self.piece.token_ids[self.piece.kept]

    @property
    def documents(self) -> np.ndarray:
        """The document of every row."""
        return self.piece.document_ids[self.piece.kept.cpu().numpy()]

    @property
    def prediction_documents(self) -> np.ndarray:
        """The document of every prediction."""
        return self.piece.document_ids[:, :-1][self.piece.counted.cpu().numpy()]

    @property
    def predicting(self) -> Bool[Tensor, " tokens"]:
        """Which rows a prediction is counted at: predictions are about these rows, in this order."""
        last = torch.zeros_like(self.piece.kept[:, :1])
        return torch.cat([self.piece.counted, last], dim=1)[self.piece.kept]

    def activations(self, hook: str) -> Float[Tensor, "tokens width"]:
        """What the untouched model has at the hook.

        Raises:
            ValueError: If a number there is not finite, as where half precision overflows.
        """
        if hook not in self._rows:
            rows = self._seen[1][hook][self.piece.kept].float()
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"{hook}: expected finite activations, got NaN or infinite ones from {self.model.id}. Judge it in "
                    "model.dtype: float32 or bfloat16."
                )
            self._rows[hook] = rows
        return self._rows[hook]

    def gradients(self, hook: str) -> Float[Tensor, "tokens width"]:
        """The gradient at the hook of the summed next-token loss."""
        return self._gradients[hook][self.piece.kept].float()

    def predictions(self, variant: Callable[[], AbstractContextManager[Any]], name: Hashable | None = None) -> Predictions:
        """What the model predicts while the context is open. With a ``name``, the same one runs the model once per piece."""
        if name is not None and name in self._variants:
            return self._variants[name]
        with variant():
            logits = self.model.logits(self.piece.token_ids)
        found = predictions(logits, self.piece.token_ids, self.piece.counted, self._clean)
        if name is not None:
            self._variants[name] = found
        return found


class View:
    """A piece as one dictionary sees it: what it reads, what it is to reproduce, what it makes of it.

    ``passage`` is ``None`` where there are activations only.
    """

    def __init__(self, setting: Setting, passage: Passage | None, rows: tuple[Tensor, Tensor] | None = None):
        assert (passage is None) != (rows is None)
        self.setting, self.passage, self._given = setting, passage, rows

    @cached_property
    def x(self) -> Float[Tensor, "tokens d_in"]:
        return self._given[0] if self._given is not None else self._at(self.setting.hook_in)

    @cached_property
    def y(self) -> Float[Tensor, "tokens d_out"]:
        return self._given[1] if self._given is not None else self._at(self.setting.hook_out)

    @cached_property
    def code(self) -> SparseCode:
        oracle, hook = self.setting.selection.oracle, self.setting.hook_out
        grad = self.passage.gradients(hook) if oracle and self.passage is not None and hook is not None else None
        return self.setting.selection.code(self.setting.dictionary, self.x, self.y, grad)

    @cached_property
    def y_hat(self) -> Float[Tensor, "tokens d_out"]:
        return self.setting.dictionary.decode(self.code, self.x)

    @cached_property
    def spliced(self) -> Predictions:
        """What the model predicts on the reconstruction; run once for all groups."""
        model, passage, (hook_in, hook_out) = self.setting.model, self.passage, (self.setting.hook_in, self.setting.hook_out)
        assert model is not None
        assert passage is not None
        assert hook_in is not None
        assert hook_out is not None
        insertion = Insertion(self.setting.dictionary, (hook_in,), (hook_out,))
        kept = passage.piece.kept
        return passage.predictions(lambda: model_spliced(model, [insertion], kept=kept, codes={(0, 0): self.code}))

    @property
    def tokens(self) -> int:
        return self.x.shape[0] if self.passage is None else int(self.passage.piece.kept.sum())

    def _at(self, hook: str | None) -> Tensor:
        assert self.passage is not None
        assert hook is not None
        return self.passage.activations(hook)


class MetricGroup(ABC):
    """Some entries of the report, computed together and cached together.

    First ``fit`` sees one half of the documents, piece by piece, then ``score`` the other. How a half is cut into pieces
    must not matter, and what is kept must not grow with the number of tokens. ``version`` goes up with every change of what
    an entry is: cached ones are then made again. A group that ``reads_model`` is left out where there are activations only.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    reads_model: ClassVar[bool]
    # Section of the page -> entry -> what it says.
    explanations: ClassVar[dict[str, dict[str, str]]]

    @abstractmethod
    def __init__(self, setting: Setting): ...

    @abstractmethod
    def fit(self, piece: View) -> None:
        """Take in a piece of the first half of the documents."""

    @abstractmethod
    def score(self, piece: View) -> None:
        """Take in a piece of the other half, after all of the first."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Flat entries: strings, numbers, lists of them, ``None`` or ``Undefined``. Not-finite numbers become ``null``."""
