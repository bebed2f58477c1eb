"""Factors of tokens from a file: labelled spans of texts, or a label for every token."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...sae.files import read_text
from ...training.activations.sites import neuron_hook
from ...training.tokens import with_one_bos
from .datasets import BATCH_CONTEXTS, Tokens
from .subject import ProbeTarget

FORMS = (
    '{"text": "...", "spans": [{"start": 0, "end": 4, "factors": {"name": "Mary"}}]} or '
    '{"tokens": ["Mary", ...], "factors": [{"name": "Mary"}, ...]}'
)

Factors = dict[str, str | int]


@dataclass(frozen=True)
class LabelledDocument:
    """Token ids of a document and the factors of each token."""

    ids: list[int]
    factors: list[Factors]


def value_names(factors: Mapping[str, Any]) -> list[str]:
    """Return the binary factors of a token, as ``factor=value``."""
    return [f"{key}={value}" for key, value in factors.items()]


def read_factors(path: str | Path, tokenizer: Any) -> list[LabelledDocument]:
    """Read documents with factors of their tokens from a JSONL file.

    A line has ``text`` and ``spans``, whose ``start`` and ``end`` are characters: a token has the factors of every span that it
    overlaps other than by white space, those of later spans first. Or it has ``tokens``, as the tokenizer writes or decodes
    them or as ids, and ``factors``, one object for each.

    Raises:
        ValueError: If the file does not exist, a line is malformed, a token is not the tokenizer's, or nothing is labelled.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--factors: {path} does not exist. Expected a JSONL file, of lines such as {FORMS}.")
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            found.append(_document(line, f"{path}:{number}", tokenizer))
    if not any(any(document.factors) for document in found):
        raise ValueError(f"{path}: expected factors of some tokens, got none in {len(found)} lines of {FORMS}.")
    return found


def _document(line: str, where: str, tokenizer: Any) -> LabelledDocument:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("spans"), list):
        return _of_spans(row["text"], row["spans"], where, tokenizer)
    if isinstance(row, dict) and isinstance(row.get("tokens"), list) and isinstance(row.get("factors"), list):
        if len(row["tokens"]) != len(row["factors"]):
            raise ValueError(
                f"{where}: factors: expected one object for each of {len(row['tokens'])} tokens, got {len(row['factors'])}."
            )
        ids = [_id_of(token, where, tokenizer) for token in row["tokens"]]
        return LabelledDocument(ids, [_factors(each or {}, f"{where}: factors") for each in row["factors"]])
    raise ValueError(f"{where}: expected {FORMS}.")


def _of_spans(text: str, spans: list[Any], where: str, tokenizer: Any) -> LabelledDocument:
    read = []
    for number, span in enumerate(spans):
        here = f"{where}: spans[{number}]"
        ends = (span.get("start"), span.get("end")) if isinstance(span, dict) else (None, None)
        start, end = ends
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end <= len(text):
            raise ValueError(
                f"{here}: expected start and end with 0 <= start < end <= {len(text)}, characters of the text, got {ends}."
            )
        read.append((start, end, _factors(span.get("factors"), f"{here}: factors")))
    try:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise ValueError(
            f"{where}: spans: {type(tokenizer).__name__} does not tell which characters a token has. Label tokens instead: "
            '{"tokens": [...], "factors": [...]}.'
        ) from None
    factors: list[Factors] = []
    for first, last in encoded["offset_mapping"]:
        # A leading space belongs to the token, but not to what is labelled.
        inside = [place for place in range(first, last) if not text[place].isspace()]
        own: Factors = {}
        for start, end, known in read:
            if any(start <= place < end for place in inside):
                own |= known
        factors.append(own)
    return LabelledDocument(list(encoded["input_ids"]), factors)


def _id_of(token: Any, where: str, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < len(tokenizer):
        return token
    if isinstance(token, str):
        vocabulary = tokenizer.get_vocab()
        if token in vocabulary:
            return vocabulary[token]
        ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
    raise ValueError(
        f"{where}: tokens: expected tokens or ids of {type(tokenizer).__name__} ({len(tokenizer)} tokens), got {token!r}. "
        "Label characters instead, which no tokenizer changes: text and spans."
    )


def _factors(value: Any, where: str) -> Factors:
    plain = (str, int, float, bool)
    if not isinstance(value, dict) or not all(key and "=" not in key and isinstance(value[key], plain) for key in value):
        raise ValueError(
            f'{where}: expected an object of names without "=" and values (text, numbers or bools), got {value!r}.'
        )
    return {key: each if isinstance(each, str) else str(each) for key, each in value.items()}


@torch.no_grad()
def tokens_of_file(subject: ProbeTarget, documents: list[LabelledDocument], tokens: int) -> Tokens:
    """Run the model on labelled documents, up to ``tokens`` of their tokens, and return activations with factors.

    Documents are cut after the dictionary's context length, and begin with BOS if its training contexts did. Special tokens
    are left out.

    Raises:
        ValueError: If there are fewer than two documents with tokens, or activations are not finite.
    """
    model = subject.model
    special = set(model.tokenizer.all_special_ids)
    neuron = neuron_hook(model, subject.hook)
    hooks = (subject.hook,) if neuron is None else (subject.hook, neuron)
    rows: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
    owners: list[int] = []
    factors: list[Factors] = []
    for batch in _batches(subject, documents):
        width = max(len(ids) for _, ids, _ in batch)
        ids = torch.full((len(batch), width), model.tokenizer.pad_token_id or 0)
        kept = torch.zeros(len(batch), width, dtype=torch.bool)
        for line, (number, some, known) in enumerate(batch):
            ids[line, : len(some)] = torch.tensor(some)
            kept[line, : len(some)] = torch.tensor([token not in special for token in some])
            wanted = [own for token, own in zip(some, known, strict=True) if token not in special]
            owners += [number] * len(wanted)
            factors += wanted
        # Attention is causal: right padding does not affect the text.
        seen = model.activations(ids.to(model.device), hooks)
        for hook in hooks:
            own = seen[hook].float().cpu()[kept]
            if not bool(torch.isfinite(own).all()):
                raise ValueError(f"{hook}: expected finite activations, got NaN or infinite ones from {model.id}.")
            rows[hook].append(own.numpy())
        if len(factors) >= tokens:
            break
    if len(set(owners)) < 2:
        raise ValueError("--factors: expected two documents or more: one half chooses detectors, the other is scored.")
    together = {hook: np.concatenate(parts) for hook, parts in rows.items()}
    return Tokens(together[subject.hook], together[neuron] if neuron else None, np.array(owners), factors)


def _batches(subject: ProbeTarget, documents: list[LabelledDocument]) -> Iterator[list[tuple[int, list[int], list[Factors]]]]:
    bos = None if subject.text.bos == "none" else subject.model.tokenizer.bos_token_id
    length, batch = subject.text.context_length, []
    for number, document in enumerate(documents):
        ids = with_one_bos(document.ids, bos)
        # The one BOS stands for those that the document began with; it has no factors.
        first = 0 if bos is None else len(document.ids) + 1 - len(ids)
        known = ([] if bos is None else [{}]) + document.factors[first:]
        if ids:
            batch.append((number, list(ids[:length]), known[:length]))
        if len(batch) == BATCH_CONTEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
