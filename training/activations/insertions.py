"""Insertions of dictionaries into a model, and interventions on their latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.suggestions import require_choice

OPERATIONS = ("set", "add", "scale", "clamp")
# Index of the insertion, and of its site.
TokenPlace = tuple[int, int]


@dataclass(frozen=True)
class Insertion:
    """Dictionary and its hooks: site ``s`` reads the activation at ``hooks_in[s]`` and replaces that at ``hooks_out[s]``.

    A cross-layer dictionary has one site per layer, a crosscoder one per hook, any other a single one. ``written`` lists the
    sites that replace an activation (default: all); the others only read.
    """

    dictionary: SparseDictionary
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    written: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        expected = len(self.dictionary.sites)
        for name, hooks in (("hooks_in", self.hooks_in), ("hooks_out", self.hooks_out)):
            if len(hooks) != expected:
                raise ValueError(f"{name}: expected {expected}, one per site of the dictionary, got {len(hooks)}: {hooks}.")
        wrong = [site for site in self.sites if not 0 <= site < expected]
        if wrong:
            raise ValueError(f"written: expected sites 0 to {expected - 1}, got {wrong}.")

    @property
    def sites(self) -> tuple[int, ...]:
        """Sites that replace an activation."""
        return tuple(range(len(self.dictionary.sites))) if self.written is None else self.written


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edit of latents of one dictionary during a forward pass, including tokens on which they are inactive.

    ``operation`` is ``set``, ``add`` or ``scale`` by ``value`` (a number or one per latent), or ``clamp`` between ``low`` and
    ``high``, all in the units of the code (one unit is ``out_scale`` of output). ``positions`` is ``"all"``, a list of
    positions of every context, a mask ``(contexts, positions)`` or, in generation, ``"new"`` for those after the prompt.
    Latents are numbered within their site; those of a crosscoder, which have no site of their own, are edited at all sites.
    Several edits of the same latents apply in order.
    """

    operation: str
    latents: Sequence[int]
    value: float | Sequence[float] | Tensor | None = None
    low: float | None = None
    high: float | None = None
    positions: str | Sequence[int] | Tensor = "all"
    insertion: int = 0
    site: int = 0

    def __post_init__(self) -> None:
        require_choice("operation", self.operation, OPERATIONS)
        if len(self.latents) == 0:
            raise ValueError("latents: expected at least one, got none.")
        bounded = self.low is not None or self.high is not None
        if self.operation == "clamp" and (not bounded or self.value is not None):
            raise ValueError("clamp: expected low, high or both, and no value.")
        if self.operation != "clamp" and (bounded or self.value is None):
            raise ValueError(f"{self.operation}: expected value, and neither low nor high.")
        if isinstance(self.positions, str) and self.positions not in ("all", "new"):
            raise ValueError(f"positions: expected all, new, a list of positions or a mask, got {self.positions!r}.")
        if self.value is not None and torch.as_tensor(self.value).shape not in ((), (len(self.latents),)):
            raise ValueError(
                f"value: expected a number or one for each of {len(self.latents)} latents, "
                f"got shape {tuple(torch.as_tensor(self.value).shape)}."
            )

    def apply(self, values: Float[Tensor, "tokens m"]) -> Float[Tensor, "tokens m"]:
        """Return the edited values of the latents."""
        if self.operation == "clamp":
            return values.clamp(self.low, self.high)
        number = torch.as_tensor(self.value, dtype=values.dtype, device=values.device)
        if self.operation == "set":
            return number.expand_as(values)
        return values + number if self.operation == "add" else values * number

    def where(self, contexts: int, positions: int, prompt: int | None) -> Bool[Tensor, "contexts positions"]:
        """Return the mask of edited positions; ``prompt`` is the length of the prompt during generation.

        Raises:
            ValueError: If the positions do not exist, or a mask has another shape.
        """
        chosen = torch.zeros(contexts, positions, dtype=torch.bool)
        if isinstance(self.positions, Tensor):
            return grown_mask(self.positions.cpu(), "positions", (contexts, positions), prompt, beyond=False)
        if isinstance(self.positions, str):
            if self.positions == "new" and prompt is None:
                raise ValueError(
                    "positions: 'new' means positions after a prompt, which only generate has. Give a list or a mask."
                )
            chosen[:, prompt if self.positions == "new" else 0 :] = True
            return chosen
        beyond = [position for position in self.positions if not 0 <= position < positions]
        if beyond:
            raise ValueError(f"positions: expected 0 to {positions - 1}, the context's last, got {beyond}.")
        chosen[:, list(self.positions)] = True
        return chosen


def latents_at(dictionary: SparseDictionary, site: int) -> int:
    """Return the number of latents of a site; where one code serves all sites, that of all latents."""
    latents = dictionary.blocks[0 if dictionary.shares_code else site].latents
    return latents.stop - latents.start


def grown_mask(mask: Tensor, name: str, shape: tuple[int, int], prompt: int | None, beyond: bool) -> Tensor:
    """Extend a mask of the prompt to the generated positions, with the value ``beyond``."""
    contexts, positions = shape
    if prompt is not None and mask.shape == (contexts, prompt):
        return torch.cat([mask, mask.new_full((contexts, positions - prompt), beyond)], dim=1)
    if mask.shape != shape or mask.dtype != torch.bool:
        expected = shape if prompt is None else (contexts, prompt)
        raise ValueError(f"{name}: expected a mask (contexts, positions) = {expected}, got {mask.dtype} {tuple(mask.shape)}.")
    return mask
