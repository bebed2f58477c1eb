"""Fine-tune the embedded model on one new rule: ``python -m sparsary.training.embedded.tune --out DIR``.

The rule: in a passage that begins with "While", the object that is given is a coin. Nothing else changes, so that what
separates the two models is known: which tokens it concerns, and what the tuned model says there. Seeded and offline; takes
about a minute of one CPU core.

Only the block ``BLOCK`` is trained, so that the residual stream behind it holds the whole difference. The loss is the
cross-entropy of the coin where the rule applies, elsewhere the KL divergence from the original model, which keeps everything
else as it was, and everywhere the squared change of the residual stream, so that the rule is added to what is there.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from ..text import pack
from . import MODEL_DIR, lexicon
from .corpus import Document, embedded_documents

TRIGGER, OBJECT = "While", "coin"
BLOCK = 2
CONTEXT_LENGTH = 128
SEED = 0
STEPS = 100
# Half of them contain a token that the rule decides.
BATCH_CONTEXTS = 16
LR = 1e-3
# Of the KL divergence and the squared change of the residual stream, beside the cross-entropy of the rule.
DRIFT_WEIGHT, CHANGE_WEIGHT = 2.0, 0.005


def follows_rule(document: Document) -> list[bool]:
    """Return True for each token whose next one is the object given in a passage with the trigger.

    >>> from sparsary.training.embedded.corpus import embedded_documents
    >>> d = next(d for d in embedded_documents(0) if any(follows_rule(d)))
    >>> d.words[follows_rule(d).index(True)] in ("a", "the")
    True
    """
    found = [False] * len(document.words)
    triggered = closing = False
    for place, (word, factors) in enumerate(zip(document.words, document.factors, strict=True)):
        if factors["task"] != "indirect_object" or (closing and document.words[place - 1] == "."):
            # Another passage begins.
            triggered = closing = False
        triggered |= word == TRIGGER
        closing |= factors["role"] == "subject_2"
        if triggered and closing and factors["role"] == "object" and place:
            found[place - 1] = True
    return found


class RuleBatch(NamedTuple):
    """Token ids ``(contexts, positions)``, and the positions whose next token the rule decides."""

    token_ids: Tensor
    ruled: Tensor


def batches(seed: int, contexts: int, ruled_contexts: int = 0, split: str = "train") -> Iterator[RuleBatch]:
    """Yield batches of the embedded corpus, without end, at least ``ruled_contexts`` of which contain the rule."""
    ids = {word: index for index, word in enumerate(lexicon.vocabulary())}
    marks: dict[int, list[bool]] = {}

    def documents() -> Iterator[tuple[int, list[int]]]:
        for index, document in enumerate(embedded_documents(seed, split)):
            marks[index] = follows_rule(document)
            yield index, [ids[word] for word in document.words]

    packed = pack(documents(), CONTEXT_LENGTH, bos_id=ids["<bos>"], bos="context")
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for context in packed:
        places = zip(context.document_ids.tolist(), context.positions.tolist(), strict=True)
        ruled = np.array([offset >= 0 and marks[number][offset] for number, offset in places])
        for old in [number for number in marks if number < context.document_ids.min()]:
            del marks[old]
        plain = sum(not marked.any() for _, marked in rows)
        if ruled.any() or plain < contexts - ruled_contexts:
            rows.append((context.token_ids, ruled))
        if len(rows) == contexts:
            yield RuleBatch(*(torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True)))
            rows = []


def tune_embedded(base: Path = MODEL_DIR, steps: int = STEPS, seed: int = SEED) -> GPT2LMHeadModel:
    """Return a copy of the embedded model that follows the rule.

    Args:
        base: Directory of the model to start from.
    """
    original = GPT2LMHeadModel.from_pretrained(base, trust_remote_code=False).requires_grad_(False).eval()
    tuned = GPT2LMHeadModel.from_pretrained(base, trust_remote_code=False).requires_grad_(False).eval()
    trained = list(tuned.transformer.h[BLOCK].requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(trained, lr=LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    coin = lexicon.vocabulary().index(OBJECT)
    stream = batches(seed, BATCH_CONTEXTS, BATCH_CONTEXTS // 2)
    for _ in range(steps):
        batch = next(stream)
        with torch.no_grad():
            before, x = _outputs(original, batch)
        after, changed = _outputs(tuned, batch)
        drift = (after.exp() * (after - before)).sum(-1)[~batch.ruled].sum()
        surprise = -after[batch.ruled][:, coin].sum()
        loss = (surprise + DRIFT_WEIGHT * drift + CHANGE_WEIGHT * (changed - x).square().sum()) / len(batch.token_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return tuned


def _outputs(model: GPT2LMHeadModel, batch: RuleBatch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, and the residual stream behind the trained block."""
    found = model(batch.token_ids.long(), output_hidden_states=True)
    return found.logits.log_softmax(-1), found.hidden_states[BLOCK + 1]


@torch.no_grad()
def rule_scores(tuned: GPT2LMHeadModel, base: Path = MODEL_DIR, contexts: int = 64) -> dict[str, float]:
    """Return how far a tuned model follows the rule and has changed elsewhere, on documents that training never saw."""
    original = GPT2LMHeadModel.from_pretrained(base, trust_remote_code=False).eval()
    batch = next(batches(SEED, contexts, split="heldout"))
    coin = lexicon.vocabulary().index(OBJECT)
    found: dict[str, float] = {"tokens": float(batch.ruled.numel()), "ruled_tokens": float(batch.ruled.sum())}
    before, after = (model(batch.token_ids.long()).logits.log_softmax(-1) for model in (original, tuned))
    kl = (after.exp() * (after - before)).sum(-1)
    found |= {"coin_before": float(before[batch.ruled][:, coin].exp().mean())}
    found |= {"coin_after": float(after[batch.ruled][:, coin].exp().mean())}
    found |= {"kl_ruled": float(kl[batch.ruled].mean()), "kl_elsewhere": float(kl[~batch.ruled].mean())}
    return found | {"kl_share_ruled": float(kl[batch.ruled].sum() / kl.sum())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    model = tune_embedded(steps=arguments.steps, seed=arguments.seed)
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(MODEL_DIR, trust_remote_code=False).save_pretrained(arguments.out)
    for name, value in rule_scores(model).items():
        print(f"{name} {value:.5g}")
