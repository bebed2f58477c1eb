"""SparseCode: which latents fire on which token, and how strongly."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .kernels import cpu_kernels


def bounds(latents: Int[Tensor, " nnz"], starts: Int[Tensor, " tokens"]) -> Int[Tensor, " ends"]:
    """Where every token's entries begin, and behind the last token where they end."""
    return torch.cat([starts, starts.new_full((1,), latents.shape[0])])


def group_by_latent(keys: Int[Tensor, " nnz"], count: int) -> tuple[Int[Tensor, " ends"], Int[Tensor, " nnz"]]:
    """Return where each of ``count`` keys' places begin and end in the second tensor, and all places by key, ascending."""
    kernels = cpu_kernels() if keys.device.type == "cpu" else None
    if kernels is not None:
        return kernels.group(keys, count)
    # Counting them would make the host wait for a GPU: torch looks for the largest key first.
    ordered, order = keys.sort(stable=True)
    return torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device)), order


@dataclass(frozen=True)
class ByLatent:
    """A code's entries grouped by latent: latent ``i`` has those from ``firsts[i]`` to ``firsts[i + 1]``.

    ``tokens`` are their tokens, ascending within a latent, ``order`` their places in the code.
    """

    firsts: Int[Tensor, " ends"]
    tokens: Int[Tensor, " nnz"]
    order: Int[Tensor, " nnz"]


@dataclass(frozen=True)
class Revival:
    """Request to bring dead latents back to their thresholds: the weight of that term, and every latent's threshold."""

    weight: float
    thresholds: Float[Tensor, " n_latents"]


@dataclass(frozen=True)
class AuxTerms:
    """What an encoder asks training to add to the loss. Decoding knows nothing of it.

    ``penalties`` are scalars in units of fvu. ``prefixes`` are widths: the reconstruction from the first so many latents
    alone is trained as well. ``frozen`` is a second code of the same tokens that is trained to reconstruct the target from
    atoms which it must not move. ``revival`` is about latents that training knows to be dead.
    """

    penalties: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    prefixes: tuple[int, ...] = ()
    frozen: "SparseCode | None" = None
    revival: Revival | None = None


@dataclass(frozen=True)
class SparseCode:
    """A flat list of (latent, value) entries grouped by token.

    ``starts[t]`` is the first entry of token ``t``; its entries run to the next start. A latent may appear twice in one
    token (its values add up), and an entry whose value is zero does not fire.
    """

    latents: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    starts: Int[Tensor, " tokens"]
    requests: AuxTerms = field(default_factory=AuxTerms)

    @classmethod
    def from_rows(cls, latents: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]) -> "SparseCode":
        """The code of an encoder that keeps equally many entries on every token."""
        tokens, k = latents.shape
        starts = torch.arange(0, tokens * k, k, device=latents.device) if k else latents.new_zeros(tokens)
        return cls(latents.reshape(-1), values.reshape(-1), starts)

    @classmethod
    def from_steps(cls, latents: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]) -> "SparseCode":
        """Return the code of an encoder that takes latents one after another, where one may be taken again.

        Its values are added up in its first entry, and its other entries are silent, so that it counts once.
        """
        ordered, order = latents.sort(dim=1, stable=True)
        places = torch.arange(latents.shape[1], device=latents.device).expand_as(latents)
        again = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, 1:] == ordered[:, :-1]], dim=1).bool()
        first = order.gather(1, places.masked_fill(again, 0).cummax(dim=1).values)
        first = torch.empty_like(order).scatter(1, order, first)
        return cls.from_rows(latents, torch.zeros_like(values).scatter_add(1, first, values))

    @classmethod
    def from_cells(cls, cells: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], tokens: int, n_latents: int) -> "SparseCode":
        """The code whose entries stand in these cells of a ``(tokens, n_latents)`` matrix, numbered row by row, ascending."""
        first = torch.arange(0, tokens * n_latents, n_latents, device=cells.device) if n_latents else cells.new_zeros(tokens)
        return cls(cells % n_latents, values, torch.searchsorted(cells, first))

    @property
    def n_tokens(self) -> int:
        return self.starts.shape[0]

    def entries_per_token(self) -> Int[Tensor, " tokens"]:
        """Entries of each token, silent ones included."""
        return torch.diff(bounds(self.latents, self.starts))

    def token_ids(self) -> Int[Tensor, " nnz"]:
        """The token each entry belongs to."""
        tokens = torch.arange(self.n_tokens, device=self.starts.device)
        return torch.repeat_interleave(tokens, self.entries_per_token(), output_size=self.latents.shape[0])

    def by_latent(self, n_latents: int) -> ByLatent:
        """Return the entries grouped by latent."""
        firsts, order = group_by_latent(self.latents, n_latents)
        return ByLatent(firsts, self.token_ids()[order], order)

    def relu(self) -> "SparseCode":
        """The code with negative values silenced."""
        return SparseCode(self.latents, self.values.relu(), self.starts, self.requests)

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCode":
        """The code less the entries that are not to be kept."""
        before = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)])
        return SparseCode(self.latents[keep], self.values[keep], before[self.starts])

    def columns(self, latents: Int[Tensor, " m"]) -> Float[Tensor, "tokens m"]:
        """The values of chosen latents on every token, zero where they are silent; differentiable in ``values``.

        Raises:
            ValueError: If a latent is chosen twice.
        """
        places, chosen = self._places(latents)
        return _summed(self.token_ids()[chosen], places[chosen], self.values[chosen], (self.n_tokens, latents.shape[0]))

    def with_columns(self, latents: Int[Tensor, " m"], values: Float[Tensor, "tokens m"]) -> "SparseCode":
        """The code with these values for chosen latents, whether they fired before or not; differentiable in both.

        Every token gets an entry for each of them, behind its others, also where the value is zero.

        Raises:
            ValueError: If a latent is chosen twice.
        """
        _, chosen = self._places(latents)
        rest, (tokens, m) = self.where(~chosen), values.shape
        owners = torch.cat([rest.token_ids(), torch.arange(tokens, device=latents.device).repeat_interleave(m)])
        order = owners.argsort(stable=True)
        every = torch.cat([rest.latents, latents.repeat(tokens)])[order]
        starts = rest.starts + m * torch.arange(tokens, device=latents.device)
        return SparseCode(every, torch.cat([rest.values, values.reshape(-1).to(rest.values.dtype)])[order], starts)

    def _places(self, latents: Int[Tensor, " m"]) -> tuple[Int[Tensor, " nnz"], Bool[Tensor, " nnz"]]:
        """Where in ``latents`` each entry's latent stands, and whether it does."""
        ascending, order = latents.sort()
        if bool((ascending[1:] == ascending[:-1]).any()):
            raise ValueError(f"latents: expected each at most once, got {latents.tolist()}.")
        if latents.shape[0] == 0:
            return torch.zeros_like(self.latents), torch.zeros_like(self.latents, dtype=torch.bool)
        found = torch.searchsorted(ascending, self.latents).clamp(max=latents.shape[0] - 1)
        return order[found], ascending[found] == self.latents

    def l0(self) -> Int[Tensor, " tokens"]:
        """Entries of each token that fire: those that are not zero. Few encoders have negative ones."""
        fires = (self.values != 0).long()
        return torch.zeros_like(self.starts).index_add_(0, self.token_ids(), fires)

    def firings(self, n_latents: int) -> Int[Tensor, " n_latents"]:
        """On how many tokens each latent fires."""
        fires = (self.values != 0).long()
        return torch.zeros(n_latents, dtype=torch.long, device=self.latents.device).index_add_(0, self.latents, fires)

    def to_dense(self, n_latents: int) -> Float[Tensor, "tokens n_latents"]:
        """The same code as a matrix, mostly zeros: for inspection and tests, not for training."""
        return _summed(self.token_ids(), self.latents, self.values, (self.n_tokens, n_latents))


def _summed(
    rows: Int[Tensor, " nnz"], columns: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], shape: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """Return the matrix that holds in every cell the sum of its values.

    By ``index_add``, which adds in order on a CPU: ``index_put`` lets threads add as they come, and float32 sums then differ
    from run to run.
    """
    cells = values.new_zeros(shape[0] * shape[1])
    return cells.index_add(0, rows * shape[1] + columns, values).view(shape)
