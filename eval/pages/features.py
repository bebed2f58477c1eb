"""Page of all latents of a dictionary: a searchable, sortable list and a detail view per latent.

Details are embedded in compressed chunks of several latents. A chunk is decompressed when one of its latents is opened, so
that a page of 10^4 latents loads as fast as one of ten.
"""

import base64
import gzip
import itertools
import json
from collections.abc import Iterable
from typing import Any

from .document import document, encoder_label
from .numbers import show

FeatureEntry = dict[str, Any]
CHUNK_LATENTS = 64
# Finer shades are indistinguishable, and this makes the page a third smaller.
SHADES = 1000
INDEX_TOKENS = 5
SCORES = {
    "predicate_f1": "F1 of the simple predicate that best describes where the latent fires, on held-out documents; chance is "
    "the F1 of a latent that fires equally often at random.",
    "example_embedding": "AUROC of separating contexts it fires in from others by their words (TF-IDF). 0.5 is chance.",
    "logit_lens": "AUROC of its direct effect on the next token's logit, positions where it fires against positions where it "
    "does not. 0.5 is chance.",
}
# Label of a figure in the detail view -> definition.
DEFINITIONS = {
    "density": "Fraction of tokens on which the latent fires (firing density).",
    "firings": "Number of tokens on which the latent fires.",
    "max activation": "Largest activation on the evaluated text.",
    "mean activation": "Mean activation over the tokens on which it fires.",
    "decoder norms": "Share of the latent's decoder norm at each site of a crosscoder, in units of each site's scale.",
    **{key.replace("_f1", " F1").replace("_", " "): text for key, text in SCORES.items()},
}


def render_features(about: dict[str, Any], records: Iterable[FeatureEntry]) -> str:
    """Render all ``records`` (lines of ``features.jsonl``, read once) as a page. Equal input gives equal bytes."""
    words = _Words()
    index: dict[str, list[Any]] = {
        key: [] for key in ("density", "max", "predicate", "top", "promoted", "explanation", *SCORES)
    }
    chunks, remaining = [], iter(records)
    while some := list(itertools.islice(remaining, CHUNK_LATENTS)):
        for record in some:
            _enter(index, record, words)
        chunks.append(_packed([_compact(record, words) for record in some]))
    hooks = " \u2192 ".join(dict.fromkeys([", ".join(about.get("hooks_in") or ()), ", ".join(about.get("hooks_out") or ())]))
    return document(
        "features.html",
        f"sparsary features \u00b7 {about.get('checkpoint') or 'dictionary'}",
        ("features.css",),
        ("page.js", "table.js", "features.js"),
        command="features",
        heading=f"{show(about.get('n_latents'))} latents",
        facts={
            "model": " and ".join(about["models"]) if about.get("models") else about.get("model"),
            "hook": hooks or None,
            "text": about.get("text"),
            "evaluated on": f"{show(about.get('tokens'))} held-out tokens of {show(about.get('documents'))} documents",
            "encoder": encoder_label(about.get("encoder")),
            "checkpoint": about.get("checkpoint"),
            **({"left out": about["left_out"]} if about.get("left_out") else {}),
            **({"doubts": "; ".join(about["doubts"])} if about.get("doubts") else {}),
        },
        scores=SCORES,
        left_out=about.get("left_out"),
        chat_template=about.get("chat_template"),
        settings={
            "chunk": CHUNK_LATENTS,
            "gapped": not words.spaced,
            "definitions": DEFINITIONS,
            **({"sites": list(about["hooks_out"])} if about.get("kind") == "crosscoder" else {}),
        },
        packed={"index": _packed(index), "words": _packed(list(words.numbers))}
        | {f"chunk-{number}": chunk for number, chunk in enumerate(chunks)},
    )


class _Words:
    """Index of token texts, numbered in order of first use."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self.numbers.setdefault(word, len(self.numbers))

    @property
    def spaced(self) -> bool:
        """True if any token starts with a space, as in byte-level tokenizers."""
        return any(word[:1].isspace() for word in self.numbers)


def _enter(index: dict[str, list[Any]], record: FeatureEntry, words: _Words) -> None:
    index["density"].append(record["density"])
    index["max"].append(record["max_activation"])
    index["predicate"].append((record["details"].get("predicate_f1") or {}).get("predicate"))
    index["top"].append([words(entry["token"]) for entry in record["top_tokens"][:INDEX_TOKENS]])
    promoted = record["logits"]["promoted"] if record["logits"] else []
    index["promoted"].append([words(entry["token"]) for entry in promoted[:INDEX_TOKENS]])
    index["explanation"].append((record["explanation"] or {}).get("text") or record.get("name"))
    for name in SCORES:
        index[name].append(record["scores"][name])


def _compact(record: FeatureEntry, words: _Words) -> dict[str, Any]:
    """Return the data of a latent's detail view, with token texts as indices and activations in thousandths of the maximum."""
    top = record["max_activation"] or 1.0

    def context(example: dict[str, Any]) -> list[Any]:
        shades: list[int] = []
        for place, value in enumerate(example["activations"]):
            if value > 0:
                shades += [place, max(1, round(SHADES * min(1.0, value / top)))]
        shown = [[words(token) for token in example["tokens"]], shades, example["peak"], example["document"]]
        masks = [example.get("left_out", []), example.get("roles", [])]
        return shown + (masks if any(masks) else [])

    def effects(logits: dict[str, Any] | None) -> list[list[list[Any]]] | None:
        if logits is None:
            return None
        return [[[words(e["token"]), e["effect"]] for e in logits[side]] for side in ("promoted", "suppressed")]

    return {
        "firings": record["firings"],
        "mean": record["mean_activation"],
        "histogram": record["histogram"] and [record["histogram"]["edges"], record["histogram"]["counts"]],
        "top": [context(example) for example in record["top"]],
        "quantiles": [[q["low"], q["high"], [context(example) for example in q["contexts"]]] for q in record["quantiles"]],
        "tokens": [[words(entry["token"]), entry["share"]] for entry in record["top_tokens"]],
        "logits": effects(record["logits"]),
        **({"base": effects(record["logits_base"])} if "logits_base" in record else {}),
        "near": {
            title: [[entry["latent"], entry[measure]] for entry in record[key]]
            for title, key, measure in (
                ("fire together (Jaccard)", "co_firing", "jaccard"),
                ("fire together (lift)", "lifted", "lift"),
                ("correlated", "correlated", "correlation"),
                ("similar decoder directions (cosine)", "nearest", "cosine"),
            )
        },
        **({"sites": record["sites"]} if "sites" in record else {}),
        **({"name": [record[f"name{part}"] for part in ("", "_cosine", "_margin")]} if record.get("name") else {}),
        "details": record["details"],
        "explanation": record["explanation"],
        "reasons": record["reasons"],
    }


def _packed(value: Any) -> str:
    """Return gzipped JSON as base64, without a timestamp so that equal input gives equal bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
