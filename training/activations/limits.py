"""Limits of a model on context length and token ids, checked against the text and the tokenizer."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..recipe import TextSection
from ..tokens import padding_id
from .hidden_states import HookError
from .hooked_model import embedding_rows
from .model import LanguageModel
from .sites import find_block

# Configuration keys for the number of positions.
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "max_target_positions")
# The attention mask of even one block takes memory quadratic in the context length.
LONGEST_TRIED = 4096


def stated_positions(module: nn.Module) -> int | None:
    """Return the number of positions in the configuration, with its RoPE scaling applied; None if it states none."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = [value for name in POSITIONS if isinstance(value := getattr(config, name, None), int) and value > 0]
    if not found:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # RoPE parameters are given per layer type, or once for all layers.
    scaled = [found[0]]
    for each in rope.values() if rope and all(isinstance(value, Mapping) for value in rope.values()) else [rope]:
        factor, original = each.get("factor"), each.get("original_max_position_embeddings")
        if factor:
            scaled.append(round(factor * (original or found[0])))
    return max(scaled)


def has_rotary_positions(module: nn.Module) -> bool:
    """Return True if the model uses rotary positions, which also run beyond the trained length."""
    # Falcon has rotary modules even if it does not use them.
    return not getattr(getattr(module, "config", None), "alibi", False) and any(
        "Rotary" in type(part).__name__ for part in module.modules()
    )


def takes_contexts_of(model: LanguageModel, positions: int) -> str | None:
    """Return the error that the model's first block raises on a context of this many positions; None if it runs.

    Tried on the CPU only: an index out of range would make a GPU unusable for the rest of the process.
    """
    if model.device.type != "cpu":
        return None
    hook = ""
    with suppress(ValueError):
        hook = f"{find_block(model.module, 0).path}:out"
    # Not the padding token, which has no position of its own in some models (RoBERTa).
    token = int(getattr(getattr(model.module, "config", None), "pad_token_id", None) == 0)
    token_ids = torch.full((1, positions), token, dtype=torch.long)
    try:
        model.activations(token_ids, (hook,) if hook else ())
    except HookError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever the model raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def context_problems(model: LanguageModel, context_length: int) -> list[str]:
    """Return one line if the model fails on contexts of this length, but not on shorter ones.

    Args:
        model: A ``skeleton`` suffices: only the first block is run.
    """
    tried = min(context_length, LONGEST_TRIED)
    error = takes_contexts_of(model, tried)
    # If three tokens fail too, the cause is not the length, and is reported elsewhere.
    if error is None or takes_contexts_of(model, 3) is not None:
        return []
    fits, fails = 3, tried
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if takes_contexts_of(model, middle) is None else (fits, middle)
    return [
        f"text.context_length: expected at most {fits}, the positions that {model.id} has, got {context_length} ({error}). "
        "Lower text.context_length."
    ]


def untrained_positions(model: LanguageModel, context_length: int) -> list[str]:
    """Return one line if contexts exceed the positions in the configuration and the model would run nevertheless."""
    stated = stated_positions(model.module)
    if stated is None or context_length <= stated:
        return []
    if not has_rotary_positions(model.module) and context_length <= LONGEST_TRIED:
        return []
    return [
        f"text.context_length: expected at most {stated}, the positions that {model.id} was made for "
        f"(max_position_embeddings of its configuration), got {context_length}: later ones were never trained. Lower "
        "text.context_length, or correct the configuration in a local copy of the model."
    ]


def tokenizer_problems(model: LanguageModel, tokenizer: Any, text: TextSection) -> list[str]:
    """Return one line for each mismatch between the model and a tokenizer or the special tokens of a text."""
    rows, problems = embedding_rows(model.module), []
    if text.bos != "none" and tokenizer.bos_token_id is None:
        problems.append(f"text.bos: expected a tokenizer with a BOS token for {text.bos!r}, got none. Set text.bos: none.")
    if rows is None:
        return problems
    used = {"BOS (text.bos)": tokenizer.bos_token_id if text.bos != "none" else None}
    if text.packing == "separate":
        used["padding (text.packing: separate)"] = padding_id(tokenizer)
    problems += [
        f"tokenizer: expected ids below {rows}, the embeddings of {model.id}, got {token} for {what}. Set another, or resize "
        "the model's embeddings."
        for what, token in used.items()
        if token is not None and token >= rows
    ]
    # Added tokens (for chats or images) may exceed the embeddings: plain text need not contain them.
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= rows and token not in added)
    if beyond:
        problems.append(
            f"tokenizer: expected ids below {rows}, the embeddings of {model.id}, got {len(beyond)} beyond, up to "
            f"{beyond[-1]}: it is another model's. Give the tokenizer the model was trained with."
        )
    return problems
