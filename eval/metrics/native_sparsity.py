"""Metric: share of the language model's own MLP neurons that are active, where neurons can be silent.

Source: Li et al. 2023, "The Lazy Neuron Phenomenon", arXiv:2210.06313, who count nonzero entries of the MLPs' hidden layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...training.activations.mlp_neurons import gated_neurons
from ..undefined import Undefined
from .base import DictionaryOutputs, MetricGroup, Setting


class NativeSparsity(MetricGroup):
    """Metric: fraction of the model's MLP neurons with a nonzero activation, by layer, counted in the passes of the report.

    A property of the model on this text, to compare l0 / n_latents with; the dictionary has no influence on it.
    """

    name = "native_sparsity"
    version = 1
    reads_model = True

    def __init__(self, setting: Setting):
        assert setting.model is not None
        try:
            self.layers = gated_neurons(setting.model.module)
            self.unknown = ""
        except ValueError:
            self.layers, self.unknown = [], "the model's blocks were not found"
        self.active = dict.fromkeys((layer.hook for layer in self.layers if layer.hook is not None), 0.0)
        self.tokens = 0

    @property
    def token_figures(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return dict.fromkeys(self.active, active_share)

    def fit(self, piece: DictionaryOutputs) -> None:
        pass

    def score(self, piece: DictionaryOutputs) -> None:
        assert piece.passage is not None
        for hook in self.active:
            self.active[hook] += float(piece.passage.token_figure(hook).double().sum())
        self.tokens += piece.tokens

    def report(self) -> dict[str, Any]:
        key = "mlp_active_share"
        if not self.active:
            reasons = dict.fromkeys(layer.reason for layer in self.layers)
            return {key: Undefined("; ".join(reasons) or self.unknown)}
        return {key: [None if each.hook is None else self.active[each.hook] / self.tokens for each in self.layers]}


def active_share(neurons: Float[Tensor, "contexts positions neurons"]) -> Float[Tensor, "contexts positions"]:
    """Return the fraction of nonzero neurons at every position."""
    return neurons.count_nonzero(dim=-1) / neurons.shape[-1]
