"""Removal of the prefixes that module wrappers and nested state dictionaries put before tensor names."""

import re
from collections.abc import Iterable

# Wrapper modules: torch.compile, DistributedDataParallel, Lightning and DeepSpeed, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Matrix names of every format. Anything before them is a container: ``state_dict.``, ``sae.``, ``model.autoencoder.``
DECODERS = r"W_dec(?:_\d+)?|w_dec|W_D(?:\.\d+)?|decoder\.weight|decoder\.linear\.weight|decoder_linear\.weight"
ENCODERS = r"W_enc(?:_\d+)?|w_enc|W_E|encoder\.weight|encoder_linear\.weight"
# Training state stored alongside the module; not part of the dictionary.
OF_TRAINING = r"(opt|sched|lr_|amp|scaler|grad_scaler|rng|callbacks|loops|(global_)?step|epoch|iteration)\w*(\..*)?"
# dictionary_learning's backups keep their container: its reader needs the values alongside it.
BACKUP, BACKUP_MARKS = "ae", {"step", "norm_factor"}


def unwrapped(names: Iterable[str], where: object) -> tuple[dict[str, str], list[str]]:
    """Return a mapping from original to stripped names of the tensors to keep, and notes on the stripped prefixes.

    Raises:
        ValueError: If there are several dictionaries, or two names become equal.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) or name for name in names}
    dropped = {part for name, short in bare.items() if short != name for part in name.split(".") if part in WRAPPERS}
    words = [f"{part}. left out of tensors' names" for part in sorted(dropped)]
    found = _containers(bare.values(), DECODERS) or _containers(bare.values(), ENCODERS)
    container = next(iter(found), "")
    if "" in found or not found or (container == BACKUP and BACKUP_MARKS & bare.keys()):
        container = ""
    elif len(found) > 1:
        raise ValueError(
            f"{where}: expected the tensors of one dictionary, got those of {len(found)}: {', '.join(sorted(found))}. Save the "
            "one you mean to a file of its own."
        )
    if container:
        words.append(f"{container}. left out of tensors' names")
        inside = {
            name: short.removeprefix(f"{container}.") for name, short in bare.items() if short.startswith(f"{container}.")
        }
        beside = {name: short for name, short in bare.items() if name not in inside and not re.fullmatch(OF_TRAINING, short)}
        # The container's value wins where a name, such as k, also exists outside it.
        bare = {name: short for name, short in beside.items() if short not in inside.values()} | inside
    if len(set(bare.values())) < len(bare):
        shorts = list(bare.values())
        twice = next(short for short in shorts if shorts.count(short) > 1)
        same = sorted(name for name, short in bare.items() if short == twice)
        raise ValueError(f"{where}: expected one tensor for {twice}, got {' and '.join(same)}. Leave one of them in the file.")
    return bare, words


def _containers(names: Iterable[str], matrices: str) -> set[str]:
    """Return the prefixes of matrix names; the empty string for matrices without a prefix."""
    found = (re.fullmatch(rf"(?:(.*)\.)?(?:{matrices})", name) for name in names)
    return {match.group(1) or "" for match in found if match}
