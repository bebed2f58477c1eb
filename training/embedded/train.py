"""Training script of the embedded language model: ``python -m sparsary.training.embedded.train [--out DIR]``.

Seeded and offline; takes about half an hour on two CPU cores. Writes the weights and a model card with the measured scores.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ..text import pack
from . import MODEL_DIR, lexicon
from .corpus import embedded_documents
from .score import score_model

CONTEXT_LENGTH = 128
SEED = 0
STEPS = 3000
BATCH_CONTEXTS = 64
PEAK_LR = 2e-3
WARMUP_STEPS = 100


def build_tokenizer(words: Sequence[str] = lexicon.vocabulary()) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that isolates punctuation and splits digits in pairs, so ``1589`` is ``15 89``."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex(r"\d\d"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<bos>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=CONTEXT_LENGTH,
    )


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(SEED)
    words = lexicon.vocabulary()
    bos_id, pad_id = words.index("<bos>"), words.index("<pad>")
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=CONTEXT_LENGTH,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos_id,
        eos_token_id=bos_id,
        pad_token_id=pad_id,
    )
    return GPT2LMHeadModel(config)


def learning_rate(step: int) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_embedded(out_dir: Path, steps: int) -> None:
    tokenizer = build_tokenizer()
    model = build_model()
    ids = {word: index for index, word in enumerate(lexicon.vocabulary())}
    token_ids = ([ids[word] for word in document.words] for document in embedded_documents(SEED, "train"))
    contexts = pack(enumerate(token_ids), CONTEXT_LENGTH, bos_id=ids["<bos>"], bos="context")
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    started = time.monotonic()
    for step in range(steps):
        batch = torch.stack([torch.from_numpy(next(contexts).token_ids) for _ in range(BATCH_CONTEXTS)]).long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            print(json.dumps(score_model(model, tokenizer, n=200)), flush=True)
            out_dir.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(out_dir)
            tokenizer.save_pretrained(out_dir)
    write_card(out_dir, score_model(model, tokenizer), steps)


# Score -> its meaning, for the model card.
MEANINGS = {
    "indirect_object_accuracy": "indirect object above subject, two name orders, eight openings, six closings",
    "greater_than_mass": "probability of two-digit years after the start year",
    "pronoun_accuracy": "pronoun of the named person's gender above the other",
    "induction_top1": "next word of a repeated random list is the most likely token",
    "argument_copying_top1": "next argument of the signature is the most likely token",
    "cross_entropy": "nats per token on held-out documents",
    "agreement_simple_accuracy": "best verb form of the subject's number above the best of the other; no attractor",
    "agreement_across_pp_accuracy": "the same across a prepositional phrase",
    "agreement_across_rc_accuracy": "the same across a relative clause",
    "agreement_attractor_accuracy": "the same where the attractor has the other number",
}


def write_card(out_dir: Path, scores: dict[str, float], steps: int) -> None:
    """Write the model card: architecture, training, and measured scores."""
    rows = "\n".join(f"| `{name}` | {MEANINGS[name]} | {value:.4f} |" for name, value in scores.items())
    tokens = steps * BATCH_CONTEXTS * CONTEXT_LENGTH
    (out_dir / "README.md").write_text(
        f"""# The embedded language model

A GPT-2 architecture (4 layers, width 128, 4 heads, contexts of {CONTEXT_LENGTH} tokens, {len(lexicon.vocabulary()):,} words)
trained on the embedded corpus, so that demo, tests and studies run offline and against known structure. It knows the
embedded language and nothing else.

Made by `python -m sparsary.training.embedded.train`: seed {SEED}, {steps:,} steps of {BATCH_CONTEXTS} contexts
({tokens / 1e6:.1f} million tokens), AdamW, peak learning rate {PEAK_LR}, float32.

Scores on 1,000 prompts per task whose combinations of names, nouns, events and years training never saw
(`training/embedded/score.py`):

| score | meaning | value |
|---|---|---|
{rows}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train_embedded(arguments.out, arguments.steps)
