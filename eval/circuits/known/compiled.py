"""Programs compiled by tracr (Lindner et al. 2023, arXiv:2301.05062), read from files, with the circuit of each program.

Every axis of a compiled residual stream is one variable of the program, so the weights show which component reads which other.
An edge is in the circuit of zero ablation if it carries an axis on a path from the prompt to the output, unless the reader does
the same without it: softmax ignores constants, for example, so a query that is uniform over the positions it selects is not
needed. The fallback of a program for empty selections (BOS, requested by ``one``) is not in the circuit either if the program
always selects something.

For resampling, axes that are equal on both prompts drop out: positions, the constant ``one``, ``tokens:BOS``, lengths. ``one``
is written by the embedding, so a bias of the program is an edge from ``embed``. Circuits of reverse and the fraction are those
of Conmy et al. 2023, arXiv:2304.14997; those of hist and detect_abc were derived in the same way:

- hist: the head selects equal tokens (query and key) and reads BOS among them, 1 / (count + 1); the MLP makes it a count.
- detect_abc: ``m0`` marks a, b and c, the heads of layer 1 shift a by two and b by one, ``m1`` and ``m2`` combine them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import PromptPairs, Question
from .files import load_toy
from .handbuilt import equal_pairs, fraction_pairs, made, reverse_pairs
from .known_circuit import Known
from .toy import ToyTransformer

REVERSE = "embed->a3.h0.v a3.h0->logits"
FRACTION = "embed->m0 m0->a1.h0.v a1.h0->logits"
HIST = "embed->a0.h0.q,k a0.h0->m0 m0->logits"
DETECT = "embed->m0 m0->a1.h0.v m0->a1.h1.v a1.h0->m1 a1.h1->m1 m0->m2 m1->m2 m2->logits"
EDGES = {
    "tracr_reverse": {
        "resample": REVERSE,
        "zero": f"{REVERSE} embed->a0.h0.v a0.h0->m0 embed->m0 m0->m1 embed->m1 m1->m2 m2->a3.h0.q embed->a3.h0.k",
    },
    "tracr_frac_prevs": {"resample": FRACTION, "zero": f"{FRACTION} embed->a1.h0.q,k"},
    "tracr_hist": {"resample": HIST, "zero": f"{HIST} embed->a0.h0.v embed->m0"},
    "tracr_detect_abc": {
        "resample": DETECT,
        "zero": f"{DETECT} embed->a1.h0.q,k embed->a1.h1.q,k embed->m1 embed->m2",
    },
}


def program(name: str, directory: str | Path, n_pairs: int = 16, seed: int = 0) -> Known:
    """Load a compiled program from its directory (``config.json`` with ``residual_labels``, ``model.safetensors``)."""
    require_choice("name", name, EDGES)
    model = load_toy(directory)
    labels = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["residual_labels"]
    directions = dict(zip(labels, torch.eye(len(labels)), strict=True))
    return made(name, model, PAIRS[name](model, n_pairs, seed), EDGES[name], directions)


def _reverse(_model: ToyTransformer, n_pairs: int, seed: int) -> PromptPairs:
    # BOS, a, b, c are 0 to 3, as in the handwritten model.
    return reverse_pairs("tracr_reverse", n_pairs, seed, length=4)


def _fraction(_model: ToyTransformer, n_pairs: int, seed: int) -> PromptPairs:
    # BOS, padding, w, x, y, z.
    return fraction_pairs("tracr_frac_prevs", (2, 4, 5), 3, n_pairs, seed, length=5)


def _hist(model: ToyTransformer, n_pairs: int, seed: int) -> PromptPairs:
    """Return pairs with questions at positions whose tokens have different counts in the two prompts."""
    draw = torch.Generator().manual_seed(seed)
    clean, corrupted, questions = [], [], []
    while len(clean) < n_pairs:
        # Prompts have the maximum length, as counts differ more then. Vocabulary: BOS, a, b, c, padding, d.
        one, other = (_letters(torch.randint(0, 4, (model.config.n_ctx - 1,), generator=draw)) for _ in range(2))
        counts = [(row[:, None] == row[None]).sum(1).tolist() for row in (one[1:], other[1:])]
        asked = [
            Question(1 + index, (count,), (foil,))
            for index, (count, foil) in enumerate(zip(*counts, strict=True))
            if count != foil
        ]
        if asked:
            clean.append(one)
            corrupted.append(other)
            questions.append(tuple(asked))
    return equal_pairs("tracr_hist", "other tokens", torch.stack(clean), torch.stack(corrupted), questions)


def _detect(model: ToyTransformer, n_pairs: int, seed: int) -> PromptPairs:
    """Return clean prompts that contain abc, asked where it ends, and corrupted prompts with a d for each of its letters."""
    draw = torch.Generator().manual_seed(seed)
    length = model.config.n_ctx - 1
    clean, corrupted, questions = [], [], []
    for _ in range(n_pairs):
        row = torch.randint(0, 4, (length,), generator=draw)
        start = int(torch.randint(0, length - 2, (), generator=draw))
        without = row.clone()
        row[start : start + 3], without[start : start + 3] = torch.arange(3), 3
        clean.append(_letters(row))
        corrupted.append(_letters(without))
        questions.append((Question(start + 3, (1,), (0,)),))
    return equal_pairs("tracr_detect_abc", "no abc", torch.stack(clean), torch.stack(corrupted), questions)


def _letters(indices: Tensor) -> Tensor:
    """Return BOS (id 0) and a, b, c, d, whose ids are 1, 2, 3 and 5."""
    return torch.cat([torch.tensor([0]), torch.tensor([1, 2, 3, 5])[indices]])


PAIRS: dict[str, Callable[[ToyTransformer, int, int], PromptPairs]] = {
    "tracr_reverse": _reverse,
    "tracr_frac_prevs": _fraction,
    "tracr_hist": _hist,
    "tracr_detect_abc": _detect,
}
