"""Handwritten multiple choice whose second head needs a known number of query and key directions.

Prompts, heads and circuit are those of ``choice``. The first head matches the color that is asked for and writes the option's
index; the second scores labels by ``query[index] . key[label]`` and copies the letter of the best. Options are told apart in
one of three shapes, each with its number of directions:

- ``contrasts``: every direction tells one option from all later ones, so that without any of them an option ties with another:
  options less one, all that centered vectors of so many options span.
- ``circle``: evenly spaced directions in a plane, each the nearest to itself: two, with any number of options.
- ``line``: queries along a line, keys on a parabola (``i j - j^2 / 2`` is largest at ``j = i``): one for queries, two for keys.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ....sae.suggestions import require_choice
from .choice import COLORS, INDEX, LETTER, LETTERS, Choices, choice_pairs
from .handbuilt import BETA, made
from .known_circuit import Known
from .rotation import rotation
from .toy import ToyConfig, ToyTransformer, blank
from .wiring import ResidualLayout, write_head

SHAPES = ("contrasts", "circle", "line")
# Ratio of the weights of one contrast and the next: the order of directions by variance is then that of the contrasts.
RATIO = 4.0
# The first option's angle, and half the ratio of the axes of the queries' and of the keys' ellipse: products are a circle's.
ANGLE, STRETCH = 0.3, 1.2
# Options on the line are not symmetric about 0.
SHIFT = 0.2
# Scores of labels also vary with their letters, by so much from one to the next; ties are thus broken at random.
LETTER_BIAS = 0.5
D_HEAD = 8


def ranks_needed(shape: str, options: int) -> dict[str, int]:
    """Return the fewest directions of the second head's queries and keys (``q``, ``k``) that keep the accuracy."""
    require_choice("shape", shape, SHAPES)
    return {"contrasts": {"q": options - 1, "k": options - 1}, "circle": {"q": 2, "k": 2}, "line": {"q": 1, "k": 2}}[shape]


def written_choice(options: int = 3, shape: str = "contrasts", n_pairs: int = 16, seed: int = 0) -> Known:
    """Return a two-layer, attention-only transformer with four heads that answers multiple choice exactly.

    ``seed`` draws the prompts, and a rotation of the second head's queries and keys.

    Raises:
        ValueError: If ``options`` is not 2 to 5 (3 to 5 for a circle), or the shape is unknown.
    """
    require_choice("shape", shape, SHAPES)
    choices = Choices(options)
    if shape == "circle" and options == 2:
        raise ValueError("options: expected 3 to 5, as two options on a circle are a line, got 2.")
    stream = ResidualLayout(
        letter=LETTERS, color=COLORS, label=options, place=options, end=1, index=options, answer=LETTERS, spare=6
    )
    vocabulary = 1 + LETTERS + COLORS
    model = blank(ToyConfig(2, 4, stream.width, D_HEAD, 2 * options + 2, vocabulary, vocabulary))
    color, letter = stream.all("color"), stream.all("letter")
    with torch.no_grad():
        model.wte.weight[1:] = torch.cat([letter, color])
        model.wpe.weight[1:-1] = torch.stack([stream.all("label"), stream.all("place")], 1).flatten(0, 1)
        model.wpe.weight[-1] = stream.at("end")
        model.lm_head.weight[1 : 1 + LETTERS] = stream.all("answer")
    _write_index(model, stream)
    _write_letter(model, stream, shape, seed)
    _write_distractors(model, stream)
    edges = f"embed->{INDEX}.q {INDEX}->{LETTER}.q {LETTER}->logits"
    return made(
        f"choice_{shape}_{options}", model, choice_pairs(choices, n_pairs, seed), {"resample": edges}, stream.directions()
    )


def codes(shape: str, options: int) -> tuple[Float[Tensor, "options n"], Float[Tensor, "options n"]]:
    """Return a query and a key of every option; their product is larger by at least 1 than the query's with any other key."""
    places = torch.arange(options).float()
    if shape == "contrasts":
        rows = torch.eye(options) * (options - 1 - places) - torch.ones(options, options).triu(1)
        rows = F.normalize(rows[:-1], dim=1).T * RATIO ** (places[:-1].flip(0) / 2)
        return rows, rows
    if shape == "circle":
        angles = ANGLE + places * (2 * math.pi / options)
        points, axes = 2 * torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([STRETCH, 1 / STRETCH])
        return points * axes, points / axes
    places = places - places.mean() - SHIFT
    one = torch.ones_like(places)
    return torch.stack([places, one], 1), 2 * torch.stack([places, options**2 / 4 * one - places.square() / 2], 1)


def _write_index(model: ToyTransformer, stream: ResidualLayout) -> None:
    """Write the head that finds the color asked for; it does not attend to the question itself."""
    color, end = stream.all("color"), stream.at("end")[None]
    query = torch.cat([2 * BETA * color, torch.zeros_like(end)])
    bias = F.pad(torch.tensor([2 * BETA]), (COLORS, 0))
    write_head(model, 0, 1, stream.all("place"), stream.all("index"), query, torch.cat([color, -end]), bias)


def _write_letter(model: ToyTransformer, stream: ResidualLayout, shape: str, seed: int) -> None:
    """Write the head that scores labels by the index and copies the letter of the best."""
    queries, keys = (F.pad(code, (0, D_HEAD - code.shape[1])) for code in codes(shape, len(stream.all("index"))))
    # Along the first direction that queries do not share.
    nuisance = torch.arange(LETTERS)[:, None] * F.pad(torch.tensor([1.0]), (0, D_HEAD - 1)) * LETTER_BIAS / BETA
    turn = rotation(D_HEAD, seed).float()
    key = (keys @ turn).T @ stream.all("label") + (nuisance @ turn).T @ stream.all("letter")
    query = BETA * (queries @ turn).T @ stream.all("index")
    write_head(model, 1, 2, stream.all("letter"), stream.all("answer"), query, key)


def _write_distractors(model: ToyTransformer, stream: ResidualLayout) -> None:
    """Write the six heads beside the circuit, which read it or what is asked, and write what only they read."""
    color, spare, index = stream.all("color"), stream.all("spare"), stream.all("index")
    write_head(model, 0, 0, color, spare)
    write_head(model, 0, 2, color, spare, query=BETA * stream.at("end")[None], key=stream.at("end")[None])
    write_head(model, 0, 3, color, spare, query=color, key=color)
    write_head(model, 1, 0, index, spare[: len(index)])
    write_head(model, 1, 1, spare, spare, query=BETA * stream.at("end")[None], key=stream.at("end")[None])
    write_head(model, 1, 3, stream.all("letter"), spare[:LETTERS], query=BETA * index, key=stream.all("label"))
