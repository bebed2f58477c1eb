"""Modular addition by trigonometry: a handwritten clock, and a comparison with trained models.

A token is an angle ``w_k a`` on a circle, for a few frequencies k; sine and cosine of ``w_k (a + b)`` come from products of
those of the two tokens; the logit of c is the sum over k of ``cos w_k (a + b - c)`` (Nanda et al. 2023, arXiv:2301.05217; Zhong
et al. 2023, arXiv:2306.17844).

In a trained model each head carries some of every frequency: in that of Zhong et al. (59, four heads, "model B") patching any
head, or any of the 23 edges except those from the embedding to queries and logits, changes the logit difference (about 60) by
more than 5 on some pair. Only the frequencies form a circuit there: 13, 16 and 21 make up the logits, although the embedding
holds 17 as well. The clock below is such a model whose unused frequencies have their own heads and neurons.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..tasks.pairs import PromptPairs, Question
from .handbuilt import BETA, equal_pairs, made
from .known_circuit import Known
from .toy import ToyConfig, ToyTransformer, blank
from .wiring import ResidualLayout, write_head, write_neurons

# Distance of the points that interpolate the square; between them it is at most STEP^2 / 4 too large.
STEP = 0.25
# Range of the square's argument, a sum of two sines or cosines.
REACH = 2.0
# Coefficients of (cos a, sin a, cos b, sin b) in each form, and of its square in 4 cos(a + b) and 4 sin(a + b).
FORMS = torch.tensor(
    [[1, 0, 1, 0], [1, 0, -1, 0], [0, 1, 0, 1], [0, 1, 0, -1], [0, 1, 1, 0], [0, 1, -1, 0], [1, 0, 0, 1], [1, 0, 0, -1]]
).float()
SIGNS = torch.tensor([[1, -1, -1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, -1, 1, -1]]).float()


def clock(
    n_pairs: int = 16, seed: int = 0, p: int = 13, frequencies: tuple[int, ...] = (1, 5), unused: tuple[int, ...] = (2, 3)
) -> Known:
    """Return a clock for prompts ``a b =``, asked for ``a + b`` modulo ``p``; ``unused`` frequencies are computed, never read.

    Frequencies alternate as far as possible, used ones at odd indices; each has two heads, the first for a, the second for b.
    """
    order = _interleaved(unused, frequencies)
    _check(p, order)
    n, neurons = len(order), len(FORMS) * 2 * round(REACH / STEP)
    stream = ResidualLayout(wave=2 * n, position=3, first=2 * n, second=2 * n, total=2 * n)
    model = blank(ToyConfig(1, 2 * n, stream.width, 2, n_ctx=3, d_vocab=p + 1, d_vocab_out=p, d_mlp=n * neurons))
    waves = torch.cat([wave(p, k) for k in order], 1)
    with torch.no_grad():
        model.wte.weight[:p] = waves @ stream.all("wave")
        model.wpe.weight.copy_(stream.all("position"))
    for index, frequency in enumerate(order):
        axes = slice(2 * index, 2 * index + 2)
        for head, (position, target) in enumerate(((0, "first"), (1, "second"))):
            key = stream.at("position", position)[None]
            value, output = stream.all("wave")[axes], stream.all(target)[axes]
            write_head(model, 0, 2 * index + head, value, output, key=key, query_bias=torch.tensor([BETA]))
        both = torch.cat([stream.all("first")[axes], stream.all("second")[axes]])
        write_products(model, index * neurons, both, stream.all("total")[axes])
        if frequency in frequencies:
            with torch.no_grad():
                model.lm_head.weight += wave(p, frequency) @ stream.all("total")[axes]
    heads = [2 * order.index(k) + side for k in frequencies for side in (0, 1)]
    path = " ".join(f"embed->a0.h{head}.v a0.h{head}->m0" for head in heads) + " m0->logits"
    edges = {"resample": path, "zero": path + "".join(f" embed->a0.h{head}.k" for head in heads)}
    return made("clock", model, _pairs(p, n_pairs, seed), edges, stream.directions())


def wave(p: int, frequency: int) -> Float[Tensor, "p 2"]:
    """Return cosine and sine of every number's angle."""
    angles = torch.arange(p) * (2 * math.pi * frequency / p)
    return torch.stack([angles.cos(), angles.sin()], 1)


def write_products(
    model: ToyTransformer, start: int, both: Float[Tensor, "4 d_model"], total: Float[Tensor, "2 d_model"]
) -> None:
    """Write neurons from (cos a, sin a, cos b, sin b), read along ``both``, to cos and sin of a + b along ``total``.

    A product is a difference of squares, ``4 x y = (x + y)^2 - (x - y)^2``; squares are piecewise linear, with one neuron per
    breakpoint.
    """
    bends = torch.arange(round(REACH / STEP)) * STEP
    # The slope starts at STEP and grows by twice that at each later breakpoint.
    heights = torch.full_like(bends, 2 * STEP)
    heights[0] = STEP
    for form, signs in zip(FORMS @ both, SIGNS.T @ total / 4, strict=True):
        for side in (form, -form):
            start = write_neurons(model, 0, start, side.expand(len(bends), -1), -bends, heights[:, None] * signs)


def _interleaved(first: tuple[int, ...], second: tuple[int, ...]) -> list[int]:
    shorter = min(len(first), len(second))
    mixed = [k for pair in zip(first, second, strict=False) for k in pair]
    return [*mixed, *first[shorter:], *second[shorter:]]


def _check(p: int, order: list[int]) -> None:
    if p < 3 or any(p % d == 0 for d in range(2, math.isqrt(p) + 1)):
        raise ValueError(f"p: expected an odd prime, got {p}.")
    if len(set(order)) < len(order) or any(not 1 <= k <= p // 2 for k in order):
        raise ValueError(f"frequencies, unused: expected distinct numbers from 1 to {p // 2} (half of p), got {order}.")


def _pairs(p: int, n_pairs: int, seed: int) -> PromptPairs:
    draw = torch.Generator().manual_seed(seed)
    clean, corrupted, questions = [], [], []
    while len(clean) < n_pairs:
        one, other = (torch.randint(0, p, (2,), generator=draw) for _ in range(2))
        answer, foil = int(one.sum()) % p, int(other.sum()) % p
        # Both numbers change, so that either alone matters.
        if answer == foil or (one == other).any():
            continue
        for rows, numbers in ((clean, one), (corrupted, other)):
            rows.append(torch.cat([numbers, torch.tensor([p])]))
        questions.append((Question(2, (answer,), (foil,)),))
    return equal_pairs("clock", "other numbers", torch.stack(clean), torch.stack(corrupted), questions)
