"""Recipes: YAML in, a checked and frozen configuration out.

Every mistake of a recipe is reported at once, with the nearest valid name. Types are never coerced; the loader speaks
YAML 1.2, where ``1e-4`` is a number and ``no`` is a word.
"""

import copy
import difflib
import inspect
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sae.encoders import ENCODERS, build_encoder


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors. Frozen: what varies in a run lives in ``state.py``."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# YAML has lists where a frozen section has tuples.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelSection(Section):
    """The language model under study."""

    id: str = Field(default="embedded", description="'embedded', a Hugging Face id or a local directory")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="auto", description="'auto' takes a GPU if there is one")


class TextSection(Section):
    """Where documents come from and how they become contexts."""

    source: Literal["embedded", "files", "hub"] = "embedded"
    files: Names = Field(default=(), description="source files: .txt, .jsonl or .parquet paths, read in this order")
    dataset: str | None = Field(default=None, description="source hub: data set id, streamed")
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    column: str = Field(default="text", description="the column or JSON key that holds the text")
    separator: str = Field(default="\n\n", description="what stands between the documents of a .txt file")
    seed: int = Field(default=1, description="source embedded: which corpus")
    context_length: Annotated[int, Field(ge=2)] = 128
    bos: Literal["context", "document", "none"] = Field(
        default="context",
        description="where the beginning-of-sequence token goes: before every document and at the head of every context; "
        "before every document; nowhere",
    )
    packing: Literal["pack", "separate"] = Field(default="pack", description="documents end to end, or one per context, padded")


class HarvestSection(Section):
    """Which activations are taken, and how they are stored."""

    hooks: Annotated[Names, Field(min_length=1)] = Field(description="module paths with a side, e.g. transformer.h.2:out")
    tokens: Positive | None = Field(default=None, description="with a store: tokens to put in it, held-out ones included")
    store: str | None = Field(default=None, description="the store's directory; null streams straight from the model")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    block: Positive = Field(default=64, description="int8: how many neighbouring dimensions share a scale")
    gradients: bool = Field(default=False, description="also store the gradient of the next-token loss at every hook")
    batch_contexts: Positive = 32
    shard_tokens: Positive = 131_072
    heldout: Share = Field(default=0.05, description="share of documents kept from training, for evaluation")
    exclude_special: bool = Field(default=True, description="leave out BOS, EOS, padding: their norms dwarf all others")
    exclude_leading: Annotated[int, Field(ge=0)] = Field(default=8, description="leave out so many positions of every context")
    live_buffer_tokens: Positive = Field(default=65_536, description="store null: tokens shuffled together")
    verify: bool = Field(default=True, description="check every shard's checksum before training on it")


class DictionarySection(Section):
    """What is learned."""

    kind: Literal["sae"] = "sae"
    hook: str = Field(description="one of harvest.hooks")
    n_latents: Positive
    encoder: dict[str, Any] = Field(description="name of the variant and its arguments")
    normalize: Literal["scale", "none"] = Field(
        default="scale", description="divide by one constant, so that variance per dimension is 1"
    )
    init: Literal["data", "random"] = Field(
        default="data", description="atoms start as centred activations, or in random directions"
    )


class WandbSection(Section):
    """Logging to Weights & Biases, beside metrics.jsonl."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class Recipe(Section):
    """One training run."""

    model: ModelSection = ModelSection()
    text: TextSection = TextSection()
    harvest: HarvestSection
    dictionary: DictionarySection
    tokens: Positive = Field(description="tokens trained on; more than the store holds means several passes")
    batch_tokens: Positive = 2048
    accumulate: Positive = Field(default=1, description="split every batch into so many pieces, to save memory")
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 100
    lr_decay: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.2, description="last share of the run, with lr falling to 0"
    )
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    grad_clip: Annotated[float, Field(gt=0.0)] | None = Field(
        default=0.003,
        description="largest norm of a step's gradient; null: none. The loss is an fvu, so 0.003 clips nearly every step: Adam "
        "then sees gradients of one norm, and the large ones of the start do not slow the rest of the run",
    )
    auxk_weight: Annotated[float, Field(ge=0.0)] = Field(default=1 / 32, description="Gao et al. 2024, appendix A.2")
    auxk_latents: Positive | None = Field(
        default=None, description="dead latents per token in the auxiliary loss; null: d_in / 2"
    )
    dead_after_tokens: Positive = Field(default=1_000_000, description="a latent silent for so long is dead")
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU that has it"
    )
    seed: int = 0
    out_dir: str
    log_every: Positive = Field(default=50, description="steps")
    save_every: Positive = Field(default=1000, description="steps")
    wandb: WandbSection | None = None
    eval_tokens: Positive = Field(default=200_000, description="held-out tokens that `sparsary eval` judges the dictionary on")


# What may differ when an interrupted run is continued: none of it touches the numbers.
FREE_ON_RESUME = ("out_dir", "log_every", "save_every", "wandb", "eval_tokens")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override (``{"dictionary.n_latents": 512}``) and check a recipe.

    Raises:
        ValueError: With one line per mistake.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a recipe file ({error}).") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of recipe keys, got {type(values).__name__}.")
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    return check_recipe(values, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """One YAML 1.2 document; duplicate keys are errors."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: expected YAML ({' '.join(str(error).split())}).") from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["lr=1e-4", "dictionary.encoder.k=8"]`` as a mapping; values are YAML."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r}: expected key.sub=value, for example lr=1e-4.")
        overrides[key] = parse_yaml(value, argument)
    return overrides


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ValueError(f"{key}: {parent} is not a section but {nested!r}.")
        values = nested
    values[last] = value


def check_recipe(values: dict[str, Any], where: str) -> Recipe:
    """The configuration of parsed YAML.

    Raises:
        ValueError: With one line per mistake; ``where`` opens each.
    """
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [_explain(problem, values) for problem in error.errors()]
        recipe = _without_unknown(values, error)
    dictionary = values.get("dictionary")
    if isinstance(dictionary, dict) and isinstance(dictionary.get("encoder"), dict):
        problems += _check_encoder(dictionary["encoder"])
    if recipe is not None:
        problems += _check_together(recipe)
    if problems or recipe is None:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return recipe


def _without_unknown(values: dict[str, Any], error: ValidationError) -> Recipe | None:
    """The recipe less its unknown keys, if nothing else is wrong: its other checks need not wait for a second try."""
    values = copy.deepcopy(values)
    for problem in error.errors():
        *parents, last = problem["loc"]
        section: Any = values
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        if problem["type"] != "extra_forbidden" or not isinstance(section, dict):
            return None
        section.pop(last)
    return Recipe.model_validate(values)


def _check_encoder(spec: dict[str, Any]) -> list[str]:
    name = spec.get("name")
    if name not in ENCODERS:
        if name is None:
            return [f"dictionary.encoder.name: required, but missing. Choose one of {', '.join(ENCODERS)}."]
        return [f"dictionary.encoder.name: expected one of {', '.join(ENCODERS)}, got {name!r}.{_nearest(str(name), ENCODERS)}"]
    try:
        encoder_schema(name).model_validate({key: value for key, value in spec.items() if key != "name"})
    except ValidationError as error:
        takes = f"{name} takes {', '.join(ENCODERS[name].parameters_of())}."
        return [_explain(problem, spec, ("dictionary", "encoder"), takes) for problem in error.errors()]
    return []


@cache
def encoder_schema(name: str) -> type[BaseModel]:
    """The constructor's signature as a strict schema."""
    fields: dict[str, Any] = {
        key: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for key, p in ENCODERS[name].parameters_of().items()
    }
    return create_model(name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _check_together(recipe: Recipe) -> list[str]:
    """What no single key can be blamed for."""
    problems = []
    if not _check_encoder(recipe.dictionary.encoder):
        try:
            build_encoder(recipe.dictionary.encoder).validate(recipe.dictionary.n_latents)
        except ValueError as error:
            problems.append(str(error))
    if recipe.dictionary.hook not in recipe.harvest.hooks:
        near = _nearest(recipe.dictionary.hook, recipe.harvest.hooks)
        problems.append(
            f"dictionary.hook: expected one of harvest.hooks ({', '.join(recipe.harvest.hooks)}), "
            f"got {recipe.dictionary.hook!r}.{near}"
        )
    for index, hook in enumerate(recipe.harvest.hooks):
        if hook.rpartition(":")[2] not in ("in", "out") or ":" not in hook:
            problems.append(
                f"harvest.hooks.{index}: expected a module path and a side, like {hook.split(':')[0]}:out, got {hook!r}."
            )
    if recipe.harvest.store is not None and recipe.harvest.tokens is None:
        problems.append("harvest.tokens: required with harvest.store, but missing.")
    if len(set(recipe.harvest.hooks)) < len(recipe.harvest.hooks):
        problems.append("harvest.hooks: expected each hook once, got one twice.")
    if recipe.batch_tokens % recipe.accumulate:
        problems.append(f"accumulate: expected a divisor of batch_tokens = {recipe.batch_tokens}, got {recipe.accumulate}.")
    if recipe.batch_tokens > recipe.tokens:
        problems.append(f"batch_tokens: expected at most tokens = {recipe.tokens}, got {recipe.batch_tokens}.")
    if recipe.harvest.exclude_leading >= recipe.text.context_length:
        problems.append(
            f"harvest.exclude_leading: expected less than text.context_length = {recipe.text.context_length}, "
            f"got {recipe.harvest.exclude_leading}; nothing would be left."
        )
    needed = {"files": ("files", recipe.text.files), "hub": ("dataset", recipe.text.dataset)}
    if recipe.text.source in needed and not needed[recipe.text.source][1]:
        problems.append(
            f"text.{needed[recipe.text.source][0]}: required when text.source is {recipe.text.source}, but missing."
        )
    if recipe.text.source == "embedded" and recipe.model.id != "embedded":
        problems.append("text.source: the embedded corpus is for model.id embedded. Set text.source to files or hub.")
    return problems


def _explain(problem: Any, values: Any, prefix: tuple[str, ...] = (), takes: str = "") -> str:
    """One pydantic error in this project's words."""
    loc, kind = tuple(str(part) for part in problem["loc"]), problem["type"]
    key = ".".join((*prefix, *loc))
    if kind == "extra_forbidden":
        known = ENCODERS[values["name"]].parameters_of() if prefix else _fields_at(loc[:-1])
        return f"{key}: unknown key. {takes or 'Known here: ' + ', '.join(known) + '.'}{_nearest(loc[-1], known)}"
    if kind == "missing":
        return f"{key}: required, but missing. {takes}".rstrip()
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    given = problem["input"]
    hint = " Write whole numbers without exponent, like 2_000_000." if kind == "int_type" and isinstance(given, float) else ""
    return f"{key}: expected {message}, got {given!r}.{hint}"


def _fields_at(loc: tuple[str, ...]) -> list[str]:
    """Valid keys of the section at ``loc``."""
    section: type[BaseModel] = Recipe
    for part in loc:
        annotation = section.model_fields[part].annotation
        options = [option for option in (annotation, *get_args(annotation)) if isinstance(option, type)]
        section = next(option for option in options if issubclass(option, BaseModel))
    return list(section.model_fields)


def _nearest(name: str, choices: Any) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults written out; loads back to an equal recipe."""
    buffer = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(TypeAdapter(Recipe).dump_python(recipe, mode="json"), buffer)
    return buffer.getvalue()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys, with both values, in which ``new`` would not continue ``old``."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] not in FREE_ON_RESUME
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: leaf for key, value in values.items() for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
