"""Share of the two models' KL divergence that closes when the base runs on changed activations.

The base's activation ``x`` at its hook becomes ``x + change`` at every token that counts, and the rest of the base runs on it.
A change is the sum over a set of latents of ``f_i (d_i^tuned - d_i^base)``, or one of the floors and ceilings below. With
``KL`` the divergence of the base's predictions from the tuned model's, ``closed = 1 - KL(tuned || changed base) / KL(tuned ||
base)``: 1 if the base then predicts what the tuned model does, 0 without effect, negative if it moves away. Both are sums over
tokens.

- ``activation``: the tuned model's activation in place of the base's: the most that any change at this hook can do;
- ``reconstruction_difference``: the differences of all latents, with the biases;
- ``mean_difference``: the mean activation difference, added everywhere;
- ``pca``: the difference projected onto as many principal directions of differences as there are changed latents;
- ``random``: as many latents as are changed (exclusive or rotated), drawn from the others that fire;
- ``difference_sae``: the difference as an SAE trained on it reconstructs it; ``difference_sae_few``: as many of its latents as
  are changed, those that contribute most.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...training.activations.model import LanguageModel
from ...transcoders.crosscoder import Crosscoder
from ..bootstrap import ByDocument
from ..heldout import TextBatch, logits_and_activations
from ..undefined import settled


@dataclass(frozen=True)
class PairRows:
    """Kept tokens of a batch: activations of both models in raw units, and the activation of every latent."""

    base: Float[Tensor, "tokens d"]
    tuned: Float[Tensor, "tokens d"]
    values: Float[Tensor, "tokens n_latents"]


# From the rows of a batch to what is added to the base's activations.
Change = Callable[[PairRows], Float[Tensor, "tokens d"]]


def latent_change(crosscoder: Crosscoder, keep: Tensor, biases: bool = False) -> Change:
    """Return the change by the latents of a mask: what they write in the tuned model minus what they write in the base."""
    difference = (crosscoder.decoder(1) - crosscoder.decoder(0)) * keep.to(crosscoder.W_dec)[:, None]
    constant = crosscoder.bias(1) - crosscoder.bias(0)
    return lambda rows: rows.values @ difference + (constant if biases else 0.0)


def constant_change(difference: Float[Tensor, " d"]) -> Change:
    """Return the change that adds one vector everywhere."""
    return lambda rows: difference.expand_as(rows.base)


def projected_change(directions: Float[Tensor, "m d"], mean: Float[Tensor, " d"]) -> Change:
    """Return the change by the difference's projection onto orthonormal directions around its mean."""
    return lambda rows: mean + (rows.tuned - rows.base - mean) @ directions.T @ directions


def activation_change(rows: PairRows) -> Float[Tensor, "tokens d"]:
    """Return the whole difference of the two models' activations."""
    return rows.tuned - rows.base


def rows_of_pair(crosscoder: Crosscoder, x: tuple[Tensor, Tensor]) -> PairRows:
    """Encode the kept tokens of a batch."""
    code = crosscoder.encode(torch.cat(x, dim=-1))
    return PairRows(*x, code.to_dense(crosscoder.n_latents))


@torch.no_grad()
def kl_closed(
    crosscoder: Crosscoder,
    models: tuple[LanguageModel, LanguageModel],
    hooks: tuple[str, str],
    batches: Iterable[TextBatch],
    changes: Mapping[str, Change],
) -> dict[str, Any]:
    """Return ``kl_base`` in nats per token, and for every change ``closed`` with its 95% interval over documents.

    Args:
        models: Base and tuned model, whose predictions are over one vocabulary.
        hooks: Hook of each, as the model itself names it.
    """
    base, tuned = models
    names = ("tokens", "base", *changes)
    sums = ByDocument(names)
    for batch in batches:
        kept = batch.kept
        target, of_tuned = logits_and_activations(tuned, batch.token_ids, (hooks[1],))
        logits, of_base = logits_and_activations(base, batch.token_ids, (hooks[0],))
        rows = rows_of_pair(crosscoder, (of_base[hooks[0]][kept].float(), of_tuned[hooks[1]][kept].float()))
        wanted = target[kept].float().log_softmax(-1)
        found = {"tokens": np.ones(int(kept.sum())), "base": _kl(wanted, logits[kept])}
        for name, change in changes.items():
            with base.replacing(hooks[0], _added(change(rows), kept)):
                found[name] = _kl(wanted, base.logits(batch.token_ids)[kept])
        sums.update(batch.document_ids[kept.cpu().numpy()], found)
    return _closed(sums, tuple(changes))


def _added(amount: Float[Tensor, "tokens d"], kept: Bool[Tensor, "contexts positions"]) -> Callable[[Tensor], Tensor]:
    """Return the function that adds rows to an activation at the kept tokens."""

    def changed(x: Tensor) -> Tensor:
        new = x.clone()
        new[kept] = x[kept] + amount.to(x)
        return new

    return changed


def _kl(wanted: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]) -> np.ndarray:
    """Return the KL divergence, in nats per token, of predictions from the wanted ones."""
    width = min(wanted.shape[-1], logits.shape[-1])
    # Embeddings may be padded to different sizes beyond the one tokenizer's last token.
    other = logits[:, :width].float().log_softmax(-1)
    return (wanted[:, :width].exp() * (wanted[:, :width] - other)).sum(-1).double().cpu().numpy()


def _closed(sums: ByDocument, names: tuple[str, ...]) -> dict[str, Any]:
    columns = {name: float(np.sum(values)) for name, values in sums.columns().items()}
    tokens, whole = columns["tokens"], columns["base"]
    found: dict[str, Any] = {"tokens": int(tokens), "documents": len(sums.rows), "kl_base": whole / tokens, "closed": {}}
    if whole <= 0:
        return found | {"closed": dict.fromkeys(names), "reason": "the two models predict the same"}
    intervals = sums.intervals({name: lambda totals, name=name: 1 - totals[name] / totals["base"] for name in names})
    for name in names:
        ends, _ = settled({end: intervals[f"{name}_{end}"] for end in ("low", "high")})
        found["closed"][name] = {"share": 1 - columns[name] / whole, "kl": columns[name] / tokens} | ends
    return found
