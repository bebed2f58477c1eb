"""Conversion of dictionaries trained on TransformerLens-processed weights to dictionaries of the published model.

Files record the weight processing (``model_from_pretrained_kwargs``) and the positions used in training (``seqpos_slice``).
Processing that changes activations at a dictionary's hooks is folded if an equivalent exists, or applied during evaluation if
possible; otherwise a warning names the field. Source: ``HookedTransformer.from_pretrained`` of TransformerLens 3.9.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .canonical import CanonicalSAE
from .folding import fold_all, fold_b_in, wide
from .hooks import NORMS, architecture_of, to_transformer_lens

CENTRED = "centred"
KWARGS, CENTRE = "model_from_pretrained_kwargs", "center_writing_weights"
# TransformerLens names of hooks in a block, and outside of blocks.
STREAMS = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_out"}
STREAMS |= {"hook_embed", "hook_pos_embed", "hook_attn_in", "hook_mlp_in"}
BEHIND_NORMS = {"ln1.hook_normalized", "ln2.hook_normalized", "ln_final.hook_normalized", "mlp.hook_in"}
INSIDE_HEADS = {"attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"}
# Processing that cannot be folded -> the hooks whose activations it changes, and the change.
CHANGES: dict[str, tuple[set[str], str]] = {
    "fold_ln": (BEHIND_NORMS, "what norms give out is without their gain and bias"),
    "fold_value_biases": ({"attn.hook_v", "attn.hook_z"}, "values of heads are without their biases"),
    "refactor_factored_attn_matrices": (INSIDE_HEADS, "the axes inside heads are others"),
    "center_unembed": (set(), "logits are less their mean"),
}
# Arguments that affect only how the model is loaded, or rounding.
HARMLESS = {"device", "n_devices", "move_to_device", "device_map", "low_cpu_mem_usage", "use_safetensors", "cache_dir", "token"}
HARMLESS |= {"local_files_only", "trust_remote_code", "attn_implementation", "hf_model", "tokenizer", "default_padding_side"}
HARMLESS |= {"default_prepend_bos", "n_ctx", "first_n_layers", "use_cache", "output_hidden_states"}
DTYPES = ("float32", "bfloat16", "float16")


def of_published_model(n: CanonicalSAE, about: Mapping[str, Any]) -> CanonicalSAE:
    """Convert a dictionary (with provenance) to one of the published model, with warnings for what cannot be converted.

    Args:
        about: Metadata from the files: ``model_from_pretrained_kwargs``, ``seqpos_slice``, ``hook_name``, and others.
    """
    kwargs = about.get(KWARGS) or {}
    if not isinstance(kwargs, Mapping):
        return n.noting(warnings=(*n.warnings, f"{KWARGS}: expected a mapping, got {kwargs!r}: not obeyed"))
    model = (n.provenance.get("model") or {}).get("id")
    places = [_place(about, n, side, model) for side in ("in", "out")]
    for key, value in kwargs.items():
        if value is None or value is False or key in HARMLESS:
            continue
        if key == CENTRE:
            n = _centred(n, places, model)
        elif key in CHANGES:
            at, change = CHANGES[key]
            hit = [place for place in places if place is None or place in at]
            n = _doubt(n, key, f"{change}, and the published model's have them") if hit and at else _unchanged(n, key)
        else:
            n = _loaded_with(n, key, value)
    return _positions(n, about)


def _place(about: Mapping[str, Any], n: CanonicalSAE, side: str, model: str | None) -> str | None:
    """Return the TransformerLens name of a hook within its block."""
    name = about.get("hook_name_out") if side == "out" else None
    name = name or about.get("hook_name")
    hook = next(iter(n.provenance.get(f"hooks_{side}") or ()), None)
    if not isinstance(name, str) or not re.match(r"blocks\.|hook_|ln_final", name):
        name = hook and to_transformer_lens(hook, model)
    return None if name is None else re.sub(r"^blocks\.\d+\.", "", name)


def _centred(n: CanonicalSAE, places: Sequence[str | None], model: str | None) -> CanonicalSAE:
    """Convert a dictionary of mean-centered residual streams to one of the original, uncentered streams.

    The next LayerNorm subtracts the mean anyway, so the model's function is the same. Models without LayerNorm are not
    centered.
    """
    norm = NORMS.get(architecture_of(model) or "")
    if norm == "rms":
        return n.noting(f"{CENTRE}: TransformerLens centres no model with RMS norms")
    if not any(place is None or place in STREAMS for place in places):
        return _unchanged(n, CENTRE)
    if norm is None or None in places:
        return _doubt(n, CENTRE, "it is not known whether the model has LayerNorms and whether the hook is a stream")
    if n.row_norm == "layer_norm" and n.kind == "sae":
        return n.noting(f"{CENTRE}: the normalisation of each token takes its mean away in any case")
    if n.row_norm is not None:
        return _doubt(n, CENTRE, f"activations are less each token's mean before the {n.row_norm}")
    if n.kind == "sae":
        return fold_all(n).noting(f"{CENTRE}: each token's mean is taken away first and added again", row_norm=CENTRED)
    if places[0] in STREAMS:
        n = fold_b_in(n)
        assert n.W_enc is not None
        blind: dict[str, Any] = {"W_enc": wide(n.W_enc) - wide(n.W_enc).mean(1, keepdim=True)}
        if n.W_skip is not None:
            blind["W_skip"] = wide(n.W_skip) - wide(n.W_skip).mean(1, keepdim=True)
        n = n.noting(f"{CENTRE}: each token's mean folded out of the encoder", **blind)
    return _doubt(n, CENTRE, "outputs are without each token's mean") if places[1] in STREAMS else n


def _loaded_with(n: CanonicalSAE, key: str, value: Any) -> CanonicalSAE:
    """Record revision and dtype in the provenance, and warn about other arguments."""
    if key == "revision" and isinstance(value, str):
        return _with(n, "model", {"revision": value}, f"{KWARGS}.{key} {value}")
    model = (n.provenance.get("model") or {}).get("id") or ""
    if key == "checkpoint_value" and "pythia" in model:
        return _with(n, "model", {"revision": f"step{value}"}, f"{KWARGS}.{key} {value} is revision step{value}")
    dtype = str(value).removeprefix("torch.")
    if key in ("dtype", "torch_dtype") and dtype in DTYPES:
        return _with(n, "model", {"dtype": dtype}, f"{KWARGS}.{key} {dtype}")
    return _doubt(n, key, f"it is {value!r}, which nothing here obeys")


def _positions(n: CanonicalSAE, about: Mapping[str, Any]) -> CanonicalSAE:
    """Exclude leading positions that training excluded, and warn about other slices."""
    said = about.get("seqpos_slice")
    if said in (None, [], ()):
        return n
    try:
        taken = slice(*said)
        start = taken.start or 0
        leading = start >= 0 and taken.stop is None and taken.step in (None, 1)
    except TypeError:
        taken, start, leading = None, 0, False
    if not leading:
        doubt = f"seqpos_slice {said}: it was trained on these positions of a context alone, and is evaluated on others"
        return n.noting(warnings=(*n.warnings, doubt))
    if not start:
        return n
    return _with(n, "harvest", {"exclude_leading": start}, f"seqpos_slice: the first {start} positions of a context left out")


def _with(n: CanonicalSAE, section: str, values: dict[str, Any], words: str) -> CanonicalSAE:
    kept = n.provenance.get(section) or {}
    return n.noting(words, provenance={**n.provenance, section: kept | values})


def _doubt(n: CanonicalSAE, key: str, why: str) -> CanonicalSAE:
    return n.noting(warnings=(*n.warnings, f"{KWARGS}.{key} is not obeyed: {why}"))


def _unchanged(n: CanonicalSAE, key: str) -> CanonicalSAE:
    return n.noting(f"{KWARGS}.{key} changes no activation at this hook")
