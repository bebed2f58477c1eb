"""Uniform view of transformer weights across architectures, and a recorded forward pass, for linear analysis.

Attention writes ``sum_h z_h @ W_O[h] + b_O``, where ``z_h[t] = sum_s pattern[h, t, s] * v_h[s]`` and
``v_h = x @ W_V[h].T + b_V[h]``. The only nonlinear part of a norm is its division; with the recorded denominator it is linear.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .model import LanguageModel
from .placement import is_spread
from .sites import find_block, n_layers

RECORDED = ("resid_pre", "resid_mid", "attn_heads", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Norm:
    """Layer norm or RMS norm: ``(x - mean(x)) / scale(x) * weight + bias``; RMS norm does not subtract the mean.

    A model without norms gets one with ``divides=False``, which does not divide either.
    """

    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    divides: bool = True

    def centre(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return ``x`` minus its mean over the width if this norm subtracts the mean, else ``x``."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
        """Return the denominator of each vector: 1 if this norm does not divide."""
        if not self.divides:
            return x.new_ones(x.shape[:-1])
        return (self.centre(x).pow(2).mean(-1) + self.eps).sqrt()

    def apply(self, x: Float[Tensor, "... d_model"], scale: Float[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Return the normalized ``x`` with ``scale`` as the denominator."""
        return self.centre(x) / scale[..., None] * self.weight + self.bias

    def fold(self, readers: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return directions that read before the norm what ``readers`` read after it, up to the denominator and the bias."""
        return self.centre(readers * self.weight)

    def pull_back(
        self, x: Float[Tensor, "... #readers d_model"], grads: Float[Tensor, "... readers d_model"]
    ) -> Float[Tensor, "... readers d_model"]:
        """Return gradients with respect to ``x``, given gradients with respect to the normalized ``x``."""
        folded = self.fold(grads)
        if self.divides:
            # The denominator depends on x too, which removes the component of the gradient along the normalized x.
            unit = self.centre(x) / self.scale(x)[..., None]
            folded = folded - unit * (unit * folded).mean(-1, keepdim=True)
        return folded / self.scale(x)[..., None]


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one transformer block: its norms, and the query, key, value and output matrices of its heads.

    ``attention_post_norm`` and ``mlp_post_norm`` normalize what attention and MLP write before it is added (Gemma 2 and 3);
    ``q_norm`` and ``k_norm`` normalize each head's queries and keys (Qwen 3, Gemma 3). They are None where a block has none.
    """

    attention_norm: Norm
    mlp_norm: Norm
    W_Q: Float[Tensor, "n_heads d_head d_model"]
    b_Q: Float[Tensor, "n_heads d_head"]
    W_K: Float[Tensor, "n_heads d_head d_model"]
    b_K: Float[Tensor, "n_heads d_head"]
    W_V: Float[Tensor, "n_heads d_head d_model"]
    b_V: Float[Tensor, "n_heads d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def carry(self, head: int, vectors: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Apply the OV matrix of one head, without biases, to vectors taken after the attention norm."""
        return vectors @ self.W_V[head].T @ self.W_O[head]


@dataclass(frozen=True)
class HeadInput:
    """Location of the queries, keys or values of all heads, before any query/key norms and rotary embeddings.

    ``shape`` unflattens the last axis of the tensor at ``hook``; ``index`` then selects ``(n_heads, d_head)``.
    """

    hook: str
    shape: tuple[int, ...]
    index: tuple[Any, ...]

    def of(self, x: Float[Tensor, "contexts positions width"]) -> Float[Tensor, "contexts positions n_heads d_head"]:
        """Return a view of the tensor at the hook, split by head."""
        return x.unflatten(-1, self.shape)[(..., *self.index)]


@dataclass(frozen=True)
class LayerTrace:
    """Recorded inputs and outputs of one block. ``pattern[c, h, t, s]`` is the attention of head ``h`` from ``t`` to ``s``.

    ``mid`` is the input of the MLP's norm; in blocks with parallel attention and MLP it is ``pre``. A block without an MLP is
    recorded as one whose MLP writes zeros. ``attention_out`` and ``mlp_out`` are the outputs of the modules themselves; a
    block with post-norms adds ``attention_written`` and ``mlp_written`` to the stream, which are the same elsewhere.
    """

    pre: Float[Tensor, "contexts positions d_model"]
    attention_in: Float[Tensor, "contexts positions d_model"]
    attention_scale: Float[Tensor, "contexts positions"]
    pattern: Float[Tensor, "contexts n_heads positions positions"]
    v: Float[Tensor, "contexts positions n_heads d_head"]
    z: Float[Tensor, "contexts positions n_heads d_head"]
    attention_out: Float[Tensor, "contexts positions d_model"]
    mid: Float[Tensor, "contexts positions d_model"]
    mlp_scale: Float[Tensor, "contexts positions"]
    mlp_in: Float[Tensor, "contexts positions d_model"]
    mlp_out: Float[Tensor, "contexts positions d_model"]
    attention_written: Float[Tensor, "contexts positions d_model"]
    attention_post_scale: Float[Tensor, "contexts positions"] | None
    mlp_written: Float[Tensor, "contexts positions d_model"]
    mlp_post_scale: Float[Tensor, "contexts positions"] | None


@dataclass(frozen=True)
class Trace:
    """Recorded forward pass: a trace of every block, and the input of the final norm (``last``)."""

    token_ids: Int[Tensor, "contexts positions"]
    layers: tuple[LayerTrace, ...]
    last: Float[Tensor, "contexts positions d_model"]
    last_scale: Float[Tensor, "contexts positions"]
    logits: Float[Tensor, "contexts positions vocabulary"]


class Architecture:
    """Weights of a language model by block and head: GPT-2, GPT-NeoX, and models built like Llama or like Gemma 2 and 3.

    With grouped-query attention, ``W_K`` and ``W_V`` are repeated for each head. In ``parallel`` models, attention and MLP of
    a block read the same residual stream. ``W_P`` is None if positions are not added to embeddings. ``logit_cap`` is c if
    logits are ``c * tanh(x / c)`` of what the unembedding writes, else None. ``W_E`` is without the factor by which Gemma
    scales embeddings; the stream that a trace begins with has it.

    Args:
        post_norms: Accept models with post-norms, which normalize what attention and MLPs write. Only callers that handle
            ``attention_post_norm`` and ``mlp_post_norm`` may.

    Raises:
        ValueError: If the architecture is not supported, or has post-norms that the caller does not handle.
    """

    def __init__(self, model: LanguageModel, post_norms: bool = False):
        module = model.module
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        if kind not in READERS:
            raise ValueError(
                f"model.id: expected an architecture whose attention is supported ({', '.join(READERS)}), got {kind!r} "
                f"({model.id}): what is missing is where its norms, heads and embeddings are, and how they are combined. Use "
                "a model of a supported architecture."
            )
        if READERS[kind].post_norms is not None and not post_norms:
            raise ValueError(
                f"model.id: expected blocks that add the outputs of attention and MLP as they are, got {kind!r} "
                f"({model.id}), which normalizes them first ({', '.join(_POST_NORMS)}). Only attribution graphs "
                "(circuits --prompt) take such models."
            )
        if is_spread(module) or getattr(module, "is_quantized", False):
            raise ValueError(
                f"model.id: {model.id}: expected unquantized weights on one device, as attribution requires, got "
                f"{'weights on several devices' if is_spread(module) else 'quantized weights'}. Set model.device_map and "
                "model.quantization to null."
            )
        self.model, self._read = model, READERS[kind]
        self.blocks = [find_block(module, layer) for layer in range(n_layers(module))]
        read = self._read
        self.layers = read.layers(module)
        self.final_norm = _norm(module.get_submodule(read.final_norm), read.plus_one)
        self.parallel = self.blocks[0].parallel
        self.n_layers = len(self.layers)
        self.n_heads, self.d_head, self.d_model = self.layers[0].W_V.shape
        self.W_E: Tensor = module.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
        self.W_P: Tensor | None = None if read.positions is None else module.get_parameter(read.positions)
        self.W_U: Tensor = module.get_output_embeddings().weight  # pyright: ignore[reportCallIssue]
        self.logit_cap: float | None = getattr(_text_config(module), "final_logit_softcapping", None)

    @property
    def final_norm_hook(self) -> str:
        """Hook at the input of the final norm."""
        return f"{self._read.final_norm}:in"

    def attention_norm_path(self, layer: int) -> str:
        """Return the module path of the norm before attention."""
        return f"{self.blocks[layer].path}.{self._read.attention_norm}"

    def post_norm_paths(self, layer: int) -> tuple[str, str] | None:
        """Return the module paths of the norms after attention and MLP, if the block has them."""
        if self._read.post_norms is None:
            return None
        after_attention, after_mlp = (f"{self.blocks[layer].path}.{name}" for name in self._read.post_norms)
        return after_attention, after_mlp

    def head_inputs(self, layer: int) -> dict[str, HeadInput]:
        """Return where queries (``q``), keys (``k``) and values (``v``) of a block's heads can be read and replaced.

        With grouped-query attention, single heads have no keys and values of their own unless the model is ``ungrouped``.
        """
        path, heads, every = self.blocks[layer].path, (self.n_heads, self.d_head), slice(None)
        found = {}
        for place, kind in enumerate("qkv"):
            if len(self._read.projections) == 3:
                found[kind] = HeadInput(f"{path}.{self._read.projections[place]}:out", heads, (every, every))
                continue
            hook = f"{path}.{self._read.projections[0]}:out"
            if self._read.head_by_head:
                found[kind] = HeadInput(hook, (self.n_heads, 3, self.d_head), (every, place, every))
            else:
                found[kind] = HeadInput(hook, (3, *heads), (place, every, every))
        return found

    @torch.no_grad()
    def trace(self, token_ids: Int[Tensor, "contexts positions"]) -> Trace:
        """Run the model once and record the activations of every block.

        Attention runs in its eager implementation, because fused kernels never materialize the attention pattern. The
        previous implementation is restored afterwards, even if the pass fails.
        """
        hooks: dict[str, str] = {"last": self.final_norm_hook}
        for index, block in enumerate(self.blocks):
            wanted = {site: hook for site, (hook, _) in block.sites().items() if site in RECORDED}
            hooks |= {f"{index} {site}": hook for site, hook in wanted.items()}
            hooks[f"{index} attention_in"] = f"{self.attention_norm_path(index)}:out"
        seen: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[[Tensor], None]:
            def keep(x: Tensor) -> None:
                # Later modules may modify it in place.
                seen[name] = x.clone()

            return keep

        readers = {hook: keeper(name) for name, hook in hooks.items()}
        with self.model.hooked(readers), _eager_attention(self.model.module):
            output = self.model.module(input_ids=token_ids, use_cache=False, output_attentions=True)
        layers = []
        for index, layer in enumerate(self.layers):
            if self.blocks[index].mlp is None:
                _without_mlp(seen, index, layer.mlp_norm)
            at = {site: seen[f"{index} {site}"] for site in ("resid_pre", "attention_in", "attn_out", "mlp_in", "mlp_out")}
            mid = at["resid_pre"] if self.parallel else seen[f"{index} resid_mid"]
            v = torch.einsum("cpm,hdm->cphd", at["attention_in"], layer.W_V) + layer.b_V
            attention_written, attention_post_scale = _normalised(layer.attention_post_norm, at["attn_out"])
            mlp_written, mlp_post_scale = _normalised(layer.mlp_post_norm, at["mlp_out"])
            layers.append(
                LayerTrace(
                    pre=at["resid_pre"],
                    attention_in=at["attention_in"],
                    attention_scale=layer.attention_norm.scale(at["resid_pre"]),
                    pattern=output.attentions[index],
                    v=v,
                    z=seen[f"{index} attn_heads"].view_as(v),
                    attention_out=at["attn_out"],
                    mid=mid,
                    mlp_scale=layer.mlp_norm.scale(mid),
                    mlp_in=at["mlp_in"],
                    mlp_out=at["mlp_out"],
                    attention_written=attention_written,
                    attention_post_scale=attention_post_scale,
                    mlp_written=mlp_written,
                    mlp_post_scale=mlp_post_scale,
                )
            )
        return Trace(token_ids, tuple(layers), seen["last"], self.final_norm.scale(seen["last"]), output.logits)


def _normalised(norm: Norm | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a post-norm makes of a module's output, and its denominator; without one, the output itself."""
    if norm is None:
        return x, None
    scale = norm.scale(x)
    return norm.apply(x, scale), scale


def _text_config(module: Any) -> Any:
    config = module.config
    # For multimodal models, the configuration of the text model.
    return getattr(config, "get_text_config", lambda: config)()


def _without_mlp(seen: dict[str, Tensor], index: int, norm: Norm) -> None:
    """Record the input and the zero output of an MLP for a block that has none."""
    mid = seen[f"{index} resid_pre"] + seen[f"{index} attn_out"]
    seen[f"{index} resid_mid"] = mid
    seen[f"{index} mlp_in"] = norm.apply(mid, norm.scale(mid))
    seen[f"{index} mlp_out"] = torch.zeros_like(mid)


@contextmanager
def _eager_attention(module: Any) -> Iterator[None]:
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _norm(module: Any, plus_one: bool = False) -> Norm:
    """Return the norm of a module; with ``plus_one`` (Gemma) its gain is stored as the difference from 1."""
    weight = module.weight.detach() + (1.0 if plus_one else 0.0)
    if isinstance(module, nn.Identity):
        return Norm(False, weight, torch.zeros_like(weight), 0.0, divides=False)
    # Llama's norms have no bias, and do not subtract the mean.
    bias = getattr(module, "bias", None)
    centred = isinstance(module, nn.LayerNorm)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(centred, weight, torch.zeros_like(weight) if bias is None else bias.detach(), eps)


@dataclass(frozen=True)
class _Reader:
    """Locations of the weights in one architecture; ``attention_norm`` and ``projections`` are paths within a block.

    Queries, keys and values have a projection each or a fused one, which stores the three of each head together if
    ``head_by_head``, else the queries of all heads first. ``post_norms`` are the norms after attention and MLP; norms of
    ``plus_one`` models store their gains minus 1.
    """

    layers: Callable[[Any], list[BlockWeights]]
    attention_norm: str
    final_norm: str
    positions: str | None
    projections: tuple[str, ...]
    head_by_head: bool = False
    post_norms: tuple[str, str] | None = None
    plus_one: bool = False


def _bias(projection: Any) -> Tensor:
    return projection.weight.new_zeros(projection.weight.shape[0]) if projection.bias is None else projection.bias


def _gpt2_layers(module: Any) -> list[BlockWeights]:
    def read(block: Any) -> BlockWeights:
        # GPT-2 stores these weights transposed: (in, out).
        shape = (module.config.n_head, -1, module.config.n_embd)
        W_Q, W_K, W_V = (weight.T.reshape(shape) for weight in block.attn.c_attn.weight.chunk(3, 1))
        b_Q, b_K, b_V = (bias.view(shape[:2]) for bias in block.attn.c_attn.bias.chunk(3))
        W_O, b_O = block.attn.c_proj.weight.view(shape), block.attn.c_proj.bias
        return BlockWeights(_norm(block.ln_1), _norm(block.ln_2), W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O)

    return [read(block) for block in module.transformer.h]


def _gpt_neox_layers(module: Any) -> list[BlockWeights]:
    heads, width = module.config.num_attention_heads, module.config.hidden_size

    def read(block: Any) -> BlockWeights:
        # Query, key and value of each head are stored together.
        joint, dense = block.attention.query_key_value, block.attention.dense
        W_Q, W_K, W_V = joint.weight.view(heads, 3, -1, width).unbind(1)
        b_Q, b_K, b_V = _bias(joint).view(heads, 3, -1).unbind(1)
        norms = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        W_O = dense.weight.T.reshape(heads, -1, width)
        return BlockWeights(*norms, W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, _bias(dense))

    return [read(block) for block in module.gpt_neox.layers]


def _llama_layers(module: Any) -> list[BlockWeights]:
    def read(block: Any) -> BlockWeights:
        norms = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        return BlockWeights(*norms, **_grouped_heads(module.config, block.self_attn))

    return [read(block) for block in module.model.layers]


def _gemma_layers(module: Any) -> list[BlockWeights]:
    """Return the weights of Gemma 2 and 3, which have norms before and after attention and MLP."""

    def read(block: Any) -> BlockWeights:
        names = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
        before_attention, before_mlp, after_attention, after_mlp = (_norm(getattr(block, name), True) for name in names)
        heads = _grouped_heads(_text_config(module), block.self_attn, plus_one=True)
        return BlockWeights(before_attention, before_mlp, attention_post_norm=after_attention, mlp_post_norm=after_mlp, **heads)

    return [read(block) for block in module.get_submodule(_decoder_path(module)).layers]


def _grouped_heads(config: Any, attention: Any, plus_one: bool = False) -> dict[str, Any]:
    """Return the heads' weights by field name of ``BlockWeights``, with keys and values repeated for every head of a group."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    found: dict[str, Any] = {}
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        projection = getattr(attention, f"{name}_proj")
        for kind, part in (("W", projection.weight.view(count, -1, width)), ("b", _bias(projection).view(count, -1))):
            found[f"{kind}_{name.upper()}"] = part.repeat_interleave(heads // count, 0)
    output = attention.o_proj
    found |= {"W_O": output.weight.T.reshape(heads, -1, width), "b_O": _bias(output)}
    norms = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
    return found | {name: _norm(norm, plus_one) for name, norm in norms.items() if norm is not None}


def _decoder_path(module: Any) -> str:
    """Return the path of the decoder, which is within the text model of a multimodal one."""
    return "model.language_model" if hasattr(module.model, "language_model") else "model"


def _toy_layers(module: Any) -> list[BlockWeights]:
    config = module.config
    heads, width = config.n_heads, config.d_model

    def read(block: Any) -> BlockWeights:
        attention = block.attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        W_Q, W_K, W_V = (projection.weight.view(heads, -1, width) for projection in projections)
        b_Q, b_K, b_V = (projection.bias.view(heads, -1) for projection in projections)
        W_O, b_O = attention.o_proj.weight.T.reshape(heads, -1, width), attention.o_proj.bias
        return BlockWeights(_norm(block.ln_1), _norm(block.ln_2), W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O)

    return [read(block) for block in module.h]


def _apart(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{kind}_proj" for kind in "qkv")


_LLAMA = _Reader(_llama_layers, "input_layernorm", "model.norm", None, _apart("self_attn"))
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA = _Reader(
    _gemma_layers, "input_layernorm", "model.norm", None, _apart("self_attn"), post_norms=_POST_NORMS, plus_one=True
)
READERS = {
    "gpt2": _Reader(_gpt2_layers, "ln_1", "transformer.ln_f", "transformer.wpe.weight", ("attn.c_attn",)),
    "gpt_neox": _Reader(
        _gpt_neox_layers,
        "input_layernorm",
        "gpt_neox.final_layer_norm",
        None,
        ("attention.query_key_value",),
        head_by_head=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # The multimodal models: image inputs are no part of a prompt here.
    "gemma3": replace(_GEMMA, final_norm="model.language_model.norm"),
    # The toy models with ground-truth circuits (eval.circuits.known).
    "sparsary_toy": _Reader(_toy_layers, "ln_1", "ln_f", "wpe.weight", _apart("attn")),
}
