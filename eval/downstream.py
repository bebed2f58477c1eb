"""What the model loses when it runs on reconstructions: cross-entropy and KL with a dictionary spliced in.

Only positions the dictionary was trained for are replaced, and only predictions made there are counted. Losses are in
nats, summed over tokens before any division.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.activations.model import LanguageModel, next_token_loss

SPLICES = ("spliced", "zero", "mean")


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
        self.ce["clean"] += float(next_token_loss(clean_logits, token_ids)[counted].double().sum())
        clean = clean_logits[:, :-1][counted].float().log_softmax(-1)
        for name in self.kl:
            with variants[name]:
                logits = self.model.logits(token_ids)
            self.ce[name] += float(next_token_loss(logits, token_ids)[counted].double().sum())
            changed = logits[:, :-1][counted].float().log_softmax(-1)
            self.kl[name] += float((clean.exp() * (clean - changed)).sum(-1).double().sum())
            self.agree[name] += int((clean.argmax(-1) == changed.argmax(-1)).sum())
        self.tokens += int(counted.sum())

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
