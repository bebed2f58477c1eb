"""Codes and activations of a contrast's documents: selectivity of latents, their means, and contexts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse, stats

from ..features.records import number
from ..probing.subject import ProbeTarget
from .edits import FIRST
from .texts import Rows, padded_batches

# Latents whose ranks are computed at once.
COLUMNS_AT_ONCE = 4096
CONTEXTS, TOP_TOKENS = 3, 8
# A position counts in the mean differences if this many documents of both texts reach it.
POSITION_DOCUMENTS = 10


@dataclass(frozen=True)
class DocumentCodes:
    """Codes of a text's tokens, BOS left out, with the document and id of each, and means of activations."""

    codes: Any  # scipy.sparse.csr_array, (tokens, n_latents); its stubs are incomplete
    documents: Int[np.ndarray, " tokens"]
    token_ids: Int[np.ndarray, " tokens"]
    mean: Float[np.ndarray, " d"]
    # Sum of the activations at every position behind BOS, and the number of documents that reach it.
    position_sums: Float[np.ndarray, "positions d"]
    position_counts: Int[np.ndarray, " positions"]

    def pooled(self, pooling: str, piece: int) -> Float[np.ndarray, "pieces n_latents"]:
        """Return the mean or the largest value of every latent in every piece of ``piece`` tokens.

        Documents are joined in their order, so that all pieces are equally long; tokens left over at the end are dropped.
        """
        pieces = len(self.documents) // piece
        # Codes are in the order of batches, which hold documents of similar length.
        codes = self.codes[np.argsort(self.documents, kind="stable")[: pieces * piece]]
        found = np.zeros((pieces, codes.shape[1]), dtype=np.float32)
        rows = np.repeat(np.arange(pieces * piece) // piece, np.diff(codes.indptr))
        (np.add if pooling == "mean" else np.maximum).at(found, (rows, codes.indices), codes.data)
        return found / piece if pooling == "mean" else found

    def means(self) -> Float[np.ndarray, " n_latents"]:
        """Return the mean value of every latent over tokens."""
        return np.asarray(self.codes.mean(0), dtype=np.float64).ravel()

    def firings(self) -> Int[np.ndarray, " n_latents"]:
        """Return the number of tokens on which every latent fires."""
        return np.bincount(self.codes.indices, minlength=self.codes.shape[1])


@torch.no_grad()
def document_codes(subject: ProbeTarget, rows: Rows) -> DocumentCodes:
    """Run the model on documents and encode all tokens but the first of each.

    Raises:
        ValueError: If an activation is not finite.
    """
    tokens, owners, ids_of, width = [], [], [], subject.dictionary.d_in
    positions = max(map(len, rows)) - FIRST
    sums, counts = np.zeros((positions, width)), np.zeros(positions, dtype=np.int64)
    parts: list[sparse.csr_array] = []
    for ids, places, sizes in padded_batches(rows, 0):
        seen = subject.model.activations(ids.to(subject.model.device), (subject.hook,))[subject.hook].float()
        for line, (place, size) in enumerate(zip(places.tolist(), sizes, strict=True)):
            x = seen[line, FIRST:size]
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"{subject.hook}: expected finite activations, got NaN or infinite ones from {subject.model.id}. The model "
                    "overflows there: run it in float32, --set model.dtype=float32."
                )
            tokens.append(x)
            owners += [place] * len(x)
            ids_of.append(ids[line, FIRST:size].numpy())
            sums[: len(x)] += x.double().cpu().numpy()
            counts[: len(x)] += 1
        parts.append(_encoded(subject, torch.cat(tokens)))
        tokens = []
    together = sparse.csr_array(sparse.vstack(parts, format="csr"))
    return DocumentCodes(together, np.array(owners), np.concatenate(ids_of), sums.sum(0) / counts.sum(), sums, counts)


def _encoded(subject: ProbeTarget, x: Float[torch.Tensor, "tokens d"]) -> sparse.csr_array:
    code = subject.encode(x)
    fires = code.values != 0
    entries = (
        code.values[fires].float().cpu().numpy(),
        (code.token_ids()[fires].cpu().numpy(), code.latents[fires].cpu().numpy()),
    )
    return sparse.csr_array(sparse.coo_array(entries, shape=(len(x), subject.dictionary.n_latents)))


def selectivity(towards: DocumentCodes, away_from: DocumentCodes, pooling: str, piece: int) -> Float[np.ndarray, " n_latents"]:
    """Return the AUROC of every latent's pooled value, with pieces of the first text as positives.

    0.5 for a latent that does not tell the two texts apart, or never fires.
    """
    a, b = (codes.pooled(pooling, piece) for codes in (towards, away_from))
    found = np.empty(a.shape[1])
    for start in range(0, a.shape[1], COLUMNS_AT_ONCE):
        some = slice(start, start + COLUMNS_AT_ONCE)
        ranks = stats.rankdata(np.concatenate([a[:, some], b[:, some]]), axis=0)
        found[some] = (ranks[: len(a)].sum(0) - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))
    return found


def position_differences(towards: DocumentCodes, away_from: DocumentCodes) -> Float[np.ndarray, "positions d"]:
    """Return the difference of the mean activations at every position that enough documents of both texts reach."""
    shared = min(len(towards.position_counts), len(away_from.position_counts))
    counts = np.stack([each.position_counts[:shared] for each in (towards, away_from)])
    # The longest documents alone would give means of nothing but themselves.
    kept = (counts >= min(POSITION_DOCUMENTS, int(counts[:, 0].min()))).all(0)
    means = [each.position_sums[:shared][kept] / each.position_counts[:shared][kept, None] for each in (towards, away_from)]
    return means[0] - means[1]


def record_of(latent: int, codes: DocumentCodes, words: Sequence[str]) -> dict[str, Any]:
    """Return a latent's firing density, top tokens and strongest contexts in a text, in the form of ``features.jsonl``."""
    column = codes.codes[:, [latent]].toarray()[:, 0]
    by_token = np.bincount(codes.token_ids, weights=column)
    total = float(by_token.sum()) or 1.0
    order = [token for token in np.argsort(-by_token, kind="stable")[:TOP_TOKENS] if by_token[token] > 0]
    peaks: dict[int, int] = {}
    for row in np.argsort(-column, kind="stable"):
        if column[row] <= 0 or len(peaks) == CONTEXTS:
            break
        peaks.setdefault(int(codes.documents[row]), int(row))
    top = []
    for document, row in peaks.items():
        own = np.flatnonzero(codes.documents == document)
        top.append(
            {
                "tokens": [words[token] for token in codes.token_ids[own]],
                "activations": [number(value) for value in column[own]],
                "peak": int(np.searchsorted(own, row)),
                "document": document,
            }
        )
    return {
        "latent": latent,
        "density": number((column > 0).mean()),
        "max_activation": number(column.max()),
        "top": top,
        "top_tokens": [{"token": words[token], "share": number(by_token[token] / total)} for token in order],
    }


def spectrum(differences: Float[np.ndarray, "positions d"]) -> tuple[dict[str, Any], Float[np.ndarray, "directions d"]]:
    """Return figures of the singular values of mean differences by position, and their right singular vectors.

    ``shares`` are squared singular values divided by their sum; ``effective_rank`` is the exponential of their entropy
    (Roy and Vetterli 2007); ``eigengap`` the largest ratio of neighbouring ones among the first ten, and ``directions`` the
    number of directions before it.
    """
    _, values, directions = np.linalg.svd(differences, full_matrices=False)
    shares = values**2 / max(float((values**2).sum()), np.finfo(float).tiny)
    positive = shares[shares > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    ratios = positive[: len(positive) - 1][:10] / positive[1:][:10]
    gap = int(np.argmax(ratios)) if len(ratios) else 0
    figures = {
        "positions": len(differences),
        "shares": [number(share) for share in shares[:10]],
        "effective_rank": number(np.exp(entropy)),
        "eigengap": number(ratios[gap]) if len(ratios) else None,
        "directions": gap + 1,
    }
    return figures, directions
