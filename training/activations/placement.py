"""Devices and number format of a model's weights: spread over devices by accelerate, quantized by bitsandbytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import ModelSection


def quantization_options(section: ModelSection) -> dict[str, Any]:
    """Return the arguments of transformers' ``BitsAndBytesConfig``; 4 bits are NF4 (Dettmers et al. 2023, arXiv:2305.14314)."""
    if section.quantization == "8bit":
        return {"load_in_8bit": True}
    dtype = getattr(torch, section.dtype)
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}


def is_spread(module: nn.Module) -> bool:
    """Return True if accelerate keeps parts of a model on different devices."""
    return len(set(getattr(module, "hf_device_map", {}).values())) > 1


def input_device(module: nn.Module) -> torch.device:
    """Return the device of a model's token ids: where its embeddings are computed."""
    if is_spread(module):
        embeddings: Any = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        # Weights that are kept elsewhere until they are used are on the meta device.
        runs_on = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        return next(embeddings.parameters()).device if runs_on is None else torch.device(runs_on)
    return next(module.parameters()).device


def on_device(device: torch.device, reader: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """Wrap the reader of a hook: it gets the tensor on ``device``, and its own goes back to where the tensor was."""

    def read(x: Tensor) -> Tensor | None:
        changed = reader(x.to(device))
        return None if changed is None else changed.to(x.device)

    return read
