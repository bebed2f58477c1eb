"""Seeded text sampled from a small model: more tokens than the available corpus, for counting dead latents.

    .venv/bin/python docs/studies/sample_text.py --model PATH/stories3M --tokens 4000000 --out sampled.jsonl
    sparsary eval RUN --text sampled.jsonl --tokens 2000000 --set harvest.heldout=0.999 --out judged

Each line holds a document and its number of tokens. Documents are sampled in batches with a KV cache, from BOS to the next BOS
or EOS, up to one context. Every batch has its own generator, seeded by --seed and the batch number, so an interrupted call
resumes after the last whole batch and produces the same file, and a longer text begins with a shorter one. Two cores write
2,100 to 3,100 tokens/s with a model of 3 million parameters: 4 million take half an hour. Eval fits on half of the tokens and
scores the other half: request twice the window.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

# Share of finished documents at which they are removed from the batch: reordering the cache costs a copy of it.
LEAVE_AT = 0.25


@torch.no_grad()
def sample_batch(
    model: Any, first: int, stops: Tensor, batch: int, context: int, temperature: float, seed: int
) -> list[list[int]]:
    """Return the tokens of a batch of documents, without BOS and the token that ended them.

    Up to rounding, a document depends only on the seed and its index in the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    documents: list[list[int]] = [[] for _ in range(batch)]
    rows = torch.arange(batch)
    tokens, cache = torch.full((batch, 1), first), DynamicCache()
    running = torch.ones(batch, dtype=torch.bool)
    for position in range(context - 1):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].float()
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        # One random number per document of the batch, finished or not, so that documents are independent of each other.
        drawn = torch.rand(batch, 1, generator=generator)[rows] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, drawn).clamp_max(logits.shape[-1] - 1)
        running &= ~torch.isin(tokens[:, 0], stops)
        for row, token, goes_on in zip(rows.tolist(), tokens[:, 0].tolist(), running.tolist(), strict=True):
            if goes_on:
                documents[row].append(token)
        if not running.any() or position == context - 2:
            break
        if float(running.float().mean()) < 1 - LEAVE_AT:
            left = running.nonzero().flatten()
            cache.batch_select_indices(left)
            rows, tokens, running = rows[left], tokens[left], running[left]
    return documents


def written_batches(path: Path, batch: int) -> tuple[int, int]:
    """Truncate a file to whole batches; return their number and their tokens."""
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().split(b"\n")[:-1]
    whole = lines[: len(lines) // batch * batch]
    if len(whole) < len(lines) or not path.read_bytes().endswith(b"\n"):
        path.write_bytes(b"".join(line + b"\n" for line in whole))
    return len(whole) // batch, sum(json.loads(line)["tokens"] for line in whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256, help="documents sampled at once; another number is another text")
    parser.add_argument("--context", type=int, default=256, help="tokens of a document at most, the first included")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False, dtype=torch.float32).eval()
    known = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SystemExit(f"{options.model}: expected a tokenizer with a beginning or end token, which opens a document.")
    done, tokens = written_batches(options.out, options.batch)
    begun, before = time.perf_counter(), tokens
    with options.out.open("a", encoding="utf-8") as handle:
        while tokens < options.tokens:
            seed = options.seed * 1_000_003 + done
            found = sample_batch(
                model, first, torch.tensor(sorted(known)), options.batch, options.context, options.temperature, seed
            )
            for document in found:
                text = tokenizer.decode(document, skip_special_tokens=True)
                handle.write(json.dumps({"text": text, "tokens": len(document)}, ensure_ascii=False) + "\n")
            handle.flush()
            done, tokens = done + 1, tokens + sum(map(len, found))
            speed = (tokens - before) / (time.perf_counter() - begun)
            print(f"batch {done}: {tokens:,} of {options.tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
