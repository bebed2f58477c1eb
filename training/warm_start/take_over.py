"""A saved dictionary taken over into a run's units, width and encoder.

The function of the dictionary stays the same, unless the recipe changes the width or the encoder.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...sae import Encoder, SparseDictionary
from ...sae.batch_encoder import Calibrated
from ...sae.checkpoint import build_dictionary
from ...sae.dictionary import LatentBlock
from ...sae.encoders import encoder_spec
from ...sae.encoders.feature_choice import FeatureChoice
from ...sae.encoders.gated import Gated
from ...sae.encoders.jumprelu import LEAST, PACE, JumpReLU
from ...sae.encoders.lista import Lista
from ...sae.encoders.relu import ReLU
from ...sae.metrics import Moments
from ...transcoders.cross_layer import CrossLayerTranscoder
from ..activations.stream import ActivationBatch
from ..initialize import apart, geometric_median, set_scales
from ..recipe import Recipe
from ..resolve_hooks import dictionary_arguments
from .judge import ROWS, SampleRows, Usage
from .latents import EQUAL, PER_LATENT, FittedLatents, encoders_of, fitted_latents, holds_cuts, same_rule, set_cuts
from .source import StartSource

# Tokens whose scores set the bias of new latents.
BIAS_TOKENS = 4096
# Firing rate of new latents, as a share of the mean rate of the others. The quickstart's SAE (fvu 0.0200) with 512 more latents
# begins at 0.085, 0.022, and 0.0203 with shares 1, 0.1, and 0.02, and ends at 0.0207, 0.0206, and 0.0205 after 100,000 tokens.
NEW_RATE = 0.1


class TakeOver:
    """Construction of a run's ``dictionary`` from that of its start; ``changes`` lists what it does not keep."""

    @torch.no_grad()
    def __init__(
        self,
        source: StartSource,
        recipe: Recipe,
        widths: dict[str, int],
        sample: ActivationBatch,
        moments: tuple[Moments, Moments],
        usage: Usage,
    ):
        self.source, self.section = source.dictionary, recipe.dictionary
        self.sample, self.usage = sample, usage
        self.changes: list[str] = []
        self.dictionary = build_dictionary(dictionary_arguments(recipe, widths))
        set_scales(self.dictionary, *moments, self.section.normalize)
        self.own = fitted_latents(self.source)
        both = self.source.encoder, self.dictionary.encoder
        self.pursuit = any(each.tied for each in both)
        # Pursuits and LISTA subtract what they reconstruct from what they read.
        self.subtracts = self.pursuit or not all(each.linear for each in both)
        latents = self._in_run_units()
        # Before the width changes, which is another matter.
        exact = holds_cuts(self.dictionary, latents) or self._ranks_alike(latents)
        if not exact and same_rule(self.source, self.dictionary):
            self.changes.append(
                "decoder norms are not equal: latents are ranked by values times norms from now on, because training keeps "
                "decoder directions at unit norm"
            )
        resized = [self._resized(each, block) for each, block in zip(latents, self.source.blocks, strict=True)]
        self._install(resized)
        resizes = self.dictionary.n_latents != self.source.n_latents
        budget = encoder_spec(self.dictionary.encoder).get("k") != encoder_spec(self.source.encoder).get("k")
        if not exact or (isinstance(self.dictionary.encoder, Calibrated) and (budget or resizes)):
            self.dictionary.calibrate(SampleRows(self.sample.x))

    def _ranks_alike(self, latents: list[FittedLatents]) -> bool:
        """Return True if both encoders rank by the same rule, and the order of values is kept."""
        own, now = (encoder_spec(each.encoder) for each in (self.source, self.dictionary))
        # In eval mode gradient TopK is TopK.
        plain = [each | {"name": "topk"} if each["name"] == "gradient_topk" else each for each in (own, now)]
        topk = all(each["name"] == "topk" for each in plain) and own["k"] == now["k"]
        alike = topk or same_rule(self.source, self.dictionary)
        return alike and all(each.cut is None for each in latents) and self.uniform

    def _in_run_units(self) -> list[FittedLatents]:
        """Return the latents of the source with unit-norm decoders, and set scales and biases of the dictionary."""
        source, d = self.source, self.dictionary
        factors = self._norms()
        independent = isinstance(d.encoder, (*PER_LATENT, ReLU)) and all(each.cut is not None for each in self.own)
        self.uniform = _equal(torch.cat(factors))
        # Values that are subtracted from the inputs have their units, and the epsilon of a row norm those of the activations.
        one_scale = source.arguments()["kind"] == "sae" and bool(source.in_scale == source.out_scale)
        kept = source.row_norm is not None or (self.subtracts and not one_scale)
        if kept or (not independent and not self.uniform):
            mine = [each.W_dec.norm(dim=1) for each in self.own]
            if kept or _equal(torch.cat(mine)):
                d.in_scale.copy_(source.in_scale)
                d.out_scale.copy_(source.out_scale)
                factors = self._norms()
                self.uniform = _equal(torch.cat(factors))
        self._set_biases()
        found = []
        for block, latents, norms in zip(source.blocks, self.own, factors, strict=True):
            rise, fall = (
                _columns(d.in_scale, source.in_scale, block.reads),
                _columns(source.out_scale, d.out_scale, block.writes),
            )
            W_enc, b_enc = latents.W_enc * rise, latents.b_enc
            if b_enc is not None:
                b_enc = b_enc + W_enc @ (self._centre(d)[block.reads] - self._old_centre()[block.reads])
            elif d.blocks[0].weights.b_enc is not None:
                b_enc = torch.zeros(len(W_enc), dtype=W_enc.dtype)
            latents = replace(latents, W_enc=W_enc, b_enc=b_enc, W_dec=latents.W_dec * fall)
            found.append(latents.scaled(norms))
        self.factor = float(torch.cat(factors).mean())
        self.smallest = self.usage.smallest * self.factor
        return found

    def _norms(self) -> list[Float[Tensor, " n_latents"]]:
        """Return the decoder norms of the source's latents in the units of the run; 1 for directions of zero.

        Between pursuits with free norms they stay where they are, and only the units change.
        """
        stay = self.source.encoder.tied and self.dictionary.encoder.tied and not self.dictionary.encoder.unit_atoms
        found = []
        for block, latents in zip(self.source.blocks, self.own, strict=True):
            directions = F.normalize(latents.W_dec, dim=-1) if stay else latents.W_dec
            norms = (directions * _columns(self.source.out_scale, self.dictionary.out_scale, block.writes)).norm(dim=1)
            found.append(norms.where(norms > 0, 1.0))
        return found

    def _centre(self, d: SparseDictionary) -> Float[Tensor, " d_in"]:
        return torch.zeros(d.d_in, dtype=torch.float64) if d.shift is None else d.shift.detach().double()

    def _old_centre(self) -> Float[Tensor, " d_in"]:
        """Return the pre-encoder bias of the source in the units of the run."""
        return self._centre(self.source) * (self.source.in_scale.double() / self.dictionary.in_scale.double())

    def _set_biases(self) -> None:
        """Set the output bias, the pre-encoder bias and the skip path; latents make up for a changed pre-encoder bias."""
        source, d = self.source, self.dictionary
        bias = source.b_dec.detach().double() * (source.out_scale.double() / d.out_scale.double())
        if d.shift is not None and d.shift is not d.b_dec:
            centre = self._old_centre()
            if not self.pursuit and source.row_norm is None:
                # As for a new dictionary: the skip path and the encoder learn faster on centered inputs.
                centre = geometric_median(self.sample.x / d.in_scale).double()
            d.shift.copy_(centre)
        for site, old, new in _skips(source, d):
            rise, fall = _columns(d.in_scale, source.in_scale, site.reads), _columns(source.out_scale, d.out_scale, site.writes)
            new.copy_(old.detach().double() * rise * fall.reshape(-1, 1))
            bias[site.writes] += new.double() @ (self._centre(d) - self._old_centre())[site.reads]
        d.b_dec.copy_(bias)
        if self.pursuit and source.arguments()["kind"] == "sae" and not torch.allclose(self._old_centre(), bias, atol=1e-6):
            self.changes.append("the output bias is also subtracted from the inputs of the pursuit")

    def _resized(self, latents: FittedLatents, block: LatentBlock) -> FittedLatents:
        """Return the latents of one block in the width of the recipe."""
        wanted, have = self.section.known_n_latents, len(latents.W_dec)
        counts = self.usage.firings[block.latents]
        if wanted < have:
            # The densest, in their own order; of equally dense ones the first.
            return latents.rows(counts.argsort(descending=True, stable=True)[:wanted].sort().values)
        if wanted == have:
            return latents
        return self._grown(latents, block, wanted - have, float(counts.double().mean()) / max(self.usage.tokens, 1))

    def _grown(self, latents: FittedLatents, block: LatentBlock, more: int, rate: float) -> FittedLatents:
        """Return the latents and new ones, whose biases let them fire ``NEW_RATE`` times as often as the others on average."""
        d, x = self.dictionary, self.sample.x
        inputs = d.normalised(x)[:, block.reads]
        rows = self._directions(block)
        error = self.section.start is not None and self.section.start.new_latents == "error"
        weights = rows.pow(2).sum(1) if error else torch.ones(len(rows))
        tokens = torch.multinomial(weights.clamp_min(1e-12), more, replacement=True)
        W_dec = F.normalize(apart(rows[tokens]), dim=-1)
        W_enc = W_dec if self.sample.target is None else F.normalize(apart(inputs[tokens]), dim=-1)
        level = self.smallest if latents.cut is None else float(latents.cut.mean())
        scores = inputs[:BIAS_TOKENS] @ W_enc.T
        firing = max(1, min(len(scores), round(NEW_RATE * rate * len(scores))))
        b_enc = level - scores.topk(firing, dim=0).values[-1]

        def joined(old: Tensor | None, new: Tensor) -> Tensor | None:
            return None if old is None else torch.cat([old, new.double()])

        ones = torch.ones(more)
        return FittedLatents(
            torch.cat([latents.W_enc, W_enc.double()]),
            joined(latents.b_enc, b_enc),
            torch.cat([latents.W_dec, W_dec.double()]),
            joined(latents.cut, ones * level),
            joined(latents.gain, ones),
        )

    def _directions(self, block: LatentBlock) -> Float[Tensor, "tokens d_out"]:
        """Return candidates for the decoder directions of new latents: errors of the source, or centered targets."""
        d, batch = self.dictionary, self.sample
        targets = batch.x if batch.target is None else batch.target
        assert self.section.start is not None
        if self.section.start.new_latents == "error":
            guesses = torch.cat([self.source(rows) for rows in batch.x.split(ROWS)])
            return ((targets - guesses) / d.out_scale)[:, block.writes]
        return (targets / d.out_scale - d.bypass(batch.x))[:, block.writes]

    def _install(self, latents: list[FittedLatents]) -> None:
        """Write the latents into the dictionary's weights and encoders."""
        d = self.dictionary
        same_width = d.n_latents == self.source.n_latents
        for block, encoder, old, own in zip(d.blocks, encoders_of(d), encoders_of(self.source), latents, strict=True):
            if type(encoder) is type(old):
                _inherit(encoder, old, same_width)
                if isinstance(encoder, Lista) and encoder.has_thresholds:
                    # Every correction has the units of the inputs, as values do.
                    encoder.levels.mul_(self.factor)
            W_enc, b_enc = own.W_enc, own.b_enc
            if isinstance(encoder, Gated):
                gain = torch.ones(len(W_enc), dtype=W_enc.dtype) if own.gain is None else own.gain
                assert b_enc is not None
                encoder.r_mag.copy_(gain.log())
                encoder.b_mag.copy_(b_enc)
                W_enc, b_enc = W_enc / gain[:, None], b_enc if own.cut is None else (b_enc - own.cut) / gain
            elif own.cut is not None:
                set_cuts(encoder, own.cut.clamp_min(0))
            if isinstance(encoder, JumpReLU):
                encoder.started.fill_(1)
                if own.cut is None:
                    encoder.log_threshold.fill_(torch.tensor(LEAST).log() / PACE)
            block.weights.W_dec.copy_(own.W_dec)
            if block.weights.W_enc is not block.weights.W_dec:
                block.weights.W_enc.copy_(W_enc)
            if block.weights.b_enc is not None:
                assert b_enc is not None
                block.weights.b_enc.copy_(b_enc)
        if isinstance(d, CrossLayerTranscoder) and d.chooses_jointly and all(each.cut is not None for each in latents):
            d.level.copy_(torch.cat([each.cut for each in latents if each.cut is not None]).mean())
            d.batches.clamp_(min=1)


def _equal(norms: Float[Tensor, " n_latents"]) -> bool:
    return bool(norms.max() - norms.min() <= EQUAL * norms.max())


def _columns(numerator: Tensor, denominator: Tensor, columns: slice) -> Float[Tensor, "..."]:
    """Return the ratio of two scales, each one number or one per column, at some columns."""
    ratio = numerator.double() / denominator.double()
    return ratio[columns] if ratio.ndim else ratio


def _skips(source: SparseDictionary, d: SparseDictionary) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield every site with the skip matrices of the source and of the dictionary, if the source has any."""
    old, new = getattr(source, "W_skip", None), getattr(d, "W_skip", None)
    if old is None or new is None:
        return
    single = isinstance(old, Tensor)
    yield from zip(source.sites, [old] if single else old, [new] if single else new, strict=True)


def _inherit(encoder: Encoder, old: Encoder, same_width: bool) -> None:
    """Copy the state of an encoder of the same class; if the width changes, only what is not about single latents."""
    if same_width:
        encoder.inherit(old)
    elif not isinstance(encoder, FeatureChoice):
        own = encoder.state_dict()
        for name, tensor in old.state_dict().items():
            if not tensor.ndim:
                own[name].copy_(tensor)
