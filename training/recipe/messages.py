"""Errors of the schema as one readable line in a recipe's terms."""

import difflib
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from ...sae.encoders import ENCODERS
from ...sae.suggestions import did_you_mean
from .schema import Recipe


def explain(problem: Any, values: Any, prefix: tuple[str, ...] = (), takes: str = "") -> str:
    """Return a pydantic error as one line in a recipe's terms."""
    loc, kind = tuple(str(part) for part in problem["loc"]), problem["type"]
    key = ".".join((*prefix, *loc))
    if kind == "extra_forbidden":
        known = ENCODERS[values["name"]].parameters_of() if prefix else _fields_at(loc[:-1])
        suggestion = (
            did_you_mean(loc[-1], known) if prefix else _elsewhere(loc) or did_you_mean(loc[-1], known) or _nearest(loc)
        )
        return f"{key}: unknown key.{f' {takes}' if takes else ''}{suggestion}"
    if kind == "missing":
        return f"{key}: required, but missing. {takes}".rstrip()
    given = problem["input"]
    message = WORDS.get(kind) or problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.removeprefix("Tuple should have ").removesuffix(" after validation, not " + str(_length(given)))
    hint = ""
    if kind == "int_type" and isinstance(given, float):
        hint = " Write whole numbers without exponent, like 2_000_000."
    elif kind == "tuple_type" and isinstance(given, str | int | float):
        hint = f" Put it in brackets: [{given}]."
    elif kind in SECTIONS:
        hint = f" Write {loc[-1]}: {{{', '.join(f'{name}: ...' for name in list(_fields_at(loc))[:2])}}}." if not prefix else ""
    return f"{key}: expected {message}, got {given!r}.{hint}"


# pydantic's error types -> expected value, where pydantic's own message uses Python's terms.
WORDS = {
    "tuple_type": "a list",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}
SECTIONS = ("model_type", "model_attributes_type")
# Other common names of a recipe's keys, mostly from other libraries.
SYNONYMS = {
    "lr": "learning_rate peak_lr max_lr",
    "lr_warmup_steps": "warmup warmup_steps lr_warm_up_steps num_warmup_steps",
    "lr_decay": "decay lr_decay_steps decay_start",
    "betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
    "grad_clip": "gradient_clip max_grad_norm clip_grad_norm",
    "batch_tokens": "batch_size train_batch_size train_batch_size_tokens sae_batch_size",
    "accumulate": "grad_acc_steps gradient_accumulation_steps micro_acc_steps",
    "tokens": "training_tokens total_tokens total_training_tokens num_tokens n_tokens steps train_steps epochs n_epochs "
    "num_epochs",
    "out_dir": "output_dir output_path save_dir checkpoint_path run_dir",
    "auxk_weight": "auxk_alpha aux_alpha aux_loss_coefficient",
    "auxk_latents": "auxk k_aux aux_k",
    "dead_after_tokens": "dead_feature_threshold dead_feature_window dead_steps_threshold",
    "seed": "random_seed",
    "wandb.project": "wandb_project log_to_wandb",
    "model.id": "model_name model_id",
    "model.dtype": "torch_dtype",
    "text.dataset": "dataset_name dataset_path dataset_id",
    "text.column": "text_column",
    "text.context_length": "context_size context_len ctx_len seq_len sequence_length max_length",
    "harvest.store": "cached_activations_path activation_dir store_dir",
    "harvest.live_buffer_tokens": "buffer_size n_batches_in_buffer",
    "dictionary.hook": "hook_name hook_point hookpoint hookpoints",
    "dictionary.n_latents": "d_sae dict_size n_features num_features num_latents n_dict d_hidden hidden_dim width "
    "expansion_factor",
    "dictionary.encoder": "architecture activation activation_fn sae_type encoder_name",
    "dictionary.encoder.k": "top_k topk",
    "dictionary.encoder.sparsity": "l1_coefficient l1_penalty sparsity_penalty sparsity_coefficient",
}


def _elsewhere(loc: tuple[str, ...]) -> str:
    """Return a suggestion if another section, or another library, has a key of this name; else an empty string."""
    word = loc[-1].lower()
    paths = [key for key in _all_keys() if key.rpartition(".")[2] == word]
    paths += [key for key, names in SYNONYMS.items() if word in names.split()]
    # Encoder arguments are not fields of the schema.
    if not paths and any(word in encoder.parameters_of() for encoder in ENCODERS.values()):
        paths = [f"dictionary.encoder.{word}"]
    section = ".".join(part for part in loc[:-1] if not part.isdigit())
    return f" Did you mean {paths[0].removeprefix(f'{section}.')!r}?" if paths else ""


def _nearest(loc: tuple[str, ...]) -> str:
    return f" The keys nearest to it: {', '.join(difflib.get_close_matches(loc[-1], _fields_at(loc[:-1]), n=3, cutoff=0.0))}."


@cache
def _all_keys() -> tuple[str, ...]:
    """Return every key of a recipe by its path."""
    sections = [name for name in Recipe.model_fields if _section_at((name,)) is not None and name != "phases"]
    return (*Recipe.model_fields, *(f"{section}.{key}" for section in sections for key in _fields_at((section,))))


def _length(given: Any) -> int | None:
    return len(given) if isinstance(given, list | tuple) else None


def _fields_at(loc: tuple[str, ...]) -> list[str]:
    section = _section_at(loc)
    assert section is not None
    return list(section.model_fields)


def _section_at(loc: tuple[str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Recipe
    for part in (part for part in loc if not part.isdigit()):
        assert section is not None
        annotation = section.model_fields[part].annotation
        # A section is annotated alone, as optional, or in a tuple of any length.
        options = [option for option in (annotation, *get_args(annotation)) if isinstance(option, type)]
        section = next((option for option in options if issubclass(option, BaseModel)), None)
    return section
