"""Interface between the evaluator and its metrics.

A ``MetricGroup`` receives held-out text in batches: ``fit()`` on the first half of the documents, ``score()`` on the second,
then ``report()`` returns a flat dict. The outputs for a batch (activations, logits, gradients, spliced predictions) are
computed lazily and shared by all metrics and all dictionaries evaluated in the same pass.

To add a metric, subclass ``MetricGroup``, list the class in ``eval.metrics.GROUPS``, and explain each entry in the glossary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae import SparseCode, SparseDictionary
from ...training.activations.insertions import Insertion
from ...training.activations.model import LanguageModel
from ...training.activations.splice import model_spliced
from ..bootstrap import ByDocument
from .inference import DEFAULT_INFERENCE, InferenceMode
from .model_outputs import ModelOutputs, Predictions


@dataclass(frozen=True)
class Setting:
    """Dictionary under evaluation, with its model, hooks and options.

    ``model`` and the hooks are ``None`` if activations are given instead of a model. ``fit_tokens`` is the approximate number
    of tokens that ``fit`` will see, ``tokens`` the number requested in total. ``options`` belong to one metric group and are
    part of its cache key.
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
        """Return True if the dictionary reconstructs the tensor it reads (an SAE)."""
        return self.dictionary.arguments()["kind"] == "sae" if self.model is None else self.hook_in == self.hook_out


class DictionaryOutputs:
    """One dictionary's input, target, code and reconstruction on a batch, computed lazily.

    ``passage``, the model's outputs, is ``None`` if activations are given instead of a model; then ``rows`` holds input and
    target.
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
        """Model predictions with the reconstruction spliced in, computed once for all metrics."""
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
    """Group of report entries that are computed and cached together.

    ``fit`` receives the first half of the documents in batches, then ``score`` the second half. Results must not depend on
    batch boundaries, and memory must not grow with the number of tokens. Increase ``version`` whenever the definition of an
    entry changes, so that cached entries are recomputed. Groups with ``reads_model`` are skipped if activations are given
    instead of a model.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    reads_model: ClassVar[bool]

    @abstractmethod
    def __init__(self, setting: Setting): ...

    @property
    def document_sums(self) -> ByDocument | None:
        """Per-document sums that determine the figures, kept to compare several runs; ``None`` if there are none."""
        return None

    @property
    def token_figures(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Functions that reduce the tensor at a hook to one number per token, ``(contexts, positions)``, in the scoring passes.

        Their values are ``passage.token_figure(hook)``: for hooks whose tensors are too many or too wide to keep.
        """
        return {}

    @abstractmethod
    def fit(self, piece: DictionaryOutputs) -> None:
        """Process a batch of the first half of the documents."""

    @abstractmethod
    def score(self, piece: DictionaryOutputs) -> None:
        """Process a batch of the second half, after all of the first."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Return flat entries: strings, numbers, lists, ``None`` or ``Undefined``. Non-finite numbers become ``null``."""
