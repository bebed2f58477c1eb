"""SAE on the difference of two models' activations, a floor of a diff: what one dictionary without the base's concepts finds.

It is trained on ``x_tuned - x_base`` by the crosscoder's own recipe, with as many latents and the same encoder, from the
crosscoder's store and in the order in which the crosscoder read it. Like principal directions it knows the tuned model's
activation at every token, which the crosscoder's latents are not told apart from the base's.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...sae import load_dictionary
from ...sae.autoencoder import SAE
from ...training.activations.contexts import ContextBatch
from ...training.activations.remote_store import store_place
from ...training.activations.shards import ActivationStore
from ...training.activations.store_stream import StoreStream
from ...training.recipe import Recipe, check_recipe, total_steps
from ...training.run import train
from ..checkpoint import LoadedDictionary
from ..features.collect import Collected, Collector, Limits
from .patching import Change

# Stands for the difference where recipes name a hook.
HOOK = "difference:out"
# Batches that are looked at for a difference that is not zero.
LOOKED_AT = 16
# Keys of a recipe that concern its own run or model, and not how it trains.
OTHERS = ("model", "harvest", "dictionary", "out_dir", "wandb", "distributed")
KEPT_OF_HARVEST = ("dtype", "heldout", "exclude_special", "exclude_leading", "on_bad_row", "max_bad_share")
KEPT_OF_DICTIONARY = ("n_latents", "encoder", "normalize", "orthogonality", "init")


class StoredDifferences:
    """Differences ``x_tuned - x_base`` of a store's training tokens, in the batches that the recipe's crosscoder trains on."""

    def __init__(self, store: ActivationStore, recipe: Recipe):
        self.store, self.recipe = store, recipe

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d"]]:
        recipe = self.recipe
        stream = StoreStream(self.store, recipe.dictionary.hooks_in, recipe.batch_tokens, recipe.seed)
        try:
            for batch in itertools.islice(stream.produce(0), total_steps(recipe)):
                base, tuned = batch.x.chunk(2, dim=-1)
                yield tuned - base
        finally:
            stream.release()


def train_difference_sae(member: LoadedDictionary, directory: Path) -> SAE | None:
    """Train the SAE into ``directory``, or read it if it has been trained; ``None`` if the stored activations are equal.

    Raises:
        ValueError: If the crosscoder's recipe or its store is missing, or the store holds other models' activations.
    """
    values = member.provenance.get("recipe")
    if values is None:
        raise ValueError(
            f"--difference-sae: expected a crosscoder with its recipe, got {member.directory} without. Leave the option out."
        )
    recipe = check_recipe(values, str(member.directory))
    differences = StoredDifferences(_store(recipe, member.provenance), recipe)
    if not any(bool(some.any()) for some in itertools.islice(differences, LOOKED_AT)):
        return None
    train(_sae_recipe(values, directory), differences)
    found = load_dictionary(directory)
    assert isinstance(found, SAE)
    return found.requires_grad_(False)


def _store(recipe: Recipe, provenance: dict[str, Any]) -> ActivationStore:
    """Return the store that the crosscoder was trained on."""
    section = recipe.harvest
    if section.store is None:
        raise ValueError(
            "--difference-sae: expected a crosscoder trained from a store, got one trained on live activations. Train it with "
            "harvest.store and harvest.tokens, or leave --difference-sae out."
        )
    place = store_place(section)
    place.fetch()
    try:
        store = ActivationStore.open(place.directory)
    except ValueError as error:
        raise ValueError(
            f"--difference-sae: expected the activations that the crosscoder was trained on in {section.store}: {error} "
            "Harvest them again: sparsary harvest CHECKPOINT/recipe.yaml."
        ) from None
    held, trained_on = ((each or {}).get("model") for each in (store.manifest.get("content"), provenance.get("content")))
    if held and trained_on and held != trained_on:
        raise ValueError(
            f"--difference-sae: expected activations of the crosscoder's models in {section.store}, got those of others. "
            "Harvest them again into another folder: sparsary harvest CHECKPOINT/recipe.yaml harvest.store=DIR."
        )
    return store


def _sae_recipe(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the crosscoder's recipe, of which only the dictionary's kind and its hooks are changed."""
    section, harvest = values["dictionary"], values["harvest"]
    changed = {key: value for key, value in values.items() if key not in OTHERS}
    changed["dictionary"] = {"kind": "sae", "hook": HOOK} | {key: section[key] for key in KEPT_OF_DICTIONARY}
    changed["harvest"] = {key: harvest[key] for key in KEPT_OF_HARVEST}
    return changed | {"model": {"device": values["model"]["device"]}, "out_dir": str(directory)}


@dataclass(frozen=True)
class DifferencePass:
    """The SAE's codes over text: statistics of its latents, fvu, and the sum of every latent's squared contribution."""

    collected: Collected
    fvu: float
    contributions: Float[Tensor, " n_latents"]

    @property
    def l0(self) -> float:
        """Mean number of latents per token."""
        return float(self.collected.firings.sum()) / self.collected.tokens

    def largest(self, count: int) -> list[int]:
        """Return the latents that contribute most to the difference, largest first; silent ones are in none."""
        order = self.contributions.argsort(descending=True, stable=True)[:count].tolist()
        return [latent for latent in order if self.contributions[latent] > 0]


class DifferenceCodes:
    """Running statistics of an SAE's codes of differences."""

    def __init__(self, sae: SAE, limits: Limits):
        self.sae, self.collector = sae, Collector(sae.n_latents, limits)
        self.squares = torch.zeros(sae.n_latents, dtype=torch.float64)
        self.sum = torch.zeros(sae.d_in, dtype=torch.float64)
        self.total = self.error = 0.0

    def update(self, batch: ContextBatch, difference: Float[Tensor, "tokens d"]) -> None:
        """Add a batch of contexts and the differences at its kept tokens."""
        code = self.sae.encode(difference)
        self.collector.update(batch, code)
        self.squares += code.to_dense(self.sae.n_latents).double().square().sum(0).cpu()
        self.sum += difference.double().sum(0).cpu()
        self.total += float(difference.double().square().sum())
        self.error += float((difference - self.sae.decode(code)).double().square().sum())

    def result(self) -> DifferencePass:
        """Return the statistics."""
        collected = self.collector.result()
        spread = self.total - float(self.sum.square().sum()) / collected.tokens
        rows = atoms_in_units(self.sae).double().cpu()
        return DifferencePass(collected, self.error / spread if spread else 0.0, self.squares * rows.square().sum(-1))


def atoms_in_units(sae: SAE) -> Float[Tensor, "n_latents d"]:
    """Return what one unit of every latent adds to the difference, in raw units."""
    return sae.atoms * sae.out_scale


def sae_change(sae: SAE, keep: Bool[Tensor, " n_latents"] | None = None) -> Change:
    """Return the change by the SAE's reconstruction of the difference, or by some of its latents alone, without the bias."""
    if keep is None:
        return lambda rows: sae(rows.tuned - rows.base)
    kept = atoms_in_units(sae) * keep.to(sae.W_dec)[:, None]
    return lambda rows: sae.encode(rows.tuned - rows.base).to_dense(sae.n_latents) @ kept
