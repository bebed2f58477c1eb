"""Texts of a contrast: documents as token ids in two halves, the tokens that tell them apart, and prompts."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...sae.suggestions import did_you_mean
from ...training.recipe import TextSection
from ...training.text import documents
from ...training.tokens import Tokenization, with_one_bos

log = logging.getLogger(__name__)

# A path, or the documents themselves.
Text = str | Path | Sequence[str]
Rows = list[list[int]]

FEWEST_DOCUMENTS = 20
# A token belongs to a text if it is this many times as frequent there, and the log ratio is as many standard errors from 0.
FREQUENCY_RATIO, STANDARD_ERRORS = 4.0, 1.96
BATCH_DOCUMENTS = 16


class TextHalves(NamedTuple):
    """Documents of a text as token ids: the half that latents and strengths are chosen on, and the one that is reported on."""

    choosing: Rows
    reporting: Rows


class TokenSets(NamedTuple):
    """Tokens that are typical of the text steered towards, and of the one steered from, as masks over the vocabulary."""

    target: Bool[np.ndarray, " vocabulary"]
    contrast: Bool[np.ndarray, " vocabulary"]


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: of a document at most, of a prompt, of a prefix, and of a continuation."""

    document: int
    prompt: int
    prefix: int
    new: int


def lengths(context_length: int, new: int) -> Lengths:
    """Return lengths that fit a model's contexts together."""
    document = min(context_length, 128)
    prompt, prefix = min(12, document // 4), min(24, document // 4)
    return Lengths(document, prompt, prefix, max(1, min(new, document - prompt - prefix)))


def read_rows(given: Text, option: str, section: TextSection, tokenizer: Any, most: int, length: int) -> Rows:
    """Return the token ids of the first ``most`` documents, each behind BOS if ``section`` has one; equal ones count once.

    Raises:
        ValueError: If the file cannot be read, or there are too few documents.
    """
    if isinstance(given, str | Path):
        name = str(given)
        section = section.model_copy(update={"source": "files", "files": (name,), "mix": ()})
        try:
            numbered: Iterable[tuple[int, str]] = list(itertools.islice(documents(section, 0, lambda _: True), most))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    else:
        name = "the texts given"
        numbered = list(enumerate(text for text in given if text.strip()))[:most]
    bos = None if section.bos == "none" else tokenizer.bos_token_id
    tokenized = (tuple(with_one_bos(ids, bos)[:length]) for _, ids in Tokenization(section, tokenizer).of(numbered))
    rows = [list(row) for row in dict.fromkeys(tokenized) if len(row) > 1 + (bos is not None)]
    if len(rows) < FEWEST_DOCUMENTS:
        raise ValueError(
            f"{option}: expected at least {FEWEST_DOCUMENTS} different documents of two tokens or more, got {len(rows)} in "
            f"{name}. Documents of a .txt file are separated by blank lines, those of .jsonl are lines."
        )
    return rows


def require_distinct(towards: Rows, away_from: Rows) -> None:
    """Raise ``ValueError`` if the two texts share documents, which then could not tell them apart."""
    shared = set(map(tuple, towards)) & set(map(tuple, away_from))
    if shared:
        both = f"{len(shared)} of {min(len(towards), len(away_from))} documents are in both"
        raise ValueError(f"--towards and --from: expected two different texts, got some of one in the other: {both}.")


def document_halves(rows: Rows, seed: int) -> TextHalves:
    """Return a random half of the documents, and the other one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    middle = len(rows) // 2
    return TextHalves([rows[place] for place in order[:middle]], [rows[place] for place in order[middle:]])


def counts_of(rows: Rows, vocabulary: int, special: Iterable[int]) -> Float[np.ndarray, " vocabulary"]:
    """Return how often each token occurs, with 0 for special ones."""
    found = np.bincount(np.concatenate([np.asarray(row) for row in rows]), minlength=vocabulary).astype(np.float64)
    found[list(special)] = 0
    return found


def frequent_tokens(towards: Rows, away_from: Rows, vocabulary: int, special: Iterable[int]) -> TokenSets:
    """Return the tokens whose frequency differs between two texts by ``FREQUENCY_RATIO`` and ``STANDARD_ERRORS``."""
    special = list(special)
    a, b = (counts_of(rows, vocabulary, special) + 0.5 for rows in (towards, away_from))
    difference = np.log(a / a.sum()) - np.log(b / b.sum())
    errors = difference / np.sqrt(1 / a + 1 / b)
    enough = np.log(FREQUENCY_RATIO)
    return TokenSets((difference > enough) & (errors > STANDARD_ERRORS), (difference < -enough) & (errors < -STANDARD_ERRORS))


def tokens_named(names: Sequence[str], tokenizer: Any, vocabulary: int) -> Bool[np.ndarray, " vocabulary"]:
    """Return the mask of the tokens with these names: tokens of the vocabulary, or words that are single tokens.

    Raises:
        ValueError: If one is neither.
    """
    found, known = np.zeros(vocabulary, dtype=bool), tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    if not names:
        raise ValueError("--tokens: expected at least one token, got none.")
    for name in names:
        ids = {known[name]} if name in known else set()
        # As a word at the beginning of a text, and behind a space.
        for written in (name, f" {name}"):
            some = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
            ids |= {some[0]} if len(some) == 1 and some[0] != tokenizer.unk_token_id else set()
        ids -= special
        if not ids:
            raise ValueError(f"--tokens: expected single tokens of the model, got {name!r}.{did_you_mean(name, known)}")
        found[list(ids)] = True
    return found


def prompts_of(rows: Rows, length: int, most: int, option: str) -> Int[Tensor, "prompts positions"]:
    """Return the first ``length`` tokens behind BOS of up to ``most`` documents that are longer.

    Raises:
        ValueError: If there are fewer than five such documents.
    """
    found = [row[: length + 1] for row in rows if len(row) > length + 1][:most]
    if len(found) < 5:
        raise ValueError(f"{option}: expected documents of more than {length} tokens to continue, got {len(found)}.")
    return torch.tensor(found)


def padded_batches(rows: Rows, padding: int) -> Iterable[tuple[Int[Tensor, "contexts positions"], np.ndarray, list[int]]]:
    """Yield documents of similar length together: token ids padded on the right, their numbers, and their lengths."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), BATCH_DOCUMENTS):
        places = order[start : start + BATCH_DOCUMENTS]
        sizes = [len(rows[place]) for place in places]
        ids = torch.full((len(places), max(sizes)), padding)
        for line, place in enumerate(places):
            ids[line, : sizes[line]] = torch.tensor(rows[place])
        yield ids, np.array(places), sizes
