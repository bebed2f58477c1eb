"""PEFT adapters, such as LoRA, on the weights of a language model."""

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ...sae.extras import needs
from ..content import file_digest
from ..recipe import ModelSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_files(section: ModelSection) -> list[Path]:
    """Return the files of a recipe's adapter; none without one.

    Raises:
        ValueError: If it is no directory of an adapter with its weights in safetensors.
    """
    if section.adapter is None:
        return []
    files = [Path(section.adapter) / name for name in (CONFIG, WEIGHTS)]
    if missing := next((path.name for path in files if not path.is_file()), None):
        raise ValueError(
            f"model.adapter: expected a directory with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them, got "
            f"{section.adapter} without {missing}."
        )
    return files


def adapter_content(section: ModelSection) -> dict[str, str]:
    """Return the digest of a recipe's adapter, for the content of its model; empty without one."""
    files = adapter_files(section)
    joined = "\n".join(f"{path.name} {file_digest(path)}" for path in files)
    return {"adapter": hashlib.sha256(joined.encode()).hexdigest()} if files else {}


def with_adapter(module: nn.Module, section: ModelSection) -> nn.Module:
    """Return a model with a recipe's adapter, merged into its weights or active beside them; hooks keep their paths.

    Raises:
        MissingPackageError: If peft is not installed.
        ValueError: If the adapter does not fit the model.
    """
    if not adapter_files(section):
        return module
    with needs("model.adapter"):
        peft: Any = importlib.import_module("peft")
    try:
        with warnings.catch_warnings():
            # peft asks transformers for what is to be renamed there.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.PeftModel.from_pretrained(module, section.adapter, is_trainable=False)
        return wrapped.merge_and_unload() if section.adapter_mode == "merged" else wrapped.get_base_model()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.adapter: expected an adapter of {section.id}, got {section.adapter}, which does not fit it ({reason})."
        ) from None
