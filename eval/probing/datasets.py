"""Labelled tokens and texts for probing."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse

from ...sae.files import read_text
from ...training.activations.contexts import context_batches
from ...training.activations.sites import neuron_hook
from ...training.embedded import corpus
from ...training.tokens import with_one_bos
from .subject import ProbeTarget

BATCH_CONTEXTS = 16

# Names of a token's binary factors, as ``factor=value``.
NameFactors = Callable[[corpus.Factors], list[str]]


@dataclass(frozen=True)
class Tokens:
    """Tokens with known factors: activations, documents and factors."""

    x: np.ndarray  # (tokens, d_in)
    neurons: np.ndarray | None  # (tokens, n_neurons)
    documents: np.ndarray  # (tokens,)
    factors: list[corpus.Factors]

    def where(self, rows: np.ndarray) -> "Tokens":
        """Return the tokens selected by a mask."""
        neurons = None if self.neurons is None else self.neurons[rows]
        return Tokens(self.x[rows], neurons, self.documents[rows], [self.factors[i] for i in np.flatnonzero(rows)])


def embedded_tokens(subject: ProbeTarget, tokens: int, neurons: bool = True) -> Tokens:
    """Read at least ``tokens`` held-out tokens (rounded up to whole batches) with the factors behind each.

    Tokens excluded from training (special tokens, leading positions) are excluded here too.

    Raises:
        ValueError: If the dictionary was not trained on the embedded corpus.
    """
    if not subject.embedded:
        raise no_factors(subject.model.id, subject.text.source)
    model, hook = subject.model, subject.hook
    neuron = neuron_hook(model, hook) if neurons else None
    hooks = (hook,) if neuron is None else (hook, neuron)
    xs, ns, documents, factors, known = [], [], [], [], {}
    for some in context_batches(model, subject.text, subject.section, BATCH_CONTEXTS, heldout=True):
        batch = replace(some, kept=some.kept & (some.positions >= 0))
        rows = batch.kept_activations(model, hooks)
        xs.append(rows[hook].cpu().numpy())
        if neuron is not None:
            ns.append(rows[neuron].cpu().numpy())
        owners, places = batch.document_ids[batch.kept], batch.positions[batch.kept]
        documents.append(owners)
        for owner, place in zip(owners.tolist(), places.tolist(), strict=True):
            if owner not in known:
                known[owner] = corpus.embedded_document(subject.text.seed, owner).factors
            factors.append(known[owner][place])
        if len(factors) >= tokens:
            break
    if not factors:
        raise ValueError("text: expected held-out documents, got none. Train with harvest.heldout above 0.")
    return Tokens(np.concatenate(xs), np.concatenate(ns) if ns else None, np.concatenate(documents), factors)


def no_factors(model: str, text: str) -> ValueError:
    """Return the error for a model and a source of text whose factors are not known."""
    return ValueError(
        f"--task: the factors behind {model} on {text} text are not known. This needs a dictionary trained on the embedded "
        "model and corpus; give labelled text with --labels FILE, or the factors of every token with --factors FILE, instead."
    )


@dataclass(frozen=True)
class Labelled:
    """Texts with one label each and, optionally, a second label (``spurious``) that correlates with it."""

    name: str
    texts: list[str]
    labels: list[str]
    spurious: list[str] | None = None


def read_labelled(path: str | Path) -> Labelled:
    """Read labelled text from a JSONL file with the keys ``text``, ``label`` and, in all lines or none, ``spurious``.

    Raises:
        ValueError: If the file does not exist, a line is malformed, or there are fewer than two distinct labels.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'--labels: {path} does not exist. Expected a JSONL file, one {{"text": ..., "label": ...}} a line.')
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not _is_label(row.get("label")):
            raise ValueError(
                f'{path}:{number}: expected {{"text": "...", "label": "..."}}, a label being text, number or bool.'
            )
        rows.append(row)
    seconds = [row.get("spurious") for row in rows]
    if any(second is not None for second in seconds) and not all(map(_is_label, seconds)):
        raise ValueError(f"{path}: spurious: expected a label in every line or in none.")
    labels = [str(row["label"]) for row in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"{path}: label: expected at least two classes, got {sorted(set(labels))} in {len(rows)} lines.")
    spurious = [str(second) for second in seconds] if seconds[0] is not None else None
    return Labelled(path.stem, [row["text"] for row in rows], labels, spurious)


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and value == value and str(value) != ""


@dataclass(frozen=True)
class Pooled:
    """Activations and codes of texts, averaged over the tokens of each text.

    Ablating latents with the dictionary's error kept is linear in the codes, so it can be applied to the means.
    """

    name: str
    x: np.ndarray  # (texts, d_in)
    codes: sparse.csc_array  # (texts, n_latents)
    labels: np.ndarray  # (texts,) of str
    spurious: np.ndarray | None
    counts: np.ndarray  # (texts,) number of tokens


@torch.no_grad()
def pool(subject: ProbeTarget, data: Labelled, most_tokens: int | None = None) -> Pooled:
    """Run the model on every text and average over its tokens, excluding special ones; texts without other tokens are dropped.

    Texts are truncated to ``most_tokens`` or the dictionary's context length, and start with BOS if its training contexts did.

    Raises:
        ValueError: If no text has a valid token.
    """
    tokenizer = subject.model.tokenizer
    special = set(tokenizer.all_special_ids)
    length = most_tokens or subject.text.context_length
    bos = None if subject.text.bos == "none" else tokenizer.bos_token_id
    encoded = tokenizer(data.texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [with_one_bos(ids, bos)[:length] for ids in encoded]
    valid = [number for number, row in enumerate(rows) if any(token not in special for token in row)]
    if not valid:
        raise ValueError(f"{data.name}: expected texts with valid tokens for {subject.model.id}, got none. Give other text.")
    d, n_latents = subject.dictionary.d_in, subject.dictionary.n_latents
    x, codes, counts = np.zeros((len(valid), d), np.float32), [], np.zeros(len(valid), np.int64)
    for batch in _by_length(valid, rows):
        width = max(len(rows[number]) for _, number in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
        kept = torch.zeros(len(batch), width, dtype=torch.bool)
        for line, (_, number) in enumerate(batch):
            ids[line, : len(rows[number])] = torch.tensor(rows[number])
            kept[line, : len(rows[number])] = torch.tensor([token not in special for token in rows[number]])
        # Attention is causal: right padding does not affect the text.
        seen = subject.model.activations(ids.to(subject.model.device), (subject.hook,))[subject.hook].float()
        owner = kept.nonzero()[:, 0].to(seen.device)
        rows_of = seen[kept.to(seen.device)]
        if not bool(torch.isfinite(rows_of).all()):
            raise ValueError(
                f"{subject.hook}: expected finite activations on {data.name}, got NaN or infinite ones from "
                f"{subject.model.id}. The model overflows there: train in model.dtype: float32."
            )
        count = torch.bincount(owner, minlength=len(batch))
        places = [place for place, _ in batch]
        x[places] = (torch.zeros(len(batch), d, device=seen.device).index_add_(0, owner, rows_of) / count[:, None]).cpu()
        counts[places] = count.cpu()
        code = subject.encode(rows_of)
        # A pursuit's values may be negative: they write too.
        fires = code.values != 0
        tokens = code.token_ids()[fires]
        values = code.values[fires].float() / count[owner[tokens]]
        where = torch.tensor(places, device=seen.device)[owner[tokens]]
        codes.append(tuple(part.cpu().numpy() for part in (where, code.latents[fires], values)))
    where, latents, values = (np.concatenate(parts) for parts in zip(*codes, strict=True))
    together = sparse.csc_array(sparse.coo_array((values, (where, latents)), shape=(len(valid), n_latents)))
    spurious = None if data.spurious is None else np.array(data.spurious)[valid]
    return Pooled(data.name, x, together, np.array(data.labels)[valid], spurious, counts)


def _by_length(valid: Sequence[int], rows: list[list[int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (row, text index) of similar length, to keep padding small."""
    order = sorted(enumerate(valid), key=lambda item: len(rows[item[1]]))
    for start in range(0, len(order), 4 * BATCH_CONTEXTS):
        yield order[start : start + 4 * BATCH_CONTEXTS]


def halves(documents: Int[np.ndarray, " tokens"], seed: int) -> np.ndarray:
    """Return a mask of the tokens that belong to a random half of the documents."""
    owners = np.unique(documents)
    chosen = np.random.default_rng(seed).permutation(owners)[: len(owners) // 2]
    return np.isin(documents, chosen)
