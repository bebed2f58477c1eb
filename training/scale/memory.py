"""Memory of one device in training, by part."""

from dataclasses import dataclass

from ...sae.tiled_scores import LEAST_WIDTH, TILE_NUMBERS_ACCELERATOR, TILE_NUMBERS_CPU
from ..initialize import SAMPLE_TOKENS
from .mesh import MeshShape, prefers_dense
from .sizes import DictionarySizes, RunSizes, split

# Queued batches are read ahead, shuffled and copied: about twelve are in memory.
QUEUED_BATCHES, LABEL_BYTES = 12, 16


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, and in the main memory of its process.

    ``weights`` are parameters and Adam's two moments; ``gradients`` dense ones, or the gathered entries and rows; ``working``
    the peak of a step; ``model`` the language model, if it runs during training. In main memory are queued batches and the
    ``snapshot`` from which a checkpoint is written.
    """

    weights: int
    gradients: int
    working: int
    model: int
    queued: int
    snapshot: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.working + self.model

    @property
    def host(self) -> int:
        return self.queued + self.snapshot

    @property
    def all(self) -> int:
        return self.device + self.host


def device_memory(run: RunSizes, mesh: MeshShape, on_cpu: bool) -> DeviceMemory:
    """Return the memory of one rank.

    Args:
        on_cpu: True if the rank computes in main memory, where the run's initial sample is too.
    """
    parts = [split(sizes, mesh.latents) for sizes in run.dictionaries]
    own = run.batch_tokens // mesh.data
    numbers = sum(part.parameters for part in parts)
    working = max(working_bytes(part, max(1, own // run.accumulate), on_cpu, run.half) for part in parts)
    sample = 3 * 4 * max(run.row_numbers) * min(SAMPLE_TOKENS, run.tokens)
    return DeviceMemory(
        weights=12 * numbers,
        gradients=max(gradient_bytes(part, own, mesh.data, run) for part in parts),
        working=max(working, sample) if on_cpu else working,
        # It runs whole on every rank.
        model=run.model.parameters * run.model.bytes_per_number if run.live and run.model is not None else 0,
        queued=QUEUED_BATCHES * own * sum(4 * row + LABEL_BYTES for row in run.row_numbers),
        # Whole tensors go to files, in the memory of the rank that writes.
        snapshot=12 * run.parameters,
    )


def working_bytes(sizes: DictionarySizes, tokens: int, on_cpu: bool, half: bool) -> int:
    """Return the peak bytes of forward and backward: scores (one tile, or all) and about four copies of inputs and outputs."""
    tile = max(TILE_NUMBERS_CPU if on_cpu else TILE_NUMBERS_ACCELERATOR, LEAST_WIDTH * tokens)
    scores = sum((min(tokens * b.n_latents, tile) if sizes.budgeted else 2 * tokens * b.n_latents) for b in sizes.blocks)
    if sizes.budgeted:
        # Layers are encoded one after another, and only codes are kept.
        scores = max(min(tokens * block.n_latents, tile) for block in sizes.blocks)
    # Autocast keeps a copy of the encoder in 16 bits.
    copy = 2 * sum(block.n_latents * block.d_in for block in sizes.blocks) if half else 0
    return 4 * (scores + 4 * tokens * (sizes.d_in + sizes.d_out)) + copy


def gradient_bytes(sizes: DictionarySizes, tokens: int, ranks: int, run: RunSizes) -> int:
    """Return the bytes of gradients when the optimizer starts: dense, or the entries and rows of all ranks' tokens."""
    if prefers_dense(sizes, tokens, ranks, run):
        return 4 * sizes.parameters
    every = tokens * ranks
    # Latents, values of both matrices and the order by latent.
    entries = sum(round(every * block.active) * (8 + 4 * len(block.widths) + 8) for block in sizes.blocks)
    return entries + 4 * every * sum(sum(block.widths) for block in sizes.blocks)
