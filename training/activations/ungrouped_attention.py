"""Grouped-query attention expanded to separate keys and values for every head, so that those of one can be replaced."""

import copy
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture
from .model import LanguageModel


class _Repeated(nn.Module):
    """Key or value projection whose output is repeated for every head of a group."""

    def __init__(self, projection: nn.Module, d_head: int, times: int):
        super().__init__()
        self.projection, self.d_head, self.times = projection, d_head, times

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).unflatten(-1, (-1, self.d_head)).repeat_interleave(self.times, -2).flatten(-2)


def ungrouped(anatomy: Architecture) -> LanguageModel:
    """Return an equivalent model with separate keys and values for every head, so that one head's can be replaced alone.

    With grouped-query attention this is a new module that shares the weights and repeats keys and values before attention
    does; any other model is returned unchanged.
    """
    model = anatomy.model
    config = getattr(model.module, "config", None)
    times = anatomy.n_heads // (getattr(config, "num_key_value_heads", None) or anatomy.n_heads)
    if times == 1:
        return model
    weights = [*model.module.parameters(), *model.module.buffers()]
    module = copy.deepcopy(model.module, {id(weight): weight for weight in weights})
    for block in anatomy.blocks:
        assert block.attention is not None
        attention: Any = module.get_submodule(block.attention)
        attention.k_proj = _Repeated(attention.k_proj, anatomy.d_head, times)
        attention.v_proj = _Repeated(attention.v_proj, anatomy.d_head, times)
        # Attention must not repeat them again.
        attention.num_key_value_groups = 1
    return LanguageModel(module, model.tokenizer, model.id, model.revision)
