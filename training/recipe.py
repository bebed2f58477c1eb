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


class PhaseSection(Section):
    """Another encoder from some point of the run on; it takes over what the one before it measured."""

    start: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="share of the run at which the phase begins")
    encoder: dict[str, Any] = Field(description="name of the variant and its arguments")
    blend: Share = Field(default=0.0, description="share of the run over which more and more batches belong to the new phase")
    lr_factor: Annotated[float, Field(gt=0.0)] = Field(default=1.0, description="what lr is multiplied by from then on")


# [[share of the run, value], ...]
Knots = Annotated[tuple[Annotated[tuple[float, int | float], Field(strict=False)], ...], Field(strict=False, min_length=1)]


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
    screen: Literal["none", "int8"] = Field(
        default="none",
        description="int8: a coarse product finds candidates, an exact one ranks them (topk). Faster; seldom misses a latent",
    )
    screen_floor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.999,
        description="smallest share of the latents exact selection takes; below it there are more candidates, then no screen",
    )
    optimizer: Literal["auto", "plain"] = Field(
        default="auto",
        description="auto: Adam in one pass over the latents where there are kernels for it, no accumulation and one process; "
        "plain: gradients written out and torch's Adam. Both are the same step up to rounding",
    )
    objective: Literal["reconstruction", "kl"] = Field(
        default="reconstruction",
        description="kl trains end to end: the loss is what the model's predictions lose when it runs on the reconstruction",
    )
    reconstruction_weight: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None, description="weight of the reconstruction error; null: 1, or 0 with objective kl"
    )
    phases: Annotated[tuple[PhaseSection, ...], Field(strict=False)] = Field(
        default=(), description="encoders that follow dictionary.encoder within the run, each with its start"
    )
    schedules: dict[str, Knots] = Field(
        default_factory=dict,
        description="encoder argument -> [[share of the run, value], ...]: piecewise linear, for example k or beta",
    )
    auxk_weight: Annotated[float, Field(ge=0.0)] = Field(default=1 / 32, description="Gao et al. 2024, appendix A.2")
    auxk_latents: Positive | None = Field(
        default=None, description="dead latents per token in the auxiliary loss; null: d_in / 2"
    )
    aux_zipf_tau: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="above 0 the auxiliary loss also takes latents that fire less than tau times what a Zipf law expects of "
        "their rank (aux_zipf_loss); 0 is AuxK. On stories3M 0.1 changed nothing and 0.5 left more latents dead",
    )
    aux_zipf_absolute: bool = Field(default=False, description="compare with what the law expects of the last rank instead")
    calibration_tokens: Positive = Field(
        default=262_144, description="tokens from which batch-wide encoders' thresholds are set when training ends"
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

    A recipe may name another as its ``base``, relative to itself: it then holds what differs from it.

    Raises:
        ValueError: With one line per mistake.
    """
    values = read_values(path, overrides)
    if "grid" in values:
        raise ValueError(f"{path}: grid: expected a recipe of one run here, got several. Name one member's recipe.yaml.")
    return check_recipe(values, str(path))


def read_values(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's values, its base's below and the overrides above them; nothing else is checked."""
    values = _read_values(Path(path), ())
    for key, value in (overrides or {}).items():
        override(values, key, value)
    return values


def _read_values(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's unchecked values over those of its base."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a recipe file ({error}).") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of recipe keys, got {type(values).__name__}.")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in above:
        raise ValueError(
            f"{path}: base: expected the name of another recipe file, which does not lead back here, got {base!r}."
        )
    return _merged(_read_values(path.parent / base, (*above, path.resolve())), values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``base``, section by section. An encoder is replaced whole: its arguments belong to its name."""
    merged = dict(base)
    for key, value in values.items():
        nested = key != "encoder" and isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if nested else value
    return merged


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


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key of unchecked values; what was there is replaced whole."""
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
    for key, spec in _encoder_specs(values):
        problems += _check_encoder(spec, key)
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
            if isinstance(section, list) and isinstance(part, int):
                section = section[part]
            else:
                section = section.get(part) if isinstance(section, dict) else None
        if problem["type"] != "extra_forbidden" or not isinstance(section, dict):
            return None
        section.pop(last)
    return Recipe.model_validate(values)


def _encoder_specs(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every encoder of unchecked values, with its key."""
    found = [("dictionary.encoder", values.get("dictionary"))]
    if isinstance(values.get("phases"), list):
        found += [(f"phases.{i}.encoder", phase) for i, phase in enumerate(values["phases"])]
    return [
        (key, section["encoder"])
        for key, section in found
        if isinstance(section, dict) and isinstance(section.get("encoder"), dict)
    ]


def _check_encoder(spec: dict[str, Any], key: str) -> list[str]:
    name = spec.get("name")
    if name not in ENCODERS:
        if name is None:
            return [f"{key}.name: required, but missing. Choose one of {', '.join(ENCODERS)}."]
        return [f"{key}.name: expected one of {', '.join(ENCODERS)}, got {name!r}.{_nearest(str(name), ENCODERS)}"]
    try:
        encoder_schema(name).model_validate({name: value for name, value in spec.items() if name != "name"})
    except ValidationError as error:
        takes = f"{name} takes {', '.join(ENCODERS[name].parameters_of())}."
        return [_explain(problem, spec, tuple(key.split(".")), takes) for problem in error.errors()]
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
    problems = _check_training(recipe)
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
    if recipe.objective == "kl":
        if recipe.harvest.store is not None:
            problems.append(
                "harvest.store: expected null with objective kl, which runs the model at every step, "
                f"got {recipe.harvest.store!r}."
            )
        if recipe.accumulate > 1:
            problems.append(f"accumulate: expected 1 with objective kl, got {recipe.accumulate}. Lower batch_tokens instead.")
        if recipe.harvest.gradients:
            problems.append("harvest.gradients: expected false with objective kl, whose batches hold no gradients, got true.")
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


def _check_training(recipe: Recipe) -> list[str]:
    """Encoders, schedules and phases against each other and against the batch."""
    specs = [("dictionary.encoder", recipe.dictionary.encoder)]
    specs += [(f"phases.{i}.encoder", phase.encoder) for i, phase in enumerate(recipe.phases)]
    problems = []
    for key, spec in specs:
        if not _check_encoder(spec, key):
            problems += _check_variants(recipe, key, spec)
    names = {spec["name"] for _, spec in specs if spec.get("name") in ENCODERS}
    if recipe.screen != "none" and not any(ENCODERS[name].can_screen for name in names):
        able = ", ".join(name for name, encoder in ENCODERS.items() if encoder.can_screen)
        problems.append(f"screen: expected none, because only {able} can screen, got {recipe.screen!r}.")
    arguments = {name for _, spec in specs if spec.get("name") in ENCODERS for name in ENCODERS[spec["name"]].parameters_of()}
    for name, knots in recipe.schedules.items():
        if name not in arguments:
            problems.append(f"schedules.{name}: no encoder of this recipe has that argument.{_nearest(name, arguments)}")
        shares = [share for share, _ in knots]
        if sorted(set(shares)) != shares or shares[0] < 0 or shares[-1] > 1:
            problems.append(f"schedules.{name}: expected shares of the run that ascend within 0 to 1, got {shares}.")
    starts, steps = [phase.start for phase in recipe.phases], total_steps(recipe)
    firsts = [round(start * steps) for start in starts]
    if sorted(set(starts)) != starts:
        problems.append(f"phases: expected starts that ascend, got {starts}.")
    elif sorted(set(firsts)) != firsts or (firsts and not 0 < firsts[0] <= firsts[-1] < steps):
        problems.append(
            f"phases: expected starts at different steps from 1 to {steps - 1} of the run's {steps}, got steps {firsts}."
        )
    for i, phase in enumerate(recipe.phases if sorted(starts) == starts else ()):
        end = starts[i + 1] if i + 1 < len(starts) else 1.0
        # The sum of two written shares may miss a third by a rounding.
        if phase.start + phase.blend > end + 1e-9:
            left = f"{end - phase.start:.3g}, until the phase ends"
            problems.append(f"phases.{i}.blend: expected at most {left}, got {phase.blend}.")
    free = [not ENCODERS[spec["name"]].unit_atoms for _, spec in specs if spec.get("name") in ENCODERS]
    for i, phase in enumerate(recipe.phases):
        if phase.blend and len(free) == len(specs) and free[i] != free[i + 1]:
            problems.append(f"phases.{i}.blend: expected 0 between free and unit atoms (relu and others), got {phase.blend}.")
    tied = {ENCODERS[spec["name"]].tied for _, spec in specs if spec.get("name") in ENCODERS}
    if len(tied) > 1:
        problems.append("phases: an encoder with tied weights (matching_pursuit) cannot share a run with one without.")
    return problems


def _check_variants(recipe: Recipe, key: str, spec: dict[str, Any]) -> list[str]:
    """One encoder as it stands in the recipe, and with every value its schedules give it."""
    cases = [(key, spec)]
    for name, knots in recipe.schedules.items():
        if name in ENCODERS[spec["name"]].parameters_of():
            cases += [(f"schedules.{name}.{i}", spec | {name: value}) for i, (_, value) in enumerate(knots)]
    problems = []
    pool = recipe.batch_tokens // recipe.accumulate
    for where, case in cases:
        found = _check_encoder(case, key)
        if not found:
            try:
                encoder = build_encoder(case)
                encoder.prepare(recipe.dictionary.n_latents)
            except ValueError as error:
                found = [str(error)]
            else:
                if encoder.smallest_batch > pool:
                    found = [
                        f"batch_tokens: {case['name']} gives every latent a match: {pool} tokens x k {case['k']} = "
                        f"{pool * case['k']} matches for {recipe.dictionary.n_latents} latents. Give at least "
                        f"{encoder.smallest_batch} tokens a batch (divided by accumulate), raise k, or lower n_latents."
                    ]
                if encoder.needs_gradient and where == key and recipe.objective == "kl":
                    found.append(f"objective: {case['name']} needs gradients, which the batches of objective kl do not hold.")
                elif encoder.needs_gradient and where == key and not recipe.harvest.gradients:
                    found.append(
                        f"harvest.gradients: expected true, because {case['name']} chooses latents by the loss's gradient, got "
                        "false. Set it, choose a new harvest.store, and run: sparsary harvest RECIPE"
                    )
        problems += [line if where == key else f"{where}: {line}" for line in found]
    return list(dict.fromkeys(line.replace("dictionary.encoder", key, 1) for line in problems))


def total_steps(recipe: Recipe) -> int:
    """Steps of the whole run; the last batch is a full one."""
    return -(-recipe.tokens // recipe.batch_tokens)


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
    for part in (part for part in loc if not part.isdigit()):
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
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] not in FREE_ON_RESUME
    ]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: leaf for key, value in values.items() for name, leaf in flat(value, f"{prefix}.{key}".lstrip(".")).items()}
