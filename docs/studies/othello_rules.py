"""Othello on a 6x6 board for many games at once: rules, random legal games, and the facts known of every position.

A position is two bitboards, the discs of the player to move (mine) and of the other (yours). Rows of a board take seven bits;
the seventh stays empty, so that a shift never moves a disc from one row into the next. Every function takes arrays of
``numpy.uint64`` of any shape.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

SIZE, STRIDE = 6, 7
SQUARES = [f"{column}{row + 1}" for row in range(SIZE) for column in "abcdef"]
PASS, BOS, END = len(SQUARES), len(SQUARES) + 1, len(SQUARES) + 2
VOCABULARY = [*SQUARES, "pass", "<bos>", "<end>"]
# BOS, 32 moves, and more passes than random games have.
CONTEXT = 40

BITS = np.array([1 << (STRIDE * row + column) for row in range(SIZE) for column in range(SIZE)], dtype=np.uint64)
BOARD = int(BITS.sum())
STEPS = (1, -1, STRIDE, -STRIDE, STRIDE + 1, -STRIDE - 1, STRIDE - 1, 1 - STRIDE)

Boards = UInt64[np.ndarray, "..."]


def mask(*squares: str) -> int:
    """Return the bitboard of some squares."""
    return sum(int(BITS[SQUARES.index(square)]) for square in squares)


# Black moves first.
BLACK, WHITE = mask("d3", "c4"), mask("c3", "d4")


def shifted(boards: Boards, step: int) -> Boards:
    """Move all discs by a step; discs that leave the board lie on bits that are no square's."""
    return boards << step if step > 0 else boards >> -step


def _runs(start: Boards, discs: Boards, step: int) -> Boards:
    """Return the unbroken lines of discs that begin one step from ``start``; at most four fit between two others."""
    run = shifted(start, step) & discs
    for _ in range(SIZE - 3):
        run = run | (shifted(run, step) & discs)
    return run


def legal(mine: Boards, yours: Boards) -> Boards:
    """Return the squares on which the player to move may place a disc."""
    found = np.zeros_like(mine)
    for step in STEPS:
        found |= shifted(_runs(mine, yours, step), step)
    return found & ~(mine | yours) & BOARD


def flips(mine: Boards, yours: Boards, move: Boards) -> Boards:
    """Return the discs that a move turns over; a move of 0, a pass, turns none."""
    found = np.zeros_like(mine)
    for step in STEPS:
        run = _runs(move, yours, step)
        found |= np.where(shifted(run, step) & mine, run, 0)
    return found


def stable(mine: Boards, yours: Boards) -> Boards:
    """Return discs that no later move can flip, by the usual sufficient rule.

    On each of the four lines through such a disc, the board ends beside it, or a stable disc of its own colour is beside it, or
    the line has no empty square. Corners are stable, then discs beside them on an edge, then inner ones. Du et al. 2025
    (arXiv:2501.07108) ask of inner discs that all eight neighbours are stable, which no inner disc could be the first to be.
    """
    found = np.zeros_like(mine)
    closed = {step: _full(mine | yours, step) | (BOARD & ~(_onto(step) & _onto(-step))) for step in STEPS[::2]}
    while True:
        before = found
        for colour in (mine, yours):
            own = colour
            for step, ends in closed.items():
                own = own & (ends | shifted(found & colour, step) | shifted(found & colour, -step))
            found = found | own
        if np.array_equal(found, before):
            return found


def _onto(step: int) -> int:
    """Return the squares from which a step leads to another."""
    return BOARD & (BOARD >> step if step > 0 else BOARD << -step)


def _full(discs: Boards, step: int) -> Boards:
    """Return the squares on whose line, along a step, no square is empty."""
    empty = ~discs & BOARD
    for _ in range(SIZE - 1):
        empty = empty | ((shifted(empty, step) | shifted(empty, -step)) & BOARD)
    return ~empty & BOARD


def squares(boards: Boards) -> Bool[np.ndarray, "... 36"]:
    """Return which squares a bitboard holds, row by row."""
    return (boards[..., None] & BITS) != 0


@dataclass(frozen=True)
class Games:
    """Random legal games, one per row, to their end.

    ``tokens`` are the moves (numbers of squares), ``PASS``, and ``END`` after the last; ``allowed[:, t]`` says which of
    ``VOCABULARY`` may stand at ``t``, and the boards are those after the token at ``t``: ``mine`` are discs of the player to
    move next. Columns after a game's first ``END`` repeat its last position.
    """

    tokens: Int[np.ndarray, "games tokens"]
    allowed: Bool[np.ndarray, "games tokens vocabulary"]
    mine: UInt64[np.ndarray, "games tokens"]
    yours: UInt64[np.ndarray, "games tokens"]
    flipped: UInt64[np.ndarray, "games tokens"]

    @property
    def played(self) -> Bool[np.ndarray, "games tokens"]:
        """Mask of moves and passes."""
        return self.tokens != END

    def inputs(self) -> Int[np.ndarray, "games tokens"]:
        """Return a model's input: BOS, then all but the last token; inputs up to ``t`` predict the token at ``t``."""
        return np.concatenate([np.full((len(self.tokens), 1), BOS), self.tokens[:, :-1]], 1)

    def targets(self) -> tuple[Float[np.ndarray, "games tokens vocabulary"], Bool[np.ndarray, "games tokens"]]:
        """Return the exact distribution of every token, given those before it, and the mask of tokens up to ``END``.

        It is uniform over what is legal, because moves were drawn so.
        """
        known = np.concatenate([np.ones((len(self.tokens), 1), dtype=bool), self.played[:, :-1]], 1)
        return self.allowed / np.maximum(self.allowed.sum(-1, keepdims=True), 1).astype(np.float32), known


def random_games(n: int, rng: np.random.Generator) -> Games:
    """Play ``n`` games in which every legal move is equally likely."""
    mine, yours = np.full(n, BLACK, dtype=np.uint64), np.full(n, WHITE, dtype=np.uint64)
    tokens, allowed, boards = [], [], []
    while not tokens or (len(tokens) < CONTEXT and (tokens[-1] != END).any()):
        moves = squares(legal(mine, yours))
        can = moves.any(-1)
        passes = ~can & (legal(yours, mine) != 0)
        token = np.where(can, (rng.random(moves.shape) * moves).argmax(-1), np.where(passes, PASS, END))
        # No player can move again once neither could: the position stays.
        move = np.where(can, BITS[np.minimum(token, len(BITS) - 1)], 0).astype(np.uint64)
        flipped = flips(mine, yours, move)
        after = (yours & ~flipped, mine | move | flipped)
        goes_on = can | passes
        mine, yours = (np.where(goes_on, new, old) for new, old in zip(after, (mine, yours), strict=True))
        tokens.append(token)
        allowed.append(np.concatenate([moves, np.stack([passes, np.zeros(n, dtype=bool), ~goes_on], -1)], -1))
        boards.append((mine, yours, flipped))
    mine, yours, flipped = (np.stack(column, 1) for column in zip(*boards, strict=True))
    return Games(np.stack(tokens, 1), np.stack(allowed, 1), mine, yours, flipped)
