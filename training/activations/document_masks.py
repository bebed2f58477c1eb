"""Forward passes in which no token attends to another document of its context: ``text.packing: pack_masked``.

Every BOS begins a document. Positions restart there, and attention ends there. How a model is told differs between
architectures, so a way is used only after a pass has shown that it works.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

# Ways to tell a model, the first that works is used: transformers derives the mask from positions that restart (also for
# sliding windows); others take a mask of four axes.
WAYS = (("position_ids",), ("position_ids", "attention_mask"), ("attention_mask",))
# Largest difference between a document alone and behind another, relative to the largest activation.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.03

# Runs the model on token ids with further arguments, and returns the tensors to be compared.
Pass = Callable[[Tensor, Mapping[str, Any]], Sequence[Tensor]]


class DocumentMasks:
    """Arguments of a model's forward pass that keep its documents apart; ``bos_id`` begins each of them."""

    def __init__(self, module: nn.Module, model_id: str, bos_id: int, vocabulary: int):
        self.module, self.model_id, self.bos_id, self.vocabulary = module, model_id, bos_id, vocabulary
        # Of each kind of pass, because a pass may end before the first attention.
        self._ways: dict[Any, tuple[str, ...]] = {}

    def arguments(self, token_ids: Int[Tensor, "contexts positions"], kind: Any, run: Pass) -> dict[str, Tensor]:
        """Return the arguments for a pass over contexts; none if every context is one document.

        Args:
            kind: Name of the pass; passes of one kind need to be tried only once.
            run: The pass itself.

        Raises:
            ValueError: If no way of keeping documents apart works for this model.
        """
        if token_ids.is_meta or not bool((token_ids[:, 1:] == self.bos_id).any()):
            return {}
        if kind not in self._ways:
            self._ways[kind] = self._way_that_works(token_ids, run)
        return self._arguments(token_ids, self._ways[kind])

    def _arguments(self, token_ids: Tensor, way: tuple[str, ...]) -> dict[str, Tensor]:
        begins = token_ids == self.bos_id
        begins[:, 0] = True
        places = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        found = {"position_ids": places - torch.where(begins, places, 0).cummax(1).values}
        if "attention_mask" in way:
            documents = begins.cumsum(1)
            seen = (documents[:, :, None] == documents[:, None, :]) & (places[:, :, None] >= places[:, None, :])
            dtype = next(x.dtype for x in self.module.parameters() if x.is_floating_point())
            mask = torch.zeros(seen.shape, dtype=dtype, device=token_ids.device)
            found["attention_mask"] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return {name: found[name] for name in way}

    def _way_that_works(self, token_ids: Tensor, run: Pass) -> tuple[str, ...]:
        """Return the first way in which a document behind another one gives what it gives alone."""
        words = [token for token in (self.vocabulary // 2, self.vocabulary // 3, self.vocabulary // 5) if token != self.bos_id]
        document = [self.bos_id, *words]
        twice = torch.tensor([document * 2], device=token_ids.device, dtype=token_ids.dtype)
        alone = run(twice[:, : len(document)], {})
        for way in WAYS:
            try:
                together = run(twice, self._arguments(twice, way))
            except Exception:  # noqa: BLE001 - whatever a model raises for an argument that it does not take
                continue
            if all(_equal(x, y[:, -len(document) :]) for x, y in zip(alone, together, strict=True)):
                return way
        raise ValueError(
            f"text.packing: expected a model that can keep documents of a context apart for pack_masked, but {self.model_id} "
            f"({type(self.module).__name__}) takes neither positions nor masks for it. Set text.packing: separate, which gives "
            "the same activations."
        )


def _equal(alone: Tensor, behind: Tensor) -> bool:
    tolerance = TOLERANCES.get(alone.dtype, HALF_TOLERANCE)
    alone, behind = alone.float(), behind.float()
    return bool((alone - behind).abs().max() <= tolerance * alone.abs().max())
