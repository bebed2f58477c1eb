"""Diff of two models by a crosscoder: ``diff.json`` and ``diff.html``."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...sae.autoencoder import SAE
from ...sae.files import write_json
from ...training.activations.contexts import context_batches
from ...training.activations.model import LanguageModel, each_model
from ...training.activations.model_pair import NAMES, ModelPair, own_hook, side_of
from ...training.stages import stage
from ...transcoders.crosscoder import Crosscoder
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import Checkpoint, LoadedCheckpoint, open_checkpoint
from ..features.collect import Collected, Collector, Limits
from ..features.predicates import token_texts
from ..features.records import Described, describe_latents, number
from ..heldout import EvalData, Halves, eval_data, wanted_tokens
from ..pages.render import render_file
from ..result import Report
from .difference_sae import DifferenceCodes, DifferencePass, atoms_in_units, sae_change, train_difference_sae
from .differences import Differences, promoted_tokens
from .kinds import BASE_ONLY, CHANGED, DEAD, EXCLUSIVE, KINDS, decoder_cosines, histogram, kinds_of, of_kinds
from .patching import (
    Change,
    activation_change,
    constant_change,
    kl_closed,
    latent_change,
    projected_change,
)
from .scaling import LatentScaling, Ratios

log = logging.getLogger(__name__)

DIFF_FILE, DIFF_VERSION = "diff.json", 1
CONTEXTS = 8
# Changed latents are described with contexts; the others only counted.
DESCRIBED = 200
PRINCIPAL_SHOWN = 5
DIFFERENT_WIDTHS = "the two models differ in width at their hooks"
EQUAL_ACTIVATIONS = "the two models' activations are equal"
# Latents of the SAE on the difference that are described, if fewer are changed; and at most.
DESCRIBED_OF_SAE = (5, 20)
SAE_FOLDER = "difference_sae"
UNMEASURED_LENS = "the logit lens of a latent is that of its own model, listed with the latent"


@dataclass(frozen=True)
class DiffedPair:
    """Crosscoder of two models with what its measurements need."""

    opened: LoadedCheckpoint
    crosscoder: Crosscoder
    data: EvalData
    hooks: tuple[str, str]
    models: tuple[LanguageModel, LanguageModel]
    # Trained on the difference of the two activations, if it was asked for.
    sae: SAE | None = None

    @property
    def equal_widths(self) -> bool:
        """True if differences of the two models' activations are defined."""
        return len(set(self.crosscoder.widths)) == 1


@dataclass(frozen=True)
class PassResult:
    """Results of one pass over the fitting half of the text."""

    collected: Collected
    fvus: tuple[float, float]
    l0: float
    differences: Differences | None
    ratios: Ratios | None
    of_sae: DifferencePass | None


def diff(
    checkpoint: Checkpoint,
    out: str | Path | None = None,
    tokens: int | None = None,
    seed: int = 0,
    options: CheckpointOptions = NO_OPTIONS,
    difference_sae: bool = False,
) -> Report:
    """Compare two models by their crosscoder; write ``diff.json`` and ``diff.html``, return the former.

    Example::

        found = diff("runs/embedded/diff", tokens=40_000)
        found["counts"]["tuned_only"], found["patching"]["closed"]["exclusive"]["share"]

    Args:
        checkpoint: Crosscoder trained by a recipe with ``models: [BASE, TUNED]``.
        out: Directory of the files. Default: ``diff`` in the checkpoint's directory.
        tokens: Held-out tokens: half to measure latents on, half for the KL divergence. Default: the recipe's ``eval_tokens``.
        seed: Seed of the random latents that are patched as a floor.
        options: Text that the checkpoint does not record, and the permission to run a repository's code.
        difference_sae: Also train an SAE on the difference of the two models' activations, by the crosscoder's recipe and from
            its store, and measure it beside the other floors. It takes about half as long as the crosscoder, and is kept in
            ``difference_sae`` beside ``diff.json``.

    Raises:
        ValueError: If the checkpoint is no crosscoder of two models, its models or text cannot be loaded, or an SAE on the
            difference was asked for and there is no store to train it from.
    """
    if tokens is not None and tokens < 2:
        raise ValueError(f"--tokens: expected at least 2, got {tokens}.")
    opened = open_checkpoint(checkpoint, options)
    require_crosscoder_of_two(opened)
    opened = opened.completed()
    directory = Path(out) if out is not None else opened.results / "diff"
    pair, reasons = _pair(opened), {}
    if difference_sae:
        pair, reasons = _with_sae(pair, directory / SAE_FOLDER)
    entries = diff_entries(pair, wanted_tokens(opened.members[0].provenance, tokens), seed)
    entries["difference_sae_asked"] = difference_sae
    entries["reasons"] |= reasons
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / DIFF_FILE, entries, sealed=True)
    page = render_file(directory / DIFF_FILE)
    return Report(entries | {"page_path": str(page), "path": str(directory / DIFF_FILE)}, entries["latents"])


def require_crosscoder_of_two(opened: LoadedCheckpoint) -> None:
    """Raise ``ValueError`` unless the checkpoint is a crosscoder of two models, with one hook of each."""
    first = opened.members[0]
    kind = first.dictionary.arguments()["kind"]
    train = "Train one with models: [BASE, TUNED] and kind: crosscoder (docs/model_diffing.md)."
    if opened.stacked or len(opened.members) > 1 or not isinstance(first.dictionary, Crosscoder):
        got = f"{len(opened.members)} dictionaries" if len(opened.members) > 1 else f"kind {kind}"
        raise ValueError(f"{opened.name}: expected a crosscoder of two models, got {got}. {train}")
    hooks = hooks_of_provenance(first.provenance)[0]
    if tuple(map(side_of, hooks)) != NAMES:
        raise ValueError(
            f"{opened.name}: expected a crosscoder of two models, one hook of each, got one of {', '.join(hooks)}. {train}"
        )


def _pair(opened: LoadedCheckpoint) -> DiffedPair:
    member = opened.members[0]
    first, second = hooks_of_provenance(member.provenance)[0]
    data = eval_data(member.provenance, (first, second))
    if not isinstance(data.model.module, ModelPair):
        raise ValueError(
            f"{opened.name}: model: expected two models, got {data.model.id} alone. Leave --model out, or give the tuned one "
            "too: --set model.tuned='{id: TUNED}'."
        )
    base, tuned = each_model(data.model)
    crosscoder = member.dictionary.to(data.model.device)
    assert isinstance(crosscoder, Crosscoder)
    widths = data.model.widths((first, second))
    for hook, expected in zip((first, second), crosscoder.widths, strict=True):
        if widths[hook] != expected:
            raise ValueError(f"{hook}: expected width {expected}, the crosscoder's, got {widths[hook]} from {data.model.id}.")
    return DiffedPair(opened, crosscoder, data, (own_hook(first), own_hook(second)), (base, tuned))


def _with_sae(pair: DiffedPair, directory: Path) -> tuple[DiffedPair, dict[str, str]]:
    """Return the pair with an SAE on the difference, and the reason if there is none."""
    if not pair.equal_widths:
        return pair, {SAE_FOLDER: DIFFERENT_WIDTHS}
    sae = train_difference_sae(pair.opened.members[0], directory)
    if sae is None:
        return pair, {SAE_FOLDER: EQUAL_ACTIVATIONS}
    return replace(pair, sae=sae.to(pair.data.model.device)), {}


@torch.no_grad()
def diff_entries(pair: DiffedPair, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Return the entries of ``diff.json``."""
    crosscoder, data = pair.crosscoder, pair.data
    halves = data.halves(tokens)
    found = _first_pass(pair, halves.fit_tokens)
    relative = crosscoder.relative_norms()[:, 1].cpu()
    cosines = decoder_cosines(crosscoder.decoder(0), crosscoder.decoder(1)).cpu() if pair.equal_widths else None
    kinds = kinds_of(relative, torch.from_numpy(found.collected.firings), cosines)
    alive = torch.from_numpy(found.collected.firings > 0)
    words = token_texts(data.model.tokenizer, len(data.model.tokenizer))
    member = pair.opened.members[0]
    arguments = crosscoder.arguments()
    reasons: dict[str, str] = {}
    entries: dict[str, Any] = {
        "diff_version": DIFF_VERSION,
        "checkpoint": pair.opened.name,
        "encoder": json.dumps(arguments["encoder"]),
        "n_latents": crosscoder.n_latents,
        "widths": list(crosscoder.widths),
        "models": {name: model.id for name, model in zip(NAMES, pair.models, strict=True)},
        "hooks": dict(zip(NAMES, pair.hooks, strict=True)),
        "text": data.text.source,
        "tokens": found.collected.tokens,
        "tokens_asked": tokens,
        "documents": found.collected.documents,
        "seed": seed,
        "git_commit": member.provenance.get("git_commit"),
        "fvu": dict(zip(NAMES, map(number, found.fvus), strict=True)),
        "l0": number(found.l0),
        "counts": {kind: kinds.count(kind) for kind in KINDS},
        "relative_norms": histogram(relative[alive]),
    }
    if found.differences is None:
        reasons |= dict.fromkeys(("cosines", "latent_scaling", "mean_difference", "principal"), DIFFERENT_WIDTHS)
        entries |= dict.fromkeys(("cosines", "cosine_median", "mean_difference", "principal"))
    else:
        assert cosines is not None
        entries |= _of_equal_widths(pair, found.differences, cosines[alive & ~of_kinds(kinds, *EXCLUSIVE)], words)
    if found.ratios is not None:
        entries["true_exclusive"] = {kind: int((found.ratios.true & of_kinds(kinds, kind)).sum()) for kind in EXCLUSIVE}
    entries["latents"] = _latents(pair, found, kinds, relative, cosines, words)
    changed = int(of_kinds(kinds, *CHANGED).sum())
    if pair.sae is not None and found.of_sae is not None:
        entries["difference_sae"] = _sae_entries(pair, pair.sae, found.of_sae, changed, words)
    entries["patching"] = _patching(pair, found, kinds, halves, seed, reasons)
    return entries | {"reasons": reasons}


def _first_pass(pair: DiffedPair, tokens: int) -> PassResult:
    """Read the first half of the tokens: codes, reconstruction, differences, latent scaling."""
    crosscoder = pair.crosscoder
    collector = Collector(crosscoder.n_latents, Limits(top=CONTEXTS))
    same = pair.equal_widths
    differences = Differences(crosscoder.widths[0]) if same else None
    decoders = crosscoder.decoder(0).cpu(), crosscoder.decoder(1).cpu()
    biases = crosscoder.bias(0).cpu(), crosscoder.bias(1).cpu()
    scaling = LatentScaling(decoders, biases) if same else None
    of_sae = None if pair.sae is None else DifferenceCodes(pair.sae, Limits(top=CONTEXTS))
    sums = [torch.zeros(width, dtype=torch.float64) for width in crosscoder.widths]
    squares, errors = [0.0, 0.0], [0.0, 0.0]
    with stage("diff", tokens) as shown:
        for batch, x in _activations(pair, tokens):
            code = crosscoder.encode(torch.cat(x, dim=-1))
            collector.update(batch, code)
            x_hat = crosscoder.split(crosscoder.decode(code))
            if differences is not None and scaling is not None:
                differences.update(*x)
                values = code.to_dense(crosscoder.n_latents)
                scaling.update(values.cpu(), (x[0].cpu(), x[1].cpu()), (x_hat[0].cpu(), x_hat[1].cpu()))
            if of_sae is not None:
                of_sae.update(batch, x[1] - x[0])
            for site in (0, 1):
                sums[site] += x[site].double().sum(0).cpu()
                squares[site] += float(x[site].double().square().sum())
                errors[site] += float((x[site] - x_hat[site]).double().square().sum())
            shown.update(collector.tokens)
    collected = collector.result()
    spreads = [total - float(each.square().sum()) / collected.tokens for total, each in zip(squares, sums, strict=True)]
    fvus = [error / spread for error, spread in zip(errors, spreads, strict=True)]
    l0 = float(collected.firings.sum()) / collected.tokens
    ratios, codes = None if scaling is None else scaling.ratios(), None if of_sae is None else of_sae.result()
    return PassResult(collected, (fvus[0], fvus[1]), l0, differences, ratios, codes)


def _activations(pair: DiffedPair, tokens: int) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    data = pair.data
    hooks = tuple(f"{name}/{hook}" for name, hook in zip(NAMES, pair.hooks, strict=True))
    kept = 0
    for some in context_batches(data.model, data.text, data.exclusions, 8, heldout=True, bad=data.bad_texts):
        batch, rows = some.finite_activations(data.model, hooks, data.bad_tokens)
        yield batch, (rows[hooks[0]], rows[hooks[1]])
        kept += int(batch.kept.sum())
        if kept >= tokens:
            return


def _of_equal_widths(pair: DiffedPair, differences: Differences, cosines: Tensor, words: list[str]) -> dict[str, Any]:
    """Return the entries that compare vectors of the two models: cosines of decoder rows, mean and principal differences."""
    variances, directions = differences.principal()
    shown = torch.cat([differences.mean[None], directions[:PRINCIPAL_SHOWN]])
    lens = promoted_tokens(pair.models[1], shown, words)
    lenses = [lens] * len(shown) if isinstance(lens, str) else lens
    total = float(variances.sum())
    return {
        # From -1 to 1, as shares of that range.
        "cosines": histogram((cosines + 1) / 2),
        "cosine_median": number(cosines.median()) if len(cosines) else None,
        "mean_difference": {"norm": number(differences.mean.norm()), "logits": lenses[0]},
        "principal": [
            {"share": number(float(value) / total) if total else None, "logits": logits}
            for value, logits in zip(variances[:PRINCIPAL_SHOWN], lenses[1:], strict=True)
        ],
    }


def _latents(
    pair: DiffedPair, found: PassResult, kinds: list[str], relative: Tensor, cosines: Tensor | None, words: list[str]
) -> list[dict[str, Any]]:
    """Return the exclusive and rotated latents, the most active first, with ratios, contexts and the logit lens of a model.

    The model is the base for latents of the base alone, else the tuned one.
    """
    collected, crosscoder = found.collected, pair.crosscoder
    chosen = [latent for latent, kind in enumerate(kinds) if kind in CHANGED]
    chosen.sort(key=lambda latent: (-collected.sums[latent], latent))
    if len(chosen) > DESCRIBED:
        log.warning("%s: %d changed latents; the %d most active are described.", pair.opened.name, len(chosen), DESCRIBED)
    described = describe_latents(collected, crosscoder.W_dec, words, UNMEASURED_LENS, _corpus(pair)) if chosen else None
    rows = []
    for latent in chosen[:DESCRIBED]:
        assert described is not None
        site = 0 if kinds[latent] == BASE_ONLY else 1
        rows.append(
            _described(described, latent, pair.models[site], crosscoder.decoder(site)[latent], words)
            | {"kind": kinds[latent], "relative_norm": number(relative[latent])}
            | {"cosine": None if cosines is None else number(cosines[latent])}
            | _ratios_of(found.ratios if kinds[latent] in EXCLUSIVE else None, latent)
        )
    return rows


def _corpus(pair: DiffedPair) -> int | None:
    """Return the seed of the embedded corpus, whose factors are known; ``None`` for other text."""
    return pair.data.text.seed if pair.data.text.source == "embedded" else None


def _described(described: Described, latent: int, model: LanguageModel, row: Tensor, words: list[str]) -> dict[str, Any]:
    """Return a latent's contexts and scores, and the tokens that a decoder row makes more likely in a model."""
    record, lens = described.record(latent), promoted_tokens(model, row[None], words)
    names = ("latent", "density", "max_activation", "mean_activation", "top", "top_tokens", "scores", "details")
    return {name: record[name] for name in names} | {"logits": lens if isinstance(lens, str) else lens[0]}


def _sae_entries(pair: DiffedPair, sae: SAE, found: DifferencePass, changed: int, words: list[str]) -> dict[str, Any]:
    """Return the figures of the SAE on the difference, and the latents that contribute most to it."""
    least, most = DESCRIBED_OF_SAE
    rows, total = atoms_in_units(sae), float(found.contributions.sum())
    described = describe_latents(found.collected, rows, words, UNMEASURED_LENS, _corpus(pair))
    return {
        "folder": SAE_FOLDER,
        "encoder": json.dumps(sae.arguments()["encoder"]),
        "n_latents": sae.n_latents,
        "fvu": number(found.fvu),
        "l0": number(found.l0),
        "dead": int((found.collected.firings == 0).sum()),
        "latents": [
            _described(described, latent, pair.models[1], rows[latent], words)
            | {"contribution": number(float(found.contributions[latent]) / total)}
            for latent in found.largest(min(max(changed, least), most))
        ],
    }


def _ratios_of(ratios: Ratios | None, latent: int) -> dict[str, Any]:
    if ratios is None:
        return {"nu_error": None, "nu_reconstruction": None, "true": None}
    values = {"nu_error": ratios.nu_error[latent], "nu_reconstruction": ratios.nu_reconstruction[latent]}
    return {name: number(x) if torch.isfinite(x) else None for name, x in values.items()} | {"true": bool(ratios.true[latent])}


def _patching(
    pair: DiffedPair, found: PassResult, kinds: list[str], halves: Halves, seed: int, reasons: dict[str, str]
) -> dict[str, Any] | None:
    """Return the share of the KL divergence that each set of latents and each floor closes."""
    if found.differences is None:
        reasons["patching"] = DIFFERENT_WIDTHS
        return None
    # Fixes where the second half begins.
    for _ in halves.fit():
        pass
    alive, changed = ~of_kinds(kinds, DEAD), of_kinds(kinds, *CHANGED)
    count = int(changed.sum())
    changes: dict[str, Change] = {
        "activation": activation_change,
        "reconstruction_difference": latent_change(pair.crosscoder, alive, biases=True),
        "all": latent_change(pair.crosscoder, alive),
        "exclusive": latent_change(pair.crosscoder, of_kinds(kinds, *EXCLUSIVE)),
        "changed": latent_change(pair.crosscoder, changed),
        "unchanged": latent_change(pair.crosscoder, alive & ~changed),
        "mean_difference": constant_change(found.differences.mean.to(pair.crosscoder.W_dec)),
    }
    if count:
        others = torch.nonzero(alive & ~changed).flatten()
        drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:count]]
        mask = torch.zeros_like(changed)
        mask[drawn] = True
        directions = found.differences.principal()[1][:count].to(pair.crosscoder.W_dec)
        changes["random"] = latent_change(pair.crosscoder, mask)
        changes["pca"] = projected_change(directions, found.differences.mean.to(directions))
    if pair.sae is not None and found.of_sae is not None:
        changes["difference_sae"] = sae_change(pair.sae)
        if count:
            few = torch.zeros(pair.sae.n_latents, dtype=torch.bool)
            few[found.of_sae.largest(count)] = True
            changes["difference_sae_few"] = sae_change(pair.sae, few)
    closed = kl_closed(pair.crosscoder, pair.models, pair.hooks, halves.score(), changes)
    return {"changed_latents": count, "drawn_latents": min(count, int((alive & ~changed).sum()))} | closed
