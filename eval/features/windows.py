"""Windows of text with a latent's activations, as explainers and scorers see them."""

from collections.abc import Sequence
from typing import NamedTuple

MARKED_SHARE = 0.3


class ActivatingWindow(NamedTuple):
    """Window of text with a latent's activation on each token."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]

    def text(self, marked: Sequence[bool] | None = None) -> str:
        """Return the text, with marked tokens between ``<<`` and ``>>``."""
        marks = marked or [False] * len(self.tokens)
        # Tokens of a word-level vocabulary contain no spaces.
        glue = "" if any(token[:1].isspace() for token in self.tokens) else " "
        return glue.join(f"<<{token}>>" if mark else token for token, mark in zip(self.tokens, marks, strict=True))

    def active(self) -> list[bool]:
        """Return a mask of the tokens above ``MARKED_SHARE`` of the window's maximum."""
        level = MARKED_SHARE * max(self.values, default=0.0)
        return [value > 0 and value >= level for value in self.values]
