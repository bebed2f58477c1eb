"""How long a context a model takes, and which token ids: what its configuration bounds, and its tokenizer has to agree with."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..recipe import TextSection
from ..text import padding_id
from .hidden_states import HookError
from .model import LanguageModel, embedding_rows
from .sites import find_block

# How configurations call the number of positions.
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "max_target_positions")
# A pass of one block's masks takes memory with the square of the context.
LONGEST_TRIED = 4096


def stated_positions(module: nn.Module) -> int | None:
    """Return the number of positions of the configuration, scaled as its rotary positions are; None if it states none."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = [value for name in POSITIONS if isinstance(value := getattr(config, name, None), int) and value > 0]
    if not found:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # One for each kind of layer, or one for all.
    scaled = [found[0]]
    for each in rope.values() if rope and all(isinstance(value, Mapping) for value in rope.values()) else [rope]:
        factor, original = each.get("factor"), each.get("original_max_position_embeddings")
        if factor:
            scaled.append(round(factor * (original or found[0])))
    return max(scaled)


def has_rotary_positions(module: nn.Module) -> bool:
    """Return whether positions are rotations, which go on beyond those that were trained."""
    # Falcon has the rotations also where it does not use them.
    return not getattr(getattr(module, "config", None), "alibi", False) and any(
        "Rotary" in type(part).__name__ for part in module.modules()
    )


def takes_contexts_of(model: LanguageModel, positions: int) -> str | None:
    """Return the error with which the model's first block fails on a context of so many positions; None if it does not.

    Elsewhere than on the CPU it is not tried: an index too high would end the process's use of a GPU.
    """
    if model.device.type != "cpu":
        return None
    hook = ""
    with suppress(ValueError):
        hook = f"{find_block(model.module, 0).path}:out"
    # Padding has no positions of its own in some models (RoBERTa).
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
    """Return one line if the model fails on contexts of this length, and not on shorter ones.

    Args:
        model: A ``skeleton`` will do: its first block is run.
    """
    tried = min(context_length, LONGEST_TRIED)
    error = takes_contexts_of(model, tried)
    # Where three tokens fail too, the reason is another one, and met elsewhere.
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
    """Return one line if contexts reach beyond the positions that the configuration states, and the model would go on."""
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
    """Return a line for everything in which a tokenizer and a text's special tokens do not fit the model."""
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
    # Tokens added later (of chats, of images) may lie beyond: text need not hold them.
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= rows and token not in added)
    if beyond:
        problems.append(
            f"tokenizer: expected ids below {rows}, the embeddings of {model.id}, got {len(beyond)} beyond, up to "
            f"{beyond[-1]}: it is another model's. Give the tokenizer the model was trained with."
        )
    return problems
