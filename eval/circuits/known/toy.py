"""Small transformer of plain modules, for handwritten weights and for toy models.

Module paths are GPT-2's at the top level (``wte``, ``wpe``, ``h``, ``ln_f``, ``lm_head``) and Llama's within attention and MLP,
so that sites and ``Architecture`` find everything. Heads are ``n_heads`` equal slices of ``q_proj``, ``k_proj``, ``v_proj``
(rows) and ``o_proj`` (columns). Norms and MLPs are optional; positional embeddings that are not learned are zeros. MLPs may be
mixtures of experts, in the layout of transformers (``gate``, and ``experts`` with one tensor for all).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ....sae.suggestions import require_choice

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Unnormed(nn.Identity):
    """Identity in place of a norm. ``weight``, all ones, records the width."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(width), persistent=False)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": Unnormed,
    "layer": nn.LayerNorm,
    "rms": lambda width: nn.RMSNorm(width, eps=1e-5),
}


@dataclass(frozen=True)
class ToyConfig:
    """Sizes and module types. A ``d_mlp`` of 0 means attention only; keys at ``pad_id`` tokens are never attended to.

    With ``n_experts`` every MLP is a mixture of as many MLPs of width ``d_mlp``, of which a token gets ``experts_per_token``.

    ``attention_share`` mixes the softmax (1) with a constant weight of 1 on every visible position (0), as in Zhong et al.
    2023, arXiv:2306.17844.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int
    d_vocab_out: int
    d_mlp: int = 0
    activation: str = "relu"
    norm: str = "none"
    causal: bool = True
    pad_id: int | None = None
    attention_share: float = 1.0
    n_experts: int = 0
    experts_per_token: int = 2

    model_type: ClassVar[str] = "sparsary_toy"
    # The only implementation of attention; code for other models reads this attribute.
    _attn_implementation: ClassVar[str] = "eager"

    def __post_init__(self) -> None:
        for key, choices in (("activation", ACTIVATIONS), ("norm", NORMS)):
            require_choice(key, getattr(self, key), choices)

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def vocab_size(self) -> int:
        return self.d_vocab


class Attention(nn.Module):
    """Attention heads. ``blocked[t, s]``: ``t`` never attends to ``s``; ``silent[t]``: ``t`` attends to nothing."""

    blocked: Bool[Tensor, "n_ctx n_ctx"]
    silent: Bool[Tensor, " n_ctx"]

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.n_heads, self.d_head, self.share = config.n_heads, config.d_head, config.attention_share
        width = config.n_heads * config.d_head
        self.q_proj = nn.Linear(config.d_model, width)
        self.k_proj = nn.Linear(config.d_model, width)
        self.v_proj = nn.Linear(config.d_model, width)
        self.o_proj = nn.Linear(width, config.d_model)
        square = torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool)
        self.register_buffer("blocked", square.triu(1) if config.causal else torch.zeros_like(square))
        self.register_buffer("silent", torch.zeros(config.n_ctx, dtype=torch.bool))

    def forward(
        self, x: Float[Tensor, "contexts positions d_model"], seen: Bool[Tensor, "contexts positions"]
    ) -> tuple[Float[Tensor, "contexts positions d_model"], Float[Tensor, "contexts n_heads positions positions"]]:
        """Return the output and each head's attention pattern; keys that are not ``seen`` are masked."""
        split = (*x.shape[:2], self.n_heads, self.d_head)
        q, k, v = (project(x).view(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        pattern = self.pattern(torch.einsum("cthd,cshd->chts", q, k) / self.d_head**0.5, seen)
        z = torch.einsum("chts,cshd->cthd", pattern, v)
        return self.o_proj(z.flatten(2)), pattern

    def pattern(
        self, scores: Float[Tensor, "contexts n_heads positions positions"], seen: Bool[Tensor, "contexts positions"]
    ) -> Float[Tensor, "contexts n_heads positions positions"]:
        """Return each head's attention pattern from its scores."""
        length = scores.shape[-1]
        hidden = self.blocked[:length, :length] | ~seen[:, None, None, :]
        # Not -inf: a row in which every key is masked would be NaN.
        pattern = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        if self.share != 1:
            pattern = self.share * pattern + (1 - self.share) * (~hidden).to(scores.dtype)
        return pattern.masked_fill(self.silent[:length, None], 0.0)


class ToyMLP(nn.Module):
    """Two projections with an activation function between them."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_mlp)
        self.act = ACTIVATIONS[config.activation]()
        self.down_proj = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.down_proj(self.act(self.up_proj(x)))


class ToyRouter(nn.Module):
    """Router that takes the largest logits and divides their softmax by its sum, as Mixtral's."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.k = config.experts_per_token
        self.weight = nn.Parameter(torch.zeros(config.n_experts, config.d_model))

    def forward(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens n_experts"], Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return the logits, and scores and indices of the chosen experts."""
        logits = nn.functional.linear(x, self.weight)
        scores, indices = logits.softmax(-1).topk(self.k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), indices


class ToyExperts(nn.Module):
    """All experts of a mixture: MLPs of one size, without output biases."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(config.n_experts, config.d_mlp, config.d_model))
        self.down_proj = nn.Parameter(torch.zeros(config.n_experts, config.d_model, config.d_mlp))
        self.act = ACTIVATIONS[config.activation]()

    def forward(self, x: Float[Tensor, "tokens d_model"], indices: Tensor, scores: Tensor) -> Float[Tensor, "tokens d_model"]:
        """Return the sum of the chosen experts' outputs, weighted by their scores."""
        hidden = self.act(torch.einsum("tkmd,td->tkm", self.up_proj[indices], x))
        return torch.einsum("tkdm,tkm,tk->td", self.down_proj[indices], hidden, scores)


class ToyMixture(nn.Module):
    """Mixture of experts: a router and the experts it chooses from."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.gate = ToyRouter(config)
        self.experts = ToyExperts(config)

    def forward(self, x: Float[Tensor, "contexts positions d_model"]) -> Float[Tensor, "contexts positions d_model"]:
        tokens = x.flatten(0, 1)
        _, scores, indices = self.gate(tokens)
        return self.experts(tokens, indices, scores).view_as(x)


class ToyBlock(nn.Module):
    """Attention, then an optional MLP. Without an MLP nothing reads ``ln_2``."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.ln_1 = norm(config.d_model)
        self.attn = Attention(config)
        self.ln_2 = norm(config.d_model)
        if config.d_mlp:
            self.mlp = ToyMixture(config) if config.n_experts else ToyMLP(config)
        self.has_mlp = config.d_mlp > 0

    def forward(
        self, x: Float[Tensor, "contexts positions d_model"], seen: Bool[Tensor, "contexts positions"]
    ) -> tuple[Float[Tensor, "contexts positions d_model"], Float[Tensor, "contexts n_heads positions positions"]]:
        """Return the residual stream after the block, and the attention patterns."""
        written, pattern = self.attn(self.ln_1(x), seen)
        x = x + written
        return (x + self.mlp(self.ln_2(x)) if self.has_mlp else x), pattern


@dataclass(frozen=True)
class ToyOutput:
    """Output of a forward pass. ``attentions``, one pattern per layer, is None unless requested."""

    logits: Float[Tensor, "contexts positions d_vocab_out"]
    attentions: tuple[Float[Tensor, "contexts n_heads positions positions"], ...] | None


class ToyTransformer(nn.Module):
    """Token and positional embeddings, blocks, a final norm and an unembedding with bias."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(ToyBlock(config) for _ in range(config.n_layers))
        self.ln_f = NORMS[config.norm](config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.d_vocab_out)

    def forward(
        self,
        input_ids: Int[Tensor, "contexts positions"],
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> ToyOutput:
        """Return the logits at every position. ``attention_mask`` is 0 at masked keys; nothing is cached."""
        length = input_ids.shape[1]
        if length > self.config.n_ctx:
            raise ValueError(f"input_ids: expected at most {self.config.n_ctx} positions (n_ctx), got {length}.")
        seen = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.config.pad_id is not None:
            seen = seen & (input_ids != self.config.pad_id)
        x = self.wte(input_ids) + self.wpe.weight[:length]
        patterns = []
        for block in self.h:
            x, pattern = block(x, seen)
            patterns.append(pattern)
        return ToyOutput(self.lm_head(self.ln_f(x)), tuple(patterns) if output_attentions else None)

    def attention(self, layer: int) -> Attention:
        """Return the attention of one block."""
        attention = self.h[layer].get_submodule("attn")
        assert isinstance(attention, Attention)
        return attention

    def mlp(self, layer: int) -> ToyMLP:
        """Return the MLP of one block, in a model that has MLPs."""
        mlp = self.h[layer].get_submodule("mlp")
        assert isinstance(mlp, ToyMLP)
        return mlp

    def mixture(self, layer: int) -> ToyMixture:
        """Return the mixture of experts of one block, in a model that has mixtures."""
        mixture = self.h[layer].get_submodule("mlp")
        assert isinstance(mixture, ToyMixture)
        return mixture

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_attn_implementation(self, name: Any) -> None:
        """Do nothing; there is only one implementation."""


def blank(config: ToyConfig) -> ToyTransformer:
    """Return a model with all weights and biases zero, to write a circuit into; norms have weight 1."""
    model = ToyTransformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)
    return model
