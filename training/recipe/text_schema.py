"""Schema of a recipe's section ``text``: where documents come from, and how they are cut into contexts."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .fields import Columns, OnBadRow, Place, Places, Roles, Section, Share


class TextSource(Section):
    """Source of documents: the embedded corpus, local files, or a Hugging Face dataset."""

    source: Literal["embedded", "files", "hub"] = Field(
        default="embedded",
        description="embedded: the generated corpus of the embedded model; files: local files; hub: a Hugging Face dataset",
    )
    files: Places = Field(
        default=(),
        description="source files: paths of .txt, .json, .jsonl (also .gz and .zst) or .parquet files, read in this order; "
        "also patterns (data/*.jsonl) and folders",
    )
    dataset: str | None = Field(default=None, description="source hub: id of a Hugging Face dataset, which is streamed")
    dataset_config: str | None = Field(default=None, description="source hub: configuration of the dataset")
    dataset_split: str = Field(default="train", description="source hub: split of the dataset")
    dataset_revision: str | None = Field(default=None, description="source hub: branch, tag or commit; null: the main branch")
    column: Columns = Field(
        default="text",
        description="column or JSON key that holds text, the messages of a chat, or token ids; a list: columns of text, joined "
        "by separator",
    )
    separator: str = Field(default="\n\n", description="separator of documents in a .txt file, and of joined columns")
    seed: int = Field(default=1, description="source embedded: seed of the generated corpus")


class MixPart(TextSource):
    """One of several texts that are read together."""

    weight: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="share of the mix, in characters, relative to the other weights"
    )


class ChatSection(Section):
    """Reading of chats: columns that hold lists of messages."""

    template: Place = Field(default="tokenizer", description="'tokenizer': its own chat template; or a file with one, in Jinja")
    roles: Roles = Field(
        default=(),
        description="roles of the tokens to keep, e.g. [assistant]; template: what the template adds; empty: all tokens",
    )
    thinking: Literal["keep", "drop"] = Field(
        default="keep", description="reasoning in assistant messages (<think>...</think>); drop: left out before the template"
    )


def _with_source(values: Any) -> Any:
    """Return the values of a text section, with the source that a mix implies."""
    return {"source": "mix", **values} if isinstance(values, dict) and values.get("mix") else values


class TextSection(TextSource):
    """Source of the documents, and their division into contexts."""

    source: Literal["embedded", "files", "hub", "mix"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="embedded",
        description="embedded: the generated corpus of the embedded model; files: local files; hub: a Hugging Face dataset; "
        "mix: several of these, set by mix itself",
    )
    mix: Annotated[tuple[MixPart, ...], Field(strict=False)] = Field(
        default=(), description="several texts in place of one, interleaved by weight; it ends with the first that ends"
    )
    chat: ChatSection = Field(default=ChatSection(), description="how columns of messages are read")
    tokenizer_sha256: str | None = Field(
        default=None,
        description="columns of token ids: digest of the tokenizer that made them, as in a store's manifest; checked",
    )
    context_length: Annotated[int, Field(ge=2)] = Field(default=128, description="tokens per context, BOS included")
    bos: Literal["context", "document", "none"] = Field(
        default="context",
        description="beginning-of-sequence token; context: before every document and at the start of every context; document: "
        "before every document; none: none is added. A document that brings its own gets no second one",
    )
    packing: Literal["pack", "pack_masked", "separate"] = Field(
        default="pack",
        description="pack: documents end to end; pack_masked: likewise, but no token attends to another document; "
        "separate: one document per context, padded",
    )
    on_bad_row: OnBadRow = Field(
        default="skip",
        description="skip: leave out rows without text, turn bytes that are not UTF-8 into U+FFFD, count both; error: stop",
    )
    max_bad_share: Share = Field(default=0.05, description="on_bad_row skip: stop if a larger share of rows is bad")

    _set_source = model_validator(mode="before")(_with_source)
