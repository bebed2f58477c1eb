"""Rotated residual streams: the same function without privileged axes, so that neurons are no shortcut to the circuit.

Weights that write to the stream or read from it are rotated; heads and neurons compute the same up to rounding. Circuits do not
change, and named directions rotate with the stream.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ....training.activations.model import LanguageModel
from .known_circuit import Known
from .toy import ToyTransformer


def rotated(known: Known, seed: int) -> Known:
    """Return the known circuit after a random rotation of its residual stream.

    Raises:
        ValueError: If the model's norms do not commute with rotations, because they subtract the mean or weight the axes.
    """
    module = known.module
    _check(known.name, module)
    turn = rotation(module.config.d_model, seed)
    twin = ToyTransformer(module.config).to(module.wte.weight)
    twin.load_state_dict(module.state_dict())
    _turn(twin, turn.to(module.wte.weight))
    name = f"{known.name}_rotated{seed}"
    return replace(
        known,
        name=name,
        model=LanguageModel(twin, known.model.tokenizer, f"known:{name}", known.model.revision),
        directions={
            label: (turn.to(device=direction.device) @ direction.double()).to(direction)
            for label, direction in known.directions.items()
        },
    )


def rotation(width: int, seed: int) -> Float[Tensor, "width width"]:
    """Return a random orthogonal matrix in float64, uniform over all of them (Mezzadri 2007, arXiv:math-ph/0609050)."""
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    # The signs remove the convention of the QR decomposition, which would bias the draw.
    return q * r.diagonal().sign()


@torch.no_grad()
def _turn(module: ToyTransformer, turn: Float[Tensor, "d_model d_model"]) -> None:
    for table in (module.wte, module.wpe):
        table.weight.copy_(table.weight @ turn.T)
    readers, writers = [module.lm_head], []
    for layer in range(module.config.n_layers):
        attention = module.attention(layer)
        readers += [attention.q_proj, attention.k_proj, attention.v_proj]
        writers.append(attention.o_proj)
        if module.config.d_mlp:
            readers.append(module.mlp(layer).up_proj)
            writers.append(module.mlp(layer).down_proj)
    for reader in readers:
        reader.weight.copy_(reader.weight @ turn.T)
    for writer in writers:
        writer.weight.copy_(turn @ writer.weight)
        writer.bias.copy_(turn @ writer.bias)


def _check(name: str, module: ToyTransformer) -> None:
    norms = [part for path, part in module.named_modules() if path.split(".")[-1].startswith("ln_")]
    if any(isinstance(norm, nn.LayerNorm) for norm in norms):
        reason = "norms subtract the mean over the axes"
    elif any(isinstance(norm, nn.RMSNorm) and len(norm.weight.unique()) > 1 for norm in norms):
        reason = "norms weigh the axes differently"
    else:
        return
    raise ValueError(
        f"{name}: expected a model that a rotation of its stream leaves as it is, got one whose {reason}. "
        "Rotate a model without norms, or with root-mean-square norms of equal weights."
    )
