"""Evaluation of the embedded model: held-out accuracy per task, as reported in the model card."""

from typing import Any

import torch

from .corpus import AGREEMENT_KINDS, Prompt, embedded_document, task_prompts


@torch.no_grad()
def last_logits(model, tokenizer: Any, batch: list[Prompt]) -> torch.Tensor:
    """Return next-token logits ``(prompts, vocabulary)`` after each prompt, with BOS prepended."""
    rows = [[tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list(prompt.words))] for prompt in batch]
    width = max(len(row) for row in rows)
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    # With causal attention, padding on the right cannot change the logits of the last word.
    logits = model(padded.to(model.device)).logits
    return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]


def accuracy(model, tokenizer: Any, batch: list[Prompt]) -> float:
    """Return the fraction of prompts whose best right answer has a higher logit than the best wrong one."""
    hits = 0
    for row, prompt in zip(last_logits(model, tokenizer, batch), batch, strict=True):
        right = row[tokenizer.convert_tokens_to_ids(list(prompt.answers))].max()
        wrong = row[tokenizer.convert_tokens_to_ids(list(prompt.foils))].max()
        hits += bool(right > wrong)
    return hits / len(batch)


def answer_mass(model, tokenizer: Any, batch: list[Prompt]) -> float:
    """Return the mean total probability of the right answers."""
    total = 0.0
    for row, prompt in zip(last_logits(model, tokenizer, batch).softmax(-1), batch, strict=True):
        total += float(row[tokenizer.convert_tokens_to_ids(list(prompt.answers))].sum())
    return total / len(batch)


def top1(model, tokenizer: Any, batch: list[Prompt]) -> float:
    """Return the fraction of prompts whose most likely next token is a right answer."""
    best = last_logits(model, tokenizer, batch).argmax(-1).tolist()
    tokens = tokenizer.convert_ids_to_tokens(best)
    return sum(token in prompt.answers for token, prompt in zip(tokens, batch, strict=True)) / len(batch)


@torch.no_grad()
def mean_cross_entropy(model, tokenizer: Any, n: int, seed: int = 7) -> float:
    """Return the mean next-token loss in nats over ``n`` held-out documents, one document per context."""
    total, count = 0.0, 0
    for index in range(n):
        ids = tokenizer.convert_tokens_to_ids(list(embedded_document(seed, index, "heldout").words))[
            : model.config.n_positions - 1
        ]
        row = torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device)
        total += float(model(row, labels=row).loss) * len(ids)
        count += len(ids)
    return total / count


def score_model(model, tokenizer: Any, n: int = 1000) -> dict[str, float]:
    """Compute all scores of the model card, on held-out combinations of names, nouns, and years."""
    was_training = model.training
    model.eval()
    results = {
        "indirect_object_accuracy": accuracy(model, tokenizer, task_prompts("indirect_object", n)),
        "greater_than_mass": answer_mass(model, tokenizer, task_prompts("greater_than", n)),
        "pronoun_accuracy": accuracy(model, tokenizer, task_prompts("pronoun", n)),
        "induction_top1": top1(model, tokenizer, task_prompts("induction", n)),
        "argument_copying_top1": top1(model, tokenizer, task_prompts("argument_copying", n)),
        "cross_entropy": mean_cross_entropy(model, tokenizer, n),
    }
    for kind in AGREEMENT_KINDS:
        results[f"agreement_{kind}_accuracy"] = accuracy(model, tokenizer, task_prompts("agreement", n, kind=kind))
    # Agreement is hard if the attractor's number differs from the subject's.
    hard = [p for kind in AGREEMENT_KINDS[1:] for p in task_prompts("agreement", 2 * n, kind=kind) if _attracted(p)]
    results["agreement_attractor_accuracy"] = accuracy(model, tokenizer, hard[:n])
    model.train(was_training)
    return results


def _attracted(prompt: Prompt) -> bool:
    return any(f["role"] == "attractor" and f["number"] != f["subject_number"] for f in prompt.factors)
