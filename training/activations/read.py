"""Activations of models that recipes do not run: encoders, masked language models, vision, speech, any PyTorch module."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .hidden_states import HookError
from .hooked_model import attach
from .model import LanguageModel
from .model_pair import EnoughSeen

# Arguments of one call of a model: by name, in order, or a single one.
ModelInput = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor


def read_activations(
    model: nn.Module, hook: str, inputs: Iterable[ModelInput], target: str | None = None
) -> Iterable[Tensor | dict[str, Tensor]]:
    """Return the activations at a hook of any PyTorch model, for ``train`` to use in place of a language model's.

    Each item holds the activations of one input: ``(tokens, width)`` in float32 on the CPU, contexts concatenated. Positions
    masked by the input's ``attention_mask`` (in a decoder: its ``decoder_attention_mask``) are dropped. A forward pass stops
    at the hook, so reading an encoder needs no input for the decoder. The model is frozen and put in eval mode.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU())
    >>> [rows.shape for rows in read_activations(model, "1:out", [torch.ones(2, 7, 3)])]
    [torch.Size([14, 5])]

    Args:
        model: For example ``transformers.AutoModel.from_pretrained("google/vit-base-patch16-224")``.
        hook: A module path of the model and a side: ``encoder.layer.8:out``.
        inputs: Arguments of each call of the model: mappings, tuples, or single tensors. A list or a data loader is iterated
            as often as training needs, an iterator once.
        target: The hook that a transcoder predicts. Items are then mappings with ``x`` and ``target``.

    Raises:
        ValueError: If a hook does not exist; while reading, if its tensor is not of shape ``(contexts, positions, width)`` or
            ``(rows, width)``.
    """
    reader = _Reader(model, (hook,) if target is None else (hook, target), inputs)
    return iter(reader) if iter(inputs) is inputs else reader


class _Reader:
    """Iterable that runs the model on all inputs each time it is iterated."""

    def __init__(self, model: nn.Module, hooks: tuple[str, ...], inputs: Iterable[ModelInput]):
        self.model, self.hooks, self.inputs = LanguageModel(model, None, type(model).__name__, None), hooks, inputs
        for hook in hooks:
            self.model.find(hook)

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        for item in self.inputs:
            found = self._rows(item)
            yield (
                found[self.hooks[0]]
                if len(self.hooks) == 1
                else {
                    "x": found[self.hooks[0]],
                    "target": found[self.hooks[1]],
                }
            )

    @torch.no_grad()
    def _rows(self, item: ModelInput) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(hook: str, x: Tensor) -> None:
            # Later modules may modify this tensor in place.
            seen.setdefault(hook, x.clone())
            if len(seen) == len(set(self.hooks)):
                raise EnoughSeen

        args, kwargs = _called_with(item, self.model.device)
        with ExitStack() as stack, suppress(EnoughSeen):
            for hook in dict.fromkeys(self.hooks):
                module, side = self.model.find(hook)
                stack.callback(attach(module, side, hook, lambda x, hook=hook: keep(hook, x)).remove)
            self.model.module(*args, **kwargs)
        missing = [hook for hook in self.hooks if hook not in seen]
        if missing:
            raise HookError(f"hook {missing[0]}: the model never ran this module. Choose one that is part of its forward pass.")
        return {hook: _flat(hook, x, kwargs) for hook, x in seen.items()}


def _called_with(item: ModelInput, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(item, Mapping):
        return (), {key: there(value) for key, value in item.items()}
    return tuple(map(there, item)) if isinstance(item, (tuple, list)) else (there(item),), {}


def _flat(hook: str, x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the rows of positions that are not padding."""
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise HookError(
            f"hook {hook}: expected a tensor (contexts, positions, width) or (rows, width) of floating point numbers, got "
            f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}. Choose another module or side."
        )
    mask = inputs.get("decoder_attention_mask" if "decoder" in hook.split(".") else "attention_mask")
    if x.ndim == 3 and isinstance(mask, Tensor) and mask.ndim == 2:
        if x.shape[:2] == mask.shape:
            x = x[mask.to(x.device) != 0]
        elif x.shape[:2] == mask.shape[::-1]:
            x = x.transpose(0, 1)[mask.to(x.device) != 0]
    return x.reshape(-1, x.shape[-1]).float().cpu()
