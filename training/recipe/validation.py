"""Validation of recipes: mistakes that involve several keys, each as one readable line."""

from typing import Any

from ...sae.encoders import ENCODERS, build_encoder
from ...sae.suggestions import did_you_mean
from ...transcoders.cross_layer import JOINT_ENCODERS, LAYER_ENCODERS
from .dictionary_checks import check_dictionary, check_start
from .encoder_checks import check_encoder, with_budget
from .hook_names import check_hook, theirs, unharvested
from .model_pair import pair_problems
from .schema import Recipe, total_steps
from .text_checks import check_text


def check_together(recipe: Recipe) -> list[str]:
    """Return one line for each mistake that involves several keys."""
    section = recipe.dictionary
    problems = check_start(section) + _check_training(recipe) + check_dictionary(section, recipe.model.id)
    own = [key for key in ("hook", "hooks") if getattr(section, key) is not None]
    named = own or (["hook_in", "hook_out"] if section.resolved else [])
    foreign = any(theirs(hook) for hook in (*(section.all_hooks if named and not problems else ()), *recipe.harvest.hooks))
    # Hooks in another spelling are compared when the model is known.
    for key in named if not problems and not foreign else ():
        problems += unharvested(recipe, f"dictionary.{key}", section.hooks_in if key != "hook_out" else section.hooks_out)
    for index, hook in enumerate(recipe.harvest.hooks):
        problems += check_hook(f"harvest.hooks.{index}", hook, recipe.model.id)
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
    # The encoder of a start is not known yet.
    named = [
        spec["name"] for spec in (recipe.dictionary.encoder, *(phase.encoder for phase in recipe.phases)) if spec is not None
    ]
    needs = [name for name in named if name in ENCODERS and ENCODERS[name].needs_gradient]
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
