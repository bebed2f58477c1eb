"""Transcoder made of the neurons of the MLP that it is to replace: the start of a run with ``dictionary.start: mlp``.

A latent is a neuron. Its encoder row and bias are those of the neuron, its value is the ReLU of that pre-activation times the
factor that fits the neuron's own values best on a sample, and its decoder direction is the neuron's output weights. Where the
activation function is ReLU the factor is 1, and the transcoder equals the MLP; for other functions it is an approximation.
A neuron of a gated MLP is a product of two pre-activations, one of them behind an activation function, which no latent equals:
it gets the gate's row, or the other row with one sign or the other, whichever fits its values best.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...sae.encoders import ENCODERS
from ...transcoders import Transcoder
from ..activations.model import LanguageModel
from ..activations.sites import MLP_PROJECTION
from ..activations.stream import ActivationBatch
from ..recipe import DictionarySection
from ..recipe.start_schema import MLP_START
from .source import StartSource, require_kind

# Tokens on which neurons are fitted, and tokens that pass through the MLP at once.
FIT_TOKENS, ROWS = 8192, 1024
GATES = ("gate_proj", "gate", "w1", "wi_0")


@dataclass(frozen=True)
class MlpParts:
    """Paths of an MLP, of its linear maps to the neurons, the gate first if there are two, and of the map from the neurons."""

    mlp: str
    readers: tuple[str, ...]
    projection: str


@dataclass(frozen=True)
class MlpSource(StartSource):
    """Start from the neurons of an MLP; until it is fitted, only their number is known."""

    parts: MlpParts
    load: Callable[[], LanguageModel]

    @torch.no_grad()
    def fitted(self, sample: ActivationBatch) -> StartSource:
        """Return the source with the weights of the model, and factors that fit the neurons' values on the sample."""
        model = self.load()
        mlp, projection = (model.module.get_submodule(path) for path in (self.parts.mlp, self.parts.projection))
        readers = [model.module.get_submodule(path) for path in self.parts.readers]
        x, n = sample.x[:FIT_TOKENS], self.dictionary.n_latents
        rows_in, biases = _candidates(readers)
        products, squares, active_sum = torch.zeros(3, len(rows_in), n, dtype=torch.float64)
        values_sum = torch.zeros(n, dtype=torch.float64)
        for rows in x.split(ROWS):
            pre_acts, values = _neurons(mlp, readers, projection, rows.to(model.device))
            active = torch.stack(_signed(pre_acts)).relu()
            products += (active * values).sum(1)
            squares += active.square().sum(1)
            active_sum += active.sum(1)
            values_sum += values.sum(0)
        tiny = torch.finfo(torch.float64).tiny
        chosen = (products.square() / squares.clamp_min(tiny)).argmax(0)
        every = torch.arange(n)
        # Nothing is known of a neuron that is never active on the sample.
        factor = torch.where(squares > 0, products / squares.clamp_min(tiny), 1.0)[chosen, every]
        W_out = _matrix(projection).double().cpu()
        dictionary = Transcoder(self.dictionary.d_in, self.dictionary.d_out, self.dictionary.n_latents, ENCODERS["relu"]())
        weights = dictionary.blocks[0].weights
        assert weights.b_enc is not None
        weights.W_enc.copy_(rows_in[chosen, every])
        weights.b_enc.copy_(biases[chosen, every])
        weights.W_dec.copy_(factor[:, None] * W_out.T)
        # What the neurons add on average beyond the latents: nothing where they are equal.
        rest = (values_sum - factor * active_sum[chosen, every]) / len(x)
        dictionary.b_dec.copy_(_bias(projection) + W_out @ rest)
        return replace(self, dictionary=dictionary.eval())


def mlp_source(section: DictionarySection, outline: LanguageModel, load: Callable[[], LanguageModel]) -> MlpSource:
    """Return the MLP between a recipe's hooks as a start.

    Args:
        outline: The model, possibly without weights.
        load: Returns the model with the weights of that MLP.

    Raises:
        ValueError: If the recipe's dictionary is no transcoder, or the hooks do not enclose an MLP whose neurons can be read.
    """
    require_kind(MLP_START, "transcoder", section.kind)
    reads, writes = section.hooks_in[0], section.hooks_out[0]
    parts = _parts(outline.module, reads, writes)
    d_out, n_neurons = _matrix(outline.module.get_submodule(parts.projection)).shape
    d_in = _matrix(outline.module.get_submodule(parts.readers[0])).shape[1]
    dictionary = Transcoder(d_in, d_out, n_neurons, ENCODERS["relu"]())
    place, evidence = f"mlp of {reads.rpartition(':')[0]}", "the model's weights"
    return MlpSource(place, dictionary, (section.hooks_in, section.hooks_out), None, evidence, Path(), (), parts, load)


def _parts(module: nn.Module, reads: str, writes: str) -> MlpParts:
    path, side = reads.rpartition(":")[::2]
    end, end_side = writes.rpartition(":")[::2]
    where = f"dictionary.start: mlp: expected the hooks of an MLP (layer, and site: mlp), got {reads} and {writes}"
    if (side, end_side) != ("in", "out") or not (end == path or end.startswith(f"{path}.")):
        raise ValueError(f"{where}. Name other hooks, or leave start out.")
    mlp = module.get_submodule(path)
    linear = {f"{path}.{name}": part for name, part in mlp.named_modules() if name and _is_linear(part)}
    last = [name for name in linear if name == end or name.rpartition(".")[2] in MLP_PROJECTION]
    required = [
        parameter
        for parameter in inspect.signature(mlp.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(last) == 1 and len(required) == 1:
        n_neurons = _matrix(linear[last[0]]).shape[1]
        first = [name for name in linear if name != last[0] and _matrix(linear[name]).shape[0] == n_neurons]
        gates = [name for name in first if name.rpartition(".")[2] in GATES]
        if len(linear) == 1 + len(first) and (len(first) == 1 or (len(first) == 2 and len(gates) == 1)):
            return MlpParts(path, tuple(sorted(first, key=lambda name: name not in gates)), last[0])
    raise ValueError(
        f"{where}, where {path} is a {type(mlp).__name__} with the linear maps {', '.join(linear) or 'none'}. What can be read "
        "has one map to its neurons, or two of which one is a gate, and one from them. Leave start out."
    )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and isinstance(weight, Tensor)


def _matrix(linear: nn.Module) -> Float[Tensor, "width_out width_in"]:
    """Return the weights of a linear map, one row for each output; GPT-2's Conv1D stores them transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if type(linear).__name__ == "Conv1D" else weight.detach()


def _bias(linear: nn.Module) -> Float[Tensor, " width_out"]:
    bias = getattr(linear, "bias", None)
    return torch.zeros(len(_matrix(linear)), dtype=torch.float64) if bias is None else bias.detach().double().cpu()


def _signed(of_readers: list[Tensor]) -> list[Tensor]:
    """Return what each neuron's latent may read: its row, or in gated MLPs the gate's and the other with either sign."""
    return of_readers if len(of_readers) == 1 else [*of_readers, -of_readers[1]]


def _candidates(
    readers: list[nn.Module],
) -> tuple[Float[Tensor, "candidates n_neurons d_in"], Float[Tensor, "candidates n_neurons"]]:
    """Return the encoder rows and biases that neurons choose from."""
    rows, biases = [_matrix(reader).double().cpu() for reader in readers], [_bias(reader) for reader in readers]
    return torch.stack(_signed(rows)), torch.stack(_signed(biases))


def _neurons(
    mlp: nn.Module, readers: list[nn.Module], projection: nn.Module, x: Float[Tensor, "tokens d_in"]
) -> tuple[list[Float[Tensor, "tokens n_neurons"]], Float[Tensor, "tokens n_neurons"]]:
    """Return each map's output and the values of an MLP's neurons, in float64 on the CPU."""
    seen: dict[nn.Module, Tensor] = {}

    def keep_output(part: nn.Module, _: object, output: Tensor) -> None:
        seen[part] = output

    def keep_input(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[part] = inputs[0]

    handles = [reader.register_forward_hook(keep_output) for reader in readers]
    handles.append(projection.register_forward_pre_hook(keep_input))
    try:
        mlp(x[None].to(_matrix(projection).dtype))
    finally:
        for handle in handles:
            handle.remove()
    found = {part: rows[0].double().cpu() for part, rows in seen.items()}
    return [found[reader] for reader in readers], found[projection]
