"""Facts of Othello positions, and how well linear probes and single columns of a code detect them.

Imported by othello.py, which judges the dictionaries of a model with them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from othello_rules import PASS, SQUARES, random_games, squares, stable
from scipy import sparse

from sparsary.eval.bootstrap import bootstrap_f1, interval, percentiles, resamples
from sparsary.eval.probing.datasets import Tokens, halves
from sparsary.eval.probing.factor_file import value_names
from sparsary.eval.probing.infomec import infomec
from sparsary.eval.probing.probes import ProbeInputs, Search, auroc, best_threshold, f1_of, group_counts, ranking
from sparsary.training.activations.model import LanguageModel

COLOURS = ("mine", "yours", "empty")
KINDS = (*COLOURS, "flipped", "stable")
# Every square is the image of one of these under a symmetry of the board.
QUADRANT = [square for square in SQUARES if square[0] in "abc" and square[1] in "123"]
# Positions of a context that recipes leave out by default: dictionaries are judged on what they are trained on.
LEADING = 8
PROBE_STEPS, PROBE_ROWS = 800, 1024
# Games of InfoMEC.
INFOMEC_GAMES = 100
# Positives and negatives of a factor in either half of the games.
LEAST = 30


@dataclass(frozen=True)
class Positions:
    """Tokens of games: ids for the model, owners, and the colour of every square and two facts of it."""

    ids: np.ndarray  # (games, context)
    kept: np.ndarray  # (games, context)
    documents: np.ndarray  # (tokens,)
    colours: np.ndarray  # (tokens, 36): 0 mine, 1 yours, 2 empty
    facts: np.ndarray  # (tokens, 72): flipped, then stable

    @classmethod
    def of(cls, games: int, seed: int, leading: int = LEADING) -> "Positions":
        """Play random games; the first ``leading`` positions of each, BOS among them, are left out."""
        played = random_games(games, np.random.default_rng(seed))
        kept = played.played[:, :-1] & (np.arange(1, played.tokens.shape[1]) >= leading)
        mine, yours, flipped = (boards[:, :-1][kept] for boards in (played.mine, played.yours, played.flipped))
        colours = np.where(squares(mine), 0, np.where(squares(yours), 1, 2))
        facts = np.concatenate([squares(flipped), squares(stable(mine, yours))], -1)
        # BOS stands before the moves.
        before = np.zeros((games, 1), dtype=bool)
        return cls(played.inputs(), np.concatenate([before, kept], 1), np.nonzero(kept)[0], colours, facts)

    def factors(self) -> list[dict[str, str | int]]:
        """Return the factors of every token as ``sparsary probe --factors`` has them."""
        found: list[dict[str, str | int]] = []
        for colours, facts in zip(self.colours.tolist(), self.facts, strict=True):
            own: dict[str, str | int] = {square: COLOURS[colour] for square, colour in zip(SQUARES, colours, strict=True)}
            for number in np.flatnonzero(facts).tolist():
                own[f"{'flipped' if number < PASS else 'stable'} {SQUARES[number % PASS]}"] = "yes"
            found.append(own)
        return found

    def labels(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Return kind and square of every binary factor, and its labels ``(tokens, factors)``."""
        names = [(kind, square) for kind in KINDS for square in SQUARES]
        board = [self.colours == number for number in range(len(COLOURS))]
        return names, np.concatenate([*board, self.facts], 1)

    def activations(self, model: LanguageModel, hook: str) -> np.ndarray:
        """Return the activations of all tokens."""
        rows = [
            model.activations(ids, (hook,))[hook][kept].float()
            for ids, kept in zip(torch.from_numpy(self.ids).split(64), torch.from_numpy(self.kept).split(64), strict=True)
        ]
        return torch.cat(rows).numpy()


@dataclass(frozen=True)
class BoardProbe:
    """Linear probe of all facts: a softmax of three colours for every square, and a logistic regression of each other fact."""

    weights: torch.Tensor  # (d, 36 * 3 + 72)
    offsets: torch.Tensor

    @classmethod
    def fitted(cls, x: np.ndarray, positions: Positions, seed: int) -> "BoardProbe":
        """Fit with Adam on standardized activations."""
        rows, colours = torch.from_numpy(x), torch.from_numpy(positions.colours)
        facts = torch.from_numpy(positions.facts.astype(np.float32))
        mean, scale = rows.mean(0), rows.std(0) + 1e-6
        outputs = colours.shape[1] * len(COLOURS) + facts.shape[1]
        weights = torch.zeros(rows.shape[1], outputs, requires_grad=True)
        offsets = torch.zeros(outputs, requires_grad=True)
        optimizer = torch.optim.Adam([weights, offsets], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_STEPS)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(PROBE_STEPS):
            chosen = torch.randint(len(rows), (PROBE_ROWS,), generator=generator)
            logits = (rows[chosen] - mean) / scale @ weights + offsets
            board, others = _parted(logits)
            loss = F.cross_entropy(board.flatten(0, 1), colours[chosen].flatten(), reduction="sum")
            loss = loss + F.binary_cross_entropy_with_logits(others, facts[chosen], reduction="sum")
            optimizer.zero_grad()
            (loss / PROBE_ROWS).backward()
            optimizer.step()
            schedule.step()
        found = (weights / scale[:, None]).detach()
        return cls(found, (offsets - mean @ found).detach())

    def log_odds(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the colour of every square that is likeliest, and the log odds of all factors, in the order of ``labels``."""
        board, others = _parted(torch.from_numpy(x) @ self.weights + self.offsets)
        logs = board.log_softmax(-1)
        odds = logs - torch.log1p(-logs.exp().clamp(max=1 - 1e-6))
        return board.argmax(-1).numpy(), torch.cat([odds.transpose(1, 2).flatten(1), others], 1).numpy()

    def directions(self) -> np.ndarray:
        """Return unit directions of all factors; those of a colour are relative to the mean of the three."""
        board, others = _parted(self.weights)
        relative = (board - board.mean(-1, keepdim=True)).transpose(1, 2).flatten(1)
        return unit(torch.cat([relative, others], 1).T.numpy())


def _parted(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of colours ``(rows, squares, colours)``, and those of the other facts."""
    board, others = outputs.tensor_split([PASS * len(COLOURS)], -1)
    return board.unflatten(-1, (PASS, len(COLOURS))), others


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@dataclass(frozen=True)
class Judged:
    """Detectors of factors, one each: column, F1, AUROC, and counts by game for the intervals."""

    columns: list[int]
    f1: np.ndarray
    auroc: np.ndarray
    resampled: np.ndarray  # (resamples, factors)

    def summary(self, kinds: np.ndarray) -> dict[str, float]:
        """Return means over the factors of the board and of each kind, with intervals over games."""
        found: dict[str, float] = {}
        for kind in ("board", *KINDS):
            own = np.isin(kinds, COLOURS) if kind == "board" else kinds == kind
            ends = interval(float(self.f1[own].mean()), self.resampled[:, own].mean(-1))
            found |= {f"{kind}_f1": ends.mean, f"{kind}_f1_low": ends.low, f"{kind}_f1_high": ends.high}
            found |= {f"{kind}_auroc": float(self.auroc[own].mean()), f"{kind}_found_08": float((self.f1[own] >= 0.8).mean())}
            found[f"{kind}_auroc_09"] = float((self.auroc[own] >= 0.9).mean())
        return found


class Bench:
    """Positions that detectors are chosen and scored on, and the factors that are frequent enough in both halves."""

    def __init__(self, positions: Positions):
        self.positions = positions
        names, labels = positions.labels()
        self.fitted = halves(positions.documents, 0)
        counts = np.stack([[labels[half].sum(0), (~labels[half]).sum(0)] for half in (self.fitted, ~self.fitted)])
        self.chosen = np.flatnonzero(counts.min((0, 1)) >= LEAST)
        self.names = [names[number] for number in self.chosen]
        self.kinds = np.array([kind for kind, _ in self.names])
        self.squares = np.array([square for _, square in self.names])
        self.labels = labels[:, self.chosen]
        self.owners = np.unique(positions.documents[~self.fitted], return_inverse=True)[1]

    def best_columns(self, columns: ProbeInputs) -> Judged:
        """Judge the best single column of every factor."""
        parts = [
            columns[half] if isinstance(columns, np.ndarray) else sparse.csc_array(sparse.csr_array(columns)[half])
            for half in (self.fitted, ~self.fitted)
        ]
        search = Search(parts[0], self.labels[self.fitted])
        best = [search.best(number) for number in range(len(self.names))]
        scores = (each.scores(parts[1]) for each in best)
        return self._judged(
            [each.column for each in best], [(own, each.threshold) for own, each in zip(scores, best, strict=True)]
        )

    def own_columns(self, columns: np.ndarray) -> Judged:
        """Judge a column of every factor, which only lacks its threshold."""
        own = columns[:, self.chosen]
        scored = []
        for number in range(len(self.names)):
            fit = own[self.fitted, number]
            scored.append((own[~self.fitted, number], best_threshold(ranking(fit), self.labels[self.fitted, number])[1]))
        return self._judged(self.chosen.tolist(), scored)

    def _judged(self, columns: list[int], scored: list[tuple[np.ndarray, float]]) -> Judged:
        f1, areas, counts = [], [], []
        for number, (scores, threshold) in enumerate(scored):
            y, detected = self.labels[~self.fitted, number], scores > threshold
            f1.append(f1_of(detected, y))
            areas.append(auroc(scores, y))
            counts.append(group_counts(detected, y, self.owners, int(self.owners.max()) + 1))
        return Judged(columns, np.array(f1), np.array(areas), bootstrap_f1(np.stack(counts, 1), 0))

    def differences(self, x: np.ndarray) -> np.ndarray:
        """Return, for every factor, the unit direction from the mean without it to the mean with it."""
        y = self.labels[self.fitted].astype(np.float32)
        rows, counts = x[self.fitted], y.sum(0)
        return unit(((y.T @ rows) / counts[:, None] - ((1 - y).T @ rows) / (len(y) - counts)[:, None]).astype(np.float32))

    def directions(self, own: np.ndarray, probe: np.ndarray, means: np.ndarray) -> dict[str, float]:
        """Return how the directions of the board's factors lie to each other, and to those of probes and of means.

        ``between_squares`` is the mean absolute cosine of directions of different squares; ``to_others`` that of a
        direction with the probe directions of other squares, the null of ``to_probe``.
        """
        board = np.isin(self.kinds, COLOURS)
        own, probe, means = own[board], probe[board], means[board]
        apart = self.squares[board][:, None] != self.squares[board][None, :]
        return {
            "to_probe": float((own * probe).sum(1).mean()),
            "to_means": float((own * means).sum(1).mean()),
            "to_others": float(np.abs(own @ probe.T)[apart].mean()),
            "between_squares": float(np.abs(own @ own.T)[apart].mean()),
        }


def accuracy(likeliest: np.ndarray, colours: np.ndarray, owners: np.ndarray) -> dict[str, Any]:
    """Return the share of squares whose colour is right, and of boards that are right as a whole, with intervals over games."""
    right = likeliest == colours
    counts = np.stack([np.bincount(owners, values) for values in (right.mean(1), right.all(1), np.ones(len(right)))])
    draws = np.stack([counts @ weights for weights in resamples(counts.shape[1])])
    found: dict[str, Any] = {"squares": right.mean(0).round(4).tolist()}
    for number, what in enumerate(("square", "board")):
        low, high = percentiles(draws[:, number] / draws[:, 2])
        found |= {what: float(counts[number].sum() / counts[2].sum()), f"{what}_low": float(low), f"{what}_high": float(high)}
    # The commonest colour of every square: what needs no activation.
    shares = np.stack([(colours == number).mean(0) for number in range(len(COLOURS))])
    return found | {"chance": float(shares.max(0).mean()), "tokens": len(right)}


def disentanglement(positions: Positions, codes: sparse.csc_array, x: np.ndarray | None = None) -> dict[str, float]:
    """Return InfoMEC with the colours of the quadrant's squares as sources; given activations, their explicitness too."""
    some = positions.documents < INFOMEC_GAMES
    places = [SQUARES.index(square) for square in QUADRANT]
    factors: list[dict[str, str | int]] = [
        dict(zip(QUADRANT, (COLOURS[colour] for colour in row), strict=True))
        for row in positions.colours[some][:, places].tolist()
    ]
    # Without activations a constant, which costs nothing to probe.
    rows = np.zeros((int(some.sum()), 1), np.float32) if x is None else x[some]
    known = Tokens(rows, None, positions.documents[some], factors)
    report, _ = infomec(known, sparse.csc_array(sparse.csr_array(codes)[some]), value_names)
    keys = [f"infomec_{name}{end}" for name in ("modularity", "matched_compactness") for end in ("", "_low", "_high")]
    keys += ["infomec_compactness", "infomec_explicitness", "infomec_latents"]
    return {key: report[key] for key in keys + (["infomec_activation_explicitness"] if x is not None else [])}
