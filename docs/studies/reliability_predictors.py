"""Predictors of whether a model is right on a prompt pair: attention, confidence, probes and single columns, with their AUROC.

A predictor is fitted on one half of the pairs (weights, or the choice and sign of a column) and scored on the other. The
predictors of confidence do not see the answer: the margin is that between the two sides of the question, whichever leads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsary.eval.bootstrap import percentiles, resamples
from sparsary.eval.circuits.tasks.pairs import BATCH, PromptPairs
from sparsary.eval.probing.probes import auroc, logistic
from sparsary.sae.one_site import OneSiteDictionary
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import neuron_hook

# Answers sampled from the model's distribution at temperature 1, and columns of sparse probes.
SAMPLES = 10
COLUMN_COUNTS = (1, 5)
# Penalties of probes, chosen by cross-validation within the half that fits.
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 4
# Fewer errors, or fewer right answers, in a half give no AUROC worth having.
LEAST = 20
# Decimals that are read.
DIGITS = 6

Columns = Float[np.ndarray, "pairs columns"]


@dataclass(frozen=True, eq=False)
class Record:
    """Everything read from a model at the questions of some pairs, a row for each pair's clean prompt.

    ``entropy`` is that of every head's attention in nats, ``key_mass`` its weight on the tokens in which clean and corrupted
    prompt differ: those that decide the answer. ``words`` counts the tokens of the prompt, ``answers`` are those asked for.
    """

    right: Bool[np.ndarray, " pairs"]
    answers: Columns
    entropy: Columns
    key_mass: Columns
    margin: Columns
    top_probability: Columns
    agreement: Columns
    words: Columns
    neurons: Columns
    streams: dict[str, Columns]

    def rows(self, some: np.ndarray) -> "Record":
        """Return some of the pairs."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        streams = {hook: x[some] for hook, x in self.streams.items()}
        return Record(**{name: x[some] for name, x in values.items() if name != "streams"}, streams=streams)


@dataclass(frozen=True)
class Places:
    """Hooks of a model that are read: the residual stream before the first block and after every block, and MLP neurons."""

    streams: tuple[str, ...]
    neurons: tuple[str, ...]

    @classmethod
    def of(cls, model: LanguageModel) -> "Places":
        """Find the hooks of a model's blocks."""
        blocks = [block.path for block in Architecture(model).blocks]
        neurons = [neuron_hook(model, f"{block}:out") for block in blocks]
        return cls((f"{blocks[0]}:in", *(f"{block}:out" for block in blocks)), tuple(hook for hook in neurons if hook))


def require_one_question(pairs: PromptPairs) -> None:
    """Raise ``ValueError`` if a pair has several questions, so that it may be right on one and wrong on another."""
    if any(len(questions) != 1 for questions in pairs.questions):
        raise ValueError(f"{pairs.task}: expected pairs with one question each, got several. Choose another task.")


@torch.no_grad()
def record(model: LanguageModel, pairs: PromptPairs, seed: int = 0) -> Record:
    """Run a model on the clean prompts of pairs and read all predictors at their questions."""
    require_one_question(pairs)
    places, anatomy = Places.of(model), Architecture(model)
    draw = torch.Generator().manual_seed(seed)
    parts = [_batch(model, anatomy, places, some, draw) for some in pairs.batches(BATCH)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    streams = {hook: columns.pop(hook) for hook in places.streams}
    return Record(right=columns.pop("right") > 0.5, **columns, streams=streams)


def _batch(
    model: LanguageModel, anatomy: Architecture, places: Places, pairs: PromptPairs, draw: torch.Generator
) -> dict[str, np.ndarray]:
    rows = torch.arange(len(pairs))
    at = torch.tensor([question.position for [question] in pairs.questions])
    trace = anatomy.trace(pairs.clean)
    # (pairs, heads of all blocks, positions)
    patterns = torch.cat([layer.pattern[rows, :, at] for layer in trace.layers], dim=1)
    keys = (pairs.clean != pairs.corrupted).to(patterns)
    seen = model.activations(pairs.clean, (*places.streams, *places.neurons))
    logits = pairs.asked_rows(trace.logits).float()
    chances = logits.softmax(-1)
    drawn = torch.multinomial(chances, SAMPLES, replacement=True, generator=draw)
    found = {
        "right": pairs.right(trace.logits),
        "answers": torch.tensor([question.answers[0] for [question] in pairs.questions])[:, None],
        "entropy": torch.special.entr(patterns).sum(-1),
        "key_mass": (patterns * keys[:, None]).sum(-1),
        "margin": _leads(pairs, logits).abs()[:, None],
        "top_probability": chances.amax(-1, keepdim=True),
        "agreement": (drawn[:, :, None] == drawn[:, None]).double().mean(-1).amax(-1, keepdim=True),
        "words": torch.stack(list(_counts(model, pairs))),
        "neurons": torch.cat([seen[hook][rows, at] for hook in places.neurons], dim=-1),
        **{hook: seen[hook][rows, at] for hook in places.streams},
    }
    # Columns that are equal but for rounding have ties, not an order.
    return {name: np.round(tensor.double().numpy(), DIGITS) for name, tensor in found.items()}


def _counts(model: LanguageModel, pairs: PromptPairs) -> Iterator[Tensor]:
    size = int(model.module.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportCallIssue]
    for tokens, length in zip(pairs.clean, pairs.lengths.tolist(), strict=True):
        yield torch.bincount(tokens[:length], minlength=size)


def _leads(pairs: PromptPairs, logits: Float[Tensor, "pairs vocabulary"]) -> Float[Tensor, " pairs"]:
    """Return the best answer's logit minus the best foil's."""
    sides = zip(logits, (question for [question] in pairs.questions), strict=True)
    return torch.stack([row[list(question.answers)].max() - row[list(question.foils)].max() for row, question in sides])


def latent_columns(found: Record, dictionaries: Mapping[str, OneSiteDictionary]) -> Columns:
    """Return the activations of all latents of dictionaries of the residual stream, hook after hook."""
    codes = []
    for hook, dictionary in dictionaries.items():
        with torch.no_grad():
            code = dictionary.encode(torch.from_numpy(found.streams[hook]).float())
        codes.append(code.to_dense(dictionary.n_latents).double().numpy())
    return np.concatenate(codes, axis=1)


def point_biserial(columns: Columns, right: Bool[np.ndarray, " pairs"]) -> Float[np.ndarray, " columns"]:
    """Return each column's correlation with being right; 0 for constant columns."""
    centred = columns - columns.mean(0)
    y = right - right.mean()
    scale = np.sqrt((centred**2).sum(0) * (y**2).sum())
    return np.where(scale > 1e-9 * len(y), y @ centred / np.maximum(scale, 1e-30), 0.0)


def strongest(columns: Columns, right: Bool[np.ndarray, " pairs"], n: int) -> list[int]:
    """Return the columns of largest absolute correlation with being right, the largest first."""
    return np.argsort(-np.abs(point_biserial(columns, right)), kind="stable")[:n].tolist()


@dataclass(frozen=True)
class Scored:
    """Scores of one predictor on the half that is scored; higher means right."""

    name: str
    kind: str
    scores: Float[np.ndarray, " pairs"]


def single_column(fit: Columns, right: np.ndarray, judged: Columns) -> np.ndarray:
    """Return the scores of the one column whose AUROC is furthest from 0.5 on the half that fits, with its sign."""
    leads = np.array([auroc(column, right) - 0.5 for column in fit.T])
    best = int(np.abs(leads).argmax())
    return (1.0 if leads[best] >= 0 else -1.0) * judged[:, best]


def regression(fit: Columns, right: np.ndarray, judged: Columns, penalties: Sequence[float] = PENALTIES) -> np.ndarray:
    """Return the scores of a logistic regression, its penalty chosen by cross-validation within the half that fits."""
    folds = np.arange(len(fit)) % FOLDS

    def value(l2: float) -> float:
        scores = np.zeros(len(fit))
        for fold in range(FOLDS):
            inside = folds != fold
            probe = logistic(fit[inside], right[inside], l2)
            # Folds differ in offset and scale.
            own = probe.scores(fit[~inside])
            scores[~inside] = own.argsort().argsort() / len(own)
        return auroc(scores, right)

    best = max(penalties, key=value) if len(penalties) > 1 else penalties[0]
    return logistic(fit, right, best).scores(judged)


def answer_rates(fit: Record, judged: Record, prior: float = 5.0) -> np.ndarray:
    """Return how often the model is right, on the half that fits, if this answer is asked for; the control of a mere bias.

    Args:
        prior: Number of pairs that the rate of all answers counts for.
    """
    same = judged.answers == fit.answers.T
    return (same @ fit.right + prior * fit.right.mean()) / (same.sum(1) + prior)


def predictions(fit: Record, judged: Record, latents: tuple[Columns, Columns] | None) -> list[Scored]:
    """Return the scores of every predictor, fitted on one half of the pairs and applied to the other.

    Args:
        latents: Activations of latents in both halves, if there are dictionaries.
    """
    right = fit.right
    found = [
        Scored("attention entropy, mean of heads", "attention", -judged.entropy.mean(1)),
        Scored("attention entropy, best head", "attention", single_column(fit.entropy, right, judged.entropy)),
        Scored("attention on the key, mean of heads", "attention", judged.key_mass.mean(1)),
        Scored("attention on the key, best head", "attention", single_column(fit.key_mass, right, judged.key_mass)),
    ]
    # Tokens that no prompt has would only cost time.
    said = fit.words.any(0)
    both = [np.concatenate([half.entropy, half.key_mass], axis=1) for half in (fit, judged)]
    found += [
        Scored("attention, all heads", "attention", regression(both[0], right, both[1])),
        Scored("the answer asked for", "text", answer_rates(fit, judged)),
        Scored("logit margin", "confidence", judged.margin[:, 0]),
        Scored("largest probability", "confidence", judged.top_probability[:, 0]),
        Scored(f"agreement of {SAMPLES} samples", "confidence", judged.agreement[:, 0]),
        Scored("tokens of the prompt", "text", regression(fit.words[:, said], right, judged.words[:, said])),
    ]
    for layer, hook in enumerate(fit.streams):
        name = f"probe after block {layer}" if layer else "probe before the blocks"
        found.append(Scored(name, "probe", regression(fit.streams[hook], right, judged.streams[hook])))
    last = list(fit.streams)[-1]
    sets = {"neurons": (fit.neurons, judged.neurons), "dimensions": (fit.streams[last], judged.streams[last])}
    for name, (columns, others) in (sets | ({"latents": latents} if latents else {})).items():
        for k in COLUMN_COUNTS:
            chosen = strongest(columns, right, k)
            scores = regression(columns[:, chosen], right, others[:, chosen], PENALTIES[:1])
            found.append(Scored(f"{k} {name if k > 1 else name[:-1]}", name, scores))
    return found


def resampled_auroc(scores: np.ndarray, right: np.ndarray, weights: Float[np.ndarray, "resamples pairs"]) -> np.ndarray:
    """Return the AUROC in every resample; ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    right, wrong = (np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (right, ~right))
    below = wrong.cumsum(1) - wrong / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (right * below).sum(1) / (right.sum(1) * wrong.sum(1))


def resampled_correlation(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the point-biserial correlation in every resample; 0 where scores are constant."""
    share = weights / weights.sum(1, keepdims=True)
    x, y = scores - scores.mean(), right.astype(float)
    covariance = share @ (x * y) - (share @ x) * (share @ y)
    variance = (share @ x**2 - (share @ x) ** 2) * (share @ y - (share @ y) ** 2)
    return np.where(variance > 1e-12, covariance / np.sqrt(np.maximum(variance, 1e-12)), 0.0)


def judge(predictor: Scored, right: Bool[np.ndarray, " pairs"]) -> dict[str, Any]:
    """Return a predictor's AUROC and point-biserial correlation with 95 % bootstrap intervals over pairs."""
    # Scores of regressions have any scale.
    deviation = predictor.scores.std()
    scores = (predictor.scores - predictor.scores.mean()) / (deviation if deviation > 1e-12 else 1.0)
    scores = np.round(scores, DIGITS)
    weights = np.stack(list(resamples(len(right)))).astype(float)
    row: dict[str, Any] = {"predictor": predictor.name, "kind": predictor.kind}
    for name, statistic in (("auroc", resampled_auroc), ("r", resampled_correlation)):
        low, high = percentiles(statistic(scores, right, weights))
        whole = statistic(scores, right, np.ones((1, len(right))))[0]
        row |= {name: float(whole), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def halves(right: Bool[np.ndarray, " pairs"], seed: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the half that fits and of the half that is scored, at random.

    Raises:
        ValueError: If a half has too few errors, or too few right answers.
    """
    order = np.random.default_rng(seed).permutation(len(right))
    parts = order[: len(right) // 2], order[len(right) // 2 :]
    for part in parts:
        counts = int(right[part].sum()), int((~right[part]).sum())
        if min(counts) < LEAST:
            raise ValueError(
                f"{where}: expected at least {LEAST} right and {LEAST} wrong answers in each half of the pairs, got "
                f"{counts[0]} and {counts[1]}. Give more pairs, or a task on which the model errs."
            )
    return parts
