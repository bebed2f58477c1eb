"""Conversion between ``CanonicalSAE`` and native dictionaries.

Only what native dictionaries cannot represent is folded: an input bias that differs from the output bias, and comparisons by
decoder norm. A matrix with contiguous rows stays a view of the memory-mapped file. A transposed one is copied, so that every
latent is a contiguous row: compiled kernels require it, and rounding no longer depends on the source format. The default
dtype is float32.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import KINDS, build_dictionary
from ..dictionary import SparseDictionary
from ..encoders import build_encoder, encoder_spec
from ..encoders.jumprelu import JumpReLU
from ..one_site import OneSiteDictionary
from .canonical import ActivationFn, CanonicalCrosscoder, CanonicalCrossLayer, CanonicalSAE
from .folding import EQUAL, equal_norms, fold_b_in, fold_norm_into_threshold, fold_norms, norms_of, wide


def to_dictionary(
    n: CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder, dtype: torch.dtype | None = torch.float32
) -> SparseDictionary:
    """Build a native dictionary in eval mode; ``dtype=None`` keeps the decoder's dtype.

    Raises:
        ValueError: If no native dictionary can represent it.
    """
    if isinstance(n, CanonicalCrossLayer):
        return _cross_layer(n, dtype)
    if isinstance(n, CanonicalCrosscoder):
        return _crosscoder(n, dtype)
    n = representable(n)
    own = dtype or n.W_dec.dtype
    encoder, state = encoder_of(n)
    if n.kind == "sae":
        if n.d_in != n.d_out:
            raise ValueError(f"W_dec: expected an autoencoder's output as wide as its input, {n.d_in}, got {n.d_out}.")
        if n.W_skip is not None:
            raise ValueError("W_skip: expected no skip path in an autoencoder, got one.")
        rare = {} if n.b_in is not None else {"apply_b_dec_to_input": False}
        arguments: dict[str, Any] = {"kind": "sae", "d_in": n.d_in, "n_latents": n.n_latents} | rare
    else:
        arguments = {"kind": "transcoder", "d_in": n.d_in, "d_out": n.d_out, "n_latents": n.n_latents}
        arguments["skip"] = n.W_skip is not None
        state["in_centre"] = torch.zeros(n.d_in) if n.b_in is None else n.b_in
    arguments |= {"encoder": encoder} | ({} if n.row_norm is None else {"row_norm": n.row_norm})
    state |= _weights(n) | {"in_scale": _number(1 / n.scale_in), "out_scale": _number(1 / n.scale_out)}
    return _assembled(arguments, state, own)


def representable(n: CanonicalSAE) -> CanonicalSAE:
    """Return an equivalent form that a native dictionary can represent."""
    if n.gate.by_norm and n.gate.name == "threshold":
        n = fold_norm_into_threshold(n)
    elif n.gate.by_norm:
        n = replace(n, gate=replace(n.gate, by_norm=False)) if equal_norms(n.W_dec) else fold_norms(n)
    if n.kind == "sae" and n.b_in is not None and not (n.b_in is n.b_out or torch.equal(n.b_in, n.b_out)):
        n = fold_b_in(n)
    if n.gate.k is not None and n.gate.name != "pursuit" and n.gate.k > n.n_latents:
        raise ValueError(f"k: expected at most the {n.n_latents} latents there are, got {n.gate.k}.")
    return n


def _number(value: float | list[float]) -> Tensor:
    """Return a float64 scalar or vector, so that it is rounded only once, to the dictionary's dtype."""
    return torch.tensor(value, dtype=torch.float64)


def _weights(n: CanonicalSAE) -> dict[str, Tensor]:
    """Return the tensors under native names; the native skip path acts on the scaled and centered input."""
    b_dec = n.b_out
    weights = {"W_dec": n.W_dec}
    weights |= {} if n.W_enc is None else {"W_enc": n.W_enc}
    weights |= {} if n.b_enc is None else {"b_enc": n.b_enc}
    if n.W_skip is not None:
        factor = n.scale_out / n.scale_in
        weights["W_skip"] = n.W_skip if factor == 1.0 else wide(n.W_skip) * factor
        if n.b_in is not None:
            b_dec = wide(b_dec) + wide(weights["W_skip"]) @ wide(n.b_in)
    return weights | {"b_dec": b_dec}


def encoder_of(n: CanonicalSAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the encoder specification of an activation function and its tensors, including training-only ones."""
    spec, own = _encoder(n)
    fresh = build_encoder(spec).state_dict()
    return spec, {f"encoder.{name}": tensor for name, tensor in fresh.items()} | own


def _encoder(n: CanonicalSAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gate, k = n.gate, n.gate.k
    if gate.name == "threshold":
        assert gate.threshold is not None
        return {"name": "threshold"}, {"encoder.threshold": gate.threshold.reshape(-1).expand(n.n_latents).clone()}
    if gate.name == "gated":
        assert gate.r_mag is not None
        assert gate.b_mag is not None
        return {"name": "gated"}, {"encoder.r_mag": gate.r_mag, "encoder.b_mag": gate.b_mag}
    if gate.name == "pursuit":
        return _pursuit(n), {}
    specs: dict[str, dict[str, Any]] = {
        "relu": {"name": "relu"},
        "topk": {"name": "topk", "k": k},
        "topk_raw": {"name": "signed_topk", "k": k},
        "abs_topk": {"name": "signed_topk", "k": k, "by": "size"},
        "group_max": {"name": "group_max", "k": k},
    }
    return specs[gate.name], {}


def _pursuit(n: CanonicalSAE) -> dict[str, Any]:
    gate = n.gate
    if n.W_enc is not None or (gate.residual_norm == 0 and not gate.stop_on_repeat):
        # Preferred: compiled, and differentiable through all steps.
        unit = bool(((norms_of(n.W_dec) - 1).abs() < EQUAL).all())
        return {"name": "matching_pursuit", "k": gate.k, "tolerance": gate.tolerance} | ({} if unit else {"unit_norm": False})
    rules = {"residual_norm": gate.residual_norm, "stop_on_repeat": gate.stop_on_repeat}
    return {"name": "residual_pursuit", "max_steps": gate.k} | rules


def _cross_layer(n: CanonicalCrossLayer, dtype: torch.dtype | None) -> SparseDictionary:
    layers = [representable(layer) for layer in n.layers]
    first, count = layers[0], len(layers)
    if any(layer.row_norm is not None for layer in layers):
        raise ValueError("layers: expected a cross-layer transcoder without per-token normalisation, got one with.")
    skip = first.W_skip is not None
    if any((layer.W_skip is not None) != skip for layer in layers):
        raise ValueError("layers: expected a skip path in every layer or in none, got some with and some without.")
    specs, states = zip(*(encoder_of(layer) for layer in layers), strict=True)
    if any(spec != specs[0] for spec in specs) or len({layer.n_latents for layer in layers}) > 1:
        raise ValueError("layers: expected the same gate, k and number of latents in every layer, got different ones.")
    state: dict[str, Tensor] = {}
    biases: list[Tensor] = []
    for i, (layer, own) in enumerate(zip(layers, states, strict=True)):
        weights = _weights(layer)
        state |= {f"{name}.{i}": tensor for name, tensor in weights.items() if name != "b_dec"}
        biases.append(weights["b_dec"])
        prefix = "encoder." if i == 0 else f"later_encoders.{i - 1}."
        state |= {prefix + name.removeprefix("encoder."): tensor for name, tensor in own.items()}
    width_in, width_out = first.d_in, first.b_out.shape[0]
    centres = [torch.zeros(width_in) if layer.b_in is None else layer.b_in for layer in layers]
    state |= {
        "b_dec": torch.cat(biases),
        "in_centre": torch.cat([centre.float() for centre in centres]),
        "in_scale": _number([1 / layer.scale_in for layer in layers]).repeat_interleave(width_in),
        "out_scale": _number([1 / layer.scale_out for layer in layers]).repeat_interleave(width_out),
    }
    arguments = {
        "kind": "cross_layer_transcoder",
        "n_layers": count,
        "d_in": count * width_in,
        "d_out": count * width_out,
        "n_latents": count * first.n_latents,
        "encoder": specs[0],
    } | ({"skip": True} if skip else {})
    return _assembled(arguments, state, dtype or first.W_dec.dtype)


def _crosscoder(n: CanonicalCrosscoder, dtype: torch.dtype | None) -> SparseDictionary:
    whole = representable(n.whole)
    spec, state = encoder_of(whole)
    scale = (1 / _number(list(n.scales))).repeat_interleave(torch.tensor(n.widths))
    state |= _weights(whole) | {"in_scale": scale, "out_scale": scale.clone()}
    names = n.provenance.get("hooks_out") or [str(number) for number in range(len(n.widths))]
    sizes = {"widths": list(n.widths), "n_latents": whole.n_latents, "names": list(names)}
    arguments = {"kind": "crosscoder", **sizes, "apply_b_dec_to_input": False, "encoder": spec}
    return _assembled(arguments, state, dtype or whole.W_dec.dtype)


def _assembled(arguments: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> SparseDictionary:
    """Build the dictionary around these tensors, copied at most once; raise ``ValueError`` for wrong names or shapes."""
    with torch.device("meta"):
        dictionary = build_dictionary(arguments)
    expected = dictionary.state_dict()
    if expected.keys() != state.keys():
        raise ValueError(f"tensors: expected {', '.join(sorted(expected))}, got {', '.join(sorted(state))}.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}.")
    # to() makes rows contiguous only if it changes the dtype, contiguous() handles the rest: at most one copy.
    own = {name: t.to(dtype, memory_format=torch.contiguous_format).contiguous() for name, t in state.items()}
    dictionary.load_state_dict(own, assign=True)
    return dictionary.eval()


@torch.no_grad()
def from_dictionary(
    dictionary: SparseDictionary, provenance: dict[str, Any] | None = None
) -> CanonicalSAE | CanonicalCrossLayer:
    """Return the canonical form of a native dictionary's eval mode. Tensors are shared, not copied.

    TopK and gradient TopK become topk, since no gradient is available at inference; batch-wide encoders and JumpReLU become
    thresholds.

    Raises:
        ValueError: If the dictionary's threshold has not been estimated yet.
    """
    if isinstance(dictionary, OneSiteDictionary):
        return _one_site(dictionary, provenance or {})
    kind = dictionary.arguments()["kind"]
    if kind == "cross_layer_transcoder":
        return _layers(dictionary, provenance or {})
    if kind == "crosscoder":
        raise ValueError(
            "dictionary: expected one of a single hook, or a cross-layer transcoder, got a crosscoder, which no format that is "
            "written can hold. Share the checkpoint itself: sparsary.load reads it."
        )
    raise ValueError(f"dictionary: expected one of {', '.join(KINDS)}, got {type(dictionary).__name__}.")


def _one_site(d: OneSiteDictionary, provenance: dict[str, Any]) -> CanonicalSAE:
    kind = d.arguments()["kind"]
    gate, words = gate_of(d.encoder, d.n_latents)
    shift = None if d.shift is None else d.shift.detach()
    scale_in, scale_out = 1 / float(d.in_scale), 1 / float(d.out_scale)
    b_out = d.b_dec.detach()
    W_skip = getattr(d, "W_skip", None)
    if W_skip is not None:
        b_out = b_out if shift is None else b_out - W_skip.detach() @ shift
        W_skip = W_skip.detach() * (scale_in / scale_out)
    return CanonicalSAE(
        kind=kind,
        W_enc=None if d.W_enc is None else d.W_enc.detach(),
        b_enc=None if d.b_enc is None else d.b_enc.detach(),
        W_dec=d.W_dec.detach(),
        b_out=b_out,
        gate=gate,
        # A zero input bias becomes None, which every format can represent.
        b_in=shift if shift is not None and bool(shift.any()) else None if kind == "transcoder" else shift,
        scale_in=scale_in,
        scale_out=scale_out,
        row_norm=d.row_norm,
        W_skip=W_skip,
        provenance=provenance,
        done=words,
    )


def _layers(d: Any, provenance: dict[str, Any]) -> CanonicalCrossLayer:
    layers = []
    words: tuple[str, ...] = ()
    for site, block, encoder in zip(d.sites, d.blocks, d.encoders, strict=True):
        if d.joint:
            if not int(d.batches):
                raise ValueError("encoder: no threshold is known before the first training batch. Train the dictionary.")
            here = block.latents.stop - block.latents.start
            gate, words = (
                ActivationFn("threshold", threshold=d.level.float().expand(here)),
                ("joint topk as the threshold of eval mode",),
            )
        else:
            gate, words = gate_of(encoder, block.latents.stop - block.latents.start)
        centre, b_out, W_skip = d.in_centre[site.reads], d.b_dec.detach()[site.writes], None
        scale_in, scale_out = 1 / float(d.in_scale[site.reads.start]), 1 / float(d.out_scale[site.writes.start])
        if d.W_skip is not None:
            matrix = d.W_skip[len(layers)].detach()
            b_out, W_skip = b_out - matrix @ centre, matrix * (scale_in / scale_out)
        layers.append(
            CanonicalSAE(
                kind="transcoder",
                W_enc=block.weights.W_enc.detach(),
                b_enc=block.weights.b_enc.detach(),
                W_dec=block.weights.W_dec.detach(),
                b_out=b_out,
                gate=gate,
                b_in=centre if bool(centre.any()) else None,
                scale_in=scale_in,
                scale_out=scale_out,
                W_skip=W_skip,
            )
        )
    return CanonicalCrossLayer(tuple(layers), provenance, words)


def gate_of(encoder: Any, n_latents: int) -> tuple[ActivationFn, tuple[str, ...]]:
    """Return the activation function of a native encoder in eval mode, and notes on what it drops."""
    name = encoder_spec(encoder)["name"]
    return GATE_OF[name](encoder, n_latents)


def _threshold(words: str) -> Callable[[Any, int], tuple[ActivationFn, tuple[str, ...]]]:
    def gate(encoder: Any, n_latents: int) -> tuple[ActivationFn, tuple[str, ...]]:
        level = encoder.thresholds() if isinstance(encoder, JumpReLU) else encoder.known_threshold()
        # k has no effect in eval mode, but some formats store it.
        return ActivationFn("threshold", k=getattr(encoder, "k", None), threshold=level.detach().expand(n_latents)), (words,)

    return gate


def _plain(name: str, *arguments: str) -> Callable[[Any, int], tuple[ActivationFn, tuple[str, ...]]]:
    return lambda encoder, _: (ActivationFn(name, **{key: getattr(encoder, key) for key in arguments}), ())


def _gated(encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    return ActivationFn("gated", r_mag=encoder.r_mag.detach(), b_mag=encoder.b_mag.detach()), ()


def _own_threshold(encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    return ActivationFn("threshold", threshold=encoder.threshold.detach()), ()


def _signed(encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    return ActivationFn("topk_raw" if encoder.by == "value" else "abs_topk", k=encoder.k), ()


def _gradient_topk(encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    return ActivationFn("topk", k=encoder.k), ("gradient topk as the topk it is without a gradient",)


def _residual_pursuit(encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    rules = {"residual_norm": float(encoder.residual_norm), "stop_on_repeat": encoder.stop_on_repeat}
    return ActivationFn("pursuit", k=encoder.max_steps, **rules), ()


def _lista(_encoder: Any, _: int) -> tuple[ActivationFn, tuple[str, ...]]:
    raise ValueError(
        "lista: no other format has an encoder that corrects its selection by the error. Keep the checkpoint as it is saved."
    )


# Encoder name -> its activation function in eval mode.
GATE_OF: dict[str, Callable[[Any, int], tuple[ActivationFn, tuple[str, ...]]]] = {
    "topk": _plain("topk", "k"),
    "multi_topk": _plain("topk", "k"),
    "gradient_topk": _gradient_topk,
    "relu": _plain("relu"),
    "gated": _gated,
    "jumprelu": _threshold("learned thresholds written out"),
    "batch_topk": _threshold("batch topk as the threshold of eval mode"),
    "matryoshka": _threshold("matryoshka as the threshold of eval mode"),
    "mutual_choice": _threshold("mutual choice as the threshold of eval mode"),
    "feature_choice": _threshold("feature choice as the thresholds of eval mode"),
    "lista": _lista,
    "matching_pursuit": _plain("pursuit", "k", "tolerance"),
    "threshold": _own_threshold,
    "signed_topk": _signed,
    "group_max": _plain("group_max", "k"),
    "residual_pursuit": _residual_pursuit,
}
