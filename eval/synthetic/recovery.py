"""Matching of learned decoder directions to planted ones, and recovery scores."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.metrics import RunningFvu, dead_fraction
from .planted import Planted, Sample, generator_of, unit_directions

# A feature counts as recovered if the |cos| of its atom with some decoder direction is above this.
RECOVERED_COSINE = 0.9
# Limits the memory of a wide dictionary's dense pre-activations; codes in eval mode do not depend on it.
JUDGE_BATCH_TOKENS = 8192


class Matching(NamedTuple):
    """One-to-one matching: entries ``i`` of both tensors form a pair."""

    features: Tensor  # (pairs,)
    latents: Tensor  # (pairs,)


def match(cosines: Float[Tensor, "n_features n_latents"]) -> Matching:
    """Return the min(n_features, n_latents) pairs with the largest sum of cosines (Hungarian method)."""
    features, latents = linear_sum_assignment(cosines.numpy(), maximize=True)
    return Matching(torch.from_numpy(features), torch.from_numpy(latents))


def absolute_cosines(
    atoms: Float[Tensor, "n_features d"], W_dec: Float[Tensor, "n_latents d"]
) -> Float[Tensor, "n_features n_latents"]:
    """Return |cos| of every planted atom with every learned decoder direction; a zero row is orthogonal to all."""
    return (F.normalize(atoms.double(), dim=-1) @ F.normalize(W_dec.double(), dim=-1).T).abs()


def match_score(
    planted: Planted,
    W_dec: Float[Tensor, "n_latents d"],
    latents: Float[Tensor, "tokens n_latents"],
    sample: Sample,
    x_hat: Float[Tensor, "tokens d"],
) -> dict[str, float]:
    """Return a dictionary's recovery metrics on one sample; see ``Recovery``."""
    recovery = Recovery(planted, W_dec)
    recovery.update(latents, sample, x_hat)
    return recovery.report()


class Recovery:
    """Recovery metrics of a dictionary, from its decoder and, over any number of samples, its latents and reconstructions.

    - ``mcc``: mean |cos| of planted and learned directions matched one to one; ``chance_mcc``: that of random directions.
    - ``mmcs_true``: mean over features of the |cos| with the nearest decoder direction, which may be nearest to several (like a
      recall); ``mmcs_learned``: mean over latents of the |cos| with the nearest feature (like a precision).
    - ``recall_09``: fraction of features with a decoder direction above |cos| 0.9; ``recall_09_<group>``: within a group.
    - ``uniqueness``: fraction of latents, dead ones included, whose nearest feature is no other latent's nearest.
      ``distinct_features``: number of features that are some latent's nearest, per latent; SAELens calls this uniqueness.
    - ``detector_f1``: (latent > 0) as a detector of (coefficient > 0), mean over matched pairs.
    - ``latent_f1``, ``latent_precision``, ``latent_recall``: (latent > 0) as a detector of its nearest feature, mean over all
      latents; 0 for a dead one.
    - ``coefficient_correlation``: Pearson's, over tokens, mean over matched pairs; 0 if the latent is constant.
    - ``fvu``, ``shrinkage`` (mean ||x_hat|| / ||x||), ``l0``, ``true_l0``, ``dead_fraction``: on the samples.

    Means over pairs exclude features that never fire in the samples. Source: SynthSAEBench, arXiv:2602.14687.

    Args:
        planted: The data.
        W_dec: Decoder directions.
        chance: Report ``chance_mcc``, whose matching takes longest if there are as many latents as features.
    """

    def __init__(self, planted: Planted, W_dec: Float[Tensor, "n_latents d"], chance: bool = True):
        self.planted = planted
        self.n_latents = W_dec.shape[0]
        cosines = absolute_cosines(planted.atoms, W_dec)
        self.pairs = match(cosines)
        nearest_atom = cosines.max(1).values
        nearest_cosine, self.nearest_feature = cosines.max(0)
        shared_by = torch.bincount(self.nearest_feature, minlength=planted.n_features)
        recovered = (nearest_atom > RECOVERED_COSINE).double()
        self.of_atoms = {
            "mcc": float(cosines[self.pairs.features, self.pairs.latents].mean()),
            **({"chance_mcc": chance_mcc(planted.atoms, self.n_latents)} if chance else {}),
            "mmcs_true": float(nearest_atom.mean()),
            "mmcs_learned": float(nearest_cosine.mean()),
            "recall_09": float(recovered.mean()),
            **{f"recall_09_{name}": float(recovered[features].mean()) for name, features in planted.groups.items()},
            "uniqueness": float((shared_by[self.nearest_feature] == 1).double().mean()),
            "distinct_features": int((shared_by > 0).sum()) / self.n_latents,
        }
        n_pairs = len(self.pairs.features)
        # Tokens on which both fire, the feature fires, the latent fires.
        self.counts = torch.zeros(3, n_pairs, dtype=torch.float64)
        self.latent_counts = torch.zeros(3, self.n_latents, dtype=torch.float64)
        # Sums of the coefficient, the latent, their squares and their product.
        self.sums = torch.zeros(5, n_pairs, dtype=torch.float64)
        self.fvu = RunningFvu(planted.d)
        self.shrinkage, self.l0, self.true_l0, self.tokens = 0.0, 0.0, 0.0, 0

    def update(self, latents: Float[Tensor, "tokens n_latents"], sample: Sample, x_hat: Float[Tensor, "tokens d"]) -> None:
        """Add a sample, the dictionary's latents on it, and its reconstruction."""
        fires, truly = latents > 0, sample.coefficients > 0
        true, learned = sample.coefficients[:, self.pairs.features].double(), latents[:, self.pairs.latents].double()
        self.counts += _overlap(truly[:, self.pairs.features], fires[:, self.pairs.latents])
        self.latent_counts += _overlap(truly[:, self.nearest_feature], fires)
        self.sums += torch.stack([t.sum(0) for t in (true, learned, true * true, learned * learned, true * learned)])
        self.fvu.update(sample.x, x_hat)
        norms = sample.x.double().norm(dim=-1)
        self.shrinkage += float((x_hat.double().norm(dim=-1) / norms.clamp_min(1e-12)).sum())
        self.l0 += int(fires.sum())
        self.true_l0 += int(truly.sum())
        self.tokens += len(norms)

    def report(self) -> dict[str, float]:
        """Return the metrics over all samples so far."""
        both, truly, fired = self.counts
        # A feature that never fires says nothing about its detector.
        seen = truly > 0
        f1 = 2 * both[seen] / (truly + fired)[seen]
        both_latent, truly_latent, fired_latent = self.latent_counts
        return self.of_atoms | {
            "detector_f1": float(f1.mean()),
            "latent_f1": float((2 * both_latent / (truly_latent + fired_latent).clamp_min(1)).mean()),
            "latent_precision": float((both_latent / fired_latent.clamp_min(1)).mean()),
            "latent_recall": float((both_latent / truly_latent.clamp_min(1)).mean()),
            "coefficient_correlation": float(self._correlation()[seen].mean()),
            "fvu": float(self.fvu.value()),
            "shrinkage": self.shrinkage / self.tokens,
            "l0": self.l0 / self.tokens,
            "true_l0": self.true_l0 / self.tokens,
            "dead_fraction": dead_fraction(fired_latent.long()),
        }

    def _correlation(self) -> Float[Tensor, " pairs"]:
        a, b, aa, bb, ab = self.sums / self.tokens
        spread = ((aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)).sqrt()
        # A constant's computed variance is rounding error.
        constant = (bb - b * b <= 1e-12 * bb) | (aa - a * a <= 1e-12 * aa)
        return torch.where(constant, 0.0, (ab - a * b) / spread.where(spread > 0, 1.0))


def _overlap(true: Bool[Tensor, "tokens n"], detected: Bool[Tensor, "tokens n"]) -> Float[Tensor, "3 n"]:
    return torch.stack([(true & detected).sum(0), true.sum(0), detected.sum(0)]).double()


def chance_mcc(atoms: Float[Tensor, "n_features d"], n_latents: int, seed: int = 0) -> float:
    """Return the ``mcc`` of ``n_latents`` random decoder directions, i.e. of a dictionary that learned nothing."""
    guessed = unit_directions(n_latents, atoms.shape[1], generator_of("chance", seed))
    cosines = absolute_cosines(atoms, guessed)
    pairs = match(cosines)
    return float(cosines[pairs.features, pairs.latents].mean())


@torch.no_grad()
def evaluate_recovery(dictionary: SparseDictionary, planted: Planted, tokens: int, seed: int) -> dict[str, float]:
    """Evaluate a dictionary in eval mode on fresh tokens, by the metrics of ``Recovery``; choose a seed not used in training.

    Raises:
        ValueError: If the dictionary's width is not the planted one.
    """
    recovery = recovery_of(planted, dictionary)
    update_recovery(recovery, dictionary, planted.sample(tokens, seed))
    return recovery.report()


def recovery_of(planted: Planted, dictionary: SparseDictionary) -> Recovery:
    """Return an empty ``Recovery`` for a dictionary.

    Raises:
        ValueError: If the dictionary's width is not the planted one.
    """
    if dictionary.d_in != planted.d or dictionary.d_out != planted.d:
        raise ValueError(
            f"dictionary: expected d_in = d_out = {planted.d}, as planted, got {dictionary.d_in} and {dictionary.d_out}."
        )
    return Recovery(planted, dictionary.atoms.detach().float().cpu())


@torch.no_grad()
def update_recovery(recovery: Recovery, dictionary: SparseDictionary, sample: Sample) -> None:
    """Add a sample and a dictionary's outputs on it in eval mode."""
    device = dictionary.device
    training = dictionary.training
    dictionary.eval()
    try:
        for start in range(0, len(sample.x), JUDGE_BATCH_TOKENS):
            x, coefficients, grad = (None if t is None else t[start : start + JUDGE_BATCH_TOKENS] for t in sample)
            assert x is not None
            assert coefficients is not None
            code = dictionary.encode(x.to(device), None if grad is None else grad.to(device))
            latents = code.to_dense(dictionary.n_latents).float().cpu()
            recovery.update(latents, Sample(x, coefficients, grad), dictionary.decode(code).float().cpu())
    finally:
        dictionary.train(training)
