"""Token ids of documents, with the roles of chats' tokens, and digests of the tokenizers that make them."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from .bad_rows import LEAST_TEXTS, BadRows
from .chats import TEMPLATE, ChatTemplate, Span, UnfitChatError, chat_template, messages_of, roles_of_tokens
from .documents import SourceDocument
from .recipe import TextSection

# Documents tokenized together, and so read ahead.
TOKENIZE_AT_ONCE = 256

log = logging.getLogger(__name__)


class TokenList(list[int]):
    """Token ids of a document; ``roles`` holds the role of each, by its number in ``ROLES``, or None for other than chats."""

    def __init__(self, ids: Iterable[int], roles: list[int] | None = None):
        super().__init__(ids)
        self.roles = roles


class Tokenization:
    """Conversion of documents of every kind to token ids, without special tokens that the packing adds.

    A document that begins with its own BOS loses it if the packing adds one; so does one that ends with it (where BOS ends
    documents) if another follows in the same context.
    """

    def __init__(self, section: TextSection, tokenizer: Any):
        self.section, self.tokenizer = section, tokenizer
        self._template: ChatTemplate | None = None
        self._refused = BadRows(section, "text", LEAST_TEXTS)
        self._checked: set[str | None] = set()
        self._size: int | None = None

    def of(self, numbered: Iterable[tuple[int, str]], at_once: int = TOKENIZE_AT_ONCE) -> Iterator[tuple[int, TokenList]]:
        """Yield number and token ids of every document, ``at_once`` at a time.

        Raises:
            ValueError: If there is no template for chats, more chats do not fit it than the recipe allows, or token ids are
                another tokenizer's.
        """
        iterator = iter(numbered)
        while batch := list(itertools.islice(iterator, at_once)):
            texts = [text for _, text in batch if _kind(text) == "text"]
            encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
            for number, document in batch:
                match _kind(document):
                    case "chat":
                        found = self._chat(number, document)
                    case "tokens":
                        found = self._ids(number, document)
                    case _:
                        found = TokenList(next(encoded))
                yield number, self._without_bos(found)

    def _without_bos(self, tokens: TokenList) -> TokenList:
        bos = self.tokenizer.bos_token_id
        if self.section.bos == "none" or bos is None or not tokens:
            return tokens
        start, end = 0, len(tokens)
        while start < end and tokens[start] == bos:
            start += 1
        while end > start and tokens[end - 1] == bos and self.section.packing != "separate":
            end -= 1
        if (start, end) == (0, len(tokens)):
            return tokens
        return TokenList(tokens[start:end], None if tokens.roles is None else tokens.roles[start:end])

    def _chat(self, number: int, document: str) -> TokenList:
        if self._template is None:
            self._template = chat_template(self.section.chat, self.tokenizer)
        try:
            text, spans = self._template.rendered(messages_of(document))
        except UnfitChatError as error:
            remedy = "Give another text.chat.template, or leave out such chats."
            where = f"document {number}: expected a chat that {self._template.name} takes, got another ({error})"
            self._refused.count(1, 1, where, remedy)
            return TokenList([], [])
        self._refused.count(1)
        return self._with_roles(text, spans)

    def _with_roles(self, text: str, spans: list[Span]) -> TokenList:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return TokenList(found["input_ids"], roles_of_tokens(found["offset_mapping"], spans))

    def _ids(self, number: int, document: str) -> TokenList:
        ids: list[int] = json.loads(document)
        recorded = getattr(document, "tokenizer", None)
        if recorded not in self._checked:
            self._require_own(recorded or self.section.tokenizer_sha256, number)
            self._checked.add(recorded)
        if self._size is None:
            self._size = len(self.tokenizer)
        if ids and max(ids) >= self._size:
            raise ValueError(
                f"text.column: expected token ids below {self._size}, the vocabulary of the tokenizer, got {max(ids)} in "
                f"document {number}. Give the model whose tokenizer made them, or text."
            )
        return TokenList(ids)

    def _require_own(self, recorded: str | None, number: int) -> None:
        """Raise ``ValueError`` if the digest recorded with token ids is another tokenizer's."""
        if recorded is None:
            log.warning(
                "text.column: nothing records which tokenizer made these token ids; only their range is checked. Set "
                "text.tokenizer_sha256, or the same key of the parquet files' metadata."
            )
            return
        own = tokenizer_digest(self.tokenizer)
        if recorded != own:
            raise ValueError(
                f"text.tokenizer_sha256: expected token ids of this model's tokenizer ({own[:12]}), got those of another "
                f"({recorded[:12]}) from document {number} on. Give the model whose tokenizer made them, or text."
            )


def _kind(document: str) -> str:
    return document.kind if isinstance(document, SourceDocument) else "text"


def beginning_roles(tokens: Iterable[int]) -> list[int] | None:
    """Return the role of BOS before a document, in a list; None if the document's tokens have no roles."""
    return None if getattr(tokens, "roles", None) is None else [TEMPLATE]


def padding_id(tokenizer: Any) -> int:
    """Return the token id that pads incomplete contexts."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((token for token in known if token is not None), 0)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of the vocabulary and the tokenization rules: equal for tokenizers that give equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_content(tokenizer: Any) -> str:
    """Return a hash of all that decides which tokens a harvest stores: the tokenization and the special tokens."""
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(f"{tokenizer_digest(tokenizer)} {json.dumps(marks)}".encode()).hexdigest()


def tokenizer_contents(tokenizer: Any) -> dict[str, str | None]:
    """Return the digests of a tokenizer that a content records: ``tokenizer`` and, if it has one, its ``chat_template``."""
    if tokenizer is None:
        return {"tokenizer": None}
    found: dict[str, str | None] = {"tokenizer": tokenizer_content(tokenizer)}
    if template := getattr(tokenizer, "chat_template", None):
        found["chat_template"] = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return found
