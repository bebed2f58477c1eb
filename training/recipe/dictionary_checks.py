"""Validation of the section ``dictionary``: its kind, its hooks and what they exclude."""

from .hook_names import check_hook
from .schema import DictionarySection
from .start_schema import MLP_START, AlignSection

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


def check_dictionary(section: DictionarySection, model: str) -> list[str]:
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
        problems += [line for hook in hooks for line in check_hook(f"dictionary.{key}", hook, model)]
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


def check_start(section: DictionarySection) -> list[str]:
    """Check the keys that a warm start makes optional, or that only it may set."""
    if section.start is not None:
        given = {*section.start.model_fields_set, "path"} - {"path", "new_latents"}
        if section.start.path == MLP_START and given:
            return [f"dictionary.start.{min(given)}: expected none with path mlp, which reads no files. Leave it out."]
        return [] if section.start.align is None else _check_align(section, section.start.align)
    problems = [
        f"dictionary.{key}: required, but missing." for key in ("n_latents", "encoder") if getattr(section, key) is None
    ]
    if section.row_norm is not None:
        problems.append(
            f"dictionary.row_norm: expected null without dictionary.start, got {section.row_norm!r}. Leave it out: new "
            "dictionaries are trained on inputs that are divided by one scale."
        )
    return problems


def _check_align(section: DictionarySection, align: AlignSection) -> list[str]:
    """Check that one source of the map is given, and that the kind of dictionary can be mapped."""
    if section.kind not in ("sae", "transcoder"):
        return [
            f"dictionary.start.align: expected null with kind {section.kind}, whose latents read or write several activations "
            "that one map does not move, got a section. Leave it out."
        ]
    sources = {
        "model": align.model is not None,
        "store": align.store is not None,
        "files": bool(align.files),
        "unpaired": align.unpaired,
    }
    given = [key for key, there in sources.items() if there]
    if len(given) > 1:
        return [f"dictionary.start.align: expected one of {', '.join(sources)}, got {' and '.join(given)}. Give one."]
    problems = [
        f"dictionary.start.align.{key}: expected it with kind sae only, got kind {section.kind}. Give a model."
        for key in ("files", "unpaired")
        if key in given and section.kind != "sae"
    ]
    if align.column is not None and not align.files:
        problems.append("dictionary.start.align.column: expected null without files. Leave it out.")
    return problems
