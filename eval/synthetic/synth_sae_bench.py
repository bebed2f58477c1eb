"""SynthSAEBench-like data, in its published size and in one that two CPU cores can learn, with baselines and a ceiling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ...sae import SparseDictionary
from .firing import Firing
from .planted import Planted, Sample, generator_of, levels, zipf_probabilities
from .recovery import Recovery, recovery_of, update_recovery

# Tokens drawn at a time: 2048 tokens of 16,384 features take 0.1 GB.
DRAW_TOKENS = 2048
# Enough to measure a probability of 5e-4 to within a fifth.
MEASURED_TOKENS = 50_000


@dataclass(frozen=True)
class Tree(Firing):
    """Forest whose features are drawn by a ``Copula``, then silenced if their parent is silent.

    Among siblings that still fire, one is kept at random; roots do not exclude each other. ``p`` is each feature's target
    probability: it is raised beforehand to compensate on average for silencing by parents and siblings, at most to certainty,
    so features whose parent is rarer than they are miss the target. Children of one parent are contiguous, and parents of one
    level have equally many.
    """

    parents: Int[Tensor, " n_features"]
    p: Float[Tensor, " n_features"]
    factors: Float[Tensor, "n_features rank"]

    @cached_property
    def _thresholds(self) -> Float[Tensor, " n_features"]:
        raised = self.p.clone()
        for level in levels(self.parents)[1:]:
            above = self.p[self.parents[level]]
            total = torch.zeros_like(self.p).index_add_(0, self.parents[level], self.p[level])[self.parents[level]]
            raised[level] = self.p[level] / above * (1 + (total - self.p[level]) / above)
        return torch.special.ndtri(1 - raised.clamp_max(1 - 1e-6))

    @cached_property
    def _measured(self) -> Float[Tensor, " n_features"]:
        generator, count, fired = generator_of("measure", 0), 0, torch.zeros_like(self.p)
        while count < MEASURED_TOKENS:
            fired += self.draw(DRAW_TOKENS, generator).sum(0)
            count += DRAW_TOKENS
        return fired / count

    def probabilities(self) -> Float[Tensor, " n_features"]:
        """Return frequencies on 50,000 tokens: correlated features with exclusive siblings have no closed form."""
        return self._measured

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        n_features, rank = self.factors.shape
        normals = torch.randn(tokens, n_features, generator=generator) * (1 - self.factors.pow(2).sum(-1)).sqrt()
        normals += torch.randn(tokens, rank, generator=generator) @ self.factors.T
        fires = normals > self._thresholds
        for level in levels(self.parents)[1:]:
            above = self.parents[level]
            n_parents = len(above.unique())
            # (tokens, parents, siblings): the firing sibling with the largest random number stays.
            lots = torch.rand(tokens, n_parents, len(level) // n_parents, generator=generator)
            lots *= (fires[:, level] & fires[:, above]).view_as(lots)
            chosen = (lots == lots.max(-1, keepdim=True).values) & (lots > 0)
            fires[:, level] = chosen.view(tokens, -1)
        return fires


def synth_sae_bench(
    seed: int = 42,
    n_features: int = 16_384,
    d: int = 768,
    roots: int = 128,
    branching: int = 4,
    depth: int = 3,
    exponent: float = 0.5,
    p_min: float = 5e-4,
    p_max: float = 0.4,
    rank: int = 25,
    scale: float = 0.1,
    orthogonalise_steps: int = 100,
    bias_norm: float = 1.0,
) -> Planted:
    """Return data with Zipf probabilities, trees with exclusive siblings, weak correlations, and atoms pushed apart.

    The defaults are the published SynthSAEBench-16k as far as it is described: parents scale their children, mean magnitudes
    fall linearly from 5 to 4, their standard deviations are |N(0.5, 0.5)|. The most frequent features are the roots, then their
    children. Random numbers differ from the published ones, and so do the atoms. Groups: ``roots``, one for each depth, and
    ``loners``, the features outside the trees. Source: SynthSAEBench, arXiv:2602.14687.

    Raises:
        ValueError: If the trees need more than ``n_features`` features.
    """
    sizes = [roots * branching**level for level in range(depth + 1)]
    in_trees = sum(sizes)
    if in_trees > n_features:
        raise ValueError(f"n_features: expected at least {in_trees}, as many as the trees have, got {n_features}.")
    generator = generator_of("truth", seed)
    parents, first = [torch.full((roots,), -1)], 0
    for size in sizes[:-1]:
        parents.append(torch.arange(first, first + size).repeat_interleave(branching))
        first += size
    parents.append(torch.full((n_features - in_trees,), -1))
    atoms = push_apart(torch.randn(n_features, d, generator=generator), orthogonalise_steps)
    bias = bias_norm * F.normalize(torch.randn(1, d, generator=generator), dim=-1)[0]
    factors = scale * torch.randn(n_features, rank, generator=generator)
    # A row of norm 1 would leave no independent variance.
    factors *= (0.99 / factors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    firing = Tree(torch.cat(parents), zipf_probabilities(n_features, exponent, p_min, p_max), factors)
    stds = (0.5 + 0.5 * torch.randn(n_features, generator=generator)).abs()
    parts = torch.arange(n_features).split([*sizes, n_features - in_trees])
    names = ["roots", *(f"depth_{level}" for level in range(1, depth + 1)), "loners"]
    groups = {name: part for name, part in zip(names, parts, strict=True) if len(part)}
    means = torch.linspace(5.0, 4.0, n_features)
    return Planted(atoms, bias, firing, means, stds, groups=groups, parents=firing.parents)


SYNTH: dict[str, Callable[[int], Planted]] = {
    "synth_sae_bench_16k": synth_sae_bench,
    # A hundredth of the size: 128 features in 32 dimensions, 4 per token, three minutes of training on two cores.
    "synth_sae_bench_small": lambda seed: synth_sae_bench(
        seed, 128, 32, roots=8, branching=3, depth=2, p_min=5e-3, p_max=0.3, rank=4
    ),
}


def push_apart(atoms: Float[Tensor, "n_features d"], steps: int, lr: float = 3e-4) -> Float[Tensor, "n_features d"]:
    """Return unit rows after ``steps`` steps of Adam on the sum of their squared cosines."""
    rows = F.normalize(atoms, dim=-1).requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        lengths = rows.pow(2).sum(-1)
        # ||A A^T||_F = ||A^T A||_F, and the second matrix is smaller.
        loss = (rows.T @ rows).pow(2).sum() - lengths.pow(2).sum() + len(rows) * (lengths - 1).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(rows.detach(), dim=-1)


def _pieces(planted: Planted, tokens: int, seed: int) -> list[tuple[int, int]]:
    """Return sizes and seeds of the samples that make up ``tokens`` tokens."""
    sizes = [min(DRAW_TOKENS, tokens - start) for start in range(0, tokens, DRAW_TOKENS)]
    return [(size, 1_000_003 * seed + number) for number, size in enumerate(sizes)]


def judge_streamed(dictionary: SparseDictionary, planted: Planted, tokens: int, seed: int) -> dict[str, float]:
    """Evaluate as ``evaluate_recovery`` does, in memory independent of ``tokens``; the tokens drawn are different ones.

    Raises:
        ValueError: If the dictionary's width is not the planted one.
    """
    recovery = recovery_of(planted, dictionary)
    for size, number in _pieces(planted, tokens, seed):
        update_recovery(recovery, dictionary, planted.sample(size, number))
    return recovery.report()


def references(planted: Planted, n_latents: int, k: int, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the recovery metrics of baseline dictionaries and of the ground truth.

    - ``random``: ``n_latents`` random directions; ``pca``: the principal components with both signs, at most ``n_latents``;
      ``kmeans``: ``n_latents`` spherical cluster centers. The k directions with the largest inner products fire.
    - ``oracle``: the planted atoms, firing exactly where the truth does, with coefficients by least squares.
    """
    fitted = torch.cat([planted.sample(size, number).x for size, number in _pieces(planted, tokens, seed + 1)])
    mean = fitted.mean(0)
    generator = generator_of("references", seed)
    components = torch.linalg.svd(fitted - mean, full_matrices=False).Vh
    floors = {
        "random": F.normalize(torch.randn(n_latents, planted.d, generator=generator), dim=-1),
        "pca": torch.stack([components, -components], 1).flatten(0, 1)[:n_latents],
        "kmeans": cluster_centres(fitted - mean, n_latents, generator),
    }
    recoveries = {name: Recovery(planted, atoms, chance=False) for name, atoms in floors.items()} | {
        "oracle": Recovery(planted, planted.atoms, chance=False)
    }
    for size, number in _pieces(planted, tokens, seed):
        sample = planted.sample(size, number)
        for name, atoms in floors.items():
            scores = (sample.x - mean) @ atoms.T
            top = scores.topk(min(k, len(atoms)), dim=-1)
            latents = torch.zeros_like(scores).scatter_(1, top.indices, top.values.relu())
            # Correlated directions count shared variance twice; one common factor corrects the scale.
            y_hat = latents @ atoms
            share = ((sample.x - mean) * y_hat).sum() / y_hat.pow(2).sum().clamp_min(1e-12)
            recoveries[name].update(latents, sample, mean + share * y_hat)
        recoveries["oracle"].update(*_with_true_support(planted, sample))
    return {name: recovery.report() for name, recovery in recoveries.items()}


def cluster_centres(
    x: Float[Tensor, "tokens d"], n: int, generator: Generator, rounds: int = 10
) -> Float[Tensor, "n_centres d"]:
    """Return unit centers of spherical k-means, at most one per row of ``x``; an empty cluster keeps its center."""
    rows = F.normalize(x, dim=-1)
    centres = rows[torch.randperm(len(rows), generator=generator)[:n]].clone()
    for _ in range(rounds):
        nearest = torch.cat([(part @ centres.T).argmax(-1) for part in rows.split(DRAW_TOKENS)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        norms = sums.norm(dim=-1, keepdim=True)
        centres = torch.where(norms > 1e-6, sums / norms.clamp_min(1e-6), centres)
    return centres


def _with_true_support(planted: Planted, sample: Sample) -> tuple[Tensor, Sample, Tensor]:
    """Return latents by least squares on each token's true atoms, the sample, and the reconstruction."""
    fires = sample.coefficients > 0
    width = int(fires.sum(-1).max())
    order = fires.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]
    used = fires.gather(1, order)
    atoms = planted.atoms.double()[order] * used[..., None]
    gram = atoms @ atoms.mT + torch.diag_embed((~used).double() + 1e-9)
    target = atoms @ (sample.x - planted.bias).double()[..., None]
    values = torch.linalg.solve(gram, target)[..., 0] * used
    latents = torch.zeros_like(sample.coefficients).scatter_(1, order, values.float())
    return latents, sample, latents @ planted.atoms + planted.bias
