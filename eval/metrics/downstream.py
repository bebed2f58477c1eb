"""Cross-entropy and KL divergence of the language model with a dictionary spliced in.

Only positions that the dictionary was trained on are replaced, and only predictions made there are counted. Losses are in nats,
summed over tokens before any division.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...training.activations.hooked_model import next_token_loss
from ...training.activations.model import LanguageModel
from ..bootstrap import ByDocument
from ..pages.glossary import EXPLANATIONS
from ..undefined import Undefined
from .base import DictionaryOutputs, MetricGroup, Setting
from .document_sums import ABLATIONS, DOWNSTREAM
from .histograms import Quantiles
from .model_outputs import Predictions, predictions

SPLICES = ("spliced", "zero", "mean")
ABLATED = ("spliced", *ABLATIONS)
MEASURED = [("ce", "clean"), *((measure, name) for measure in ("ce", "kl") for name in ABLATED)]
# Number of activations that the resample ablation draws from.
POOL_TOKENS = 4096
NO_COST = "the ablation costs nothing, so there is nothing to recover"
NO_PREDICTION = "no kept token is followed by one of the same document, so no prediction is counted"


class SplicedModel(MetricGroup):
    """Metric: loss of the model with the dictionary spliced in, and with ablations at the same hook.

    Ablations are zeros, the mean target of the first half of the documents, and targets of other tokens of that half
    (resample).
    """

    name = "downstream"
    version = 3
    reads_model = True

    def __init__(self, setting: Setting):
        assert setting.model is not None
        assert setting.hook_in is not None
        assert setting.hook_out is not None
        self.model, self.hook = setting.model, setting.hook_out
        self.total = torch.zeros(setting.dictionary.d_out, dtype=torch.float64, device=setting.device)
        self.fitted, self.scored = 0, 0
        # Every `stride`-th target of the first half is kept, independent of batch boundaries.
        self.stride = max(1, setting.fit_tokens // POOL_TOKENS)
        self.pool: list[Tensor] = []
        self.sums = Downstream(self.model, ABLATED)
        self.increases = Quantiles(floor=1e-3)
        self.better = 0
        self.documents = ByDocument(("count", "agrees", *(f"{measure}_{name}" for measure, name in MEASURED)))

    @property
    def document_sums(self) -> ByDocument:
        return self.documents

    def fit(self, piece: DictionaryOutputs) -> None:
        self.total += piece.y.double().sum(0)
        self.pool.append(piece.y[-self.fitted % self.stride :: self.stride].clone())
        self.fitted += piece.tokens

    @cached_property
    def others(self) -> Float[Tensor, "pool d_out"]:
        return torch.cat(self.pool)

    def score(self, piece: DictionaryOutputs) -> None:
        passage = piece.passage
        assert passage is not None
        kept = passage.piece.kept
        ablated = ablations(self.model, kept, {self.hook: (self.total / self.fitted).float()})
        chosen = self.others[scattered(self.scored, piece.tokens, len(self.others)).to(self.others.device)]
        ablated["resample"] = _replaced(self.model, kept, {self.hook: lambda x: _placed(x, kept, chosen)})
        self.scored += piece.tokens
        found = {
            "spliced": piece.spliced,
            # Shared by all dictionaries at this hook.
            **{name: passage.predictions(lambda name=name: ablated[name], (name, self.hook)) for name in ABLATED[1:]},
        }
        self.sums.add(passage.clean_loss, found)
        increase = found["spliced"].loss.double() - passage.clean_loss.double()
        self.increases.update(increase)
        self.better += int((increase < 0).sum())
        values = {"count": torch.ones_like(increase), "agrees": found["spliced"].agrees, "ce_clean": passage.clean_loss}
        values |= {f"ce_{name}": found[name].loss for name in ABLATED} | {f"kl_{name}": found[name].kl for name in ABLATED}
        self.documents.update(
            passage.prediction_documents, {name: value.double().cpu().numpy() for name, value in values.items()}
        )

    def report(self) -> dict[str, Any]:
        if self.sums.tokens == 0:
            keys = set(EXPLANATIONS["Effect on the model"]) - {"downstream_tokens"}
            return {"downstream_tokens": 0} | dict.fromkeys(sorted(keys), Undefined(NO_PREDICTION))
        low, middle, high, highest = self.increases.quantiles([0.05, 0.5, 0.95, 0.99])
        return (
            {key: Undefined(NO_COST) if value is None else value for key, value in self.sums.report().items()}
            | {
                "token_ce_increase_p05": low,
                "token_ce_increase_median": middle,
                "token_ce_increase_p95": high,
                "token_ce_increase_p99": highest,
                "token_ce_better_fraction": self.better / self.sums.tokens,
            }
            | self.documents.intervals(DOWNSTREAM)
        )


def scattered(first: int, count: int, among: int) -> Int[Tensor, " count"]:
    """Return a pseudo-random index below ``among`` for each of ``count`` tokens, numbered from ``first``.

    Indices are a hash of the token's number, so they do not depend on batch boundaries.
    """
    numbers = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        # The splitmix64 finalizer.
        z = numbers * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) % np.uint64(among)).astype(np.int64))


def _placed(x: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    """Return ``x`` with ``rows`` written to the kept positions."""
    changed = x.clone()
    changed[kept] = rows.to(x.dtype)
    return changed


class Downstream:
    """Running sums of losses for variants of the model: with a dictionary spliced in, with ablations."""

    def __init__(self, model: LanguageModel, variants: Sequence[str] = SPLICES):
        self.model = model
        self.ce: dict[str, float] = dict.fromkeys(("clean", *variants), 0.0)
        self.kl: dict[str, float] = dict.fromkeys(variants, 0.0)
        self.agree: dict[str, int] = dict.fromkeys(variants, 0)
        self.tokens = 0

    def update(
        self,
        token_ids: Int[Tensor, "contexts positions"],
        counted: Bool[Tensor, "contexts predictions"],
        clean_logits: Float[Tensor, "contexts positions vocabulary"],
        variants: Mapping[str, AbstractContextManager[Any]],
    ) -> None:
        """Add a batch of contexts.

        Args:
            counted: Mask of the predictions that are scored.
            variants: Context managers, by name, inside which the model is that variant.
        """
        clean = clean_logits[:, :-1][counted].float().log_softmax(-1)
        found: dict[str, Predictions] = {}
        for name in self.kl:
            with variants[name]:
                found[name] = predictions(self.model.logits(token_ids), token_ids, counted, clean)
        self.add(next_token_loss(clean_logits, token_ids)[counted], found)

    def add(self, clean_loss: Float[Tensor, " predictions"], found: Mapping[str, Predictions]) -> None:
        """Add the losses of all variants at the same predictions."""
        self.ce["clean"] += float(clean_loss.double().sum())
        for name in self.kl:
            self.ce[name] += float(found[name].loss.double().sum())
            self.kl[name] += float(found[name].kl.double().sum())
            self.agree[name] += int(found[name].agrees.sum())
        self.tokens += clean_loss.shape[0]

    def mean_ce(self, name: str) -> float:
        return self.ce[name] / self.tokens

    def mean_kl(self, name: str) -> float:
        return self.kl[name] / self.tokens

    def agreement(self, name: str) -> float:
        """Return the fraction of predictions whose top-1 token matches the unmodified model's."""
        return self.agree[name] / self.tokens

    def report(self) -> dict[str, Any]:
        """Return per-token means of the standard variants. A recovered fraction is ``None`` if the ablation costs nothing."""
        known = [name for name in ABLATED if name in self.kl]
        entries: dict[str, Any] = {"downstream_tokens": self.tokens}
        entries |= {f"ce_{name}": self.mean_ce(name) for name in ("clean", *known)}
        entries |= {f"kl_{name}": self.mean_kl(name) for name in known}
        entries["ce_increase"] = entries["ce_spliced"] - entries["ce_clean"]
        entries["top1_agreement"] = self.agreement("spliced")
        for name in known[1:]:
            span = entries[f"ce_{name}"] - entries["ce_clean"]
            entries[f"ce_recovered_{name}"] = (entries[f"ce_{name}"] - entries["ce_spliced"]) / span if span > 0 else None
            kl = entries[f"kl_{name}"]
            entries[f"kl_recovered_{name}"] = (kl - entries["kl_spliced"]) / kl if kl > 0 else None
        return entries


def _replaced(
    model: LanguageModel, kept: Bool[Tensor, "contexts positions"], changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> AbstractContextManager[Any]:
    """Return a context manager that replaces the tensors at these hooks, at kept positions only."""

    def within(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(kept.unsqueeze(-1), change(x).to(x.dtype), x)

    return model.hooked({hook: within(change) for hook, change in changes.items()})


def ablations(
    model: LanguageModel, kept: Bool[Tensor, "contexts positions"], means: Mapping[str, Float[Tensor, " _"]]
) -> dict[str, AbstractContextManager[Any]]:
    """Return context managers for the zero and the mean ablation of all hooks in ``means`` at once."""
    to_mean = {hook: lambda x, mean=mean: mean.to(x.dtype).expand_as(x) for hook, mean in means.items()}
    return {"zero": _replaced(model, kept, dict.fromkeys(means, torch.zeros_like)), "mean": _replaced(model, kept, to_mean)}
