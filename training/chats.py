"""Chats as token ids: messages are put through a chat template, and every token gets the role of its message.

A token has the role of the message whose content it overlaps; what the template adds (headers, ends of turns) has the role
``template``. Contents are found by rendering the template twice, once with a mark in place of every content, so that words of
a message that also occur in the template are not confused with it.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from .recipe import ChatSection, Role

ROLES: tuple[str, ...] = get_args(Role)
NO_ROLE, TEMPLATE = -1, ROLES.index("template")
# Reasoning within a message's content, and keys of messages that hold it apart.
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Templates look for these tags themselves, so they stay where contents are replaced by marks.
_TAGS = re.compile(r"(</?think>)")
_MARK = re.compile("\ue000(\\d+)\ue001")

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Range of characters of a rendered chat that is the content of a message of this role."""

    start: int
    end: int
    role: str


class UnfitChatError(ValueError):
    """Error for a chat that the template refuses, or whose contents are not found in what it makes of them."""


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer, or of a file; ``name`` is its name in messages."""

    tokenizer: Any
    template: str
    name: str
    drops_thinking: bool

    def rendered(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Return a chat as text, and the ranges of its messages' contents.

        Raises:
            UnfitChatError: If the template refuses the chat, or changes its contents.
        """
        if self.drops_thinking:
            messages = [without_thinking(message) for message in messages]
        marks = _Marks()
        text, skeleton = self._render(messages), self._render([marks.of_message(message) for message in messages])
        whole, spans, at = "", [], 0
        for mark in _MARK.finditer(skeleton):
            words, role = marks.kept[int(mark[1])] if int(mark[1]) < len(marks.kept) else ("", "template")
            whole += skeleton[at : mark.start()]
            spans.append(Span(len(whole), len(whole) + len(words), role))
            whole, at = whole + words, mark.end()
        if whole + skeleton[at:] != text:
            raise UnfitChatError("contents are not found in the text that the template makes of them")
        return text, spans

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, tokenize=False))
        except Exception as error:  # noqa: BLE001 - a template raises whatever its author chose
            raise UnfitChatError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def without_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message without its reasoning; others as they are."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in THINKING_KEYS}
    return kept | {"content": _in_texts(message["content"], lambda words: THINKING.sub("", words))}


def _in_texts(content: Any, change: Callable[[str], str]) -> Any:
    """Return a message's content with its text, or the texts of its parts, changed."""
    if isinstance(content, str):
        return change(content)
    return [part | {"text": change(part["text"])} if isinstance(part.get("text"), str) else part for part in content]


class _Marks:
    """Marks in place of the contents of messages, with what they stand for; spaces around contents stay as they are."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str]] = []

    def of_message(self, message: dict[str, Any]) -> dict[str, Any]:
        mark = functools.partial(self._marked, message["role"])
        apart = {key: mark(message[key]) for key in THINKING_KEYS if isinstance(message.get(key), str)}
        return message | apart | {"content": _in_texts(message["content"], mark)}

    def _marked(self, role: str, words: str) -> str:
        return "".join(piece if _TAGS.fullmatch(piece) else self._of_piece(role, piece) for piece in _TAGS.split(words))

    def _of_piece(self, role: str, piece: str) -> str:
        core = piece.strip()
        if not core:
            return piece
        self.kept.append((core, role))
        begin = piece.index(core)
        return f"{piece[:begin]}\ue000{len(self.kept) - 1}\ue001{piece[begin + len(core) :]}"


def chat_template(section: ChatSection, tokenizer: Any) -> ChatTemplate:
    """Return the template that a recipe names.

    Raises:
        ValueError: If the tokenizer has none, the file cannot be read, or it is not valid Jinja.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "text.column: expected a fast tokenizer, which tells where its tokens are, for a column of messages, got "
            f"{type(tokenizer).__name__}. Convert it with tokenizers, or give text without messages."
        )
    template, name = template_text(section, tokenizer), section.template
    name = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}" if name == "tokenizer" else name
    found = ChatTemplate(tokenizer, template, name, section.thinking == "drop")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except Exception as error:  # noqa: BLE001 - a template raises whatever its author chose, and may want other messages
        if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
            line = getattr(error, "lineno", "?")
            raise ValueError(f"text.chat.template: expected Jinja, got an error in line {line} of {name} ({error}).") from None
    return found


def template_text(section: ChatSection, tokenizer: Any) -> str:
    """Return the text of the template that a recipe names.

    Raises:
        ValueError: If the tokenizer has none, or the file cannot be read.
    """
    if section.template != "tokenizer":
        return template_file(section)
    try:
        found = tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        found = None
    if not found:
        raise ValueError(
            "text.chat.template: expected a chat template for a column of messages, got none in the tokenizer "
            f"{tokenizer.name_or_path or type(tokenizer).__name__}. Give a Jinja file: text.chat.template: FILE."
        )
    return str(found)


def template_file(section: ChatSection) -> str:
    """Return the text of a template that is a file.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return Path(section.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(
            f"text.chat.template: expected 'tokenizer' or a file, got {section.template} ({reason}). Give a Jinja file."
        ) from None


def roles_of_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """Return the number of each token's role in ``ROLES``, given the characters that it stands for."""
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    roles = np.full(len(places), TEMPLATE)
    for span in spans:
        roles[(places[:, 0] < span.end) & (places[:, 1] > span.start)] = ROLES.index(span.role)
    return roles.tolist()


def messages_of(document: str) -> list[dict[str, Any]]:
    """Return the messages of a chat's document."""
    return json.loads(document)
