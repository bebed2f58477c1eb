"""Names of tensors without what wrapped modules and nested state dictionaries put in front of them."""

import re
from collections.abc import Iterable

# Modules that hold another one: torch.compile, DistributedDataParallel, Lightning and DeepSpeed, FSDP, activation checkpoints.
WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The matrices of every format. What stands before them is a container: ``state_dict.``, ``sae.``, ``model.autoencoder.``
DECODERS = r"W_dec(?:_\d+)?|w_dec|W_D(?:\.\d+)?|decoder\.weight|decoder\.linear\.weight|decoder_linear\.weight"
ENCODERS = r"W_enc(?:_\d+)?|w_enc|W_E|encoder\.weight|encoder_linear\.weight"
# Tensors that a training keeps beside its module; nothing of them is part of the function.
OF_TRAINING = r"(opt|sched|lr_|amp|scaler|grad_scaler|rng|callbacks|loops|(global_)?step|epoch|iteration)\w*(\..*)?"
# dictionary_learning's backups, whose reader needs what lies beside the container.
BACKUP, BACKUP_MARKS = "ae", {"step", "norm_factor"}


def unwrapped(names: Iterable[str], where: object) -> tuple[dict[str, str], list[str]]:
    """Return the names to keep by what they were, and in words what was left out of them.

    Raises:
        ValueError: If there are several dictionaries, or two names become one.
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
        # What is kept twice, such as k, counts as the container has it.
        bare = {name: short for name, short in beside.items() if short not in inside.values()} | inside
    if len(set(bare.values())) < len(bare):
        shorts = list(bare.values())
        twice = next(short for short in shorts if shorts.count(short) > 1)
        same = sorted(name for name, short in bare.items() if short == twice)
        raise ValueError(f"{where}: expected one tensor for {twice}, got {' and '.join(same)}. Leave one of them in the file.")
    return bare, words


def _containers(names: Iterable[str], matrices: str) -> set[str]:
    """What stands before matrices; the empty string for those that have nothing before them."""
    found = (re.fullmatch(rf"(?:(.*)\.)?(?:{matrices})", name) for name in names)
    return {match.group(1) or "" for match in found if match}
