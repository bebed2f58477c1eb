"""Metric: tokens and documents used, compared with the number of tokens requested."""

from typing import Any

from .base import DictionaryOutputs, MetricGroup, Setting


class TextUsed(MetricGroup):
    """Token counts, and the number of documents that appear in both halves."""

    name = "text_used"
    version = 1
    reads_model = False

    def __init__(self, setting: Setting):
        self.asked = setting.tokens
        self.tokens = [0, 0]
        self.seen: tuple[set[int], set[int]] = (set(), set())

    def fit(self, piece: DictionaryOutputs) -> None:
        self._count(0, piece)

    def score(self, piece: DictionaryOutputs) -> None:
        self._count(1, piece)

    def _count(self, half: int, piece: DictionaryOutputs) -> None:
        self.tokens[half] += piece.tokens
        if piece.passage is not None:
            self.seen[half].update(piece.passage.piece.documents)

    def report(self) -> dict[str, Any]:
        shared = len(self.seen[0] & self.seen[1])
        return {"tokens_asked": self.asked or sum(self.tokens), "fit_tokens": self.tokens[0], "documents_shared": shared}
