"""Activations of a text with its tokens beside them, and latents to steer and ablate while a model runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ...sae import SparseDictionary
from .insertions import Insertion, Intervention, latents_at

# (dictionary, latent or latents, amount), the amount in the units of ``encode``.
Steered = tuple[SparseDictionary, int | Sequence[int], float]
# (dictionary, latent or latents).
Ablated = tuple[SparseDictionary, int | Sequence[int]]


class HookInfo(NamedTuple):
    """A hook point of a model: its name, the width of its tensor, the block and the sites it belongs to."""

    name: str
    width: int | None
    layer: int
    sites: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TextActivations:
    """Activations of one text at one hook, a row per token; NumPy and every ``encode`` take it as an array."""

    values: Float[Tensor, "tokens width"]
    token_ids: Int[Tensor, " tokens"]
    tokens: tuple[str, ...]
    hook: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(tokens, width)."""
        return tuple(self.values.shape)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: Any) -> Tensor:
        return self.values[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.values.float().cpu().numpy()
        return values.astype(dtype or values.dtype, copy=bool(copy))

    def __repr__(self) -> str:
        shown = " ".join(map(repr, self.tokens[:8])) + (" ..." if len(self.tokens) > 8 else "")
        return f"TextActivations({self.shape[0]} tokens x {self.shape[1]}, hook={self.hook!r}: {shown})"


def latent_edits(steer: Iterable[Steered] = (), ablate: Iterable[Ablated] = ()) -> tuple[list[Insertion], list[Intervention]]:
    """Return the insertions and interventions that add to latents' activations and set others to zero.

    Raises:
        ValueError: If an entry is not a tuple of that form, a latent does not exist, or a dictionary's hooks are unknown.
    """
    insertions: list[Insertion] = []
    edits: list[Intervention] = []
    places: dict[int, int] = {}
    wanted: list[tuple[str, tuple[Any, ...], int]] = [("steer", tuple(entry), 3) for entry in steer]
    wanted += [("ablate", tuple(entry), 2) for entry in ablate]
    for name, entry, length in wanted:
        if len(entry) != length or not isinstance(entry[0], SparseDictionary):
            form = "(dictionary, latent, amount)" if name == "steer" else "(dictionary, latent)"
            raise ValueError(f"{name}: expected {form}, got {len(entry)} entries beginning with {type(entry[0]).__name__}.")
        dictionary, latents = entry[0], np.atleast_1d(np.asarray(entry[1])).tolist()
        if id(dictionary) not in places:
            places[id(dictionary)] = len(insertions)
            insertions.append(Insertion(dictionary, *dictionary.hooks))
        for latent in latents:
            site, own = _place(dictionary, latent)
            change = {"operation": "add", "value": float(entry[2])} if name == "steer" else {"operation": "set", "value": 0.0}
            edits.append(Intervention(latents=[own], insertion=places[id(dictionary)], site=site, **change))
    return insertions, edits


def _place(dictionary: SparseDictionary, latent: int) -> tuple[int, int]:
    """Return a latent's site and its number within that site."""
    first = 0
    for site in range(len(dictionary.sites)):
        count = latents_at(dictionary, site)
        if first <= latent < first + count:
            return site, latent - first
        first += count
    raise ValueError(f"latent: expected 0 to {first - 1}, got {latent}.")
