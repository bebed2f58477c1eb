"""Labelled vectors from files with their codes, and names of the concepts that tasks find."""

from collections.abc import Set as AbstractSet

import numpy as np
import torch
from scipy import sparse

from ...sae import SparseDictionary
from ...training.activations.vector_files import VectorFiles
from ...training.recipe import HarvestSection
from ..checkpoint import LoadedCheckpoint
from ..features.vectors import LABEL, RowTable
from ..name.names_file import recorded_names
from ..pages.examples import features_files, latent_label, records_of
from ..sanity import ROWS_AT_ONCE
from .datasets import Pooled

# Vectors that are read of a larger table.
VECTORS = 20_000


@torch.no_grad()
def labelled_vectors(section: HarvestSection, dictionary: SparseDictionary, rows: int, seed: int) -> Pooled:
    """Return labelled vectors with their codes, at most ``rows`` of them; vectors that are not finite are left out.

    Training never sees labels, so the vectors it has seen are taken too.

    Raises:
        ValueError: If the table of rows has no labels, or the vectors have another width than the dictionary.
    """
    vectors = VectorFiles(section)
    labels = RowTable.read(section.rows, vectors.rows).labels()
    if labels is None:
        raise ValueError(f"harvest.rows: expected a table with a column {LABEL}, one record per vector, got {section.rows}.")
    if vectors.width != dictionary.d_in:
        raise ValueError(f"harvest.files: expected width {dictionary.d_in}, the dictionary's d_in, got {vectors.width}.")
    known = np.flatnonzero([label != "" for label in labels])
    numbers = np.sort(np.random.default_rng(seed).permutation(known)[:rows])
    x = vectors.at(numbers)
    finite = torch.isfinite(x).all(-1)
    x, numbers = x[finite], numbers[finite.numpy()]
    parts = []
    for some in x.split(ROWS_AT_ONCE):
        code = dictionary.encode(some)
        fires = code.values != 0
        owners, latents = code.token_ids()[fires].numpy(), code.latents[fires].numpy()
        entries = (code.values[fires].float().numpy(), (owners, latents))
        parts.append(sparse.coo_array(entries, shape=(len(some), dictionary.n_latents)))
    codes = sparse.csc_array(sparse.vstack(parts))
    return Pooled(section.rows or "vectors", x.numpy(), codes, np.array(labels)[numbers], None, np.ones(len(x), np.int64))


def concept_names(opened: LoadedCheckpoint, latents: AbstractSet[int]) -> dict[int, str]:
    """Return names of latents: those of ``sparsary name``, else labels of the checkpoint's features, where they are there."""
    files = features_files([opened.directory], opened.members[0].dictionary.n_latents)
    labels = {} if files is None else records_of(files.records, set(latents))
    found = {latent: latent_label(record) for latent, record in labels.items()} | recorded_names(opened.directory)
    return {latent: name.strip() for latent, name in found.items() if latent in latents}
