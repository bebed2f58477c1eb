"""Tokens that a recipe leaves out, by id, place or role: known without running the model."""

from typing import Any

import numpy as np

from ..chats import NO_ROLE, ROLES
from ..recipe import HarvestSection, TextSection


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all special tokens of a tokenizer: BOS, EOS, padding and others."""
    return frozenset(tokenizer.all_special_ids)


class Exclusions:
    """Masks of the tokens that a recipe leaves out of contexts, whatever their activations are.

    Padding, special tokens, leading and other positions, listed tokens, and roles are left out; if gradients are stored, the
    last position too.

    Args:
        text: ``text.chat.roles`` are the only roles kept, if there are any.

    Raises:
        ValueError: If a token to exclude is no single token of the tokenizer.
    """

    def __init__(self, tokenizer: Any, text: TextSection, section: HarvestSection):
        self.section = section
        ids = [token_id(tokenizer, token) for token in section.exclude.tokens]
        self.tokens = np.array(sorted({*ids, *(special_ids(tokenizer) if section.exclude_special else ())}), np.int64)
        wanted = set(text.chat.roles or ROLES) - set(section.exclude.roles)
        self.roles = np.array([number for number, role in enumerate(ROLES) if role not in wanted], np.int8)

    def dropped(self, token_ids: np.ndarray, document_ids: np.ndarray, roles: np.ndarray | None) -> np.ndarray:
        """Return a mask of the tokens left out of ``(contexts, positions)``."""
        drop = document_ids < 0
        drop |= np.isin(token_ids, self.tokens)
        drop[:, : self.section.exclude_leading] = True
        length = token_ids.shape[1]
        drop[:, [place for place in self.section.exclude.positions if -length <= place < length]] = True
        if roles is not None:
            # Tokens of documents other than chats have no role.
            drop |= (roles != NO_ROLE) & np.isin(roles, self.roles)
        if self.section.gradients:
            # The last position predicts no token, so its gradient has another meaning.
            drop[:, -1] = True
        return drop


def token_id(tokenizer: Any, token: int | str) -> int:
    """Return the id of a token that is given as text or as its id.

    Raises:
        ValueError: If the text is not exactly one token, or the id is beyond the vocabulary.
    """
    key = "harvest.exclude.tokens"
    if isinstance(token, int):
        if token >= len(tokenizer):
            raise ValueError(f"{key}: expected ids below {len(tokenizer)}, the vocabulary of the tokenizer, got {token}.")
        return token
    ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
    known = tokenizer.get_vocab().get(token)
    if len(ids) == 1 and (known is not None or ids[0] != tokenizer.unk_token_id):
        return int(ids[0])
    if known is not None:
        return int(known)
    raise ValueError(f"{key}: expected one token of the tokenizer, got {token!r}, which is {len(ids) or 'no'} tokens.")
