"""CrossLayerTranscoder: one encoder per layer, with decoders to that layer and all later ones."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..sae.batch_encoder import LEVEL_BATCHES
from ..sae.batch_selection import between
from ..sae.dictionary import LatentBlock, SparseDictionary, required_input
from ..sae.encoder import Encoder, Weights, scorer, with_gradient
from ..sae.encoders import encoder_spec
from ..sae.penalised import Penalised
from ..sae.ranks import ALONE, UNDIVIDED, largest_of_all
from ..sae.sparse_code import AuxTerms, Revival, SparseCode, joined_codes
from ..sae.thresholds import calibrate_cuts
from ..sae.tiled_scores import Scorer, above, largest_of_batch

# Encoders that select latents of one layer and token from pre-activations alone and whose training needs no second code.
LAYER_ENCODERS = ("topk", "jumprelu", "relu")
# Such encoders in loaded dictionaries.
LOADED_LAYER_ENCODERS = ("threshold", "signed_topk")
# Encoders that can select among all layers jointly, or meet one target L0 for all layers.
JOINT_ENCODERS = ("topk", "jumprelu", "relu")


class CrossLayerTranscoder(SparseDictionary):
    """Cross-layer transcoder: latents read their layer's MLP input and write to the MLP outputs of that and all later layers.

    ``y_hat^m = sum over l <= m of W_dec^{l->m T} code^l(x^l - in_centre^l) + b_dec^m``. ``d_in``, ``d_out`` and ``n_latents``
    are totals over layers: inputs, outputs, and latents of the layers are concatenated. ``W_dec[l]`` concatenates the decoders
    of layer ``l`` to layers ``l, l+1, ...``, so that each latent is one contiguous row, of unit norm over all layers it writes
    to. Every layer has its own input and output scale, and its own encoder with the arguments of ``encoder``.

    With ``joint`` the layers share the budget: training keeps the ``tokens n_layers k`` strongest pairs of a batch regardless
    of layer, and ``eval()`` mode keeps those above one threshold, because a layer cannot wait for later ones when the model
    runs on the reconstructions. Selection is over the batch rather than per token because tokens need different numbers of
    latents: after per-token selection in training, a threshold gave five times the error (embedded model: FVU 0.015 by
    selection, 0.085 by threshold). For encoders with a sparsity penalty, ``joint`` makes ``target_l0`` the mean over layers:
    one weight, steered by the total L0, leaves the distribution over layers free. Without ``joint`` every layer meets the
    target with its own weight.

    Ranks that divide the latents have equally many of every layer each, so that all hold and compute the same amount.

    With ``skip`` every layer's output also gets ``W_skip[m] (x^m - in_centre^m)``, as in some loaded transcoders.

    >>> import torch
    >>> from sparsary import ENCODERS, CrossLayerTranscoder
    >>> transcoder = CrossLayerTranscoder(n_layers=2, d_in=16, d_out=16, n_latents=64, encoder=ENCODERS["topk"](k=4))
    >>> [tuple(W.shape) for W in transcoder.W_dec]
    [(32, 16), (32, 8)]
    >>> transcoder(torch.randn(10, 16)).shape
    torch.Size([10, 16])

    Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
    """

    in_centre: Float[Tensor, " d_in"]
    level: Float[Tensor, ""]
    batches: Int[Tensor, ""]

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        d_out: int,
        n_latents: int,
        encoder: Encoder,
        joint: bool = False,
        skip: bool = False,
    ):
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if n_layers < 1 or size % n_layers:
                raise ValueError(f"dictionary.{name}: expected a multiple of the {n_layers} layers, got {size}.")
        super().__init__(d_in, d_out, n_latents, encoder, widths=[(d_in // n_layers, d_out // n_layers)] * n_layers)
        name = encoder_spec(encoder)["name"]
        allowed = JOINT_ENCODERS if joint else LAYER_ENCODERS
        if name not in allowed and (joint or name not in LOADED_LAYER_ENCODERS):
            how = "choosing from all layers together" if joint else "a cross-layer transcoder"
            raise ValueError(f"dictionary.encoder.name: expected one of {', '.join(allowed)} for {how}, got {name!r}.")
        if joint and encoder_spec(encoder).get("penalty") == "square":
            raise ValueError(
                "dictionary.encoder.penalty: expected l0 or tanh with joint, because square is about one layer's target, got "
                "square."
            )
        self.n_layers, self.joint = n_layers, joint
        # Guess of the next batch's level, and its margin below the last level. They save work without changing results, so they
        # are not saved.
        self._cut: float | None = None
        self._slack = 0.1
        width_in, width_out, here = d_in // n_layers, d_out // n_layers, n_latents // n_layers
        encoder.prepare(here)
        # The first layer uses `encoder` itself, whose arguments a recipe's schedules change.
        self.later_encoders = nn.ModuleList([copy.deepcopy(encoder) for _ in range(n_layers - 1)])
        self.W_enc = nn.ParameterList([torch.empty(here, width_in) for _ in range(n_layers)])
        self.b_enc = nn.ParameterList([torch.zeros(here) for _ in range(n_layers)])
        self.W_dec = nn.ParameterList([torch.empty(here, (n_layers - i) * width_out) for i in range(n_layers)])
        self.W_skip = nn.ParameterList([torch.zeros(width_out, width_in) for _ in range(n_layers)]) if skip else None
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("in_scale", torch.ones(d_in))
        self.register_buffer("out_scale", torch.ones(d_out))
        self.register_buffer("in_centre", torch.zeros(d_in))
        for each in (encoder, *self.later_encoders):
            for controller in each.controllers if joint and isinstance(each, Penalised) else ():
                controller.shared = True
        if self.chooses_jointly:
            self.register_buffer("level", torch.zeros(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        if not self.b_dec.is_meta:
            for W_enc, W_dec in zip(self.W_enc, self.W_dec, strict=True):
                nn.init.normal_(W_enc, std=width_in**-0.5)
                nn.init.normal_(W_dec)
            self.renormalize()

    @property
    def shift(self) -> Tensor:
        return self.in_centre

    @property
    def chooses_jointly(self) -> bool:
        """Return True if one selection is made among the latents of all layers."""
        return self.joint and not isinstance(self.encoder, Penalised)

    @property
    def encoders(self) -> list[Encoder]:
        """Encoders of all layers, with the arguments and progress of the first."""
        later = [cast(Encoder, encoder) for encoder in self.later_encoders]
        for name, value in self.encoder.arguments().items():
            for encoder in later:
                setattr(encoder, name, value)
        for encoder in later:
            encoder.progress = self.encoder.progress
        return [self.encoder, *later]

    @property
    def blocks(self) -> list[LatentBlock]:
        here, sites = self.n_latents // self.n_layers, self.sites
        matrices, ranks = zip(self.W_enc, self.b_enc, self.W_dec, strict=True), self.ranks if self.training else ALONE
        return [
            LatentBlock(
                slice(i * here, (i + 1) * here),
                site.reads,
                slice(site.writes.start, self.d_out),
                # No shift: it is a constant here, and its shortcut would stop gradients that flow through the model into the
                # inputs.
                Weights(W_enc, b_enc, W_dec, site_width=self.d_out // self.n_layers, ranks=ranks, shards=self.shards),
            )
            for i, (site, (W_enc, b_enc, W_dec)) in enumerate(zip(sites, matrices, strict=True))
        ]

    def arguments(self) -> dict[str, Any]:
        sizes = {"n_layers": self.n_layers, "d_in": self.d_in, "d_out": self.d_out, "n_latents": self.n_latents}
        rare = {} if self.W_skip is None else {"skip": True}
        return {"kind": "cross_layer_transcoder", **sizes, "joint": self.joint, **rare, "encoder": encoder_spec(self.encoder)}

    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        bias = self.b_dec if site is None else self.b_dec[self.sites[site].writes]
        if self.W_skip is None:
            return bias
        inputs = self.normalised(required_input(x, "this transcoder has a skip path from it"), site)
        if site is not None:
            return F.linear(inputs, self.W_skip[site], bias)
        skipped = [F.linear(inputs[:, each.reads], W) for each, W in zip(self.sites, self.W_skip, strict=True)]
        return torch.cat(skipped, dim=1) + bias

    def code_of(
        self,
        x: Float[Tensor, "tokens d"],
        grad: Float[Tensor, "tokens d_out"] | None = None,
        through: bool = False,
        site: int | None = None,
    ) -> SparseCode:
        if site is not None:
            return self._code_at(self.encoders[site], self.blocks[site].weights, x)
        if self.chooses_jointly and self.training:
            codes = self._strongest(x)
        else:
            layers = zip(self.encoders, self.blocks, strict=True)
            codes = [self._code_at(encoder, block.weights, x[:, block.reads]) for encoder, block in layers]
        code = self._joined(codes)
        return self._steered(code) if self.joint and self.training and len(x) else code

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        if not self.chooses_jointly:
            return calibrate_cuts(self.encoders, self, inputs, together=self.joint)
        # A pool of twice every batch's budget contains the overall budget unless batches differ wildly.
        pools, tokens = [], 0
        for batch in inputs:
            x = self.normalised(batch)
            tokens += len(x)
            scorers = [scorer(x[:, block.reads], block.weights) for block in self.blocks]
            values = torch.cat([largest_of_batch(s, 2 * len(x) * self.budget)[0].values for s in scorers])
            pools.append(values.topk(min(2 * len(x) * self.budget, len(values)), sorted=False).values.cpu())
        if not tokens:
            raise ValueError("encoder: expected tokens to calibrate the threshold on, got none.")
        pool = torch.cat(pools)
        best = pool.topk(min(tokens * self.budget + 1, len(pool))).values
        self.level.fill_(between(best, tokens * self.budget))
        self.batches.clamp_(min=1)
        return True

    @property
    def budget(self) -> int:
        """Latents per token over all layers, for joint selection."""
        return self.encoder.arguments()["k"] * self.n_layers

    def _code_at(self, encoder: Encoder, weights: Weights, x: Float[Tensor, "tokens d"]) -> SparseCode:
        """Return the code of one layer's normalized, centered inputs."""
        if not self.chooses_jointly:
            return encoder(x, weights)
        if not int(self.batches):
            raise ValueError(
                "encoder: no threshold is known before the first training batch. Train the dictionary, or load a trained one."
            )
        scores = scorer(x, weights)
        return with_gradient(above(scores.tiles(), self.level, *scores.shape), x, weights).relu()

    def _strongest(self, x: Float[Tensor, "tokens d_in"]) -> list[SparseCode]:
        """Return each layer's part of the batch's strongest pairs."""
        scorers = [scorer(x[:, block.reads], block.weights) for block in self.blocks]
        budget, ranks = len(x) * self.ranks.size * self.budget, self.shards.selecting(self.ranks)
        candidates = self._candidates(scorers, budget)
        values = torch.cat([code.values for code in candidates])
        if ranks.size > 1:
            kept = largest_of_all(values, budget, ranks)
        else:
            best = values.topk(min(budget, len(values)), sorted=False).indices
            kept = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, best, True)
        if budget:
            smallest = ranks.least(
                torch.where(kept, values, torch.inf).amin() if len(values) else values.new_full((), torch.inf)
            )
            self._observe(smallest)
            # Keep the number of candidates between 1.2 and 1.5 times the budget.
            share = ranks.total(len(values)) / budget
            self._slack *= 1.5 if share < 1.2 else 0.7 if share > 1.5 else 1.0
            self._cut = float(smallest) - self._slack
        parts = kept.split([len(code.values) for code in candidates])
        return [
            with_gradient(code.where(part), x[:, block.reads], block.weights).relu()
            for code, part, block in zip(candidates, parts, self.blocks, strict=True)
        ]

    def _candidates(self, scorers: list[Scorer], budget: int) -> list[SparseCode]:
        """Return at least the ``budget`` largest scores: those above a guessed level, or if too few, each layer's largest."""
        if self._cut is not None:
            found = [above(s.tiles(), torch.tensor(self._cut, device=s.x.device), *s.shape) for s in scorers]
            if self.shards.selecting(self.ranks).total(sum(len(code.values) for code in found)) >= budget:
                return found
        # Each rank's own largest: the selection among all ranks is the caller's.
        return [largest_of_batch(replace(s, ranks=ALONE, shards=UNDIVIDED), budget)[0] for s in scorers]

    @torch.no_grad()
    def _observe(self, smallest: Float[Tensor, ""]) -> None:
        """Move the threshold toward the smallest value a batch kept."""
        share = (1 / (self.batches.double() + 1)).clamp_min(1 / LEVEL_BATCHES)
        self.level.lerp_(smallest.clamp_min(0).to(self.level), share.to(self.level))
        self.batches += 1

    def _steered(self, code: SparseCode) -> SparseCode:
        """Return the code after steering every layer's penalty by the mean L0 over layers, so that their weights stay equal."""
        encoders = [encoder for encoder in self.encoders if isinstance(encoder, Penalised)]
        if not encoders or encoders[0].target_l0 is None:
            return code
        l0 = self.ranks.mean(self.shards.sum((code.values != 0).sum() / (code.n_tokens * self.n_layers)))
        wanted, rests = encoders[0].target_l0, encoders[0].rising
        pushes = [controller.steer(l0, wanted, rests) for encoder in encoders for controller in encoder.controllers]
        penalties = {name: penalty * pushes[0] for name, penalty in code.requests.penalties.items()}
        return replace(code, requests=replace(code.requests, penalties=penalties))

    def _joined(self, codes: list[SparseCode]) -> SparseCode:
        """Return one code of all layers' latents, with penalties averaged over layers."""
        here = self.n_latents // self.n_layers
        names = codes[0].requests.penalties
        penalties = {name: torch.stack([code.requests.penalties[name] for code in codes]).mean() for name in names}
        revivals = [code.requests.revival for code in codes if code.requests.revival is not None]
        revival = Revival(revivals[0].weight, torch.cat([each.thresholds for each in revivals])) if revivals else None
        joined = joined_codes([replace(code, latents=code.latents + i * here) for i, code in enumerate(codes)])
        parts = tuple(codes) if self.training else ()
        return replace(joined, requests=AuxTerms(penalties=penalties, revival=revival), parts=parts)
