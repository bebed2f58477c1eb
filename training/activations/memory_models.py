"""Language models that a program has in memory: found beneath the wrappers of other libraries, and named by their weights.

The name in a recipe and a checkpoint is ``memory:NAME@DIGEST``. It stands for the model as long as the program keeps it.
"""

import hashlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

PREFIX = "memory:"
# Where other libraries keep the module of transformers: TransformerLens's bridge, torch.compile, nnsight, and data parallelism.
BENEATH = ("original_model", "_orig_mod", "_module", "_model", "local_model", "module")


class HeldModel(NamedTuple):
    """A module and its tokenizer; ``parameters`` is the digest of its weights."""

    module: nn.Module
    tokenizer: Any
    parameters: str


_held: dict[str, tuple["weakref.ref[nn.Module]", Any, str]] = {}


def beneath(model: Any, tokenizer: Any = None) -> tuple[nn.Module, Any]:
    """Return the module of transformers in a model object, and its tokenizer: that given, or the wrapper's own.

    Raises:
        ValueError: If there is no such module, its weights are not loaded, or there is no tokenizer.
    """
    found, seen = model, set[int]()
    while not _is_causal(found) and id(found) not in seen:
        seen.add(id(found))
        tokenizer = getattr(found, "tokenizer", None) if tokenizer is None else tokenizer
        # Of PEFT: the module with the adapter's layers in it.
        base = getattr(found, "get_base_model", None)
        inner = [base()] if callable(base) else [_plain(found, name) for name in BENEATH]
        found = next((each for each in inner if isinstance(each, nn.Module)), found)
    base = getattr(found, "get_base_model", None)
    found = base() if callable(base) else found
    if not isinstance(found, nn.Module) or not _is_causal(found):
        raise ValueError(
            f"model: expected a causal language model of transformers, or a wrapper of one, got {type(model).__name__}, which "
            "has none underneath. Give transformers.AutoModelForCausalLM.from_pretrained(...); activations of other models are "
            "read with sparsary.read_activations."
        )
    if any(parameter.is_meta for parameter in found.parameters()):
        raise ValueError(
            f"model: expected loaded weights, got {type(model).__name__} without them. Load them first (nnsight: "
            "LanguageModel(..., dispatch=True))."
        )
    if tokenizer is None:
        raise ValueError("tokenizer: expected the model's tokenizer beside a model object, got none.")
    return found, tokenizer


def _plain(model: Any, name: str) -> Any:
    """Return an attribute; None if there is none, or asking for it fails, as it may in wrappers that trace what is asked."""
    try:
        return getattr(model, name, None)
    except Exception:  # noqa: BLE001 - whatever a wrapper raises
        return None


def _is_causal(model: Any) -> bool:
    """Return True for a module that takes token ids and has a configuration, as those of transformers do."""
    return isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(type(model), "get_input_embeddings")


def hold(module: nn.Module, tokenizer: Any) -> str:
    """Return the name that stands for a model in memory, which is that of equal weights only."""
    name = str(getattr(module, "name_or_path", "") or type(module).__name__).rstrip("/").rpartition("/")[2]
    digest = parameters_digest(module)
    model_id = f"{PREFIX}{name}@{digest[:16]}"
    _held[model_id] = weakref.ref(module), tokenizer, digest
    return model_id


def held(model_id: str) -> HeldModel | None:
    """Return the model that a name stands for; None if it is no name of a model in memory.

    Raises:
        ValueError: If it is one, and the program does not have that model.
    """
    if not model_id.startswith(PREFIX):
        return None
    reference, tokenizer, digest = _held.get(model_id, (lambda: None, None, ""))
    module = reference()
    if module is None:
        raise ValueError(
            f"model.id: {model_id} was a model in the memory of another program, or one that is gone. Give it: "
            "sparsary.evaluate(..., model=MODEL, tokenizer=TOKENIZER), or a saved copy: --model DIRECTORY."
        )
    return HeldModel(module, tokenizer, digest)


def parameters_digest(module: nn.Module) -> str:
    """Return a hash of the names, types, shapes and values of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
