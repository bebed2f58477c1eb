"""Tokenization of prompts, and of single tokens that continue them."""

from collections.abc import Sequence
from functools import cached_property

from ....training.activations.model import LanguageModel


class PromptEncoder:
    """Encoder of text as the model expects it: with the tokenizer's leading special tokens and no trailing ones.

    The embedded model was trained on documents that begin with BOS, which its tokenizer does not add by itself.

    Raises:
        ValueError: If the model has no tokenizer.
    """

    def __init__(self, model: LanguageModel):
        if model.tokenizer is None:
            raise ValueError(f"model: {model.id} has no tokenizer, which text needs. Give pairs as token ids.")
        self.tokenizer = model.tokenizer
        normal, plain = self.tokenizer("a")["input_ids"], self._plain("a")
        self.head: list[int] = normal[: _index(normal, plain)]
        if model.id == "embedded":
            self.head = [self.tokenizer.bos_token_id]

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            ValueError: If the tokenizer does not know a part of the text.
        """
        body = self._plain(text)
        if any(self._unknown(token) for token in body):
            raise ValueError(f"{_short(text)!r} has words the tokenizer does not know")
        return [*self.head, *body]

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the prompt that encodes to exactly these ids, or None if decoding them gives no such prompt."""
        if list(ids[: len(self.head)]) != self.head:
            return None
        text = self.tokenizer.decode(list(ids[len(self.head) :]), clean_up_tokenization_spaces=False)
        return text if [*self.head, *self._plain(text)] == list(ids) else None

    def next_token(self, prompt: str, answer: str) -> int | None:
        """Return the token that ``answer``, including a leading space, adds to a prompt, or None if it is not exactly one."""
        before, after = self._plain(prompt), self._plain(prompt + answer)
        one = len(after) == len(before) + 1 and after[:-1] == before and not self._unknown(after[-1])
        return after[-1] if one else None

    def following(self, prompt: str, answer: str) -> int:
        """Return ``next_token``, which must exist.

        Raises:
            ValueError: If there is none.
        """
        token = self.next_token(prompt, answer)
        if token is not None:
            return token
        before, after = self._plain(prompt), self._plain(prompt + answer)
        pieces = self.tokenizer.convert_ids_to_tokens(after[_common(before, after) :])
        hint = " (is a leading space missing?)" if not answer[:1].isspace() else ""
        raise ValueError(f"{answer!r} is not one token after {_short(prompt)!r}: it gives {' '.join(pieces)}{hint}")

    @cached_property
    def two_digits(self) -> dict[str, int]:
        """Token ids of the numbers 00 to 99 that are one token by themselves.

        By themselves, because a round year may be one token with its century ("1700"), which a model is not asked for.
        """
        found = {text: self._plain(text) for text in (f"{number:02d}" for number in range(100))}
        return {text: ids[0] for text, ids in found.items() if len(ids) == 1 and not self._unknown(ids[0])}

    def positions(self, text: str, ends: Sequence[int]) -> list[int | None]:
        """Return the position of the last token of each ``text[:end]``, or None if a token crosses ``end``."""
        whole = self._plain(text)
        parts = self.tokenizer([text[:end] for end in ends], add_special_tokens=False, verbose=False)["input_ids"]
        return [len(self.head) + len(part) - 1 if whole[: len(part)] == part else None for part in parts]

    def _unknown(self, token: int) -> bool:
        # GPT-2's unknown token is also its end-of-text token, and it can encode any text.
        return token == self.tokenizer.unk_token_id != self.tokenizer.bos_token_id

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _index(whole: list[int], part: list[int]) -> int:
    """Return the index at which ``part`` begins within ``whole``."""
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), 0)


def _common(one: list[int], other: list[int]) -> int:
    """Return the number of equal leading ids."""
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-57:]}"
