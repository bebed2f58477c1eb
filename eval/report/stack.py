"""Evaluation of dictionaries at several sites (stack, cross-layer transcoder, crosscoder): all spliced in, and each alone."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...sae import SparseCode, SparseDictionary
from ...sae.files import write_json
from ...sae.metrics import Moments
from ...sae.training_usage import TrainingUsage
from ...training.activations.insertions import Insertion, TokenPlace, latents_at
from ...training.activations.model import LanguageModel
from ...training.activations.splice import model_spliced
from ...training.stages import stage
from ...transcoders.crosscoder import Crosscoder
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import LoadedCheckpoint, open_checkpoint
from ..heldout import (
    TextBatch,
    eval_data,
    eval_shortfalls,
    logits_and_activations,
    require_widths,
    told_shortfalls,
    wanted_tokens,
)
from ..metrics.downstream import SPLICES, Downstream, ablations
from ..metrics.reconstruction import Reconstruction
from ..pages.document import encoder_words
from ..pages.numbers import dead_words, show
from ..pages.render import render_file
from ..pages.stack import places_word, short
from ..result import Report
from ..undefined import settled

STACK_REPORT_VERSION = 1
# Smallest share of a latent's decoder norm at a site for the latent to be exclusive to it.
EXCLUSIVE = 0.9


@dataclass(frozen=True)
class ReplacedLayer:
    """One replaced layer: its insertion and site, and the hooks read and written."""

    place: TokenPlace
    hook_in: str
    hook_out: str


def evaluate_stack(
    checkpoint: str | Path,
    out: str | Path | None = None,
    tokens: int | None = None,
    options: CheckpointOptions = NO_OPTIONS,
) -> Report:
    """Evaluate a directory of checkpoints, a cross-layer transcoder, or a crosscoder; write the report to ``out`` or there.

    Reports cross-entropy, KL and top-1 agreement with all dictionaries spliced in, with all their hooks ablated to zero or the
    mean, and for each layer alone. A single layer of a cross-layer transcoder is replaced by its reconstruction from the
    unmodified model's inputs. A crosscoder's sites take the place of layers; all its reconstructions are from the unmodified
    model's activations. fvu and l0 are measured on the unmodified model's activations.

    Raises:
        ValueError: If there is no such directory, its dictionaries do not fit each other or the model, or there is no text.
    """
    return evaluate_opened(open_checkpoint(checkpoint, options), out, tokens)


def evaluate_opened(opened: LoadedCheckpoint, out: str | Path | None = None, tokens: int | None = None) -> Report:
    """Evaluate a loaded stack, cross-layer transcoder, or crosscoder, as ``evaluate_stack`` does."""
    opened = opened.completed()
    sources = _of_one_training(opened)
    insertions = [Insertion(m.dictionary, *hooks_of_provenance(m.provenance)) for m in opened.members]
    report = _describe(opened, insertions)
    report |= judge_stack(insertions, sources[0], wanted_tokens(sources[0], tokens))
    report |= _dead_in_training([insertion.dictionary.training_usage for insertion in insertions])
    had = [report[key] for key in ("tokens_asked", "tokens", "documents_shared")]
    report |= told_shortfalls(opened.name, sources, eval_shortfalls(*had))
    target = Path(out) if out is not None else opened.results
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "report.json", report, sealed=True)
    return Report(report | {"report_path": str(render_file(target / "report.json"))})


def _of_one_training(opened: LoadedCheckpoint) -> list[dict[str, Any]]:
    """Return the members' provenances.

    Raises:
        ValueError: If they differ in model, text or token filters.
    """
    sources = [member.provenance for member in opened.members]
    hooks = [hooks_of_provenance(source)[1][0] for source in sources]
    for key in ("model", "text", "harvest"):
        different = [hook for hook, source in zip(hooks, sources, strict=True) if source.get(key) != sources[0].get(key)]
        if different:
            raise ValueError(
                f"{opened.directory}: {key}: expected dictionaries trained on the same {key}, but {', '.join(different)} "
                "differ from "
                f"{hooks[0]}. Evaluate them one by one."
            )
    return sources


def _describe(opened: LoadedCheckpoint, insertions: list[Insertion]) -> dict[str, Any]:
    dictionaries = [insertion.dictionary for insertion in insertions]
    arguments = [dictionary.arguments() for dictionary in dictionaries]
    encoders = list(dict.fromkeys(json.dumps(argument["encoder"]) for argument in arguments))
    kinds = list(dict.fromkeys(argument["kind"] for argument in arguments))
    first = opened.members[0].provenance
    return {
        "stack_report_version": STACK_REPORT_VERSION,
        "checkpoint": opened.name,
        "kind": kinds[0] if len(insertions) == 1 else "stack of " + " and ".join(f"{kind}s" for kind in kinds),
        "encoder": encoders[0] if len(encoders) == 1 else f"{len(encoders)} encoders",
        "layers": sum(len(dictionary.sites) for dictionary in dictionaries),
        "n_latents": sum(dictionary.n_latents for dictionary in dictionaries),
        "parameters": sum(parameter.numel() for dictionary in dictionaries for parameter in dictionary.parameters()),
        "model": first["model"]["id"],
        "text": first["text"]["source"],
        "training_tokens": first.get("training_tokens"),
        "git_commit": first.get("git_commit"),
        "assumed": list(opened.assumed),
    }


def _dead_in_training(usages: list[TrainingUsage | None]) -> dict[str, float | int | None]:
    """Return the share of latents dead in training over all dictionaries; the window is the shortest of theirs."""
    known = [usage for usage in usages if usage is not None]
    if len(known) < len(usages):
        return {"dead_training_fraction": None, "dead_training_window_tokens": None}
    dead = torch.cat([usage.dead for usage in known])
    window = min(usage.window_tokens for usage in known)
    return {"dead_training_fraction": float(dead.double().mean()), "dead_training_window_tokens": window}


@torch.no_grad()
def judge_stack(insertions: list[Insertion], source: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return all metrics as flat entries; keys that begin with ``layer_`` hold lists with one item per layer."""
    layers = [
        ReplacedLayer((index, site), insertion.hooks_in[site], insertion.hooks_out[site])
        for index, insertion in enumerate(insertions)
        for site in insertion.sites
    ]
    hooks_in, hooks_out = [layer.hook_in for layer in layers], [layer.hook_out for layer in layers]
    where = eval_data(source, (*hooks_in, *hooks_out))
    model = where.model
    sites = [insertions[layer.place[0]].dictionary.sites[layer.place[1]] for layer in layers]
    require_widths(model, hooks_in, [site.reads.stop - site.reads.start for site in sites], "d_in")
    require_widths(model, hooks_out, [site.writes.stop - site.writes.start for site in sites], "d_out")
    for insertion in insertions:
        insertion.dictionary.to(model.device)
    means: dict[str, Moments] = {}
    halves, documents, fitted_documents = where.halves(tokens), set(), set()
    with stage("evaluation", tokens) as shown:
        for piece in halves.fit():
            for hook, y in model.activations(piece.token_ids, tuple(dict.fromkeys(hooks_out))).items():
                means.setdefault(hook, Moments(y.shape[-1], model.device)).update(y[piece.kept].float())
            fitted_documents |= piece.documents
            shown.update(min(halves.fitted, tokens // 2))
        centres = {hook: moments.mean.float() for hook, moments in means.items()}
        widths = [site.writes.stop - site.writes.start for site in sites]
        counts = [latents_at(insertions[layer.place[0]].dictionary, layer.place[1]) for layer in layers]
        found = [Reconstruction(width, count, model.device) for width, count in zip(widths, counts, strict=True)]
        alone = [name for layer in range(len(layers)) for name in _alone(layer)]
        downstream = Downstream(model, [*SPLICES, *alone])
        for piece in halves.score():
            clean_logits, seen = logits_and_activations(model, piece.token_ids, (*hooks_in, *hooks_out))
            rows = {hook: x[piece.kept].float() for hook, x in seen.items()}
            for layer, code, y_hat, record in zip(layers, *_reconstructed(insertions, layers, rows), found, strict=True):
                record.update(rows[layer.hook_out], y_hat, code)
            variants = dict(_variants(model, insertions, layers, piece, centres))
            downstream.update(piece.token_ids, piece.counted, clean_logits, variants)
            documents |= piece.documents
            shown.update(min(tokens // 2 + halves.scored, tokens))
    used = {"tokens_asked": tokens, "documents_shared": len(documents & fitted_documents), "documents": len(documents)}
    return used | _entries(layers, found, downstream) | _of_shared_code(insertions, found)


def _of_shared_code(insertions: list[Insertion], found: list[Reconstruction]) -> dict[str, Any]:
    """Return the entries of a crosscoder: its l0, counted once, and how its decoder norms are spread over the sites."""
    dictionary = insertions[0].dictionary
    if not isinstance(dictionary, Crosscoder):
        return {}
    shares = dictionary.relative_norms()
    return {
        "l0_total": settled(found[0].report())[0]["l0_mean"],
        "layer_norm_share": shares.mean(0).tolist(),
        "layer_exclusive": (shares >= EXCLUSIVE).sum(0).tolist(),
    }


def _reconstructed(
    insertions: list[Insertion], layers: list[ReplacedLayer], rows: dict[str, Tensor]
) -> tuple[list[SparseCode], list[Tensor]]:
    """Return every layer's code and reconstruction from the unmodified model's activations."""
    codes: dict[TokenPlace, SparseCode] = {}
    outputs = []
    for layer in layers:
        index, site = layer.place
        dictionary: SparseDictionary = insertions[index].dictionary
        x = rows[layer.hook_in]
        if dictionary.shares_code:
            codes[layer.place] = codes[index, 0] if site else dictionary.encode([rows[h] for h in insertions[index].hooks_in])
            outputs.append(dictionary.decode_at(site, [codes[layer.place]]))
            continue
        codes[layer.place] = dictionary.encode_at(site, x)
        outputs.append(dictionary.decode_at(site, [codes[index, earlier] for earlier in range(site + 1)], x))
    return [codes[layer.place] for layer in layers], outputs


def _alone(layer: int) -> list[str]:
    """Return the names of the variants in which only this layer is replaced."""
    return [f"{name} {layer}" for name in SPLICES]


def _variants(
    model: LanguageModel, insertions: list[Insertion], layers: list[ReplacedLayer], piece: TextBatch, means: dict[str, Tensor]
) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    yield "spliced", model_spliced(model, insertions, kept=piece.kept)
    yield from ablations(model, piece.kept, means).items()
    for number, layer in enumerate(layers):
        spliced, zero, mean = _alone(number)
        index, site = layer.place
        whole = insertions[index]
        single = Insertion(whole.dictionary, whole.hooks_in, whole.hooks_out, (site,))
        yield spliced, model_spliced(model, [single], kept=piece.kept)
        ablated = ablations(model, piece.kept, {layer.hook_out: means[layer.hook_out]})
        yield from ((zero, ablated["zero"]), (mean, ablated["mean"]))


def _entries(layers: list[ReplacedLayer], found: list[Reconstruction], downstream: Downstream) -> dict[str, Any]:
    reports = [settled(record.report())[0] for record in found]
    fvus = [report["fvu"] for report in reports]
    entries: dict[str, Any] = {
        "tokens": found[0].tokens,
        "fvu_layer_mean": None if None in fvus else sum(fvus) / len(reports),
        "l0_total": sum(report["l0_mean"] for report in reports),
        "dead_fraction": sum(float((record.firings == 0).sum()) for record in found)
        / sum(len(record.firings) for record in found),
        "dead_window_tokens": found[0].tokens,
    }
    usual = downstream.report()
    entries |= usual | {f"top1_{name}": downstream.agreement(name) for name in ("zero", "mean")}
    entries["layer_hooks"] = [
        layer.hook_out if layer.hook_in == layer.hook_out else f"{layer.hook_in} -> {layer.hook_out}" for layer in layers
    ]
    for key, source in (("fvu", "fvu"), ("l0", "l0_mean"), ("dead_fraction", "dead_fraction")):
        entries[f"layer_{key}"] = [report[source] for report in reports]
    measures = (("ce", downstream.mean_ce), ("kl", downstream.mean_kl), ("top1", downstream.agreement))
    for measure, of in measures:
        for name in SPLICES:
            entries[f"layer_{measure}_{name}"] = [of(f"{name} {layer}") for layer in range(len(layers))]
    return entries


def stack_summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as (name, value) pairs for the console."""
    variants, keys = ("spliced", "mean", "zero"), ("fvu", "l0", "ce_spliced", "ce_mean", "kl_spliced", "top1_spliced")
    # Module names and six figures must fit into 80 columns.
    width = 9
    agreements = ("top1_agreement", "top1_mean", "top1_zero")
    each = [(hook, [show(report[f"layer_{key}"][i]) for key in keys]) for i, hook in enumerate(report["layer_hooks"])]
    rows: list[tuple[str, list[str]]] = [
        (f"all {places_word(report)} at once", ["clean", "spliced", "mean", "zero"]),
        ("cross-entropy", [show(report[f"ce_{name}"]) for name in ("clean", *variants)]),
        ("KL", ["0", *(show(report[f"kl_{name}"]) for name in variants)]),
        ("same top token", ["1", *(show(report[key]) for key in agreements)]),
        (f"each {places_word(report)[:-1]} alone", ["fvu", "l0", "ce", "ce mean", "KL", "same top"]),
        *((short(hook), values) for hook, values in each),
    ]
    return [
        (
            "stack",
            f"{report['kind']}, {report['layers']} {places_word(report)}  {encoder_words(report['encoder'])}  "
            f"{report['n_latents']:,} latents",
        ),
        ("fvu", f"{show(report['fvu_layer_mean'])}   mean over {places_word(report)}, on {report['tokens']:,} held-out tokens"),
        ("l0", f"{show(report['l0_total'])}   all {places_word(report)} together   {dead_words(report)}"),
        *((name, "".join(f"{value:>{width}}" for value in values)) for name, values in rows),
    ]
