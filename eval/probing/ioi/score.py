"""Comparison of a learned dictionary with supervised ones on the indirect object identification (IOI) task.

Prompts name two people, one of whom (S) gives something to the other (IO). Three attributes describe each prompt: the name
of IO, the name of S, and their order (Pos). A supervised dictionary has one feature per attribute value. A cross-section is the
hook's activations at up to four positions: IO, S1, S2 and END.
Source: Makelov, Lange and Nanda 2024, arXiv:2405.08366.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from ...bootstrap import bootstrap_mean
from ..probes import f1_of, split_latents
from ..subject import ProbeTarget
from .prompts import (
    ATTRIBUTES,
    CROSS_SECTIONS,
    EDIT_PROMPTS,
    FIT_PROMPTS,
    N_NAMES,
    POSITIONS,
    SCORED_PROMPTS,
    Prompts,
    PromptWords,
    draw_plans,
)
from .supervised import (
    Supervised,
    cross_section,
    end_logits,
    least_squares_dictionary,
    logit_difference,
    mean_dictionary,
    prompt_codes,
)

EDIT_SIZES = (2, 4, 6, 16)
# If mean ablation moves the logit difference by less, recovery scores are undefined.
LEAST_SPAN = 0.1
# If the true counterfactual leaves more predictions unchanged, doing nothing would already score this high.
MOST_UNCHANGED = 0.95
OCCLUSION_F1, INTERPRETED_F1, CAUSAL_F1 = 0.5, 0.8, 0.6


def _inert(clean: np.ndarray, ablated: np.ndarray) -> dict[str, Any]:
    """Return null scores with a reason if mean ablation has no effect, else an empty dict."""
    span = float(clean.mean() - ablated.mean())
    if abs(span) >= LEAST_SPAN:
        return {}
    return {"sufficiency": None, "necessity": None, "why": f"mean ablation moves the logit difference by {span:.3f} only"}


def _scores(clean: np.ndarray, ablated: np.ndarray, recon: np.ndarray, rest: np.ndarray, seed: int) -> dict[str, Any]:
    """Compute sufficiency and necessity, with bootstrap intervals, from logit differences per prompt."""
    span = clean.mean() - ablated.mean()
    generator = np.random.default_rng(seed)
    n = len(clean)
    weights = np.concatenate([np.full((1, n), 1 / n), generator.multinomial(n, np.full(n, 1 / n), size=500) / n])
    a, b, c, d = (weights @ values for values in (clean, ablated, recon, rest))
    spans = np.where(np.abs(a - b) > 1e-6, a - b, span)
    sufficiency, necessity = (c - b) / spans, 1 - np.abs(b - d) / np.abs(spans)
    found: dict[str, Any] = {}
    for name, values in (("sufficiency", sufficiency), ("necessity", necessity)):
        low, high = np.quantile(values[1:], [0.025, 0.975])
        found |= {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def greedy_edit(
    source: Float[Tensor, "rows n_latents"],
    target: Float[Tensor, "rows n_latents"],
    writes: Float[Tensor, "n_latents d"],
    wanted: Float[Tensor, "rows d"],
    size: int,
) -> tuple[Float[Tensor, "rows d"], Int[Tensor, "rows size"]]:
    """Edit up to ``size`` latents per row from ``source`` to ``target``, greedily approximating the ``wanted`` difference.

    Returns:
        The edit in activation space, added with the source's error kept; and the latents (-1: none came closer).
    """
    difference = target - source
    most = max(int((difference != 0).sum(-1).max()), 1)
    candidates = (difference != 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    steps = difference.gather(1, candidates)[..., None] * writes[candidates]
    added, line = torch.zeros_like(wanted), torch.arange(len(wanted))
    norms, chosen = steps.pow(2).sum(-1), []
    free = norms > 0
    for _ in range(size):
        # Decrease of the squared distance by each step.
        gain = torch.where(free, 2 * (steps * (wanted - added)[:, None]).sum(-1) - norms, -torch.inf)
        best = gain.argmax(-1)
        good = gain[line, best] > 0
        added = added + torch.where(good[:, None], steps[line, best], 0)
        free[line, best] = free[line, best] & ~good
        chosen.append(torch.where(good, candidates[line, best], -1))
    return added, torch.stack(chosen, 1)


@dataclass(frozen=True)
class _Setting:
    subject: ProbeTarget
    words: PromptWords
    supervised: Supervised
    writes: Tensor
    bias: Tensor
    seed: int


def score_supervised(
    subject: ProbeTarget,
    seed: int = 0,
    n_names: int = N_NAMES,
    fit_prompts: int = FIT_PROMPTS,
    scored_prompts: int = SCORED_PROMPTS,
    edit_prompts: int = EDIT_PROMPTS,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a flat summary, and one row per cross-section, edit and attribute.

    Raises:
        ValueError: If the dictionary does not write at its own hook, or the tokenizer splits names.
    """
    subject.require_in_place("supervised")
    words = PromptWords.of(subject.model, n_names)
    fit, scored = (words.prompts(draw_plans(words, n, 2 * seed + i)) for i, n in enumerate((fit_prompts, scored_prompts)))
    x_fit, x = cross_section(subject, fit), cross_section(subject, scored)
    scale = subject.dictionary.out_scale
    writes = (subject.dictionary.atoms * scale).detach().float().cpu()
    bias = (subject.dictionary.bypass() * scale).detach().float().cpu()
    setting = _Setting(subject, words, mean_dictionary(x_fit, fit), writes, bias, seed)
    least = least_squares_dictionary(x_fit, fit)
    codes_fit, codes = prompt_codes(subject, x_fit), prompt_codes(subject, x)
    f1 = _interpretability(fit, scored, codes_fit, codes)
    logits = end_logits(subject, scored)
    clean = logit_difference(logits, scored)
    names = torch.from_numpy(scored.io)
    report: dict[str, Any] = {
        "supervised_prompts": scored_prompts,
        "supervised_accuracy": float((logits.argmax(-1) == names).float().mean()),
        "supervised_logit_difference": float(clean.mean()),
        "supervised_l0": float((codes > 0).sum(-1).float().mean()),
    }
    rows: list[dict[str, Any]] = []
    kept = codes * (f1["best"] >= CAUSAL_F1)
    reconstructions = {
        "latents": codes @ writes + bias,
        "interpreted_latents": kept @ writes + bias,
        "mean_features": setting.supervised.reconstruct(scored),
        "least_squares_features": least.reconstruct(scored),
    }
    for section, positions in CROSS_SECTIONS.items():

        def difference(put: Tensor, positions: tuple[int, ...] = positions) -> np.ndarray:
            return logit_difference(end_logits(subject, scored, positions, put), scored)

        ablated = difference(setting.supervised.mean.expand_as(x))
        for name, recon in reconstructions.items():
            found = _inert(clean, ablated)
            if not found:
                rest = difference(setting.supervised.mean + x - recon)
                found = _scores(clean, ablated, difference(recon), rest, seed)
            rows.append({"test": "reconstruction", "section": section, "dictionary": name} | found)
            for key in ("sufficiency", "sufficiency_low", "sufficiency_high", "necessity", "necessity_low", "necessity_high"):
                if key in found:
                    report[f"supervised_{section}_{name}_{key}"] = found[key]
            if "why" in found:
                report[f"supervised_{section}_{name}_why"] = found["why"]
    rows += _edits(setting, edit_prompts, report)
    report |= {key: value for key, value in f1.items() if key.startswith("supervised_")}
    rows += f1["rows"]
    rows += _occlusion(setting, scored, x, clean, f1, report)
    return report, rows


def _edits(setting: _Setting, n: int, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Score edits of one attribute: the fraction of prompts on which the prediction equals the true counterfactual's.

    Original prompts use one half of the names; edits change to the other half.
    """
    subject, words = setting.subject, setting.words
    half = len(words.names) // 2
    order = np.random.default_rng(setting.seed).permutation(len(words.names))
    plans = draw_plans(words, n, setting.seed + 1000, order[:half].tolist())
    generator = np.random.default_rng(setting.seed + 1)
    new = order[half:][generator.integers(len(words.names) - half, size=n)]
    source = words.prompts(plans)
    x_s = cross_section(subject, source)
    codes_s = prompt_codes(subject, x_s)
    base = end_logits(subject, source).argmax(-1)
    rows = []
    for attribute in ATTRIBUTES:
        values = [1 - plan.pos if attribute == "pos" else int(value) for plan, value in zip(plans, new, strict=True)]
        target = words.prompts([plan.changed(attribute, value) for plan, value in zip(plans, values, strict=True)])
        x_t = cross_section(subject, target)
        codes_t = prompt_codes(subject, x_t)
        # Changing Pos swaps the names, and so their activations.
        swap = setting.supervised.of(target, attribute) - setting.supervised.of(source, attribute)
        for section, positions in CROSS_SECTIONS.items():

            def after(put: Tensor, positions: tuple[int, ...] = positions) -> Tensor:
                return end_logits(subject, source, positions, put).argmax(-1)

            truth = after(x_t)
            row: dict[str, Any] = {"test": "edit", "section": section, "attribute": attribute}
            row["no_edit"] = float((base == truth).float().mean())
            rows.append(row)
            report[f"supervised_edit_{attribute}_{section}_no_edit"] = row["no_edit"]
            if row["no_edit"] > MOST_UNCHANGED:
                row["why"] = "the true counterfactual changes no prediction there: nothing to edit"
                report[f"supervised_edit_{attribute}_{section}_why"] = row["why"]
                continue
            tries: dict[str, Tensor] = {"mean_features": x_s + swap}
            weights: dict[str, float] = {}
            for size in EDIT_SIZES:
                flat = [t.flatten(0, 1) for t in (codes_s, codes_t, x_t - x_s)]
                added, chosen = greedy_edit(flat[0], flat[1], setting.writes, flat[2], size)
                tries[f"latents_{size}"] = x_s + added.view_as(x_s)
                weights[f"latents_{size}"] = _removed_weight(flat[0], chosen, setting.writes, list(positions))
            tries["random_latents"] = x_s + _random_edit(codes_s, codes_t, setting.writes, EDIT_SIZES[-2], setting.seed)
            for name, put in tries.items():
                success = bootstrap_mean((after(put) == truth).double().numpy(), setting.seed)
                row |= {name: success.mean, f"{name}_low": success.low, f"{name}_high": success.high}
                report[f"supervised_edit_{attribute}_{section}_{name}"] = success.mean
            row |= {f"{name}_removed_weight": weight for name, weight in weights.items()}
    return rows


def _removed_weight(codes: Tensor, chosen: Tensor, writes: Tensor, positions: list[int]) -> float:
    """Return the mean share of the edited latents in the source's reconstruction (Makelov et al., section 4)."""
    reconstruction = codes @ writes
    norms = reconstruction.pow(2).sum(-1).clamp_min(1e-12)
    weight = codes * (reconstruction @ writes.T) / norms[:, None]
    picked = torch.where(chosen >= 0, weight.gather(1, chosen.clamp_min(0)), 0).sum(-1)
    return float(picked.view(-1, len(POSITIONS))[:, positions].mean())


def _random_edit(codes_s: Tensor, codes_t: Tensor, writes: Tensor, size: int, seed: int) -> Tensor:
    """Edit ``size`` random latents among those that differ."""
    difference = codes_t - codes_s
    lots = torch.rand(difference.shape, generator=torch.Generator().manual_seed(seed)) * (difference != 0)
    keep = torch.zeros_like(difference).scatter_(-1, lots.topk(min(size, lots.shape[-1]), dim=-1).indices, 1.0)
    return (difference * keep) @ writes


def _predicates(prompts: Prompts) -> dict[str, dict[str, np.ndarray]]:
    """Return families of prompt properties that a latent may represent."""
    names = range(len(prompts.name_ids))
    half = len(prompts.name_ids) // 2
    first = np.where(prompts.pos == 0, prompts.io, prompts.s)
    return {
        "io": {f"io={v}": prompts.io == v for v in names},
        "s": {f"s={v}": prompts.s == v for v in names},
        "pos": {f"pos={v}": prompts.pos == v for v in (0, 1)},
        "io_and_pos": {f"io={v},pos={p}": (prompts.io == v) & (prompts.pos == p) for v in names for p in (0, 1)},
        "s_and_pos": {f"s={v},pos={p}": (prompts.s == v) & (prompts.pos == p) for v in names for p in (0, 1)},
        "name": {f"name={v}": (prompts.s == v) | (prompts.io == v) for v in names},
        "first_name": {f"first={v}": first == v for v in names},
        "s_gender": {"s=male": prompts.s < half},
        "io_gender": {"io=male": prompts.io < half},
    }


def _interpretability(fit: Prompts, scored: Prompts, codes_fit: Tensor, codes: Tensor) -> dict[str, Any]:
    """Compute the F1 of firing latents against prompt properties, per position; latents are selected on ``fit``.

    ``best`` holds every latent's best F1 at each position, on ``fit``.
    """
    n_latents = codes.shape[-1]
    best = torch.zeros(len(POSITIONS), n_latents)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    truths_fit, truths = _predicates(fit), _predicates(scored)
    counts: dict[str, list[float]] = {}
    for place, position in enumerate(POSITIONS):
        fires_fit, fires = codes_fit[:, place] > 0, codes[:, place] > 0
        columns = sparse.csc_array(fires_fit.numpy())
        for family, masks in truths_fit.items():
            y = torch.from_numpy(np.stack(list(masks.values()), 1))
            both = fires_fit.float().T @ y.float()
            f1 = 2 * both / (fires_fit.sum(0)[:, None] + y.sum(0)).clamp_min(1)
            best[place] = torch.maximum(best[place], f1.max(1).values)
            found, unions, splits = [], [], []
            for index, (name, mask) in enumerate(masks.items()):
                truth = truths[family][name]
                order = f1[:, index].argsort(dim=0, descending=True, stable=True)[:10].tolist()
                found.append(f1_of(fires[:, order[0]].numpy(), truth))
                chosen = split_latents(columns, mask, order, jump=1e-9) if columns.nnz else []
                union = fires[:, chosen].any(-1).numpy() if chosen else np.zeros(len(truth), dtype=bool)
                unions.append(f1_of(union, truth))
                splits.append(len(split_latents(columns, mask, order)) if columns.nnz else 0)
            row = {"test": "interpretability", "section": position, "family": family, "f1": float(np.mean(found))}
            row |= {"union_f1": float(np.mean(unions)), "split": float(np.mean(splits)), "values": len(found)}
            row["detected"] = float(np.mean([value >= OCCLUSION_F1 for value in found]))
            row["latents_interpreted"] = int((f1.max(1).values >= INTERPRETED_F1).sum())
            rows.append(row)
            counts.setdefault(family, []).append(row["f1"])
            for key in ("f1", "union_f1", "split", "detected", "latents_interpreted"):
                report[f"supervised_{position}_{family}_{key}"] = row[key]
        # Over-splitting: latents that represent one order but miss most of its prompts.
        for value in (0, 1):
            mask = torch.from_numpy(fit.pos == value)
            share = fires_fit.sum(0) / len(mask)
            precise = (fires_fit & mask[:, None]).sum(0) / fires_fit.sum(0).clamp_min(1)
            key = f"supervised_{position}_pos_latents"
            report[key] = report.get(key, 0) + int(((precise >= 0.9) & (share >= 0.02)).sum())
    return {"best": best, "rows": rows} | report


def _occlusion(
    setting: _Setting, prompts: Prompts, x: Tensor, clean: np.ndarray, f1: dict[str, Any], report: dict[str, Any]
) -> list[dict[str, Any]]:
    """Compute feature variance, causal effect and detected values of each attribute at each position.

    An attribute is occluded by one of larger variance and less than twice the effect if fewer of its values are detected.
    """
    rows = []
    total = (x - setting.supervised.mean).pow(2).sum(-1).mean(0)
    for place, position in enumerate(POSITIONS):
        some: dict[str, dict[str, Any]] = {}
        for attribute in ("io", "s"):
            part = setting.supervised.of(prompts, attribute)
            changed = logit_difference(end_logits(setting.subject, prompts, (place,), x - part), prompts)
            some[attribute] = {
                "test": "occlusion",
                "section": position,
                "attribute": attribute,
                "variance_share": float(part[:, place].pow(2).sum(-1).mean() / total[place].clamp_min(1e-12)),
                "effect": float(clean.mean() - changed.mean()),
                "detected": f1[f"supervised_{position}_{attribute}_detected"],
            }
        large, small = sorted(some.values(), key=lambda row: -row["variance_share"])
        matters = abs(small["effect"]) > max(LEAST_SPAN, 0.5 * abs(large["effect"]))
        large["occluded"], small["occluded"] = False, bool(matters and small["detected"] < large["detected"])
        for attribute, row in some.items():
            for key in ("variance_share", "effect", "occluded"):
                report[f"supervised_{position}_{attribute}_{key}"] = row[key]
        rows += some.values()
    return rows


def supervised_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the terminal's table, one column per cross-section."""

    def row(label: str, key: str) -> list[str]:
        values = (report.get(f"supervised_{key.format(section)}") for section in CROSS_SECTIONS)
        return [label, *("-" if value is None else f"{value:.2f}" for value in values)]

    lines = []
    for figure in ("sufficiency", "necessity"):
        lines.append(row(f"{figure} of the reconstruction", f"{{}}_latents_{figure}"))
        lines.append(row(f"{figure} of supervised features", f"{{}}_mean_features_{figure}"))
    ways = {"no edit": "no_edit", "supervised feature": "mean_features"}
    ways |= {f"{n} latents": f"latents_{n}" for n in (EDIT_SIZES[0], EDIT_SIZES[-1])}
    for name, attribute in (("IO name", "io"), ("order", "pos")):
        lines += [row(f"{name} edited: {label}", f"edit_{attribute}_{{}}_{way}") for label, way in ways.items()]
    return ["IOI, activations at", *CROSS_SECTIONS], lines
