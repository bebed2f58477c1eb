"""Predicates: simple statements, true or false of each sampled token, that a latent's firings are compared with.

Some concern the token's text and its neighbors, some name the token itself; on the embedded corpus, the factors that generated
the text are included as ground truth. None needs a language model.
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csc_array, hstack

from ...training.embedded import corpus
from .collect import TokenSample

# Number of most frequent tokens that get predicates of their own.
NAMED_TOKENS = 2000
SPACES = " \u2581\u0120"
# Running numbers are left out: predicates on the token itself cover them.
OMITTED_FACTORS = ("year", "rank")


class Predicates(NamedTuple):
    """Names of predicates, and a ``(tokens, predicates)`` matrix of truth values. ``missing`` explains absent factors."""

    names: list[str]
    true: csc_array
    missing: str | None


def predicates(sample: TokenSample, words: Sequence[str], corpus_seed: int | None) -> Predicates:
    """Return all predicates of a sample; ``words[i]`` is the text of token ``i``, spaces included.

    With the seed of an embedded corpus, its factors are included.
    """
    named = dict(_classes(sample, words)) | dict(_own_tokens(sample, words))
    factors, missing = _factors(sample, words, corpus_seed)
    named |= factors
    names = [name for name, places in named.items() if len(places)]
    columns = [_column(named[name], len(sample.tokens)) for name in names]
    return Predicates(names, csc_array(hstack(columns, format="csc")), missing)


def token_texts(tokenizer: Any, n_tokens: int) -> list[str]:
    """Return the text of every token id, including the space that a word-piece marker stands for."""
    ids = list(range(n_tokens))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    texts = tokenizer.batch_decode([[i] for i in ids])
    return [
        # Some tokenizers drop the leading space of the first token they decode.
        " " + text if piece is not None and piece[:1] in SPACES and not text.startswith(" ") else text
        for piece, text in zip(pieces, texts, strict=True)
    ]


def _classes(sample: TokenSample, words: Sequence[str]) -> dict[str, np.ndarray]:
    texts = [word.strip() for word in words]
    tests = {
        "begins with a space": [word[:1].isspace() for word in words],
        "capitalised": [text[:1].isupper() for text in texts],
        "all capitals": [len(text) > 1 and text.isupper() for text in texts],
        "a number": [text.isdigit() for text in texts],
        "punctuation": [bool(text) and all(c in string.punctuation for c in text) for text in texts],
        "one character": [len(text) == 1 for text in texts],
        "white space": [bool(word) and not text for word, text in zip(words, texts, strict=True)],
        "a newline": ["\n" in word for word in words],
        "ends a sentence": [text in (".", "!", "?") for text in texts],
    }
    if all(word[:1].isspace() for word in words if word.strip()) or not any(word[:1].isspace() for word in words):
        del tests["begins with a space"]
    found = {}
    for name, values in tests.items():
        table = np.array([*values, False])
        found[f"is {name}" if not name.startswith(("begins", "ends")) else name] = np.flatnonzero(table[sample.tokens])
        # Index -1 (no token) is the table's last entry.
        found[f"after: {name}"] = np.flatnonzero(table[sample.previous])
    for limit in (1, 4, 16):
        found[f"among the first {limit} of the document"] = np.flatnonzero((sample.offsets >= 0) & (sample.offsets < limit))
    found["occurred before in this document"] = np.flatnonzero(sample.repeated)
    return found


def _own_tokens(sample: TokenSample, words: Sequence[str]) -> dict[str, np.ndarray]:
    found = {}
    for label, ids in (("token", sample.tokens), ("after token", sample.previous), ("before token", sample.following)):
        order = np.argsort(ids, kind="stable")
        values, begins, counts = np.unique(ids[order], return_index=True, return_counts=True)
        for index in np.argsort(-counts, kind="stable")[:NAMED_TOKENS].tolist():
            if values[index] >= 0:
                places = order[begins[index] : begins[index] + counts[index]]
                found[f"{label} {words[int(values[index])]!r} (id {values[index]})"] = places
    return found


def _factors(sample: TokenSample, words: Sequence[str], seed: int | None) -> tuple[dict[str, np.ndarray], str | None]:
    if seed is None:
        return {}, "factors: the text is not the embedded corpus"
    found: dict[str, list[int]] = {}
    documents = {number: corpus.embedded_document(seed, number) for number in np.unique(sample.documents).tolist()}
    for place, number in enumerate(sample.documents.tolist()):
        token, offset, document = int(sample.tokens[place]), int(sample.offsets[place]), documents[number]
        if not 0 <= offset < len(document.words) or words[token].strip() != document.words[offset]:
            return {}, "factors: the model's tokens are not the embedded corpus's words"
        for key, value in document.factors[offset].items():
            if key not in OMITTED_FACTORS:
                found.setdefault(f"{key} = {value}", []).append(place)
    return {f"factor: {name}": np.array(places) for name, places in found.items()}, None


def _column(places: np.ndarray, tokens: int) -> csc_array:
    return csc_array((np.ones(len(places)), (places, np.zeros(len(places), np.int64))), shape=(tokens, 1))
