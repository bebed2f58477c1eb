"""What the model loses when it runs on reconstructions: cross-entropy and KL with the dictionary spliced in.

Only positions the dictionary was trained for are replaced, and only predictions made there are counted. Losses are in
nats, summed over tokens before any division.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.activations.model import LanguageModel, next_token_loss

SPLICES = ("spliced", "zero", "mean")


class Downstream:
    """Running sums over batches of contexts for the dictionary and for two ablations."""

    def __init__(self, model: LanguageModel, hook: str, mean: Float[Tensor, " d_out"]):
        self.model, self.hook, self.mean = model, hook, mean
        self.ce: dict[str, float] = dict.fromkeys(("clean", *SPLICES), 0.0)
        self.kl: dict[str, float] = dict.fromkeys(SPLICES, 0.0)
        self.agree = 0
        self.tokens = 0

    def update(
        self,
        token_ids: Int[Tensor, "contexts positions"],
        kept: Bool[Tensor, "contexts positions"],
        counted: Bool[Tensor, "contexts predictions"],
        clean_logits: Float[Tensor, "contexts positions vocabulary"],
        reconstruction: Float[Tensor, "contexts positions d_out"],
    ) -> None:
        """``kept`` positions are replaced; ``counted`` ones are those whose next token is scored."""
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "spliced": lambda x: reconstruction.to(x.dtype),
            "zero": torch.zeros_like,
            "mean": lambda x: self.mean.to(x.dtype).expand_as(x),
        }
        self.ce["clean"] += float(next_token_loss(clean_logits, token_ids)[counted].double().sum())
        clean = clean_logits[:, :-1][counted].float().log_softmax(-1)
        for name, replace in replacements.items():
            with self.model.replacing(self.hook, lambda x, replace=replace: torch.where(kept.unsqueeze(-1), replace(x), x)):
                logits = self.model.logits(token_ids)
            self.ce[name] += float(next_token_loss(logits, token_ids)[counted].double().sum())
            changed = logits[:, :-1][counted].float().log_softmax(-1)
            self.kl[name] += float((clean.exp() * (clean - changed)).sum(-1).double().sum())
            if name == "spliced":
                self.agree += int((clean.argmax(-1) == changed.argmax(-1)).sum())
        self.tokens += int(counted.sum())

    def report(self) -> dict[str, Any]:
        """Means per token. A recovered fraction is ``None`` where the ablation costs nothing."""
        entries: dict[str, Any] = {"downstream_tokens": self.tokens}
        entries |= {f"ce_{name}": total / self.tokens for name, total in self.ce.items()}
        entries |= {f"kl_{name}": total / self.tokens for name, total in self.kl.items()}
        entries["ce_increase"] = entries["ce_spliced"] - entries["ce_clean"]
        entries["top1_agreement"] = self.agree / self.tokens
        for name in ("zero", "mean"):
            span = entries[f"ce_{name}"] - entries["ce_clean"]
            entries[f"ce_recovered_{name}"] = (entries[f"ce_{name}"] - entries["ce_spliced"]) / span if span > 0 else None
            kl = entries[f"kl_{name}"]
            entries[f"kl_recovered_{name}"] = (kl - entries["kl_spliced"]) / kl if kl > 0 else None
        return entries
