"""The rules behind the Othello study, against a second engine written square by square."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

STUDY = Path(__file__).parents[2] / "docs" / "studies" / "othello_rules.py"
AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
OPENING = {(2, 3): 0, (3, 2): 0, (2, 2): 1, (3, 3): 1}


@pytest.fixture(scope="module")
def rules():
    return SimpleNamespace(**runpy.run_path(str(STUDY)))


@pytest.fixture(scope="module")
def games(rules):
    return rules.random_games(200, np.random.default_rng(0))


def flips_of(discs, player, square):
    found = []
    for down, right in AROUND if square not in discs else ():
        line, at = [], (square[0] + down, square[1] + right)
        while discs.get(at) == 1 - player:
            line.append(at)
            at = (at[0] + down, at[1] + right)
        found += line if discs.get(at) == player else []
    return found


def moves_of(discs, player):
    every = ((row, column) for row in range(6) for column in range(6))
    return {square: found for square in every if (found := flips_of(discs, player, square))}


def count(discs, player, depth):
    """Return the number of games of some moves, of which none passes so early."""
    if not depth:
        return 1
    return sum(
        count(discs | {square: player} | dict.fromkeys(found, player), 1 - player, depth - 1)
        for square, found in moves_of(discs, player).items()
    )


def test_games_from_the_opening_are_as_many_as_a_second_engine_counts(rules):
    mine, yours = np.array([rules.BLACK], dtype=np.uint64), np.array([rules.WHITE], dtype=np.uint64)
    found = []
    for _ in range(5):
        moves = rules.squares(rules.legal(mine, yours))
        game, square = np.nonzero(moves)
        move = rules.BITS[square]
        flipped = rules.flips(mine[game], yours[game], move)
        mine, yours = yours[game] & ~flipped, mine[game] | move | flipped
        found.append(len(game))
    assert found == [4, 12, 56, 244, 1364]
    assert found[:4] == [count(OPENING, 0, depth) for depth in range(1, 5)]


def test_the_first_moves_are_the_four_known_ones(rules):
    moves = rules.squares(rules.legal(np.uint64([rules.BLACK]), np.uint64([rules.WHITE])))[0]
    assert {rules.SQUARES[number] for number in np.flatnonzero(moves)} == {"c2", "b3", "e4", "d5"}


def test_random_games_follow_the_rules_to_their_end(rules, games):
    passes = 0
    for game in range(60):
        discs, player = dict(OPENING), 0
        for time, token in enumerate(games.tokens[game].tolist()):
            moves = moves_of(discs, player)
            names = {6 * row + column for row, column in moves}
            expected = names or ({rules.PASS} if moves_of(discs, 1 - player) else {rules.END})
            assert set(np.flatnonzero(games.allowed[game, time]).tolist()) == expected
            assert token in expected
            if token == rules.END:
                break
            flipped = moves.get(divmod(token, 6), []) if token < rules.PASS else []
            if token < rules.PASS:
                discs |= {divmod(token, 6): player} | dict.fromkeys(flipped, player)
            passes += token == rules.PASS
            player = 1 - player
            for boards, who in ((games.mine, player), (games.yours, 1 - player)):
                here = {divmod(number, 6) for number in np.flatnonzero(rules.squares(boards[game, time])).tolist()}
                assert here == {square for square, owner in discs.items() if owner == who}
            assert {divmod(each, 6) for each in np.flatnonzero(rules.squares(games.flipped[game, time])).tolist()} == set(
                flipped
            )
        assert token == rules.END
    assert passes > 5


def test_stable_discs_are_never_flipped(rules, games):
    stable, flipped = rules.squares(rules.stable(games.mine, games.yours)), rules.squares(games.flipped)
    assert not (np.maximum.accumulate(stable, 1)[:, :-1] & flipped[:, 1:]).any()
    # Enough of them, of every kind: corners, edges and inner squares.
    assert min(stable[..., [0, 5, 30, 35]].sum(), stable[..., 1:5].sum(), stable[..., 7].sum()) > 100


@pytest.mark.parametrize(
    ("mine", "yours", "expected"),
    [
        (["a1", "b1", "c1", "e1", "c3"], ["d1", "a2"], {"a1", "b1", "c1"}),
        (["a1", "b1", "c1", "a2", "a3", "b2"], ["c2"], {"a1", "b1", "c1", "a2", "a3", "b2"}),
        (["a1", "b1", "c1", "a2", "a3"], ["b2", "c2"], {"a1", "b1", "c1", "a2", "a3"}),
        # A full edge.
        (["b1", "c1", "d1", "e1"], ["a1", "f1"], {"a1", "b1", "c1", "d1", "e1", "f1"}),
    ],
    ids=["edge", "inner", "other colour", "full line"],
)
def test_stability_comes_from_own_stable_neighbours_and_full_lines(rules, mine, yours, expected):
    found = rules.stable(*(np.array([rules.mask(*squares)], dtype=np.uint64) for squares in (mine, yours)))
    assert {rules.SQUARES[number] for number in np.flatnonzero(rules.squares(found)[0])} == expected


def test_targets_are_uniform_over_what_is_legal(rules, games):
    targets, known = games.targets()
    assert np.allclose(targets[known].sum(-1), 1)
    assert np.allclose(targets[known].max(-1) * games.allowed[known].sum(-1), 1)
    assert (known.sum(1) == games.played.sum(1) + 1).all()
    assert (games.inputs()[:, 0] == rules.BOS).all()
    assert (games.inputs()[:, 1:] == games.tokens[:, :-1]).all()
