"""Validation of recipes: one readable line per mistake, with the nearest valid name."""

import difflib
import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ...sae.encoders import ENCODERS, build_encoder
from ...sae.formats.hooks import to_module
from ...sae.suggestions import did_you_mean
from ...transcoders.cross_layer import JOINT_ENCODERS, LAYER_ENCODERS
from .model_pair import pair_problems
from .schema import MLP_START, DictionarySection, Recipe, total_steps
from .text_checks import check_text


def encoder_specs(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return every encoder in unchecked values, with its key."""
    section = values.get("dictionary")
    found = [("dictionary.encoder", section)]
    if isinstance(values.get("phases"), list):
        found += [(f"phases.{i}.encoder", phase) for i, phase in enumerate(values["phases"])]
    specs = [
        (key, section["encoder"])
        for key, section in found
        if isinstance(section, dict) and isinstance(section.get("encoder"), dict)
    ]
    started = isinstance(section, dict) and section.get("start") is not None
    return [(key, with_budget(spec) if started and key == "dictionary.encoder" else spec) for key, spec in specs]


def missing_budget(spec: dict[str, Any]) -> str | None:
    """Return the argument that is the number of active latents, if an encoder needs it and its spec leaves it out."""
    name = spec.get("name")
    takes = ENCODERS[name].parameters_of() if isinstance(name, str) and name in ENCODERS else {}
    if "k" in takes:
        return None if "k" in spec else "k"
    # With a weight of its own, a penalty needs no target.
    return "target_l0" if "target_l0" in takes and not {"target_l0", "sparsity"} & spec.keys() else None


def with_budget(spec: dict[str, Any], l0: float = 1) -> dict[str, Any]:
    """Return the spec with a missing number of active latents set to ``l0``: by default to one that is valid anywhere."""
    key = missing_budget(spec)
    return spec if key is None else spec | {key: max(1, round(l0)) if key == "k" else max(1.0, round(l0, 2))}


def check_encoder(spec: dict[str, Any], key: str) -> list[str]:
    name = spec.get("name")
    # Any YAML value, also one that cannot be looked up, such as a list.
    if not isinstance(name, str) or name not in ENCODERS:
        if name is None:
            return [f"{key}.name: required, but missing. Choose one of {', '.join(ENCODERS)}."]
        return [f"{key}.name: expected one of {', '.join(ENCODERS)}, got {name!r}.{did_you_mean(str(name), ENCODERS)}"]
    try:
        encoder_schema(name).model_validate({name: value for name, value in spec.items() if name != "name"})
    except ValidationError as error:
        takes = f"{name} takes {', '.join(ENCODERS[name].parameters_of())}."
        return [explain(problem, spec, tuple(key.split(".")), takes) for problem in error.errors()]
    return []


@cache
def encoder_schema(name: str) -> type[BaseModel]:
    """Return a strict schema made from an encoder's constructor."""
    fields: dict[str, Any] = {
        key: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for key, p in ENCODERS[name].parameters_of().items()
    }
    return create_model(name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def check_together(recipe: Recipe) -> list[str]:
    """Return one line for each mistake that involves several keys."""
    section = recipe.dictionary
    problems = _check_start(section) + _check_training(recipe) + _check_dictionary(section, recipe.model.id)
    own = [key for key in ("hook", "hooks") if getattr(section, key) is not None]
    named = own or (["hook_in", "hook_out"] if section.resolved else [])
    foreign = any(theirs(hook) for hook in (*(section.all_hooks if named and not problems else ()), *recipe.harvest.hooks))
    # Hooks in another spelling are compared when the model is known.
    for key in named if not problems and not foreign else ():
        problems += unharvested(recipe, f"dictionary.{key}", section.hooks_in if key != "hook_out" else section.hooks_out)
    for index, hook in enumerate(recipe.harvest.hooks):
        problems += _check_hook(f"harvest.hooks.{index}", hook, recipe.model.id)
    if not problems:
        hooks = {f"dictionary.{named[0]}": section.all_hooks} if named else {}
        problems += pair_problems(recipe.model, {**hooks, "harvest.hooks": recipe.harvest.hooks})
        if recipe.model.tuned is not None and not section.resolved:
            problems.append("dictionary.site: expected hooks with two models, which may differ in their layers. Give hook.")
        if recipe.model.tuned is not None and (recipe.uses_kl or recipe.harvest.gradients):
            key = "objective" if recipe.uses_kl else "harvest.gradients"
            problems.append(
                f"{key}: expected {'reconstruction' if recipe.uses_kl else 'false'} with two models, whose losses differ."
            )
    if recipe.harvest.store is not None and recipe.harvest.tokens is None:
        problems.append("harvest.tokens: required with harvest.store, but missing.")
    if len(set(recipe.harvest.hooks)) < len(recipe.harvest.hooks):
        problems.append("harvest.hooks: expected each hook once, got one twice.")
    if recipe.harvest.files:
        problems += _check_files(recipe)
    if recipe.uses_kl:
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
    return problems + check_text(recipe)


def _check_files(recipe: Recipe) -> list[str]:
    """Check the keys that a recipe on files of vectors cannot have: what only a language model gives."""
    harvest, kind = recipe.harvest, recipe.dictionary.kind
    needs = [spec["name"] for spec in recipe.encoders if spec["name"] in ENCODERS and ENCODERS[spec["name"]].needs_gradient]
    unfit = {
        "dictionary.kind": ("sae", None if kind == "sae" else kind, "vectors have no targets"),
        "dictionary.encoder.name": ("one that needs no gradients", needs[0] if needs else None, "vectors have none"),
        "objective": ("reconstruction", "kl" if recipe.uses_kl else None, "vectors have no model"),
        "harvest.store": ("null", harvest.store, "the files are read directly"),
        "harvest.tokens": ("null", harvest.tokens, "all vectors are used; `tokens` is the number trained on"),
        "harvest.gradients": ("false", harvest.gradients or None, "vectors have no model"),
    }
    return [
        f"{key}: expected {wanted} with harvest.files, because {why}, got {got!r}."
        for key, (wanted, got, why) in unfit.items()
        if got is not None
    ]


def _check_start(section: DictionarySection) -> list[str]:
    """Check the keys that a warm start makes optional, or that only it may set."""
    if section.start is not None:
        given = {*section.start.model_fields_set, "path"} - {"path", "new_latents"}
        if section.start.path == MLP_START and given:
            return [f"dictionary.start.{min(given)}: expected none with path mlp, which reads no files. Leave it out."]
        return []
    problems = [
        f"dictionary.{key}: required, but missing." for key in ("n_latents", "encoder") if getattr(section, key) is None
    ]
    if section.row_norm is not None:
        problems.append(
            f"dictionary.row_norm: expected null without dictionary.start, got {section.row_norm!r}. Leave it out: new "
            "dictionaries are trained on inputs that are divided by one scale."
        )
    return problems


def unharvested(recipe: Recipe, key: str, hooks: Iterable[str]) -> list[str]:
    """Return one line for each hook that is missing from ``harvest.hooks``, if those are given."""
    given = recipe.harvest.hooks
    return [
        f"{key}: expected one of harvest.hooks ({', '.join(given)}), got {hook!r}.{did_you_mean(hook, given)}"
        for hook in hooks
        if given and hook not in given
    ]


def theirs(hook: str) -> tuple[int, str] | None:
    """Return layer and place of a hook in TransformerLens's spelling that a recipe may name; None for other hooks."""
    found = re.fullmatch(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, READ))})(?::out)?", hook)
    return (int(found[1]), found[2]) if found else None


def _check_hook(key: str, hook: str, model: str) -> list[str]:
    path, _, side = hook.rpartition(":")
    if theirs(hook) is not None:
        return []
    named = re.fullmatch(r"(?:blocks\.(\d+)\.)?((?:\w+\.)*hook_\w+)(?::(?:in|out))?", hook)
    if named is None and side in ("in", "out") and path:
        return []
    layer, place = named.groups() if named else (None, hook)
    module = to_module(hook.removesuffix(f":{side}"), model) if named else None
    site = PLACES.get(place, place)
    site = "mlp" if site in SITES and key.endswith(("hook_in", "hook_out")) else site
    fix = ""
    if module is not None:
        fix = f" In this model that is {module}."
    elif site in SITES:
        fix = f" Give dictionary.layer: {layer or 'N'} and dictionary.site: {site} in place of hooks."
    elif named:
        fix = " That is TransformerLens's name of a place for which there is no site. Give the module's own path in this model."
    wanted = "a module path and a side" + ("" if fix else f", like {hook.split(':')[0]}:out")
    return [f"{key}: expected {wanted}, got {hook!r}.{fix}"]


# Sites of a transformer block; their modules are found in the model.
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_heads", "attn_out", "mlp_in", "mlp_out", "mlp", "router")
# TransformerLens's names of the sites.
PLACES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_heads",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}
# Those that recipes take as they are. Their hook_mlp_in is before the norm, which no site is.
READ = (*(place for place in PLACES if place != "hook_mlp_in"), "mlp.hook_pre", "mlp.hook_post")


# Keys that only some kinds of dictionary have, in the order in which mistakes are reported.
KINDS_WITH = {
    "hook": ("sae",),
    "hooks": ("crosscoder",),
    "hook_in": ("transcoder", "cross_layer_transcoder"),
    "hook_out": ("transcoder", "cross_layer_transcoder"),
    "layer": ("sae", "transcoder"),
    "layers": ("cross_layer_transcoder", "crosscoder"),
    "skip": ("transcoder",),
    "joint": ("cross_layer_transcoder",),
    "causal": ("crosscoder",),
}
INSTEAD = {
    "sae": "Give hook, or layer and site",
    "transcoder": "Give hook_in and hook_out, or layer and site",
    "cross_layer_transcoder": "Give hook_in and hook_out as lists, or layers and site",
    "crosscoder": "Give hooks, or layers and site",
}


def _check_dictionary(section: DictionarySection, model: str) -> list[str]:
    """Check that keys fit the kind of dictionary, and that hooks are given in one way only."""
    kind, instead = section.kind, INSTEAD[section.kind]
    # By identity, because layer 0 equals False.
    given = {key for key in (*KINDS_WITH, "site") if not any(getattr(section, key) is unset for unset in (None, False))}
    problems = [
        f"dictionary.{key}: expected it with kind {' or '.join(kinds)} only, got it with kind {kind}."
        + (f" {instead}." if key not in ("skip", "joint", "causal") else " Leave it out.")
        for key, kinds in KINDS_WITH.items()
        if key in given and kind not in kinds
    ]
    if problems:
        return problems
    ways = [_hook_keys(kind), (_layers_key(kind), "site")]
    started = [way for way in ways if given & set(way)]
    if len(started) != 1:
        found = " and ".join(key for way in ways for key in way if key in given)
        return [f"dictionary: expected hooks, or a layer and its site, got {found or 'neither'}. {instead}."]
    missing = [key for key in started[0] if key not in given]
    if missing:
        return [f"dictionary.{missing[0]}: required beside {(given & set(started[0])).pop()}, but missing. {instead}."]
    if started[0] == ways[1]:
        return _check_layers(section)
    return _check_hooks(section, model)


def _hook_keys(kind: str) -> tuple[str, ...]:
    return {"sae": ("hook",), "crosscoder": ("hooks",)}.get(kind, ("hook_in", "hook_out"))


def _layers_key(kind: str) -> str:
    return "layers" if kind in KINDS_WITH["layers"] else "layer"


def _check_layers(section: DictionarySection) -> list[str]:
    layers = section.layers
    if isinstance(layers, tuple) and (len(layers) < 2 or sorted(set(layers)) != list(layers) or layers[0] < 0):
        return [f"dictionary.layers: expected all, or two or more layers that ascend from 0 on, got {list(layers)}."]
    return []


def _check_hooks(section: DictionarySection, model: str) -> list[str]:
    problems = []
    many = section.kind in KINDS_WITH["layers"]
    for key in _hook_keys(section.kind):
        value = getattr(section, key)
        if isinstance(value, tuple) != many:
            wanted = "a list of hooks, one of every layer" if many else "one hook"
            wanted = "a list of two or more hooks" if section.kind == "crosscoder" else wanted
            problems.append(f"dictionary.{key}: expected {wanted}, got {list(value) if isinstance(value, tuple) else value!r}.")
            continue
        hooks = value if isinstance(value, tuple) else (value,)
        problems += [line for hook in hooks for line in _check_hook(f"dictionary.{key}", hook, model)]
        if len(set(hooks)) < len(hooks):
            problems.append(f"dictionary.{key}: expected each hook once, got one twice.")
    if not problems and section.kind == "crosscoder" and len(section.hooks_in) < 2:
        problems.append(
            "dictionary.hooks: expected two or more hooks, got one. What reconstructs a single activation is kind: sae."
        )
    if (
        not problems
        and many
        and section.two_sided
        and (len(section.hooks_in) < 2 or len(section.hooks_in) != len(section.hooks_out))
    ):
        sizes = f"{len(section.hooks_in)} and {len(section.hooks_out)}"
        problems.append(f"dictionary.hook_out: expected two or more hooks, as many as in hook_in, got {sizes}.")
    if not problems and section.two_sided and set(section.hooks_in) & set(section.hooks_out):
        twice = next(hook for hook in section.hooks_in if hook in section.hooks_out)
        problems.append(
            f"dictionary.hook_out: expected hooks other than those of hook_in, got {twice!r} in both. "
            "What reconstructs its input is kind: sae."
        )
    return problems


def _check_crosscoder(recipe: Recipe) -> list[str]:
    """Check the restrictions of crosscoders."""
    if recipe.uses_kl:
        return [
            "objective: expected reconstruction with a crosscoder, whose code needs later activations than the first it would "
            "replace, got kl."
        ]
    return []


def _words_of(recipe: Recipe) -> str:
    return "a causal crosscoder" if recipe.dictionary.causal else "a cross_layer_transcoder"


def _check_cross_layer(recipe: Recipe) -> list[str]:
    """Check the restrictions of cross-layer transcoders."""
    spec, problems = recipe.dictionary.encoder or {}, []
    name = spec.get("name")
    allowed = JOINT_ENCODERS if recipe.dictionary.joint else LAYER_ENCODERS
    if name in ENCODERS and name not in allowed:
        where = "with joint" if recipe.dictionary.joint else f"in {_words_of(recipe)}"
        problems.append(f"dictionary.encoder.name: expected {' or '.join(allowed)} {where}, got {name!r}.")
    # An omitted penalty has this default.
    if recipe.dictionary.joint and name == "jumprelu" and spec.get("penalty", "square") == "square":
        problems.append(
            "dictionary.encoder.penalty: expected l0 or tanh with joint, because square is about one layer's target."
        )
    if recipe.phases:
        problems.append(f"phases: expected none with {_words_of(recipe)}, whose encoder stays one. Leave them out.")
    if recipe.screen != "none":
        problems.append(f"screen: expected none with {_words_of(recipe)}, got {recipe.screen!r}.")
    if recipe.objective != "reconstruction":
        problems.append(
            f"objective: expected reconstruction with {_words_of(recipe)}, which writes to many layers, "
            f"got {recipe.objective!r}."
        )
    return problems


def _check_training(recipe: Recipe) -> list[str]:
    """Check encoders, schedules and phases against each other and against the batch size."""
    section = recipe.dictionary
    own = None if section.encoder is None else section.encoder if section.start is None else with_budget(section.encoder)
    specs = [("dictionary.encoder", own), *((f"phases.{i}.encoder", phase.encoder) for i, phase in enumerate(recipe.phases))]
    # A phase without an encoder keeps that of the one before; the start's is checked when it is known.
    specs = [(key, spec) for key, spec in specs if spec is not None]
    problems = _check_objectives(recipe)
    for key, spec in specs:
        if not check_encoder(spec, key):
            problems += _check_variants(recipe, key, spec)
    if recipe.dictionary.built_kind == "cross_layer_transcoder":
        problems += _check_cross_layer(recipe)
    if recipe.dictionary.built_kind == "crosscoder":
        problems += _check_crosscoder(recipe)
    # Names that cannot be looked up, such as lists, have been reported.
    specs = [(key, spec) for key, spec in specs if isinstance(spec.get("name"), str)]
    names = {spec["name"] for _, spec in specs if spec["name"] in ENCODERS}
    if recipe.screen != "none" and not any(ENCODERS[name].can_screen for name in names):
        able = ", ".join(name for name, encoder in ENCODERS.items() if encoder.can_screen)
        problems.append(f"screen: expected none, because only {able} can screen, got {recipe.screen!r}.")
    arguments = {name for _, spec in specs if spec["name"] in ENCODERS for name in ENCODERS[spec["name"]].parameters_of()}
    for name, knots in recipe.schedules.items():
        if name not in arguments:
            problems.append(f"schedules.{name}: no encoder of this recipe has that argument.{did_you_mean(name, arguments)}")
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
        # Tolerates rounding in the sum of two shares.
        if phase.start + phase.blend > end + 1e-9:
            left = f"{end - phase.start:.3g}, until the phase ends"
            problems.append(f"phases.{i}.blend: expected at most {left}, got {phase.blend}.")
    free = [not ENCODERS[spec["name"]].unit_atoms for _, spec in specs if spec.get("name") in ENCODERS]
    keys = [key for key, _ in specs]
    for i, phase in enumerate(recipe.phases):
        # Of this encoder and the one before it among those that the recipe names.
        at = keys.index(f"phases.{i}.encoder") if f"phases.{i}.encoder" in keys else 0
        if phase.blend and len(free) == len(specs) and at and free[at - 1] != free[at]:
            problems.append(
                f"phases.{i}.blend: expected 0 between encoders with free and with unit-norm decoders (relu and others), "
                f"got {phase.blend}."
            )
    if recipe.dictionary.aligned and (recipe.dictionary.kind != "sae" or any(ENCODERS[name].tied for name in names)):
        problems.append(
            "dictionary.aligned: expected it with kind sae and an encoder with its own weights, because it fixes the products "
            "of encoder rows and decoder directions. Leave it out."
        )
    if recipe.weight_average and recipe.phases:
        problems.append(f"weight_average: expected 0 with phases, which may rescale weights, got {recipe.weight_average}.")
    tied = {ENCODERS[spec["name"]].tied for _, spec in specs if spec.get("name") in ENCODERS}
    if len(tied) > 1:
        problems.append("phases: an encoder with tied weights (matching_pursuit) cannot share a run with one without.")
    return problems


def _check_objectives(recipe: Recipe) -> list[str]:
    """Check that every phase changes something, and that no weight leaves a phase without a loss."""
    problems = []
    for i, phase in enumerate(recipe.phases):
        if phase.encoder is None and phase.objective is None and phase.reconstruction_weight is None:
            problems.append(f"phases.{i}: expected an encoder, an objective or a reconstruction_weight, got none.")
        if phase.encoder is None and phase.blend:
            problems.append(f"phases.{i}.blend: expected 0 without an encoder, got {phase.blend}. Only encoders blend.")
    return problems


def _check_variants(recipe: Recipe, key: str, spec: dict[str, Any]) -> list[str]:
    """Check one encoder as it is written, and with every value that its schedules give it."""
    cases = [(key, spec)]
    for name, knots in recipe.schedules.items():
        if name in ENCODERS[spec["name"]].parameters_of():
            cases += [(f"schedules.{name}.{i}", spec | {name: value}) for i, (_, value) in enumerate(knots)]
    problems = []
    pool = recipe.batch_tokens // recipe.accumulate
    for where, case in cases:
        found = check_encoder(case, key)
        if not found:
            try:
                encoder = build_encoder(case)
                if recipe.dictionary.n_latents is not None:
                    encoder.prepare(recipe.dictionary.n_latents)
            except ValueError as error:
                found = [str(error)]
            else:
                if encoder.smallest_batch > pool:
                    found = [
                        f"batch_tokens: {case['name']} needs one match per latent, got {pool} tokens x k {case['k']} = "
                        f"{pool * case['k']} matches for {recipe.dictionary.n_latents} latents. Set batch_tokens / accumulate "
                        f"to at least {encoder.smallest_batch}, raise k, or lower n_latents."
                    ]
                if encoder.for_saes and where == key and recipe.dictionary.kind == "transcoder":
                    because = f"because {encoder.for_saes}, got transcoder."
                    found.append(f"dictionary.kind: expected sae with encoder {case['name']}, {because}")
                if encoder.needs_gradient and where == key and recipe.uses_kl:
                    found.append(f"objective: {case['name']} needs gradients, which the batches of objective kl do not hold.")
                elif encoder.needs_gradient and where == key and not recipe.harvest.gradients:
                    found.append(
                        f"harvest.gradients: expected true, because {case['name']} chooses latents by the loss's gradient, got "
                        "false. Set it, choose a new harvest.store, and run: sparsary harvest RECIPE"
                    )
        problems += [line if where == key else f"{where}: {line}" for line in found]
    return list(dict.fromkeys(line.replace("dictionary.encoder", key, 1) for line in problems))


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
