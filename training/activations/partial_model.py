"""Models without the modules that a pass up to the last hook does not run: later blocks, and an output layer of its own.

The class is built as a whole, from the unchanged configuration, and these modules are taken out before any weight is read or
allocated. What remains is therefore what the whole model has, computed in the same way; nothing that depends on the number of
layers in the configuration can change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .hooked_model import HookedModel
from .sites import block_paths


class NotLoaded(nn.Module):
    """Placeholder of a module that was left out; it has no weights, and running it is an error."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{self.path}: was not loaded, because this model was loaded for earlier hooks only. Load the whole model: "
            "model.truncate: never."
        )


def unneeded_modules(model: HookedModel, hooks: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of blocks after the last one that reading ``hooks`` runs, and of an untied output layer.

    Empty if the model's blocks are not found, do not run in their order, or are all needed.

    Args:
        model: The whole model; a ``skeleton`` suffices, because only the order of modules matters.
    """
    try:
        blocks = block_paths(model.module)
    except ValueError:
        return ()
    output = _output_layer(model.module)
    watched = [*blocks, *(() if output is None else (output,))]
    ran: list[str] = []
    handles = [
        model.module.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.append(path)) for path in watched
    ]
    try:
        token_ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)
        model.activations(token_ids, tuple(hooks))
    finally:
        for handle in handles:
            handle.remove()
    needed = [path for path in blocks if path in ran]
    # A model that enters blocks in another order may, with other tokens, enter others.
    if needed != blocks[: len(needed)] or len(needed) == len(blocks):
        return ()
    return tuple(path for path in watched if path not in ran)


def _output_layer(module: nn.Module) -> str | None:
    """Return the path of an output layer whose weights are not those of the embeddings; None if there is none."""
    found: Any = getattr(module, "get_output_embeddings", lambda: None)()
    path = next((name for name, part in module.named_modules() if part is found and name), None)
    tied = getattr(module, "all_tied_weights_keys", {})
    if path is None or any(name.startswith(f"{path}.") for pair in tied.items() for name in pair):
        return None
    return path


def class_without(model_class: type[nn.Module], paths: Sequence[str]) -> type[nn.Module]:
    """Return a subclass of a transformers model whose instances have placeholders at ``paths``.

    It has the name and module of ``model_class``, by which transformers looks up how a class is loaded.
    """

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        left_out = tuple(f"{path}." for path in paths)
        for path in paths:
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, NotLoaded(path))
        # Weights of a module left out cannot be tied to others.
        tied = self.all_tied_weights_keys
        self.all_tied_weights_keys = {name: source for name, source in tied.items() if not name.startswith(left_out)}

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__, "__init__": build}
    return type(model_class.__name__, (model_class,), names)
