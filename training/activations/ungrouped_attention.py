"""Grouped-query attention with keys and values of every head apart, so that those of one head can be replaced alone."""

import copy
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture
from .model import LanguageModel


class _Repeated(nn.Module):
    """A projection to the keys or values of groups, its output repeated for every head of a group."""

    def __init__(self, projection: nn.Module, d_head: int, times: int):
        super().__init__()
        self.projection, self.d_head, self.times = projection, d_head, times

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).unflatten(-1, (-1, self.d_head)).repeat_interleave(self.times, -2).flatten(-2)


def ungrouped(anatomy: Architecture) -> LanguageModel:
    """The model, computing the same with keys and values of every head apart, so that one head's can be replaced alone.

    Where heads share keys and values this is another module around the same weights, which repeats what they share before
    attention does; all other models are given back as they are.
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
        # What attention would otherwise repeat.
        attention.num_key_value_groups = 1
    return LanguageModel(module, model.tokenizer, model.id, model.revision)
