"""A small GPT-2 that names the first letter of a word, for absorption: SAEBench's task needs a model that spells.

    .venv/bin/python tests/parity/spelling_model.py runs/spelling

writes ``model``, ``text.jsonl`` to train an SAE on, and ``words.jsonl``, whose labels are the first letters. Words are
invented, with a class that does not depend on the first letter. Half of the text is lists in the form of SAEBench's prompt,
``{word} has the first letter: {letter}``, and half is sentences in which the class of a word depends on the one before it,
with a few frequent words and many rare ones. A word is one token.
"""

import argparse
import json
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CLASSES, WORDS_PER_LETTER = 12, 40
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvz"
# As in SAEBench's prompts: ten examples, then the word that is asked for.
LINES, SENTENCE_WORDS, BATCH = 11, 32, 16
SPECIAL = ["<unk>", "<bos>", "<pad>"]


class Words:
    """Invented words by their first letters, and their classes; sentences and lists of them."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.words: list[str] = []
        for letter in string.ascii_lowercase:
            found: set[str] = set()
            while len(found) < WORDS_PER_LETTER:
                found.add(letter + self._syllables(letter))
            self.words += sorted(found)
        self.classes = self.random.integers(CLASSES, size=len(self.words))
        self.members = [np.flatnonzero(self.classes == one) for one in range(CLASSES)]
        # The first word of a class occurs 30 times as often as its hundredth.
        self.weights = [1 / (1 + np.arange(len(some))) ** 0.75 for some in self.members]
        for some in self.members:
            self.random.shuffle(some)
        self.next = self.random.dirichlet(np.full(CLASSES, 0.15), size=CLASSES)

    def _syllables(self, first: str) -> str:
        letters, vowel = "", first not in VOWELS
        for _ in range(self.random.integers(3, 7)):
            letters += str(self.random.choice(list(VOWELS if vowel else CONSONANTS)))
            vowel = not vowel
        return letters

    def spelling(self, lines: int = LINES) -> str:
        """Return a list of words with their first letters."""
        words = [self.words[i] for i in self.random.choice(len(self.words), lines, replace=False)]
        return "\n".join(f"{word} has the first letter: {word[0].upper()}" for word in words)

    def sentences(self) -> str:
        """Return words whose classes follow one another."""
        words, now = [], int(self.random.integers(CLASSES))
        for _ in range(SENTENCE_WORDS):
            weights = self.weights[now]
            words.append(self.words[self.random.choice(self.members[now], p=weights / weights.sum())])
            now = int(self.random.choice(CLASSES, p=self.next[now]))
        return " ".join(words)


def tokenizer_of(words: Words) -> PreTrainedTokenizerFast:
    """Return a tokenizer for which a word, a letter and a punctuation mark are a token each."""
    tokens = [*SPECIAL, "has", "the", "first", "letter", ":", *string.ascii_uppercase, *words.words]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<bos>", pad_token="<pad>"
    )


def rows_of(text: Callable[[], str], tokenizer: PreTrainedTokenizerFast, count: int = BATCH) -> torch.Tensor:
    """Return token ids of texts of one length, each after BOS."""
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text())["input_ids"]] for _ in range(count)])


def letters_in(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return a mask of the tokens that are letters."""
    return torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_uppercase))))


def trained(words: Words, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> GPT2LMHeadModel:
    """Return a model of two layers, trained on three batches of lists to one of sentences."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.bos_token_id,
    )
    # Without dropout.
    model = GPT2LMHeadModel(config).eval()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        lists = step % 4 > 0
        # Lists grow from one line: in a long one, a word is hard to find as long as attention is even.
        lines = 1 + round((LINES - 1) * min(1.0, max(0.0, step / steps - 0.25) / 0.35))
        text = partial(words.spelling, lines) if lists else words.sentences
        ids = rows_of(text, tokenizer, BATCH * LINES // lines if lists else BATCH)
        # The words of a list follow by chance: only their letters can be learned.
        labels = ids.where(letters_in(ids, tokenizer), -100) if lists else ids
        loss = model(input_ids=ids, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, lines {lines}", flush=True)
    return model


@torch.no_grad()
def letters_right(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, words: Words, lists: int = 32) -> float:
    """Return the share of words, after the first of each list, whose letter is the likeliest token."""
    ids = rows_of(words.spelling, tokenizer, lists)
    at = letters_in(ids[:, 1:], tokenizer)
    at[:, :7] = False
    return float((model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:])[at].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--documents", type=int, default=12_000, help="documents of text.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    words = Words(arguments.seed)
    tokenizer = tokenizer_of(words)
    model = trained(words, tokenizer, arguments.steps, arguments.seed)
    print(f"first letters right: {letters_right(model, tokenizer, words):.3f}")
    model.save_pretrained(arguments.folder / "model")
    tokenizer.save_pretrained(arguments.folder / "model")
    texts = (words.spelling() if number % 2 else words.sentences() for number in range(arguments.documents))
    (arguments.folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    labels = ({"text": word, "label": word[0]} for word in words.words)
    (arguments.folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))


if __name__ == "__main__":
    main()
