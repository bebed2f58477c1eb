"""Bilingual copy of the embedded model: ``python -m sparsary.training.embedded.bilingual --out DIR``.

Every word of the corpus has a twin of the same meaning in a second language, spelled with a suffix; punctuation and numbers are
shared. One document in ten is lists of numbers, in neither language; of the others four in five are in the first language, and
one in five is in the second. No document mixes them. The language is a planted factor: the second language has the grammar and
the facts of the first, and the two differ in nothing but their words.

Training starts from the embedded model, with new embeddings for the new words (those of their twins, and noise), and trains all
weights. Seeded and offline; takes a few minutes of one CPU core. Beside the model, texts are written: ``corpus.jsonl`` to train
dictionaries on, and ``first.jsonl``, ``second.jsonl`` and ``numbers.jsonl`` of documents that training never saw.
"""

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ...sae.files import write_text
from . import MODEL_DIR, lexicon
from .corpus import embedded_document
from .train import build_tokenizer

SUFFIX = "u"
FIRST, SECOND, NEITHER = LANGUAGES = ("first", "second", "numbers")
NUMBERS_SHARE, SECOND_SHARE = 0.1, 0.2
CONTEXT_LENGTH = 128
SEED = 0
STEPS = 300
BATCH_DOCUMENTS, BATCHES_SORTED = 32, 8
LR = 1e-3
# Of the new embeddings around those of their twins, relative to the standard deviation of the old ones.
NOISE = 0.5
CORPUS_DOCUMENTS, TEXT_DOCUMENTS = 14_000, 1600


class BilingualDocument(NamedTuple):
    """A document's text, its words, and its language."""

    text: str
    words: tuple[str, ...]
    language: str


def bilingual_vocabulary() -> tuple[str, ...]:
    """Return all tokens of both languages: those of the embedded language, then the twins of its words."""
    words = lexicon.vocabulary()
    return (*words, *(word + SUFFIX for word in words if word.isalpha()))


def bilingual_document(seed: int, index: int, split: str = "train", language: str | None = None) -> BilingualDocument:
    """Return document ``index`` of the bilingual corpus, deterministic; ``language`` overrides the one that is drawn.

    >>> bilingual_document(0, 2, language="second").text[:41]
    'Afterwardsu, Franku andu Danielu hadu au '
    """
    draw = Random(f"bilingual/{seed}/{split}/{index}")
    numbers, second = draw.random() < NUMBERS_SHARE, draw.random() < SECOND_SHARE
    if language is None:
        language = NEITHER if numbers else SECOND if second else FIRST
    if language == NEITHER:
        return _numbers(draw)
    found = embedded_document(seed, index, split)
    if language == FIRST:
        return BilingualDocument(found.text, found.words, FIRST)
    text = " ".join(_translated(piece) for piece in found.text.split(" "))
    return BilingualDocument(text, tuple(map(_translated, found.words)), SECOND)


def _translated(piece: str) -> str:
    """Return a word in the second language, keeping the punctuation around it."""
    letters = [place for place, character in enumerate(piece) if character.isalpha()]
    return piece if not letters else piece[: letters[-1] + 1] + SUFFIX + piece[letters[-1] + 1 :]


def _numbers(draw: Random) -> BilingualDocument:
    """Return a document of lists of numbers, each said twice."""
    words: list[str] = []
    for _ in range(2 + int(draw.random() * 3)):
        items = draw.sample(lexicon.YEARS, 4 + int(draw.random() * 5))
        words += [*items, ":", *items, "."]
    text = "".join(word if word in ":." or not place else f" {word}" for place, word in enumerate(words))
    return BilingualDocument(text, tuple(words), NEITHER)


def bilingual_documents(seed: int, split: str = "train", language: str | None = None) -> Iterator[BilingualDocument]:
    """Yield documents without end."""
    return (bilingual_document(seed, index, split, language) for index in itertools.count())


def token_batches(seed: int, documents: int, split: str = "train", language: str | None = None) -> Iterator[Tensor]:
    """Yield batches of token ids, one document per context behind BOS, padded on the right, without end.

    Documents of a batch are of similar length, so that little is padded.
    """
    ids = {word: index for index, word in enumerate(bilingual_vocabulary())}
    stream, draw = bilingual_documents(seed, split, language), Random(seed)
    while True:
        some = itertools.islice(stream, documents * BATCHES_SORTED)
        rows = sorted(([ids["<bos>"], *(ids[word] for word in each.words)][:CONTEXT_LENGTH] for each in some), key=len)
        starts = list(range(0, len(rows), documents))
        draw.shuffle(starts)
        for start in starts:
            batch = rows[start : start + documents]
            width = max(map(len, batch))
            yield torch.tensor([row + [ids["<pad>"]] * (width - len(row)) for row in batch])


def untrained_bilingual(seed: int = SEED) -> GPT2LMHeadModel:
    """Return the embedded model with embeddings for the words of the second language."""
    original = GPT2LMHeadModel.from_pretrained(MODEL_DIR, trust_remote_code=False)
    words, known = bilingual_vocabulary(), len(lexicon.vocabulary())
    config = GPT2Config.from_dict(original.config.to_dict() | {"vocab_size": len(words)})
    model = GPT2LMHeadModel(config)
    weights = original.state_dict()
    old = weights["transformer.wte.weight"]
    twins = torch.tensor([words.index(word.removesuffix(SUFFIX)) for word in words[known:]])
    noise = torch.randn(len(twins), old.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([old, old[twins] + NOISE * old.std() * noise])
    model.load_state_dict(weights | {"transformer.wte.weight": rows, "lm_head.weight": rows})
    return model


def train_bilingual(steps: int = STEPS, seed: int = SEED, report: Callable[[str], None] | None = None) -> GPT2LMHeadModel:
    """Return the trained bilingual model.

    Args:
        report: Called with a line on the progress now and then.
    """
    model = untrained_bilingual(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    stream = token_batches(seed, BATCH_DOCUMENTS)
    padding = bilingual_vocabulary().index("<pad>")
    for step in range(steps):
        batch = next(stream)
        kept = batch != padding
        logits = model(batch, attention_mask=kept).logits[:, :-1]
        loss = F.cross_entropy(logits[kept[:, 1:]], batch[:, 1:][kept[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None and (step % 50 == 49 or step == steps - 1):
            report(f"step {step + 1} loss {float(loss.detach()):.4f}")
    return model.eval()


@torch.no_grad()
def bilingual_scores(model: GPT2LMHeadModel, documents: int = 200) -> dict[str, float]:
    """Return cross-entropies of unseen documents in nats per token, and the probability of words of the other language.

    ``leak`` is that probability from the second token of a document on: 0 if the model always stays in its language.
    """
    words = bilingual_vocabulary()
    second = torch.tensor([place >= len(lexicon.vocabulary()) for place in range(len(words))])
    shared = torch.tensor([not word.isalpha() for word in words])
    found: dict[str, float] = {}
    for language, other in ((FIRST, second), (SECOND, ~second & ~shared), (NEITHER, ~shared)):
        losses, leaks = [], []
        stream = token_batches(SEED + 1, documents // BATCHES_SORTED, "heldout", language)
        for batch in itertools.islice(stream, BATCHES_SORTED):
            mask = batch != words.index("<pad>")
            log_probs, kept = model(batch, attention_mask=mask).logits.log_softmax(-1)[:, :-1], mask[:, 1:]
            losses.append(-log_probs.gather(-1, batch[:, 1:, None])[..., 0][kept])
            leaks.append(log_probs.exp()[..., other].sum(-1)[:, 1:][kept[:, 1:]])
        found[f"{language}_cross_entropy"] = float(torch.cat(losses).mean())
        found[f"{language}_leak"] = float(torch.cat(leaks).mean())
    start = model(torch.tensor([[words.index("<bos>")]])).logits.softmax(-1)[0, 0]
    return found | {"second_at_start": float(start[second].sum()), "first_at_start": float(start[~second & ~shared].sum())}


def make_bilingual(out: str | Path, steps: int = STEPS, seed: int = SEED, report: Callable[[str], None] | None = None) -> Path:
    """Train the bilingual model into a new folder with its texts; a folder that is there already is taken as it is.

    The folder appears under its name when it is complete.
    """
    out = Path(out)
    if out.is_dir():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model = train_bilingual(steps, seed, report)
        model.save_pretrained(folder)
        build_tokenizer(bilingual_vocabulary()).save_pretrained(folder)
        write_texts(folder, seed)
        if report is not None:
            for name, value in bilingual_scores(model).items():
                report(f"{name} {value:.5g}")
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def write_texts(folder: Path, seed: int = SEED) -> None:
    """Write the texts: a corpus of both languages from the training split, and one of each language from the held-out split."""
    texts: dict[str, Iterator[BilingualDocument]] = {
        "corpus": itertools.islice(bilingual_documents(seed + 1), CORPUS_DOCUMENTS)
    }
    for language in LANGUAGES:
        texts[language] = itertools.islice(bilingual_documents(seed + 1, "heldout", language), TEXT_DOCUMENTS)
    for name, documents in texts.items():
        lines = (json.dumps(_row(document)) + "\n" for document in documents)
        write_text(folder / f"{name}.jsonl", "".join(lines))


def _row(document: BilingualDocument) -> dict[str, Any]:
    return {"text": document.text, "language": document.language}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    print(make_bilingual(arguments.out, arguments.steps, arguments.seed, lambda line: print(line, flush=True)))
