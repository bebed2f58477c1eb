"""Writing circuits into a transformer: a residual stream with named axes, and the weights of one head or MLP."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .toy import ToyTransformer


class ResidualLayout:
    """Residual stream with named blocks of axes, in the given order."""

    def __init__(self, **sizes: int):
        self.sizes = sizes
        starts = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        self.width: int = starts[-1]
        self._slices = {name: slice(a, b) for name, a, b in zip(sizes, starts[:-1], starts[1:], strict=True)}

    def __getitem__(self, block: str) -> slice:
        return self._slices[block]

    def at(self, block: str, index: int = 0) -> Float[Tensor, " d_model"]:
        """Return the unit vector of one axis."""
        vector = torch.zeros(self.width)
        vector[self._slices[block].start + index] = 1.0
        return vector

    def all(self, block: str) -> Float[Tensor, "axes d_model"]:
        """Return the unit vectors of a block."""
        return torch.eye(self.width)[self._slices[block]]

    def directions(self) -> dict[str, Float[Tensor, " d_model"]]:
        """Return every axis by name: ``block`` if it is the only axis, else ``block:index``."""
        return {
            (f"{block}:{index}" if size > 1 else block): self.at(block, index)
            for block, size in self.sizes.items()
            for index in range(size)
        }


@torch.no_grad()
def write_head(
    model: ToyTransformer,
    layer: int,
    head: int,
    value: Float[Tensor, "rank d_model"],
    output: Float[Tensor, "rank d_model"],
    query: Float[Tensor, "scored d_model"] | None = None,
    key: Float[Tensor, "scored d_model"] | None = None,
    query_bias: Float[Tensor, " scored"] | None = None,
) -> None:
    """Set a head to score ``(query @ x_t + query_bias) . (key @ x_s)`` and write ``output.T @ value @ x_s`` where it attends.

    Without ``key`` attention is uniform.
    """
    attention = model.attention(layer)
    rows = slice(head * attention.d_head, (head + 1) * attention.d_head)

    def put(matrix: Tensor) -> Tensor:
        return F.pad(matrix, (0, 0, 0, attention.d_head - len(matrix)))

    # The model divides scores by this.
    scale = attention.d_head**0.5
    if key is not None:
        attention.k_proj.weight[rows] = put(key)
        if query is not None:
            attention.q_proj.weight[rows] = put(query * scale)
        if query_bias is not None:
            attention.q_proj.bias[rows] = put(query_bias[:, None] * scale)[:, 0]
    attention.v_proj.weight[rows] = put(value)
    attention.o_proj.weight[:, rows] = put(output).T


@torch.no_grad()
def write_neurons(
    model: ToyTransformer,
    layer: int,
    start: int,
    read: Float[Tensor, "neurons d_model"],
    bias: Float[Tensor, " neurons"] | float,
    write: Float[Tensor, "neurons d_model"],
) -> int:
    """Write neurons ``act(read @ x + bias)`` from ``start`` on, with outputs along ``write``; return the next free index."""
    mlp = model.mlp(layer)
    end = start + len(read)
    assert end <= mlp.down_proj.in_features
    mlp.up_proj.weight[start:end] = read
    mlp.up_proj.bias[start:end] = bias
    mlp.down_proj.weight[:, start:end] = write.T
    return end
