"""Unit sets that the benchmark compares: latents with three treatments of errors, random latents, neurons, components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ...sae.one_site import OneSiteDictionary
from ...training.activations.model import LanguageModel, load_model
from ...training.activations.sites import find_block, n_layers, neuron_hook
from ...training.recipe import ModelSection
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import LoadedCheckpoint, open_checkpoint
from .units.nodes import ERRORS, Coordinates, Latents, NodeSpace, Part
from .units.random_latents import random_like

# Unit sets per checkpoint, and baselines shared by all checkpoints.
FAMILIES_EACH, BASELINES = 5, 3
# Treatments of reconstruction errors, and their display names.
ERROR_NAMES = {"node": "errors as nodes", "kept": "errors kept", "ablated": "errors ablated"}


@dataclass(frozen=True)
class ComparedCheckpoint:
    """Dictionaries of one command-line argument: a checkpoint, or all checkpoints below a directory.

    ``by_hook`` maps output hooks to dictionaries, ``hooks_in`` maps output hooks to input hooks. ``opened`` is the loaded
    checkpoint.
    """

    name: str
    by_hook: Mapping[str, OneSiteDictionary]
    hooks_in: Mapping[str, str]
    model: ModelSection
    opened: LoadedCheckpoint

    def parts(self, errors: str) -> list[Part]:
        """Return the latents at every hook."""
        return [Latents(hook, dictionary, self.hooks_in[hook], hook, errors) for hook, dictionary in self.by_hook.items()]

    def randomised(self, seen: Mapping[str, Float[Tensor, "contexts positions width"]], seed: int) -> "ComparedCheckpoint":
        """Return a copy with random dictionaries that have the same l0 on the activations ``seen``."""
        found = {
            hook: random_like(dictionary, seen[self.hooks_in[hook]].flatten(0, 1), seed)
            for hook, dictionary in self.by_hook.items()
        }
        return replace(self, by_hook=found)


def open_dictionaries(checkpoint: str, options: CheckpointOptions = NO_OPTIONS) -> ComparedCheckpoint:
    """Load the dictionaries of a directory, file or hub id: native or third-party, at one hook or several.

    Raises:
        ValueError: If there are none, their language model is unknown, or one is cross-layer.
    """
    opened = open_checkpoint(checkpoint, options).completed(text=False)
    provenances = {hooks_of_provenance(member.provenance)[1][0]: member.provenance for member in opened.members}
    found = dict(zip(provenances, (member.dictionary for member in opened.members), strict=True))
    model = opened.members[0].provenance["model"]
    one_site = {hook: dictionary for hook, dictionary in found.items() if isinstance(dictionary, OneSiteDictionary)}
    if len(one_site) < len(found):
        others = {dictionary.arguments()["kind"] for hook, dictionary in found.items() if hook not in one_site}
        what, instead = (
            ("crosscoder", "Train SAEs at its hooks, or give none: --model MODEL --compare.")
            if "crosscoder" in others
            else ("cross-layer transcoder", "Use an attribution graph instead: --prompt TEXT.")
        )
        raise ValueError(f"{checkpoint}: expected dictionaries with one output hook each, got a {what}. {instead}")
    reads = {hook: hooks_of_provenance(provenance)[0][0] for hook, provenance in provenances.items()}
    for dictionary in one_site.values():
        dictionary.requires_grad_(False)
    return ComparedCheckpoint(checkpoint, one_site, reads, ModelSection.model_validate(model), opened)


def open_model(several: list[ComparedCheckpoint]) -> LanguageModel:
    """Load the language model that all checkpoints share.

    Raises:
        ValueError: If they belong to different models.
    """
    ids = {found.name: found.model.id for found in several}
    if len(set(ids.values())) > 1:
        listed = ", ".join(f"{name} ({model})" for name, model in ids.items())
        raise ValueError(f"CHECKPOINT: expected dictionaries of one model, got {listed}. Evaluate one model at a time.")
    return load_model(several[0].model)


def neurons(model: LanguageModel, hooks: Sequence[str]) -> list[Part]:
    """Return every coordinate of the activations at some hooks as a unit (latents of the identity dictionary)."""
    widths = model.widths(tuple(hooks))
    return [Coordinates(hook, hook, widths[hook], 1) for hook in hooks]


def mlp_neurons(model: LanguageModel) -> list[Part]:
    """Return the neurons of every MLP: the inputs of its output projection."""
    blocks = [find_block(model.module, layer) for layer in range(n_layers(model.module))]
    found = [neuron_hook(model, f"{block.path}:out") for block in blocks]
    return neurons(model, [hook for hook in found if hook is not None])


def components(model: LanguageModel) -> list[Part]:
    """Return heads and MLPs as units: the decomposition of a model without a dictionary."""
    heads, parts = n_heads(model), []
    for layer in range(n_layers(model.module)):
        sites = find_block(model.module, layer).sites()
        for site, name in (("attn_heads", f"a{layer}"), ("mlp_out", f"m{layer}")):
            if site in sites:
                hook = sites[site][1]
                width = model.widths((hook,))[hook]
                parts.append(Coordinates(name, hook, width, width // heads if site == "attn_heads" else width))
    return parts


def n_heads(model: LanguageModel) -> int:
    """Return the number of attention heads per block."""
    config: Any = model.module.config
    return config.num_attention_heads


def spaces(
    model: LanguageModel, several: Sequence[ComparedCheckpoint], token_ids: Int[Tensor, "contexts positions"], seed: int = 0
) -> dict[str, NodeSpace]:
    """Return every unit set that is compared, by name.

    Each checkpoint gives three sets of latents and two of random latents; neurons, MLP neurons, and heads and MLPs are shared.
    Random latents and neurons use the same hooks as the latents. Random latents fire as often as the trained ones on
    ``token_ids``; neurons leave no error.
    """
    found, hooks = {}, {}
    for dictionaries in several:
        seen = model.activations(token_ids.to(model.device), tuple(dict.fromkeys(dictionaries.hooks_in.values())))
        chance = dictionaries.randomised(seen, seed)
        for errors in ERRORS:
            found[f"{dictionaries.name}: {ERROR_NAMES[errors]}"] = NodeSpace(model, dictionaries.parts(errors))
        for errors in ("kept", "ablated"):
            found[f"{dictionaries.name}: random, {ERROR_NAMES[errors]}"] = NodeSpace(model, chance.parts(errors))
        hooks |= dict.fromkeys(dictionaries.by_hook)
    found["neurons"] = NodeSpace(model, neurons(model, list(hooks)))
    found["MLP neurons"] = NodeSpace(model, mlp_neurons(model))
    found["heads and MLPs"] = NodeSpace(model, components(model))
    return found
