"""Translation between TransformerLens hook names and native hooks (module paths with a side).

``blocks.3.hook_resid_post`` of GPT-2 is ``transformer.h.3:out``. The translation uses tables and infers the architecture from
the model's name, without loading weights. Activations that no module emits, such as a normalized residual stream before the
norm's gain, have no native hook.
"""

import re
from dataclasses import dataclass

# Sides of a module: its input and its output.
IN, OUT = "in", "out"


@dataclass(frozen=True)
class ModulePaths:
    """Module paths of one model architecture: its blocks, its embedding, and sites in a block by TransformerLens name.

    If a site has several names, the first one is written.
    """

    blocks: str
    embedding: str | None
    places: tuple[tuple[str, str], ...]


def _decoder(mlp_norm: str, attn_out: str = "self_attn.o_proj:out", mlp_out: str = "mlp:out") -> tuple[tuple[str, str], ...]:
    """Return the sites of a Llama-like block."""
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
    # Gemma scales embeddings after the embedding module, so no module emits TransformerLens's hook_embed.
    "gemma": ModulePaths("model.layers", None, _decoder("post_attention_layernorm")),
    # Gemma 2 and 3 normalize attention and MLP outputs before adding them; the hooks see the normalized outputs.
    "gemma2": ModulePaths("model.layers", None, GEMMA),
}
# Norm type per architecture: RMS norms keep each token's mean, LayerNorms subtract it.
NORMS = {"gpt2": "layer", "gpt_neox": "layer", "llama": "rms", "gemma": "rms", "gemma2": "rms"}
# Model name pattern (Hub or TransformerLens name) -> architecture; the first match counts.
NAMES = (
    # gemma-2b is first-generation Gemma.
    (r"gemma-?[23](?!b)|gemma-?scope", "gemma2"),
    (r"gemma", "gemma"),
    (r"pythia|neox|stablelm-base|redpajama|dolly-v2", "gpt_neox"),
    (r"gpt2|distilgpt2|stanford-gpt2|arwen|embedded", "gpt2"),
    (r"llama|mistral|mixtral|qwen|tinyllama|stories|smollm|olmo|yi-", "llama"),
)
# RMS-normalized activations before the gain, which no module emits -> the input of that norm.
BEFORE_NORM = {
    "llama": {"ln1.hook_normalized": "input_layernorm:in", "ln2.hook_normalized": "post_attention_layernorm:in"},
    "gemma2": {"ln1.hook_normalized": "input_layernorm:in", "ln2.hook_normalized": "pre_feedforward_layernorm:in"},
}
BEFORE_NORM["gemma"] = BEFORE_NORM["llama"]
# Equivalent module paths -> the path used in the tables.
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
# TransformerLens model names -> Hub ids, where they differ.
MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt2-small-embedded": "embedded",
}
# Name patterns of models whose Hub id is owner/name.
OWNERS = (
    (r"pythia-.*", "EleutherAI"),
    (r"gemma-.*", "google"),
    (r"[Mm]istral-7[Bb].*|[Mm]ixtral.*", "mistralai"),
    (r"[Qq]wen.*", "Qwen"),
    (r"(Meta-)?Llama-[23].*", "meta-llama"),
)


def architecture_of(model: str | None) -> str | None:
    """Return the architecture inferred from a model's name, or ``None``."""
    words = (model or "").lower()
    return next((architecture for pattern, architecture in NAMES if re.search(pattern, words)), None)


def to_module(name: str, model: str | None = None) -> str | None:
    """Return a hook as a module path with a side; ``None`` if no module of the model emits it, or the model is unknown.

    Accepts TransformerLens names, module paths with a side (returned unchanged), and bare module paths (their output).
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
    """Return the TransformerLens name of a module path with a side, or ``None`` if it has none.

    For an unknown model, the architecture is inferred from the module path of its blocks.
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
    """Return the input hook of the RMS norm whose normalized output (before the gain) is ``name``; ``None`` for other hooks."""
    found, architecture = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), architecture_of(model)
    path = None if found is None else BEFORE_NORM.get(architecture or "", {}).get(found.group(2))
    return None if found is None or path is None else _join(ARCHITECTURES[architecture or ""].blocks, found.group(1), path)


def behind_norm(hook: str, model: str | None) -> str | None:
    """Return the TransformerLens name of a norm's normalized output, given its input hook; the inverse of ``before_norm``."""
    architecture = architecture_of(model) or ""
    blocks = ARCHITECTURES[architecture].blocks if architecture in BEFORE_NORM else ""
    found = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", hook) if blocks else None
    names = {path: name for name, path in BEFORE_NORM.get(architecture, {}).items()}
    return None if found is None or found.group(2) not in names else f"blocks.{found.group(1)}.{names[found.group(2)]}"


def layer_of(hook: str | None) -> int | None:
    """Return the layer of a hook: the first number in its name, in either spelling."""
    found = re.search(r"\.(\d+)(?=[.:]|$)", hook or "")
    return int(found.group(1)) if found else None


def hub_model(name: str | None) -> str | None:
    """Return the Hub id of a TransformerLens model name; other names are returned unchanged."""
    if not name or "/" in name:
        return name or None
    if name in MODELS:
        return MODELS[name]
    owner = next((owner for pattern, owner in OWNERS if re.fullmatch(pattern, name)), None)
    return f"{owner}/{name}" if owner else name


def transformer_lens_model(model: str | None) -> str | None:
    """Return the TransformerLens name of a Hub id; other ids are returned unchanged."""
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
