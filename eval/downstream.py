"""What the model loses when it runs on reconstructions: cross-entropy and KL with a dictionary spliced in.

Only positions the dictionary was trained for are replaced, and only predictions made there are counted. Losses are in
nats, summed over tokens before any division.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.activations.model import LanguageModel, next_token_loss
from training.activations.splice import Insertion, model_spliced

from .groups import MetricGroup, Predictions, Setting, View, predictions

SPLICES = ("spliced", "zero", "mean")


class SplicedModel(MetricGroup):
    """The model with the dictionary in place, and with ablations there: zeros, and the mean of the fitted documents."""

    name = "downstream"
    version = 1
    reads_model = True
    explanations: ClassVar = {
        "Effect on the model": {
            "downstream_tokens": "Predictions scored: at replaced positions whose next token is of the same document. Excluded "
            "positions keep the model's own activation.",
            "ce_clean": "Cross-entropy of the untouched model, nats per token.",
            "ce_spliced": "Cross-entropy with reconstructions in place of the targets, nats per token.",
            "ce_zero": "Cross-entropy with zeros in their place, nats per token.",
            "ce_mean": "Cross-entropy with the mean target in their place, nats per token.",
            "kl_spliced": "KL divergence from the untouched model's predictions to those on reconstructions, nats per token.",
            "kl_zero": "The same KL divergence with zeros, nats per token.",
            "kl_mean": "The same KL divergence with the mean target, nats per token.",
            "ce_increase": "ce_spliced - ce_clean: what the dictionary costs the model, nats per token.",
            "top1_agreement": "Share of predictions whose likeliest token stays the same.",
            "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), ablated to zero. 1 is perfect, 0 no "
            "better than zeros; undefined where the ablation costs nothing.",
            "ce_recovered_mean": "The same fraction, ablated to the mean target: the fairer yardstick.",
            "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
            "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
        },
    }

    def __init__(self, setting: Setting):
        assert setting.model is not None
        assert setting.hook_in is not None
        assert setting.hook_out is not None
        self.model, self.hook = setting.model, setting.hook_out
        self.insertion = Insertion(setting.dictionary, (setting.hook_in,), (setting.hook_out,))
        self.total = torch.zeros(setting.dictionary.d_out, dtype=torch.float64, device=setting.device)
        self.fitted = 0
        self.sums = Downstream(self.model)

    def fit(self, piece: View) -> None:
        self.total += piece.y.double().sum(0)
        self.fitted += piece.tokens

    def score(self, piece: View) -> None:
        passage = piece.passage
        assert passage is not None
        kept = passage.piece.kept
        ablated = ablations(self.model, kept, {self.hook: (self.total / self.fitted).float()})
        found = {
            "spliced": passage.predictions(
                lambda: model_spliced(self.model, [self.insertion], kept=kept, codes={(0, 0): piece.code})
            ),
            # The same for all dictionaries of this hook.
            **{name: passage.predictions(lambda name=name: ablated[name], (name, self.hook)) for name in ("zero", "mean")},
        }
        self.sums.add(passage.clean_loss, found)

    def report(self) -> dict[str, Any]:
        return self.sums.report()


class Downstream:
    """Running sums over batches of contexts for variants of the model: with a dictionary spliced in, with ablations."""

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
        """``variants`` are contexts in which the model is such a variant; ``counted`` predictions are scored."""
        clean = clean_logits[:, :-1][counted].float().log_softmax(-1)
        found: dict[str, Predictions] = {}
        for name in self.kl:
            with variants[name]:
                found[name] = predictions(self.model.logits(token_ids), token_ids, counted, clean)
        self.add(next_token_loss(clean_logits, token_ids)[counted], found)

    def add(self, clean_loss: Float[Tensor, " predictions"], found: Mapping[str, Predictions]) -> None:
        """Take in what was found at some predictions."""
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
        """Share of predictions whose likeliest token is the untouched model's."""
        return self.agree[name] / self.tokens

    def report(self) -> dict[str, Any]:
        """Means per token of the three usual variants. A recovered fraction is ``None`` where the ablation costs nothing."""
        entries: dict[str, Any] = {"downstream_tokens": self.tokens}
        entries |= {f"ce_{name}": self.mean_ce(name) for name in ("clean", *SPLICES)}
        entries |= {f"kl_{name}": self.mean_kl(name) for name in SPLICES}
        entries["ce_increase"] = entries["ce_spliced"] - entries["ce_clean"]
        entries["top1_agreement"] = self.agreement("spliced")
        for name in ("zero", "mean"):
            span = entries[f"ce_{name}"] - entries["ce_clean"]
            entries[f"ce_recovered_{name}"] = (entries[f"ce_{name}"] - entries["ce_spliced"]) / span if span > 0 else None
            kl = entries[f"kl_{name}"]
            entries[f"kl_recovered_{name}"] = (kl - entries["kl_spliced"]) / kl if kl > 0 else None
        return entries


def replaced(
    model: LanguageModel, kept: Bool[Tensor, "contexts positions"], changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> AbstractContextManager[Any]:
    """A context in which the model reads changed tensors at these hooks, and its own at positions that are not kept."""

    def within(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(kept.unsqueeze(-1), change(x).to(x.dtype), x)

    return model.hooked({hook: within(change) for hook, change in changes.items()})


def ablations(
    model: LanguageModel, kept: Bool[Tensor, "contexts positions"], means: Mapping[str, Float[Tensor, " _"]]
) -> dict[str, AbstractContextManager[Any]]:
    """Zeros, and the mean, in place of the tensors at all hooks that have a mean here, at once."""
    to_mean = {hook: lambda x, mean=mean: mean.to(x.dtype).expand_as(x) for hook, mean in means.items()}
    return {"zero": replaced(model, kept, dict.fromkeys(means, torch.zeros_like)), "mean": replaced(model, kept, to_mean)}
