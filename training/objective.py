"""Training objective: the loss of a batch, and the terms to log."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..sae import SparseCode, SparseDictionary
from ..sae.losses import aux_zipf, normalized_mse, overlap, pre_activation_loss
from ..sae.ranks import UNDIVIDED, Shards
from ..sae.sparse_ops import decode
from .activations.contexts import Origin
from .activations.model import LanguageModel
from .activations.stream import ActivationBatch


@dataclass(frozen=True)
class LossWeights:
    """Weights of the reconstruction error and of the KL divergence in the loss."""

    reconstruction: float = 1.0
    kl: float = 0.0


FVU_ALONE = LossWeights()


@dataclass(frozen=True)
class Terms:
    """Results of one batch: named scalars, still on the device, and the number of times that each latent fired."""

    named: dict[str, Float[Tensor, ""]]
    firings: Int[Tensor, " n_latents"]


@dataclass(frozen=True)
class LatentUsage:
    """Latent usage after a number of steps: which latents are dead, and the running share of tokens on which each fires."""

    dead: Bool[Tensor, " n_latents"]
    density: Float[Tensor, " n_latents"]
    step: int = 0


@dataclass(frozen=True)
class AuxSettings:
    """Settings of AuxK. ``tau`` above 0 adds latents that fire less than ``tau`` times as often as a Zipf law predicts.

    ``orthogonality`` is the weight of the penalty on overlapping decoder directions.
    """

    weight: float
    latents: int
    tau: float = 0.0
    absolute: bool = False
    orthogonality: float = 0.0


class Divergence:
    """KL divergence of the model's predictions when ``hook`` gets the reconstruction, in nats per token.

    It is KL(clean || spliced). Gradients flow through the frozen model into the dictionary. Ranks run the model on some
    contexts each; the mean over the parts of a batch is the divergence of the whole batch.
    Source: Braun et al. 2024, arXiv:2405.12241.
    """

    def __init__(self, model: LanguageModel, hook: str, shards: Shards = UNDIVIDED):
        self.model, self.hook, self.shards = model, hook, shards

    def __call__(self, batch: ActivationBatch, y_hat: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
        origin = batch.origin
        assert origin is not None
        if origin.routes is None:
            return self._per_prediction(origin, y_hat).mean()
        # Shards have the same reconstructions, and run different contexts.
        y_hat = origin.routes(self.shards.shared(y_hat))
        # A rank without contexts sends and receives nothing, but takes part.
        total = self._per_prediction(origin, y_hat).sum() if len(y_hat) else y_hat.sum()
        own = total * origin.routes.ranks.size / origin.counted_of_all
        return own + (self.shards.sum(own.detach()) - own.detach())

    def _per_prediction(self, origin: Origin, y_hat: Float[Tensor, "tokens d_out"]) -> Float[Tensor, " predictions"]:
        with torch.no_grad():
            clean = self.model.run(origin.token_ids)[:, :-1][origin.counted].float().log_softmax(-1)

        def splice(x: Tensor) -> Tensor:
            return x.masked_scatter(origin.kept.unsqueeze(-1), y_hat.to(x.dtype))

        with self.model.replacing(self.hook, splice):
            spliced = self.model.run(origin.token_ids)[:, :-1][origin.counted].float().log_softmax(-1)
        return (clean.exp() * (clean - spliced)).sum(-1)


class Objective(nn.Module):
    """Training loss: the main term, the terms that the encoder asks for, and the auxiliary loss.

    The main term is the reconstruction error as FVU. Its
    ``variance`` is the dictionary's ``error_scale``: for one site the targets' mean squared distance from their mean, in raw
    units; for several, the values that make the error the mean of the sites' FVUs. ``weights`` are those of the reconstruction
    error and of the KL divergence of the model's predictions, which ``divergence`` computes; a schedule may change them.
    """

    variance: Float[Tensor, "..."]

    def __init__(
        self,
        dictionary: SparseDictionary,
        variance: float | Float[Tensor, "..."],
        aux: AuxSettings,
        divergence: Divergence | None = None,
        weights: LossWeights = FVU_ALONE,
    ):
        super().__init__()
        self.dictionary = dictionary
        self.aux = aux
        self.divergence, self.weights = divergence, weights
        self.register_buffer("variance", torch.as_tensor(variance), persistent=False)

    def forward(self, batch: ActivationBatch, usage: LatentUsage) -> tuple[Float[Tensor, ""], Terms]:
        d = self.dictionary
        y = batch.x if batch.target is None else batch.target
        code = d.encode(batch.x, batch.grad)
        y_hat = d.decode(code, batch.x)
        fvu = normalized_mse(y, y_hat, self.variance)
        firings = code.firings(d.n_latents)
        named = {"fvu": fvu.detach(), "l0": d.shards.sum(firings.sum()) / max(code.n_tokens, 1)}
        if d.screen is not None:
            for screen in (block.weights.screen for block in d.blocks if block.weights.screen is not None):
                named["screen_recall"] = screen.recall
        judged, error = [y_hat], fvu
        if code.requests.prefixes:
            judged = self.prefixes(code, batch.x)
            error = torch.stack([normalized_mse(y, guess, self.variance) for guess in judged]).mean()
        loss = self.weights.reconstruction * error
        extra = self.extra(batch, code, y, y_hat, usage)
        if self.weights.kl:
            assert self.divergence is not None
            extra["kl"] = self.weights.kl * torch.stack([self.divergence(batch, guess) for guess in judged]).mean()
        named |= {name: term.detach() for name, term in extra.items()}
        for term in extra.values():
            loss = loss + term
        named["loss"] = loss.detach()
        # Gradients are summed over ranks, each of which has an equal part of the batch.
        return loss / d.ranks.size, self.of_all_ranks(named, firings)

    def of_all_ranks(self, named: dict[str, Float[Tensor, ""]], firings: Int[Tensor, " n_latents"]) -> Terms:
        """Return the terms of the whole batch from those of this rank's part."""
        ranks = self.dictionary.ranks
        if ranks.size == 1:
            return Terms(named, firings)
        # One message: counts are exact in float32 below 16 million.
        total = ranks.sum(torch.cat([torch.stack(list(named.values())).float(), firings.float()]))
        means = total[: len(named)] / ranks.size
        return Terms(dict(zip(named, means.unbind(), strict=True)), total[len(named) :].long())

    def extra(
        self,
        batch: ActivationBatch,
        code: SparseCode,
        y: Float[Tensor, "tokens d_out"],
        y_hat: Float[Tensor, "tokens d_out"],
        usage: LatentUsage,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted terms to add to the main term, by name."""
        d, requests = self.dictionary, code.requests
        terms = dict(requests.penalties)
        if requests.frozen is not None:
            guess = (d.shards.reduced(decode(requests.frozen, d.atoms.detach())) + d.bypass(batch.x).detach()) * d.out_scale
            terms["frozen"] = normalized_mse(y, guess, self.variance)
        if requests.wider is not None:
            guess = d.decode(requests.wider.code, batch.x)
            terms["wider"] = requests.wider.weight * normalized_mse(y, guess, self.variance)
        if requests.revival is not None:
            seen, thresholds = d.normalised(batch.x), requests.revival.thresholds
            below = [
                pre_activation_loss(seen[:, block.reads], block.weights, thresholds[block.latents], usage.dead[block.latents])
                for block in d.blocks
            ]
            terms["pre_act"] = requests.revival.weight * torch.stack(below).mean()
        if self.aux.orthogonality:
            parts = [overlap(block.weights.W_dec, usage.step, d.shards) for block in d.blocks]
            terms["overlap"] = self.aux.orthogonality * torch.stack(parts).mean()
        if self.aux.weight > 0 and not self.aux.tau and not d.shards.total(int(usage.dead.any())):
            terms["aux"] = y_hat.new_zeros(())
        elif self.aux.weight > 0:
            error = (y - y_hat) / d.out_scale
            # Tied encoders run matching pursuit, whose decoder directions score residuals, not inputs.
            seen = error if d.tied else d.normalised(batch.x)
            settings = (self.aux.tau, self.aux.latents, self.aux.absolute)
            parts = [
                aux_zipf(
                    seen[:, block.reads],
                    error[:, block.writes],
                    block.weights,
                    usage.dead[block.latents],
                    usage.density[block.latents],
                    *settings,
                )
                for block in d.blocks
            ]
            terms["aux"] = self.aux.weight * torch.stack(parts).mean()
        return terms

    def prefixes(self, code: SparseCode, x: Float[Tensor, "tokens d_in"]) -> list[Float[Tensor, "tokens d_out"]]:
        """Return the reconstruction from each prefix of the latents, the full one last; every entry is decoded once."""
        d = self.dictionary
        guesses, partial, below = [], d.bypass(x).expand(len(x), d.d_out), 0
        latents = code.latents + d.shards.rank * d.n_latents
        for width in code.requests.prefixes:
            group = code.where((latents >= below) & (latents < width))
            partial = partial + d.shards.reduced(decode(group, d.atoms))
            guesses.append(partial * d.out_scale)
            below = width
        return guesses


def combine(pieces: list[Terms]) -> Terms:
    """Return the terms of a batch from those of its equally large micro-batches."""
    if len(pieces) == 1:
        return pieces[0]
    named = {key: torch.stack([piece.named[key] for piece in pieces]).mean() for key in pieces[0].named}
    return Terms(named, torch.stack([piece.firings for piece in pieces]).sum(0))
