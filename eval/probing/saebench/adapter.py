"""Adapter from a sparsary dictionary to SAEBench's custom-SAE interface: dense codes in raw units, unit-norm ``W_dec``."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ....sae.dictionary import SparseDictionary
from ....sae.formats.hooks import layer_of, to_transformer_lens
from ....sae.one_site import OneSiteDictionary


@dataclass
class SaeBenchConfig:
    """Fields of ``sae.cfg`` that SAEBench reads; those it only requires to exist are blank."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def transformer_lens_hook(hook: str, model: str | None = None) -> tuple[int, str]:
    """Return the layer and TransformerLens name of a hook; embeddings count as layer 0.

    Raises:
        ValueError: If TransformerLens has no name for it.
    """
    # The name of a local model may mislead; fall back to the names of its blocks.
    name = to_transformer_lens(hook, model) or to_transformer_lens(hook)
    if name is None:
        raise ValueError(f"{hook}: expected a hook that TransformerLens has a name for. Give hook_layer and hook_name.")
    return layer_of(name) or 0, name


class SaeBenchAdapter(nn.Module):
    """SAEBench's custom-SAE interface: encode, decode, forward, W_enc, W_dec, b_enc, b_dec, cfg, device, dtype.

    ``encode`` is the dictionary's own for every encoder; ``W_enc`` and ``b_enc`` are for inspection only. Inputs are
    ``(..., d_in)`` raw activations. The dictionary itself stays in float32.
    """

    value_scale: Tensor

    def __init__(
        self,
        dictionary: SparseDictionary,
        model_name: str,
        hook: str,
        hook_layer: int | None = None,
        hook_name: str | None = None,
    ):
        super().__init__()
        if not isinstance(dictionary, OneSiteDictionary) or dictionary.d_in != dictionary.d_out:
            raise ValueError("dictionary: expected an SAE, as SAEBench evaluates no other kinds.")
        if hook_layer is None or hook_name is None:
            hook_layer, hook_name = transformer_lens_hook(hook, model_name)
        # In a tuple, so that it is no submodule and a change of dtype does not reach it.
        self._inner = (dictionary.eval(),)
        with torch.no_grad():
            weights = dictionary.weights
            norms = dictionary.W_dec.norm(dim=-1)
            # A decoder direction of norm 0 stays 0.
            self.register_buffer("value_scale", norms * dictionary.out_scale)
            self.W_dec = nn.Parameter(dictionary.W_dec / norms.clamp_min(1e-12)[:, None], requires_grad=False)
            self.W_enc = nn.Parameter((weights.W_enc / dictionary.in_scale).T.contiguous(), requires_grad=False)
            b_enc = torch.zeros_like(norms) if weights.b_enc is None else weights.b_enc.detach().clone()
            self.b_enc = nn.Parameter(b_enc, requires_grad=False)
            self.b_dec = nn.Parameter(dictionary.bypass() * dictionary.out_scale, requires_grad=False)
        self.device, self.dtype = dictionary.device, torch.float32
        self.cfg = SaeBenchConfig(
            model_name,
            dictionary.d_in,
            dictionary.n_latents,
            hook_layer,
            hook_name,
            architecture=str(dictionary.arguments()["encoder"]["name"]),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        dictionary = self._inner[0]
        code = dictionary.encode(x.reshape(-1, dictionary.d_in).float())
        dense = code.to_dense(dictionary.n_latents) * self.value_scale.to(code.values.dtype)
        return dense.reshape(*x.shape[:-1], dictionary.n_latents).to(x.dtype)

    @torch.no_grad()
    def decode(self, codes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return codes @ self.W_dec.to(codes.dtype) + self.b_dec.to(codes.dtype)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "SaeBenchAdapter":
        super().to(*args, **kwargs)
        self.device, self.dtype = self.W_dec.device, self.W_dec.dtype
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        self._inner[0].to(self.device)
        return self
