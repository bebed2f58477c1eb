"""Configuration, tokenizer and content of the model that a recipe names. The only file that imports transformers."""

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ...sae.errors import doing
from ..content import Content, folder_content, model_folder, remembered
from ..embedded import MODEL_DIR
from ..recipe import ModelSection
from ..tokens import tokenizer_contents, tokenizer_digest
from .adapters import adapter_content
from .memory_models import held
from .model_pair import require_equal_tokenizers

# Files of a model's folder that do not affect its tokenizer.
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# The oldest version that transformers takes.
BITSANDBYTES = "bitsandbytes>=0.46.1"


class RemoteCodeRefused(ValueError):  # noqa: N818 - says what happened
    """Error for a model repository that contains Python code which the user has not allowed to run."""


def causal_config(section: ModelSection) -> tuple[Any, Any]:
    """Return the configuration of a causal language model and the class that loads it.

    Raises:
        ValueError: If it cannot be loaded, or is of another kind of model; the message explains how to train on those.
    """
    transformers = quiet_transformers()
    with explaining_load(section):
        # If unset, transformers would prompt on the terminal, and run a repository's code if a "y" is piped in.
        config = transformers.AutoConfig.from_pretrained(
            source_of(section), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    names = transformers.models.auto.modeling_auto
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    saved = (getattr(config, "architectures", None) or [""])[0]
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or own_code:
        found = transformers.AutoModelForCausalLM
    else:
        # Parts of larger models are not in the mapping (Emu3's language model): take the class they name.
        found = getattr(transformers, saved, None)
    if saved not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and saved and not own_code:
        # Masked and encoder-decoder models would load as the causal model that shares their configuration.
        masked = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if masked or getattr(config, "is_encoder_decoder", False) or found is not transformers.AutoModelForCausalLM:
            found = None
    if found is not None:
        return config, found
    raise ValueError(
        f"model.id: expected a causal language model, which is what recipes run, got {saved or config.model_type} "
        f"({section.id}). Its activations are read in Python, and trained on with the same recipe:\n"
        f"  model = transformers.AutoModel.from_pretrained({section.id!r})\n"
        '  rows = sparsary.read_activations(model, "encoder.layer.1:out", inputs)\n'
        "  sparsary.train(RECIPE, rows)\n"
        "where the hook is a module path of the model and a side, and inputs is a list or data loader of what the model takes "
        '(mappings such as {"pixel_values": ...} or {"input_ids": ..., "attention_mask": ...}).'
    )


def load_tokenizer(section: ModelSection) -> Any:
    """Load the tokenizer of a recipe's model.

    Raises:
        ValueError: If it cannot be loaded, or those of two models differ.
    """
    if section.pair is not None:
        base, tuned = map(load_tokenizer, section.pair)
        require_equal_tokenizers([each.id for each in section.pair], [tokenizer_digest(base), tokenizer_digest(tuned)])
        return base
    if (known := held(section.id)) is not None:
        return known.tokenizer
    with explaining_load(section):
        return quiet_transformers().AutoTokenizer.from_pretrained(
            source_of(section), revision=section.revision, trust_remote_code=section.trust_remote_code
        )


def require_quantization(section: ModelSection) -> None:
    """Raise ``ValueError`` if ``model.quantization`` needs a package or device that is missing."""
    if section.quantization is None:
        return
    needs = f"model.quantization: {section.quantization} needs the package bitsandbytes, and a GPU or CPU that it supports"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{needs}; it is not installed. Run: pip install '{BITSANDBYTES}', or set model.quantization: null.")
    try:
        # transformers' own check.
        from transformers.integrations.bitsandbytes import validate_bnb_backend_availability
        from transformers.utils.import_utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise RuntimeError("its version is too old")
        validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{needs} ({reason}). Run: pip install -U '{BITSANDBYTES}', or set model.quantization: null."
        ) from None
    # It repeats in every layer that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def section_content(section: ModelSection) -> Content:
    """Return the ``content()`` of the model that a recipe names, without loading its weights.

    Raises:
        ValueError: If its tokenizer or configuration cannot be loaded, or the tokenizers of two models differ.
    """
    if section.pair is not None:
        base, tuned = map(section_content, section.pair)
        if base["tokenizer"] != tuned["tokenizer"]:
            # Special tokens may differ: those of the base count.
            load_tokenizer(section)
        return base | {"model": base["model"] | {"tuned": tuned["model"]}}

    if (known := held(section.id)) is not None:
        return {"model": {"parameters": known.parameters}} | tokenizer_contents(known.tokenizer)

    # Digests of the tokenizer itself, because its files contain much that does not affect text.
    def digest() -> str:
        return json.dumps(tokenizer_contents(load_tokenizer(section)))

    folder = model_folder(section)
    if folder is not None:
        # Cached, because loading it imports transformers, which takes longer than the rest of a resumed run's start.
        read = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in WEIGHTS_SUFFIXES)
        code = " with code" if section.trust_remote_code else ""
        name = f"tokenizer with template {folder.resolve()} transformers {metadata.version('transformers')}{code}"
        return {"model": source_content(section, None)} | json.loads(remembered(name, read, digest))
    with explaining_load(section):
        tokenizer = tokenizer_contents(load_tokenizer(section))
        # Resolves the revision to a commit of the Hub.
        quiet_transformers().AutoConfig.from_pretrained(
            source_of(section), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    return {"model": source_content(section, hub_commit(section))} | tokenizer


def source_content(section: ModelSection, commit: str | None) -> Content:
    folder = model_folder(section)
    if folder is None:
        return ({"commit": commit} if commit else {}) | adapter_content(section)
    return folder_content(folder, section.trust_remote_code) | adapter_content(section)


def hub_commit(section: ModelSection) -> str | None:
    """Return the commit of the Hub model loaded last, from the Hub client's cache; ``None`` for a local model."""
    if model_folder(section) is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(section.id, "config.json", revision=section.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def source_of(section: ModelSection) -> str:
    return str(MODEL_DIR) if section.id == "embedded" else section.id


def quiet_transformers() -> Any:
    # Imported lazily: it takes seconds, and `sparsary --help` and errors in a recipe must stay fast.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def naming_remote_code(section: ModelSection) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error) or section.trust_remote_code:
            raise
        raise RemoteCodeRefused(
            f"model.id: {section.id!r} needs Python code from its repository, which is not run by default: it could do "
            "anything that you can do on this machine. Read it; to allow it, set model.trust_remote_code: true (on the "
            "command line: "
            "--trust-remote-code)."
        ) from None


@contextmanager
def explaining_load(section: ModelSection) -> Iterator[None]:
    try:
        with doing(f"loading the model {section.id}"), naming_remote_code(section):
            yield
    except RemoteCodeRefused:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.id: {section.id!r} could not be loaded ({reason}). Give a local directory with config.json, "
            "model.safetensors and tokenizer files, or use model.id: embedded, which needs no network."
        ) from None
