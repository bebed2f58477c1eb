"""What the suite and its groups of metrics agree on: a group sees the text piece by piece and returns flat entries.

A new group is a class with the members of ``MetricGroup``, its name in ``eval.metrics.GROUPS``, and an explanation for every
entry. Everything a piece offers is computed when it is first asked for and shared, by groups and by all dictionaries that are
judged in the same pass: a group pays for nothing that it does not read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae import SparseCode, SparseDictionary
from ...training.activations.model import LanguageModel
from ...training.activations.splice import Insertion, model_spliced
from ..bootstrap import ByDocument
from .inference import DEFAULT_INFERENCE, InferenceMode
from .model_outputs import ModelOutputs, Predictions


@dataclass(frozen=True)
class Setting:
    """What is judged. ``model`` and hooks are ``None`` where there are activations only.

    ``fit_tokens`` is about how many tokens ``fit`` will see, ``tokens`` how many were asked for in all. ``options`` are this
    group's own; they are part of what cached entries are found by.
    """

    dictionary: SparseDictionary
    device: torch.device
    selection: InferenceMode = DEFAULT_INFERENCE
    model: LanguageModel | None = None
    hook_in: str | None = None
    hook_out: str | None = None
    fit_tokens: int = 0
    tokens: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_target(self) -> bool:
        """Whether what is read is also what is to be reproduced."""
        return self.dictionary.arguments()["kind"] == "sae" if self.model is None else self.hook_in == self.hook_out


class DictionaryOutputs:
    """A piece as one dictionary sees it: what it reads, what it is to reproduce, what it makes of it.

    ``passage`` is ``None`` where there are activations only.
    """

    def __init__(self, setting: Setting, passage: ModelOutputs | None, rows: tuple[Tensor, Tensor] | None = None):
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

    @abstractmethod
    def __init__(self, setting: Setting): ...

    @property
    def document_sums(self) -> ByDocument | None:
        """Sums by document, if the figures follow from them: they are kept for comparisons of several runs."""
        return None

    @abstractmethod
    def fit(self, piece: DictionaryOutputs) -> None:
        """Take in a piece of the first half of the documents."""

    @abstractmethod
    def score(self, piece: DictionaryOutputs) -> None:
        """Take in a piece of the other half, after all of the first."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Flat entries: strings, numbers, lists of them, ``None`` or ``Undefined``. Not-finite numbers become ``null``."""
