"""SparseCode: active latents of every token, with their values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .kernels import cpu_kernels
from .threshold_window import Window


def bounds(latents: Int[Tensor, " nnz"], starts: Int[Tensor, " tokens"]) -> Int[Tensor, " ends"]:
    """Return the first entry of every token, followed by the number of entries."""
    return torch.cat([starts, starts.new_full((1,), latents.shape[0])])


def group_by_latent(keys: Int[Tensor, " nnz"], count: int) -> tuple[Int[Tensor, " ends"], Int[Tensor, " nnz"]]:
    """Return ``(firsts, order)``: positions sorted by key (stable), key ``i`` at ``order[firsts[i]:firsts[i + 1]]``."""
    kernels = cpu_kernels() if keys.device.type == "cpu" else None
    if kernels is not None:
        return kernels.group(keys, count)
    # Sorted, not counted: ``torch.bincount`` first reads the largest key, which makes the host wait for the GPU.
    ordered, order = keys.sort(stable=True)
    return torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device)), order


@dataclass(frozen=True)
class ByLatent:
    """Entries of a code grouped by latent: latent ``i`` has those from ``firsts[i]`` to ``firsts[i + 1]``.

    ``tokens`` holds their tokens, ascending within a latent, and ``order`` their positions in the code.
    """

    firsts: Int[Tensor, " ends"]
    tokens: Int[Tensor, " nnz"]
    order: Int[Tensor, " nnz"]


@dataclass(frozen=True)
class Revival:
    """Auxiliary loss that brings dead latents back to their thresholds: its weight and the threshold of every latent."""

    weight: float
    thresholds: Float[Tensor, " n_latents"]


@dataclass(frozen=True)
class Wider:
    """Second code of the same tokens, with more latents, whose reconstruction is trained too, and the weight of its error."""

    weight: float
    code: "SparseCode"


@dataclass(frozen=True)
class AuxTerms:
    """Auxiliary loss terms that an encoder adds in training; decoding ignores them.

    ``penalties`` are scalars in units of FVU. ``prefixes`` are widths: for each width ``n``, the reconstruction from the first
    ``n`` latents alone is trained as well. ``frozen`` is a second code of the same tokens, trained to reconstruct the target
    without updating the decoder. ``revival`` applies to latents that training counts as dead. The reconstruction of ``wider``
    is trained as well.
    """

    penalties: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    prefixes: tuple[int, ...] = ()
    frozen: "SparseCode | None" = None
    revival: Revival | None = None
    wider: Wider | None = None


@dataclass(frozen=True)
class SparseCode:
    """Sparse code of a batch: a flat list of (latent, value) entries grouped by token.

    The entries of token ``t`` run from ``starts[t]`` to the next start. A latent may occur twice in one token (its values add
    up), and an entry with value zero does not fire.

    >>> from sparsary import SparseCode
    >>> code = SparseCode.from_rows(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1.0, 0.5], [3.0, 0.0]]))
    >>> code.l0().tolist(), code.to_dense(n_latents=3).tolist()
    ([2, 1], [[1.0, 0.0, 0.5], [0.0, 3.0, 0.0]])
    """

    latents: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    starts: Int[Tensor, " tokens"]
    requests: AuxTerms = field(default_factory=AuxTerms)
    # Set by ``encode`` for inputs of more than two axes, (batch, position): the shape in which the tokens stood.
    batch_shape: tuple[int, ...] = ()
    # Latents that do not fire but train their thresholds, if they are too many to be entries.
    window: Window | None = None
    # The same entries by block of latents, each block's numbered from 0; kept in training so that decoding need not split them.
    parts: tuple["SparseCode", ...] = ()

    def __getitem__(self, token: int | tuple[int, ...]) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Return the firing latents of one token and their values, the largest first.

        With ``batch_shape`` a token is named by (batch, position).

        Raises:
            IndexError: If there is no such token.
        """
        if isinstance(token, tuple):
            shape = self.batch_shape or (self.n_tokens,)
            if len(token) != len(shape) or not all(-size <= at < size for at, size in zip(token, shape, strict=True)):
                raise IndexError(f"token: expected an index into {shape}, got {token}.")
            number = 0
            for at, size in zip(token, shape, strict=True):
                number = number * size + at % size
        else:
            number = token + self.n_tokens if token < 0 else token
        if not 0 <= number < self.n_tokens:
            raise IndexError(f"token: expected one of {self.n_tokens} tokens, got {token}.")
        last = int(self.starts[number + 1]) if number + 1 < self.n_tokens else self.latents.shape[0]
        latents, values = self.latents[int(self.starts[number]) : last], self.values[int(self.starts[number]) : last]
        order = values.abs().argsort(descending=True, stable=True)
        order = order[values[order] != 0]
        return latents[order], values[order]

    @classmethod
    def from_rows(cls, latents: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]) -> "SparseCode":
        """Return the code of an encoder that keeps the same number of entries on every token."""
        tokens, k = latents.shape
        starts = torch.arange(0, tokens * k, k, device=latents.device) if k else latents.new_zeros(tokens)
        return cls(latents.reshape(-1), values.reshape(-1), starts)

    @classmethod
    def from_steps(cls, latents: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]) -> "SparseCode":
        """Return the code of an encoder that selects latents one after another and may select one repeatedly.

        The values of a repeated latent are summed in its first entry and its other entries are zero, so it counts once.
        """
        ordered, order = latents.sort(dim=1, stable=True)
        places = torch.arange(latents.shape[1], device=latents.device).expand_as(latents)
        again = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, 1:] == ordered[:, :-1]], dim=1).bool()
        first = order.gather(1, places.masked_fill(again, 0).cummax(dim=1).values)
        first = torch.empty_like(order).scatter(1, order, first)
        return cls.from_rows(latents, torch.zeros_like(values).scatter_add(1, first, values))

    @classmethod
    def from_cells(cls, cells: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], tokens: int, n_latents: int) -> "SparseCode":
        """Return the code with entries at ascending flat indices ``cells`` of a ``(tokens, n_latents)`` matrix."""
        first = torch.arange(0, tokens * n_latents, n_latents, device=cells.device) if n_latents else cells.new_zeros(tokens)
        return cls(cells % n_latents, values, torch.searchsorted(cells, first))

    @property
    def n_tokens(self) -> int:
        return self.starts.shape[0]

    def requesting(self, requests: AuxTerms) -> "SparseCode":
        """Return the code with other auxiliary loss terms."""
        return replace(self, requests=requests)

    def shaped(self, batch_shape: tuple[int, ...]) -> "SparseCode":
        """Return the code with the shape in which its tokens stood."""
        return replace(self, batch_shape=batch_shape)

    def entries_per_token(self) -> Int[Tensor, " tokens"]:
        """Return the number of entries of each token, including zeros."""
        return torch.diff(bounds(self.latents, self.starts))

    def token_ids(self) -> Int[Tensor, " nnz"]:
        """Return the token of each entry."""
        tokens = torch.arange(self.n_tokens, device=self.starts.device)
        return torch.repeat_interleave(tokens, self.entries_per_token(), output_size=self.latents.shape[0])

    def by_latent(self, n_latents: int) -> ByLatent:
        """Return the entries grouped by latent."""
        firsts, order = group_by_latent(self.latents, n_latents)
        return ByLatent(firsts, self.token_ids().index_select(0, order), order)

    def relu(self) -> "SparseCode":
        """Return the code with negative values set to zero."""
        return SparseCode(self.latents, self.values.relu(), self.starts, self.requests, self.batch_shape)

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCode":
        """Return the code with only the entries where ``keep`` is True."""
        before, kept = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)]), keep.nonzero().squeeze(1)
        latents, values = self.latents.index_select(0, kept), self.values.index_select(0, kept)
        return SparseCode(latents, values, before[self.starts], batch_shape=self.batch_shape)

    def columns(self, latents: Int[Tensor, " m"]) -> Float[Tensor, "tokens m"]:
        """Return the values of chosen latents on every token, zero where inactive; differentiable in ``values``.

        Raises:
            ValueError: If a latent is chosen twice.
        """
        places, chosen = self._places(latents)
        return _summed(self.token_ids()[chosen], places[chosen], self.values[chosen], (self.n_tokens, latents.shape[0]))

    def with_columns(self, latents: Int[Tensor, " m"], values: Float[Tensor, "tokens m"]) -> "SparseCode":
        """Return the code with the values of chosen latents replaced, active or not; differentiable in old and new values.

        Every token gets an entry for each chosen latent, after its other entries, even if the value is zero.

        Raises:
            ValueError: If a latent is chosen twice.
        """
        _, chosen = self._places(latents)
        rest, (tokens, m) = self.where(~chosen), values.shape
        owners = torch.cat([rest.token_ids(), torch.arange(tokens, device=latents.device).repeat_interleave(m)])
        order = owners.argsort(stable=True)
        every = torch.cat([rest.latents, latents.repeat(tokens)])[order]
        starts = rest.starts + m * torch.arange(tokens, device=latents.device)
        return SparseCode(
            every,
            torch.cat([rest.values, values.reshape(-1).to(rest.values.dtype)])[order],
            starts,
            batch_shape=self.batch_shape,
        )

    def _places(self, latents: Int[Tensor, " m"]) -> tuple[Int[Tensor, " nnz"], Bool[Tensor, " nnz"]]:
        """Return the position of each entry's latent in ``latents``, and a mask of the entries found there."""
        ascending, order = latents.sort()
        if bool((ascending[1:] == ascending[:-1]).any()):
            raise ValueError(f"latents: expected each at most once, got {latents.tolist()}.")
        if latents.shape[0] == 0:
            return torch.zeros_like(self.latents), torch.zeros_like(self.latents, dtype=torch.bool)
        found = torch.searchsorted(ascending, self.latents).clamp(max=latents.shape[0] - 1)
        return order[found], ascending[found] == self.latents

    def l0(self) -> Int[Tensor, " tokens"]:
        """Return the number of nonzero entries of each token; negative values, which few encoders have, count too."""
        fires = (self.values != 0).long()
        return torch.zeros_like(self.starts).index_add_(0, self.token_ids(), fires)

    def firings(self, n_latents: int) -> Int[Tensor, " n_latents"]:
        """Return the number of tokens on which each latent fires."""
        fires = (self.values != 0).long()
        return torch.zeros(n_latents, dtype=torch.long, device=self.latents.device).index_add_(0, self.latents, fires)

    def to_dense(self, n_latents: int) -> Float[Tensor, "tokens n_latents"]:
        """Return the code as a dense matrix, mostly zeros."""
        return _summed(self.token_ids(), self.latents, self.values, (self.n_tokens, n_latents))


def joined_codes(codes: Sequence[SparseCode]) -> SparseCode:
    """Return one code with the entries of several codes of the same tokens; those of a token in the order of the codes.

    >>> first, second = (SparseCode.from_rows(torch.tensor([[i], [i]]), torch.ones(2, 1)) for i in (3, 7))
    >>> joined_codes([first, second]).latents.tolist()
    [3, 7, 3, 7]
    """
    counts = torch.stack([code.entries_per_token() for code in codes], dim=1)
    k = counts[:1]
    # On an accelerator the check would make the host wait.
    if counts.device.type == "cpu" and bool((counts == k).all()):
        rows = [(len(counts), int(count)) for count in k.flatten()]
        latents, values = (
            torch.cat([part.view(shape) for part, shape in zip(parts, rows, strict=True)], dim=1)
            for parts in ([code.latents for code in codes], [code.values for code in codes])
        )
        return SparseCode.from_rows(latents, values)
    firsts, order = group_by_latent(torch.cat([code.token_ids() for code in codes]), len(counts))
    latents, values = torch.cat([code.latents for code in codes]), torch.cat([code.values for code in codes])
    return SparseCode(latents[order], values[order], firsts[:-1])


def _summed(
    rows: Int[Tensor, " nnz"], columns: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], shape: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """Return the matrix with the sum of the given values in every cell.

    ``index_add`` adds in a fixed order on a CPU; ``index_put`` runs in parallel threads, and float32 sums would differ between
    runs.
    """
    cells = values.new_zeros(shape[0] * shape[1])
    return cells.index_add(0, rows * shape[1] + columns, values).view(shape)
