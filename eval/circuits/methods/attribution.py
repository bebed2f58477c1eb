"""Attribution patching: difference of activations times the gradient of the metric; of edges, edge attribution patching.

Two forward passes and one backward pass for each batch, whatever the number of units. Source: Nanda 2023, "Attribution
patching"; for edges Syed, Rager and Conmy 2023, arXiv:2310.10348.
"""

import torch

from ..pairs import Pairs
from ..space import Space
from .scores import BATCH, Method, Scores


class AttributionPatching(Method):
    """The metric's linear estimate at the clean prompt."""

    def __init__(self, batch: int = BATCH):
        self.batch = batch

    def discover(self, space: Space, pairs: Pairs) -> Scores:
        found = []
        with space.passes.counted() as cost:
            for some in pairs.batches(self.batch):
                _, corrupted = space.see(some.corrupted)
                seen, grads = space.passes.gradients(some.clean, space.hooks, some.measure)
                with torch.no_grad():
                    found.append(space.contrast(space.state(seen), corrupted, space.slopes(seen, grads)))
        per_pair = torch.cat(found)
        return Scores(per_pair.mean(0), cost, per_pair)
