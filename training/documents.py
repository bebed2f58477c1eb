"""Documents as they are read from rows: text, the messages of a chat, or token ids.

A document is a string, so that its digest, its length and its place in the text mean the same for all kinds. Chats and token
ids are JSON; ``kind`` says which.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from .recipe import Role

Kind = Literal["text", "chat", "tokens"]
# Roles as other data sets spell them.
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
ROLE_NAMES |= {"observation": "tool", "ipython": "tool"}
# What `template` marks is no message.
MESSAGE_ROLES = tuple(role for role in get_args(Role) if role != "template")
# A token counts as this many characters where texts of several kinds are mixed.
CHARACTERS_PER_TOKEN = 4


class SourceDocument(str):
    """A document: its text, or JSON of its messages or token ids.

    ``size`` is its length in characters, without the JSON. ``part`` is the number of its source in a mix. ``tokenizer`` is the
    digest of the tokenizer that made its ids, if the file records one. ``place`` is its file and the number of its row there.
    """

    __slots__ = ("kind", "part", "place", "size", "tokenizer")
    kind: Kind
    part: int
    place: tuple[Path, int] | None
    size: int
    tokenizer: str | None

    def __new__(
        cls,
        text: str,
        kind: Kind = "text",
        size: int | None = None,
        tokenizer: str | None = None,
        place: tuple[Path, int] | None = None,
    ) -> "SourceDocument":
        made = super().__new__(cls, text)
        made.kind, made.size, made.part, made.tokenizer = kind, len(text) if size is None else size, 0, tokenizer
        made.place = place
        return made


class UnreadableRowError(ValueError):
    """Error for a row's value that is no document; ``what`` names the kind of defect, ``found`` this one."""

    def __init__(self, what: str, found: str):
        super().__init__(found)
        self.what, self.found = what, found


def document_of(value: Any, tokenizer: str | None = None) -> SourceDocument:
    """Return the document in a row's value: text or bytes, a list of messages, or a list of token ids.

    Args:
        tokenizer: Digest of the tokenizer that made the ids, if one is recorded.

    Raises:
        UnreadableRowError: If it is none of these.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "surrogateescape")
    if isinstance(value, str):
        return SourceDocument(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and all(isinstance(each, Mapping) for each in value):
        return _chat(value)
    if isinstance(value, Sequence) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        if min(value) < 0:
            raise UnreadableRowError("rows with negative token ids", f"token ids from 0 on, got {min(value)}")
        return SourceDocument(json.dumps(list(value)), "tokens", CHARACTERS_PER_TOKEN * len(value), tokenizer)
    found = "null" if value is None else type(value).__name__
    raise UnreadableRowError(f"rows with {found} in place of text", f"text, got {found}")


def _chat(messages: Sequence[Mapping[str, Any]]) -> SourceDocument:
    found = []
    for message in messages:
        # Parquet gives every message the keys of all of them.
        own = {key: value for key, value in message.items() if value is not None}
        if "role" not in own and "from" in own:
            own = {"role": own.pop("from"), "content": own.pop("value", "")} | own
        role = own.get("role")
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in MESSAGE_ROLES:
            known = f"the role of every message to be one of {', '.join(MESSAGE_ROLES)}, got {str(role)[:40]!r}"
            raise UnreadableRowError("chats with an unknown role", known)
        content = own.get("content", "")
        if not isinstance(content, str) and not (
            isinstance(content, Sequence) and all(isinstance(part, Mapping) and "type" in part for part in content)
        ):
            wanted = f"the content of a message as text, or as a list of parts, got {type(content).__name__}"
            raise UnreadableRowError("chats with unreadable content", wanted)
        found.append(own | {"role": role, "content": content if isinstance(content, str) else [dict(p) for p in content]})
    if not found:
        return SourceDocument("")
    size = sum(len(_words(message["content"])) for message in found)
    return SourceDocument(json.dumps(found, ensure_ascii=False, default=str), "chat", size)


def _words(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def joined_columns(values: Sequence[Any], separator: str) -> Any:
    """Return the value of a single column as it is, those of several joined as text, without blank ones.

    Raises:
        UnreadableRowError: If there are several, and one of them is no text.
    """
    if len(values) == 1:
        return values[0]
    texts = [] if all(value is None for value in values) else [document_of(v) for v in values if v is not None]
    if any(text.kind != "text" for text in texts):
        raise UnreadableRowError("rows with lists in columns to be joined", "text in every column, got a list")
    return separator.join(text for text in texts if text.strip())
