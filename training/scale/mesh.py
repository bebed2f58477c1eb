"""Meshes of ranks, and the work of one rank in a step: products, memory traffic and messages.

A mesh has two axes. Ranks along ``data`` have different tokens of the batch and exchange gradients; ranks along ``latents``
have the same tokens and different latents, and exchange candidates and partial reconstructions. Work is counted for one rank,
all of whose parts run one after another: computation and communication do not overlap.
"""

from dataclasses import dataclass, fields, replace

from ...sae.ranks import GATHERED_BYTES
from ..divided import divides_batch, divides_latents
from ..gradient_exchange import ExchangedBytes
from .sizes import DictionarySizes, RunSizes, split

# Passes over inputs and outputs in forward and backward: normalization, error, loss, their gradients.
ROW_PASSES = 6
# Weights and two moments, read and written.
UPDATE_PASSES = 6
# Collectives of a step without those of matrices: presence and sum of other gradients, sizes, terms, and a request to stop.
MESSAGES = 5
# Collectives between ranks that share tokens, beside those of candidates: partial reconstructions, L0, dead latents, the
# gradient of the pre-encoder bias, the gradient's norm.
SHARD_MESSAGES = 5
# Counts by digit, and their ties (``ranks.largest_of_all``).
SELECTION_MESSAGES, SELECTION_BYTES = 6, 4 * 2048
# Named scalars summed over ranks with the firings.
NAMED_TERMS = 4


@dataclass(frozen=True)
class MeshShape:
    """Numbers of ranks along the two axes."""

    data: int
    latents: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.latents

    def __str__(self) -> str:
        return f"{self.data} x {self.latents}"


@dataclass(frozen=True)
class Traffic:
    """Messages of one axis in a step: ``rounds`` in which a rank waits for a neighbour, and bytes that it receives."""

    rounds: int = 0
    bytes_: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.rounds + other.rounds, self.bytes_ + other.bytes_)


@dataclass(frozen=True)
class Work:
    """Work of one rank in one step.

    ``macs`` are multiply-adds of the encoder product, ``scores`` its results, ``row_numbers`` float32 numbers moved in the rest
    of forward and backward, ``entry_numbers`` those of gradient rows in the update, ``update_numbers`` those of weights and
    moments. ``dictionaries`` counts steps, each with a constant cost.
    """

    macs: int = 0
    scores: int = 0
    row_numbers: int = 0
    entry_numbers: int = 0
    update_numbers: int = 0
    dictionaries: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Work)))


def forward_work(sizes: DictionarySizes, tokens: int) -> Work:
    """Return the work of forward and backward on ``tokens`` tokens, with the latents that ``sizes`` has."""
    macs = sum(block.n_latents * block.d_in for block in sizes.blocks) * tokens * sizes.passes
    scores = sizes.n_latents * tokens * sizes.passes
    # Decoder rows are read for the reconstruction and for the gradient of the values.
    rows = sum(round(2 * tokens * block.active * block.d_out) for block in sizes.blocks)
    return Work(macs, scores, rows + ROW_PASSES * tokens * (sizes.d_in + sizes.d_out), dictionaries=1)


def update_work(sizes: DictionarySizes, tokens: int, run: RunSizes, dense: bool, ranks: int = 1) -> Work:
    """Return the work of the optimizer with gradients of ``tokens`` tokens, the whole batch's.

    Args:
        dense: True if gradients are materialized, which moves them four more times.
        ranks: Number of ranks along ``data``, which share the summing of norms.
    """
    # Clipping sums the gradient rows once more.
    passes = 1 + 1 / ranks if run.clipped else 1
    entries = sum(round(passes * tokens * block.active * sum(block.widths)) for block in sizes.blocks)
    matrices = UPDATE_PASSES + (4 if dense else 0)
    return Work(entry_numbers=entries, update_numbers=matrices * sizes.parameters)


def exchange_bytes(sizes: DictionarySizes, tokens: int, ranks: int) -> tuple[int, int]:
    """Return the bytes that a rank receives for matrices' gradients, as entries and as dense matrices.

    These are the sums of ``gradient_exchange.ExchangedBytes``. ``tokens`` are those of one rank.
    """
    sparse = dense = 0
    for block in sizes.blocks:
        entries = round(tokens * block.active)
        sparse += (ranks - 1) * 4 * (entries + tokens)
        sparse += sum((ranks - 1) * 4 * (entries + tokens * width) for width in block.widths)
        dense += sum(2 * (ranks - 1) * 4 * block.n_latents * width // ranks for width in block.widths)
    return sparse, dense


def prefers_dense(sizes: DictionarySizes, tokens: int, ranks: int, run: RunSizes) -> bool:
    """Return True if ranks sum dense gradients: as ``gradient_exchange`` chooses, or because the optimizer has no others."""
    return not run.fused or (ranks > 1 and ExchangedBytes(*exchange_bytes(sizes, tokens, ranks)).prefers_dense)


def data_traffic(sizes: DictionarySizes, tokens: int, ranks: int, run: RunSizes) -> Traffic:
    """Return the messages between ranks with different tokens, of which each has ``tokens``."""
    if ranks == 1:
        return Traffic()
    sparse, dense = exchange_bytes(sizes, tokens, ranks)
    as_matrices = prefers_dense(sizes, tokens, ranks, run)
    matrices = sum(len(block.widths) for block in sizes.blocks)
    # Of entries, values and rows are sent for each matrix, latents and starts once for each encoder.
    messages = MESSAGES + (matrices if as_matrices else 2 * matrices + 2 * len(sizes.blocks))
    messages += matrices if run.clipped and run.fused else 0
    small = summed_bytes(4 * sizes.other_numbers, ranks) + summed_bytes(4 * (sizes.n_latents + NAMED_TERMS), ranks)
    if sizes.batch_wide:
        messages, small = messages + SELECTION_MESSAGES, small + (ranks - 1) * SELECTION_BYTES
    # An all-reduce of a large matrix goes around twice.
    twice = sum(4 * block.n_latents * width * ranks > GATHERED_BYTES for block in sizes.blocks for width in block.widths)
    rounds = (messages + (twice if as_matrices else 0)) * (ranks - 1)
    return Traffic(rounds, (dense if as_matrices else sparse) + small)


def latents_traffic(sizes: DictionarySizes, tokens: int, ranks: int) -> Traffic:
    """Return the messages between ranks with the same ``tokens`` and different latents; ``sizes`` are of the whole dictionary.

    Candidates' values are gathered, and partial reconstructions summed by an all-reduce.
    """
    if ranks == 1:
        return Traffic()
    candidates = sum(round(tokens * block.active) for block in sizes.blocks) if sizes.budgeted else 0
    # The gradient of the pre-encoder bias is summed too.
    received = (
        (ranks - 1) * 4 * candidates + summed_bytes(4 * tokens * sizes.d_out, ranks) + summed_bytes(4 * sizes.d_in, ranks)
    )
    gathers = len(sizes.blocks) if sizes.budgeted else 0
    return Traffic((ranks - 1) * (gathers + SHARD_MESSAGES), received)


def summed_bytes(size: int, ranks: int) -> int:
    """Return the bytes that a rank receives when a tensor of ``size`` bytes is summed over ranks."""
    return (ranks - 1) * size if size * ranks <= GATHERED_BYTES else 2 * size * (ranks - 1) // ranks


@dataclass(frozen=True)
class RankStep:
    """Work of one rank in a step on a mesh."""

    forward: Work
    update: Work
    data: Traffic
    latents: Traffic
    dense: bool


def rank_step(run: RunSizes, mesh: MeshShape) -> RankStep:
    """Return the step of one rank; members of a grid take theirs one after another."""
    own = run.batch_tokens // mesh.data
    found = RankStep(Work(), Work(), Traffic(), Traffic(), False)
    for whole in run.dictionaries:
        part = split(whole, mesh.latents)
        dense = prefers_dense(part, own, mesh.data, run)
        found = RankStep(
            found.forward + forward_work(part, own),
            found.update + update_work(part, run.batch_tokens, run, dense, mesh.data),
            found.data + data_traffic(part, own, mesh.data, run),
            found.latents + latents_traffic(whole, own, mesh.latents),
            found.dense or dense,
        )
    return replace(found, data=found.data + live_traffic(run, mesh))


def live_traffic(run: RunSizes, mesh: MeshShape) -> Traffic:
    """Return the messages of ranks that run the language model on some contexts each: the rows of their parts of a batch."""
    others = mesh.devices - 1
    if not run.live or not others:
        return Traffic()
    received = 4 * sum(run.row_numbers) * (run.batch_tokens // mesh.data) * others // mesh.devices
    return Traffic(others * len(run.row_numbers), received)


def meshes(devices: int) -> list[MeshShape]:
    """Return all meshes of so many devices, the one with all latents on every rank first."""
    return [MeshShape(devices // latents, latents) for latents in range(1, devices + 1) if devices % latents == 0]


def refusal(run: RunSizes, mesh: MeshShape) -> str:
    """Return why a run cannot be divided by a mesh; empty if it can."""
    if not divides_batch(run.batch_tokens, mesh.data, run.accumulate):
        pieces = f" in {run.accumulate} micro-batches" if run.accumulate > 1 else ""
        return f"batch_tokens {run.batch_tokens} is not a multiple of {mesh.data} ranks{pieces}"
    for sizes in run.dictionaries if mesh.latents > 1 else ():
        if sizes.unsplittable:
            return sizes.unsplittable
        if not divides_latents(sizes.least_split, mesh.latents):
            return f"n_latents {sizes.least_split} is not a multiple of {mesh.latents} ranks"
    return ""
