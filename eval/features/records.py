"""Feature records: one JSON object per latent in ``features.jsonl``, schema version 1.

Keys of a record, ``null`` if ``reasons`` has an entry of the same name:

- ``schema_version``, ``latent``, ``firings`` and ``tokens`` (of the pass), ``density`` (their ratio), ``dead``.
- ``max_activation``, ``mean_activation`` (over tokens on which the latent fires), in units of the dictionary's codes.
- ``histogram``: ``counts`` of activations between adjacent ``edges``, four bins per octave, without empty bins at the ends.
- ``top``: contexts by peak activation, strongest first, no two with equal tokens. A context has ``tokens`` (texts),
  ``activations`` (one per token), ``peak`` (the index of its center) and ``document``; where there are any, ``left_out`` (the
  indices of tokens that the recipe excludes) and ``roles`` (of a chat's tokens, as pairs of a role, or null, and a count).
- ``quantiles``: contexts drawn uniformly from all in which the latent fires, ordered by peak and cut into equal counts,
  strongest first: ``low``, ``high`` (peaks) and some ``contexts`` of each.
- ``top_tokens``: tokens on which the latent fires, with their ``share`` of its summed activation.
- ``co_firing``: latents by Jaccard index, with ``lift`` and ``count`` of common tokens; ``lifted``: by lift; ``correlated``: by
  Pearson's correlation, zeros included. ``nearest``: latents by cosine of decoder directions. See ``eval.features.neighbours``.
- ``logits``: ``promoted`` and ``suppressed`` tokens with the ``effect`` of one unit of activation
  (``eval.features.logit_lens``).
- ``logits_base``: of a crosscoder of two models only, the same for the base model, whose tuned copy ``logits`` is of.
- ``sites``: of a crosscoder only, each site's share of the latent's decoder norm (``Crosscoder.relative_norms``), in the order
  of ``hooks_out`` in ``features.json``.
- ``scores``: ``predicate_f1``, ``example_embedding``, ``logit_lens``, with ``details`` (``eval.features.scores``).
- ``explanation``: ``text`` by a language model; its scores by the scorers asked for: ``detection``, ``fuzzing`` and
  ``intervention`` as balanced accuracy, ``surprisal`` as AUROC; ``details``, the counts; numbers of ``questions`` and of
  ``malformed`` answers; its own ``reasons`` (``eval.features.autointerp``).

Numbers are rounded to five significant digits. ``features.json`` next to it holds the provenance, and medians over latents.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...training.chats import ROLES
from .autointerp import SCORERS as EXPLANATION_SCORERS
from .collect import LEFT_OUT, Collected, Examples, bin_edges
from .logit_lens import Unembedding
from .neighbours import Neighbours, Together, TokenTable, as_matrix, nearest_latents, together, token_table
from .predicates import Predicates, predicates
from .scores import Score, example_embedding, logit_lens, predicate_f1

SCHEMA_VERSION = 1
SCORES = ("predicate_f1", "example_embedding", "logit_lens")
QUANTILES, PER_QUANTILE = 5, 4
LOGIT_TOKENS = 10
NOT_ASKED = "no explainer was asked"
UNSEEN = "the latent fired on no token of the pass"

FeatureRecord = dict[str, Any]


@dataclass(frozen=True)
class Described:
    """Results of one pass over the text, ready to be written latent by latent."""

    collected: Collected
    words: Sequence[str]
    together: Together
    nearest: Neighbours
    tokens: TokenTable
    scores: dict[str, list[Score]]
    effects: list[tuple[np.ndarray, np.ndarray]] | str
    # Where the effects come from.
    lens: Unembedding | str
    known: Predicates
    # Each site's share of a latent's decoder norm; ``None`` but for crosscoders.
    shares: np.ndarray | None = None
    # Strongest logit effects in the base of two models, or the reason why there are none; ``None`` with one model.
    base_effects: list[tuple[np.ndarray, np.ndarray]] | str | None = None
    # By latent: the entries of a Result, or the reason why there is none.
    explanations: dict[int, dict[str, Any] | str] = field(default_factory=dict)

    def records(self) -> Iterator[FeatureRecord]:
        """Yield one record per latent, in order."""
        for latent in range(self.collected.n_latents):
            yield self.record(latent)

    def record(self, latent: int) -> FeatureRecord:
        found, fired = self.collected, int(self.collected.firings[latent]) > 0
        scores = {name: values[latent] for name, values in self.scores.items()}
        record: FeatureRecord = {
            "schema_version": SCHEMA_VERSION,
            "latent": latent,
            "firings": int(found.firings[latent]),
            "tokens": found.tokens,
            "density": number(found.firings[latent] / found.tokens),
            "dead": not fired,
            "max_activation": number(found.maxima[latent]) if fired else None,
            "mean_activation": number(found.sums[latent] / found.firings[latent]) if fired else None,
            "histogram": self._histogram(latent) if fired else None,
            "top": self._contexts(found.top, latent, slice(None)),
            "quantiles": self._quantiles(latent),
            "top_tokens": [
                {"token": self.words[token], "share": number(share)}
                for token, share in zip(self.tokens.tokens[latent], self.tokens.shares[latent], strict=True)
                if token >= 0
            ],
            "co_firing": [
                {"latent": int(other), "jaccard": number(value), "lift": number(lift), "count": int(count)}
                for other, value, lift, count in zip(
                    self.together.jaccard.latents[latent],
                    self.together.jaccard.values[latent],
                    self.together.lift_of_jaccard[latent],
                    self.together.count_of_jaccard[latent],
                    strict=True,
                )
                if other >= 0
            ],
            "lifted": _named(self.together.lift, latent, "lift"),
            "correlated": _named(self.together.correlation, latent, "correlation"),
            "nearest": _named(self.nearest, latent, "cosine"),
            "logits": None if isinstance(self.effects, str) else self._logits(*self.effects[latent]),
            "scores": {name: None if score.value is None else number(score.value) for name, score in scores.items()},
            "details": {name: _rounded(score.details) for name, score in scores.items() if score.details},
            "explanation": self._explanation(latent),
        }
        if self.shares is not None:
            record["sites"] = [number(share) for share in self.shares[latent]]
        base = self.base_effects
        if base is not None:
            record["logits_base"] = None if isinstance(base, str) else self._logits(*base[latent])
        reasons = {f"scores.{name}": score.reason for name, score in scores.items() if score.value is None}
        if not fired:
            reasons |= dict.fromkeys(("max_activation", "mean_activation", "histogram"), UNSEEN)
            reasons |= {f"scores.{name}": UNSEEN for name in scores}
        if isinstance(self.effects, str):
            reasons["logits"] = self.effects
        if isinstance(base, str):
            reasons["logits_base"] = base
        if record["explanation"] is None:
            reasons["explanation"] = str(self.explanations.get(latent, NOT_ASKED))
        return record | {"reasons": reasons}

    def _explanation(self, latent: int) -> dict[str, Any] | None:
        found = self.explanations.get(latent)
        if not isinstance(found, dict):
            return None
        details = {name: _rounded(values) for name, values in found["details"].items()}
        scores = {name: None if found[name] is None else number(found[name]) for name in EXPLANATION_SCORERS if name in found}
        return found | scores | {"details": details}

    def _histogram(self, latent: int) -> dict[str, list[Any]]:
        counts = self.collected.histogram[latent]
        there = np.flatnonzero(counts)
        first, last = int(there[0]), int(there[-1])
        edges = bin_edges()[first : last + 2]
        return {"edges": [number(edge) for edge in edges], "counts": counts[first : last + 1].tolist()}

    def _contexts(self, of: Examples, latent: int, slots: slice | np.ndarray) -> list[dict[str, Any]]:
        tokens, values, documents = of.tokens[latent, slots], of.values[latent, slots], of.documents[latent, slots].tolist()
        marks = np.zeros_like(tokens) if of.marks is None else of.marks[latent, slots]
        several = zip(tokens, values, documents, marks, strict=True)
        return [self._context(*example) for example in several if example[2] >= 0]

    def _context(self, tokens: np.ndarray, values: np.ndarray, document: int, marks: np.ndarray) -> dict[str, Any]:
        there = tokens >= 0
        left_out, roles = marks[there] >= LEFT_OUT, (marks[there] % LEFT_OUT).tolist()
        masks = {"left_out": np.flatnonzero(left_out).tolist()} if left_out.any() else {}
        if any(roles):
            names = (None, *ROLES)
            masks |= {"roles": [[names[role], len(list(run))] for role, run in itertools.groupby(roles)]}
        return masks | {
            "tokens": [self.words[token] for token in tokens[there]],
            # Rounding is skipped for zeros, of which there are millions.
            "activations": [number(value) if value else 0.0 for value in values[there].tolist()],
            "peak": self.collected.limits.before - int(np.argmax(there)),
            "document": document,
        }

    def _quantiles(self, latent: int) -> list[dict[str, Any]]:
        """Return the sampled contexts by peak, cut into equal counts, with the first contexts drawn of each slice."""
        sample, centre = self.collected.sample, self.collected.limits.before
        drawn = np.flatnonzero(sample.documents[latent] >= 0)
        peaks = sample.values[latent, drawn, centre]
        slices = np.array_split(np.argsort(-peaks, kind="stable"), QUANTILES)
        return [
            {
                "low": number(peaks[some].min()),
                "high": number(peaks[some].max()),
                "contexts": self._contexts(sample, latent, drawn[np.sort(some)[:PER_QUANTILE]]),
            }
            for some in slices
            if len(some)
        ]

    def _logits(self, tokens: np.ndarray, effects: np.ndarray) -> dict[str, list[dict[str, Any]]]:
        pairs = [{"token": self.words[t], "effect": number(e)} for t, e in zip(tokens, effects, strict=True)]
        half = len(pairs) // 2
        return {"promoted": pairs[:half], "suppressed": pairs[half:]}


def describe_latents(
    collected: Collected,
    atoms: Float[Tensor, "n_latents d_out"],
    words: Sequence[str],
    lens: Unembedding | str,
    corpus_seed: int | None,
) -> Described:
    """Compute the contents of all records from a pass, the decoder directions, and the path to the logits."""
    codes = as_matrix(collected.token_sample, collected.n_latents)
    known = predicates(collected.token_sample, words, corpus_seed)
    return Described(
        collected,
        words,
        together(codes),
        nearest_latents(atoms),
        token_table(collected.token_sample, codes),
        {
            "predicate_f1": predicate_f1(collected.token_sample, codes, known),
            "example_embedding": example_embedding(collected, len(words)),
            "logit_lens": logit_lens(collected.token_sample, codes, lens),
        },
        effects_of(lens, len(words)),
        lens,
        known,
    )


def effects_of(lens: Unembedding | str, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """Return ``strongest_effects``, or the reason why there are none."""
    return lens if isinstance(lens, str) else strongest_effects(lens, vocabulary)


def strongest_effects(lens: Unembedding, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each latent the tokens it promotes most, then those it suppresses most, strongest first."""
    found = []
    for effects in lens.blocks():
        # Some models' embeddings are padded beyond their tokenizer's last token.
        effects = effects[:, :vocabulary]
        count = min(LOGIT_TOKENS, effects.shape[1])
        high, low = effects.topk(count, dim=-1), (-effects).topk(count, dim=-1)
        ids = torch.cat([high.indices, low.indices], -1).cpu().numpy()
        values = torch.cat([high.values, -low.values], -1).cpu().numpy()
        found += list(zip(ids, values, strict=True))
    return found


def number(value: Any) -> float:
    """Return a finite number rounded to five significant digits."""
    value = float(value)
    assert math.isfinite(value), value
    return float(f"{value:.5g}")


def _rounded(details: dict[str, object] | None) -> dict[str, object]:
    return {key: number(value) if isinstance(value, float) else value for key, value in (details or {}).items()}


def _named(neighbours: Neighbours, latent: int, measure: str) -> list[dict[str, Any]]:
    pairs = zip(neighbours.latents[latent], neighbours.values[latent], strict=True)
    return [{"latent": int(other), measure: number(value)} for other, value in pairs if other >= 0]
