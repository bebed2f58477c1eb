"""Success and cost of edits: mass on the target tokens, continuations judged by a classifier, KL divergence, cross-entropy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from ..bootstrap import ByDocument
from ..circuits.tasks.competence import wilson
from ..features.records import number
from ..probing.probes import LinearProbe, logistic
from ..undefined import settled
from .edits import FIRST, NO_EDIT, Edit, SteeredModel
from .texts import Rows, TokenSets, padded_batches

# Name of an edit, and its strength.
Setting = tuple[Edit, float]


@dataclass(frozen=True)
class TokenClassifier:
    """Logistic regression on the token counts of pieces of text: above 0, a piece reads like the text steered towards."""

    probe: LinearProbe
    special: frozenset[int]
    vocabulary: int
    # Balanced share of the reporting halves' pieces that it judges rightly.
    accuracy: float

    @classmethod
    def fitted(
        cls, choosing: tuple[Rows, Rows], reporting: tuple[Rows, Rows], length: int, special: Iterable[int], vocabulary: int
    ) -> "TokenClassifier":
        """Fit it to pieces of ``length`` tokens of both texts' choosing halves, and test it on the other halves."""
        special = frozenset(special)
        x, y = _pieces(choosing, length, special, vocabulary)
        probe = logistic(x, y, weight=True)
        x, y = _pieces(reporting, length, special, vocabulary)
        right = (probe.scores(x) > 0) == y
        return cls(probe, special, vocabulary, float((right[y].mean() + right[~y].mean()) / 2))

    def judges(self, token_ids: Int[Tensor, "pieces positions"]) -> Bool[np.ndarray, " pieces"]:
        """Return True for each piece that reads like the text steered towards; one without tokens does not."""
        counts = _counts([[int(token) for token in row] for row in token_ids], self.special, self.vocabulary)
        return (self.probe.scores(counts) > 0) & (np.diff(counts.tocsr().indptr) > 0)


def _pieces(texts: tuple[Rows, Rows], length: int, special: frozenset[int], vocabulary: int) -> tuple[Any, np.ndarray]:
    pieces, labels = [], []
    for positive, rows in zip((True, False), texts, strict=True):
        for row in rows:
            own = [token for token in row if token not in special]
            starts = range(0, max(1, len(own) - length // 2), length)
            pieces += [own[start : start + length] for start in starts]
            labels += [positive] * len(starts)
    return _counts(pieces, special, vocabulary), np.array(labels)


def _counts(pieces: list[list[int]], special: frozenset[int], vocabulary: int) -> sparse.csc_array:
    owners = [number for number, piece in enumerate(pieces) for token in piece if token not in special]
    tokens = [token for piece in pieces for token in piece if token not in special]
    entries = (np.ones(len(tokens), dtype=np.float32), (np.array(owners, dtype=int), np.array(tokens, dtype=int)))
    return sparse.csc_array(sparse.coo_array(entries, shape=(len(pieces), vocabulary)))


def log_mass(
    steered: SteeredModel, prompts: Int[Tensor, "prompts positions"], tokens: Bool[np.ndarray, " vocabulary"], setting: Setting
) -> Float[Tensor, "prompts edited"]:
    """Return the log probability of a set of tokens behind every position that an edit reaches."""
    mask = torch.from_numpy(tokens)
    found = []
    for some in prompts.split(32):
        logits = steered.logits(some, *setting)[:, FIRST:]
        inside = logits[..., mask.to(logits.device)].logsumexp(-1)
        found.append((inside - logits.logsumexp(-1)).cpu())
    return torch.cat(found)


def masses(
    steered: SteeredModel, prompts: Int[Tensor, "prompts positions"], sets: TokenSets, setting: Setting
) -> dict[str, float]:
    """Return the mean probability of the target tokens and of the contrast tokens."""
    found = {name: log_mass(steered, prompts, tokens, setting).exp().mean() for name, tokens in sets._asdict().items()}
    return {f"{name}_mass": number(value) for name, value in found.items()}


def success(
    steered: SteeredModel,
    prompts: Int[Tensor, "prompts positions"],
    new: int,
    classifier: TokenClassifier,
    sets: TokenSets,
    setting: Setting,
) -> dict[str, float]:
    """Return how continuations come out.

    ``share`` is the share of them that the classifier takes for the text steered towards, with its 95% Wilson interval;
    ``token_share`` that of target tokens among their target and contrast tokens.
    """
    ids = steered.continuations(prompts, new, *setting)
    share = float(classifier.judges(ids).mean())
    low, high = wilson(share, len(ids))
    target, contrast = (int(tokens[ids.numpy()].sum()) for tokens in sets)
    figures = {"share": share, "share_low": low, "share_high": high, "token_share": target / max(target + contrast, 1)}
    return {name: number(value) for name, value in figures.items()}


def costs(steered: SteeredModel, rows: Rows, settings: Iterable[Setting], padding: int) -> list[dict[str, Any]]:
    """Return the cost of every setting on documents: KL divergence from the unedited model, and cross-entropy.

    ``kl`` is ``KL(unedited, edited)`` in nats per token over the positions that edits reach, with a 95% interval over
    documents; ``ce`` is the cross-entropy of the next token there, and ``ce_clean`` that of the unedited model.
    """
    settings = list(settings)
    sums = [ByDocument(("tokens", "kl", "predicted", "nll", "nll_clean")) for _ in settings]
    for ids, places, sizes in padded_batches(rows, padding):
        clean = steered.logits(ids, NO_EDIT, 0.0).log_softmax(-1)
        # The last token has no next one, but a prediction that may change.
        owners = torch.full(ids.shape, -1)
        for line, (place, size) in enumerate(zip(places.tolist(), sizes, strict=True)):
            owners[line, FIRST:size] = place
        kept, following = owners >= 0, ids.roll(-1, dims=1).to(clean.device)
        predicted = kept & (owners == owners.roll(-1, dims=1))
        predicted[:, -1] = False
        documents = owners[kept].numpy()
        for found, setting in zip(sums, settings, strict=True):
            found.update(documents, _token_costs(clean, steered.logits(ids, *setting), following, kept, predicted))
    return [_cost_figures(found) for found in sums]


def _token_costs(clean: Tensor, logits: Tensor, following: Tensor, kept: Tensor, predicted: Tensor) -> Mapping[str, np.ndarray]:
    edited = logits.log_softmax(-1)
    kl = (clean.exp() * (clean - edited)).sum(-1)
    losses = [-each.gather(-1, following[..., None])[..., 0] for each in (edited, clean)]
    counted = predicted.to(kl.device)
    columns = [torch.ones_like(kl), kl, counted.float(), *(torch.where(counted, loss, 0.0) for loss in losses)]
    return {
        name: column[kept.to(column.device)].double().cpu().numpy()
        for name, column in zip(("tokens", "kl", "predicted", "nll", "nll_clean"), columns, strict=True)
    }


def _cost_figures(sums: ByDocument) -> dict[str, Any]:
    totals = {name: float(np.sum(values)) for name, values in sums.columns().items()}
    ends = sums.intervals({"kl": lambda found: found["kl"] / found["tokens"]})
    interval, _ = settled({"kl_low": ends["kl_low"], "kl_high": ends["kl_high"]})
    return {
        "kl": number(max(0.0, totals["kl"] / totals["tokens"])),
        **{name: None if value is None else number(max(0.0, value)) for name, value in interval.items()},
        "ce": number(totals["nll"] / totals["predicted"]),
        "ce_clean": number(totals["nll_clean"] / totals["predicted"]),
    }
