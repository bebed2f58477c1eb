"""What libraries call a place in a model: TransformerLens's hook names, and module paths with a side, which are ours.

``blocks.3.hook_resid_post`` of GPT-2 is ``transformer.h.3:out``. Tables, not weights: an architecture is told from the
model's name. A place that no module emits, such as a normalised stream before the norm's gain, has no counterpart.
"""

import re
from dataclasses import dataclass

# Sides of a module: what it is given, what it returns.
IN, OUT = "in", "out"


@dataclass(frozen=True)
class ModulePaths:
    """Module paths of one family of models: its blocks, and places in a block by their TransformerLens names.

    A name that stands first for a place is the one that is written.
    """

    blocks: str
    embedding: str | None
    places: tuple[tuple[str, str], ...]


def _decoder(mlp_norm: str, attn_out: str = "self_attn.o_proj:out", mlp_out: str = "mlp:out") -> tuple[tuple[str, str], ...]:
    """The places of a Llama-like block."""
    return (
        ("hook_resid_pre", ":in"),
        ("hook_resid_mid", f"{mlp_norm}:in"),
        ("hook_resid_post", ":out"),
        ("attn.hook_z", "self_attn.o_proj:in"),
        ("hook_attn_out", attn_out),
        ("mlp.hook_in", "mlp:in"),
        ("mlp.hook_pre", "mlp.gate_proj:out"),
        ("mlp.hook_post", "mlp.down_proj:in"),
        ("hook_mlp_out", mlp_out),
        ("mlp.hook_out", "mlp:out"),
    )


GEMMA = _decoder("pre_feedforward_layernorm", "post_attention_layernorm:out", "post_feedforward_layernorm:out")
ARCHITECTURES = {
    "gpt2": ModulePaths(
        "transformer.h",
        "transformer.wte",
        (
            ("hook_resid_pre", ":in"),
            ("hook_resid_mid", "ln_2:in"),
            ("hook_resid_post", ":out"),
            ("attn.hook_z", "attn.c_proj:in"),
            ("hook_attn_out", "attn.c_proj:out"),
            ("mlp.hook_in", "mlp:in"),
            ("mlp.hook_pre", "mlp.c_fc:out"),
            ("mlp.hook_post", "mlp.c_proj:in"),
            ("hook_mlp_out", "mlp:out"),
            ("mlp.hook_out", "mlp:out"),
        ),
    ),
    "gpt_neox": ModulePaths(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        (
            ("hook_resid_pre", ":in"),
            ("hook_resid_post", ":out"),
            ("attn.hook_z", "attention.dense:in"),
            ("hook_attn_out", "attention.dense:out"),
            ("mlp.hook_in", "mlp:in"),
            ("mlp.hook_pre", "mlp.dense_h_to_4h:out"),
            ("mlp.hook_post", "mlp.dense_4h_to_h:in"),
            ("hook_mlp_out", "mlp:out"),
            ("mlp.hook_out", "mlp:out"),
        ),
    ),
    "llama": ModulePaths("model.layers", "model.embed_tokens", _decoder("post_attention_layernorm")),
    # Their embeddings are scaled behind the module, so that no module emits what TransformerLens calls hook_embed.
    "gemma": ModulePaths("model.layers", None, _decoder("post_attention_layernorm")),
    # Gemma 2 and 3 norm what attention and MLP have written before they add it, and that is what the hooks see.
    "gemma2": ModulePaths("model.layers", None, GEMMA),
}
# What norms the families have: RMS norms leave a token's mean in, LayerNorms take it away.
NORMS = {"gpt2": "layer", "gpt_neox": "layer", "llama": "rms", "gemma": "rms", "gemma2": "rms"}
# Told from a name, the first that matches: those of the hub and those of TransformerLens.
NAMES = (
    # But gemma-2b is of the first generation.
    (r"gemma-?[23](?!b)|gemma-?scope", "gemma2"),
    (r"gemma", "gemma"),
    (r"pythia|neox|stablelm-base|redpajama|dolly-v2", "gpt_neox"),
    (r"gpt2|distilgpt2|stanford-gpt2|arwen|embedded", "gpt2"),
    (r"llama|mistral|mixtral|qwen|tinyllama|stories|smollm|olmo|yi-", "llama"),
)
# Streams behind an RMS norm but before its gain, which no module emits -> the input of that norm.
BEFORE_NORM = {
    "llama": {"ln1.hook_normalized": "input_layernorm:in", "ln2.hook_normalized": "post_attention_layernorm:in"},
    "gemma2": {"ln1.hook_normalized": "input_layernorm:in", "ln2.hook_normalized": "pre_feedforward_layernorm:in"},
}
BEFORE_NORM["gemma"] = BEFORE_NORM["llama"]
# Equal module paths: what is given by another name than the tables have.
SAME = {
    "attn:out": "attn.c_proj:out",
    "attention:out": "attention.dense:out",
    "self_attn:out": "self_attn.o_proj:out",
    "mlp.c_proj:out": "mlp:out",
    "mlp.dense_4h_to_h:out": "mlp:out",
    "mlp.down_proj:out": "mlp:out",
    "mlp.c_fc:in": "mlp:in",
    "mlp.dense_h_to_4h:in": "mlp:in",
}
# TransformerLens's names of models -> the hub's, where they differ.
MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt2-small-embedded": "embedded",
}
# Whose models have the same name there, behind the owner's.
OWNERS = (
    (r"pythia-.*", "EleutherAI"),
    (r"gemma-.*", "google"),
    (r"[Mm]istral-7[Bb].*|[Mm]ixtral.*", "mistralai"),
    (r"[Qq]wen.*", "Qwen"),
    (r"(Meta-)?Llama-[23].*", "meta-llama"),
)


def architecture_of(model: str | None) -> str | None:
    """The architecture that a model's name suggests, or ``None``."""
    words = (model or "").lower()
    return next((architecture for pattern, architecture in NAMES if re.search(pattern, words)), None)


def to_module(name: str, model: str | None = None) -> str | None:
    """A hook as a module path with a side; ``None`` if no module of the model emits it, or the model is unknown.

    Takes TransformerLens names, module paths with a side, which stay, and bare module paths, whose output is meant.
    """
    if re.fullmatch(r"[\w.]+:(in|out)", name):
        return name
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found is None and name not in ("hook_embed",):
        return f"{name}:out" if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name) and not name.startswith("ln_final") else None
    architecture = ARCHITECTURES.get(architecture_of(model) or "")
    if architecture is None:
        return None
    if found is None:
        return f"{architecture.embedding}:out" if architecture.embedding else None
    layer, place = found.groups()
    path = dict(architecture.places).get(place)
    return None if path is None else _join(architecture.blocks, layer, path)


def to_transformer_lens(hook: str, model: str | None = None) -> str | None:
    """A module path with a side as TransformerLens names it; ``None`` if it has no name there.

    Without a known model, that architecture counts whose blocks are called so.
    """
    known = ARCHITECTURES.get(architecture_of(model) or "")
    for architecture in (known,) if known is not None else ARCHITECTURES.values():
        if architecture.embedding is not None and hook == f"{architecture.embedding}:out":
            return "hook_embed"
        found = re.fullmatch(rf"{re.escape(architecture.blocks)}\.(\d+)(?:\.([\w.]+))?:(in|out)", hook)
        if found is None:
            continue
        layer, inner, side = found.groups()
        place = f"{inner or ''}:{side}"
        ours = {path: name for name, path in reversed(architecture.places)}
        name = ours.get(place) or ours.get(SAME.get(place, ""))
        if name is not None:
            return f"blocks.{layer}.{name}"
    return None


def before_norm(name: str, model: str | None) -> str | None:
    """The input of the RMS norm behind which, before its gain, a TransformerLens hook is; ``None`` for other hooks."""
    found, architecture = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), architecture_of(model)
    path = None if found is None else BEFORE_NORM.get(architecture or "", {}).get(found.group(2))
    return None if found is None or path is None else _join(ARCHITECTURES[architecture or ""].blocks, found.group(1), path)


def behind_norm(hook: str, model: str | None) -> str | None:
    """The other way: what TransformerLens calls the normed stream of a norm's input."""
    architecture = architecture_of(model) or ""
    blocks = ARCHITECTURES[architecture].blocks if architecture in BEFORE_NORM else ""
    found = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", hook) if blocks else None
    names = {path: name for name, path in BEFORE_NORM.get(architecture, {}).items()}
    return None if found is None or found.group(2) not in names else f"blocks.{found.group(1)}.{names[found.group(2)]}"


def layer_of(hook: str | None) -> int | None:
    """The first number in a hook's name, in either spelling."""
    found = re.search(r"\.(\d+)(?=[.:]|$)", hook or "")
    return int(found.group(1)) if found else None


def hub_model(name: str | None) -> str | None:
    """A model's id on the hub, from what TransformerLens calls it; other names stay."""
    if not name or "/" in name:
        return name or None
    if name in MODELS:
        return MODELS[name]
    owner = next((owner for pattern, owner in OWNERS if re.fullmatch(pattern, name)), None)
    return f"{owner}/{name}" if owner else name


def transformer_lens_model(model: str | None) -> str | None:
    """What TransformerLens calls a model of the hub."""
    if model is None:
        return None
    ours = {there: here for here, there in reversed(MODELS.items())}
    if model in ours:
        return ours[model]
    owner, _, name = model.rpartition("/")
    return name if any(owner == o and re.fullmatch(pattern, name) for pattern, o in OWNERS) else model


def _join(blocks: str, layer: str, path: str) -> str:
    inner, side = path.rsplit(":", 1)
    return f"{blocks}.{layer}{'.' if inner else ''}{inner}:{side}"
