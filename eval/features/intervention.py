"""Continuations of text under a latent: what a model writes with the latent added, for intervention scoring.

A latent is added at its mean top activation to every token of a few held-out prompts, and the model continues them greedily,
as it continues them unchanged. The scorer is shown both continuations and asks whether the explanation fits the change; other
latents, added at their own mean top activation, give the items that it should not fit. 0.5 is chance.

Source: intervention scoring of Paulo et al. 2024, arXiv:2410.13928, with the change judged right or wrong in place of the
scorer's surprisal at the explanation. Strengths are those of the latents, not matched in KL, so that weak latents score low.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...training.activations.model import LanguageModel
from ...training.activations.prompt import latent_edits
from ...training.activations.splice import generate
from ...training.tokens import with_one_bos
from .collect import Collected

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 10, 12, 16
# Other latents per explained one, and the pool that those of all are drawn from, whose continuations are made once.
OTHERS, POOL = 5, 20
INTERVENE = """A neuron of a language model was made more active, and you get a description of what the neuron is about. Each \
excerpt shows a text, how the model continues it, and how it continues it with a neuron made more active: either the one \
described, or another one. Say of each excerpt whether the change fits the description. Answer with a JSON list of as many \
numbers as there are excerpts, 1 if it fits, 0 if not, and nothing else."""


class Continuations:
    """Continuations of held-out prompts by a model with latents of one dictionary added.

    Raises:
        ValueError: If the model cannot generate, or the text has too few windows to take prompts from.
    """

    def __init__(self, model: LanguageModel, dictionary: SparseDictionary, collected: Collected, seed: int = 22):
        if not hasattr(model.module, "generate"):
            raise ValueError(f"{type(model.module).__name__} does not generate text")
        self.model, self.dictionary = model, dictionary
        self.prompts = _prompts(collected, model.tokenizer.bos_token_id)
        self.strengths = top_means(collected)
        alive = np.flatnonzero(self.strengths > 0)
        self.pool = np.random.default_rng(seed).permutation(alive)[:POOL].tolist()
        self._made: dict[int | None, list[str]] = {}

    def of(self, latent: int | None) -> list[str]:
        """Return the continuation of each prompt with a latent added, or with none."""
        if latent not in self._made:
            steer = [] if latent is None else [(self.dictionary, latent, float(self.strengths[latent]))]
            insertions, edits = latent_edits(steer)
            ids = generate(self.model, self.prompts, NEW_TOKENS, insertions=insertions, edits=edits, add_error=bool(insertions))
            self._made[latent] = self.texts(ids[:, self.prompts.shape[1] :])
        return self._made[latent]

    def texts(self, token_ids: Int[Tensor, "contexts positions"]) -> list[str]:
        """Return the text of each context."""
        return [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in token_ids]

    def items(self, latent: int) -> list[tuple[str, bool]]:
        """Return what the scorer is asked about: every prompt once with the latent, and once with another one.

        Raises:
            ValueError: If no other latent fires.
        """
        others = [other for other in self.pool if other != latent]
        if not others:
            raise ValueError("no other latent fires on the text")
        start = self.pool.index(latent) if latent in self.pool else latent
        chosen = [others[(start + step) % len(others)] for step in range(OTHERS)]
        prompts, before, own = self.texts(self.prompts), self.of(None), self.of(latent)
        found = [(_item(*texts), True) for texts in zip(prompts, before, own, strict=True)]
        for number, (prompt, plain) in enumerate(zip(prompts, before, strict=True)):
            found.append((_item(prompt, plain, self.of(chosen[number % OTHERS])[number]), False))
        return found


def top_means(collected: Collected) -> np.ndarray:
    """Return each latent's mean top activation: the mean of the peaks of its strongest contexts, 0 if it has none."""
    there = collected.top.keys > -np.inf
    peaks = np.where(there, collected.top.values.max(-1), 0.0)
    return peaks.sum(1) / np.maximum(there.sum(1), 1)


def _item(prompt: str, before: str, after: str) -> str:
    return f"Text: {prompt}\nContinued: {before}\nContinued with the neuron more active: {after}"


def _prompts(collected: Collected, bos_id: int | None) -> Int[Tensor, "prompts positions"]:
    """Return the beginnings of windows of the documents that explainers do not see."""
    background = collected.background
    rows: Sequence[np.ndarray] = [
        window[window >= 0][:PROMPT_TOKENS]
        for window, document in zip(background.tokens, background.documents, strict=True)
        if document % 2 == 1 and (window >= 0).sum() >= PROMPT_TOKENS
    ]
    if len(rows) < PROMPTS:
        raise ValueError(f"expected {PROMPTS} windows of {PROMPT_TOKENS} tokens to continue, got {len(rows)}")
    ids = [with_one_bos(row.tolist(), bos_id) for row in rows[:PROMPTS]]
    # Windows may begin with the context's own BOS.
    shortest = min(map(len, ids))
    return torch.tensor([row[:shortest] for row in ids])
