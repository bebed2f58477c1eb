"""Synthetic models that SAELens publishes (SynthSAEBench), read from their files as planted dictionaries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ...sae import SparseCode
from ...sae.formats.base import require_keys, require_shape
from ...sae.formats.files import HubSource, SourceFiles
from ...sae.sparse_ops import decode
from .firing import Copula, Independent
from .planted import Planted, Sample, generator_of

CONFIG_FILE, WEIGHTS_FILE, HIERARCHY_FILE = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"
# Deviation of a feature's total variance from 1 that rounding explains.
VARIANCE_TOLERANCE = 1e-3


class Level(NamedTuple):
    """Features of one depth of a forest, and the groups of exclusive siblings below its nodes."""

    features: Int[Tensor, " some"]
    parents: Int[Tensor, " some"]
    # True where the parent's magnitude scales the feature's.
    scaled: Bool[Tensor, " some"]
    # Rows are padded with -1.
    exclusive: Int[Tensor, "groups siblings"]


@dataclass(frozen=True)
class PublishedModel(Planted):
    """Synthetic model of SAELens, which gates coefficients, rather than firing, by parents and siblings.

    Level by level, a coefficient is 0 if its parent's is, and may be scaled by its parent's in units of the parent's mean; then
    one of the positive coefficients of each exclusive group is kept at random. ``firing`` is the distribution before that.
    Source: SynthSAEBench, arXiv:2602.14687, and the files' writer, SAELens 6.54.
    """

    forest: tuple[Level, ...] = ()

    def sample(self, tokens: int, seed: int) -> Sample:
        """Sample ``tokens`` independent tokens, deterministic in the seed."""
        generator = generator_of("sample", seed)
        fires = self.firing.draw(tokens, generator)
        free, group, children = self._tables
        token, place = fires[:, free].nonzero(as_tuple=True)
        found = [self._entries(token, free[place], None, group, generator)]
        # From the roots down, as nearly all features that fire are silenced by a parent.
        for level, below in zip(self.forest, children, strict=True):
            token, parent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
            place = below[parent]
            above, column = ((place >= 0) & fires[token[:, None], level.features[place]]).nonzero(as_tuple=True)
            place = place[above, column]
            factor = torch.where(level.scaled[place], value[above] / self.means[parent[above]], 1.0)
            found.append(self._entries(token[above], level.features[place], factor, group, generator))
        token, feature, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        coefficients = torch.zeros(tokens, self.n_features)
        coefficients[token, feature] = value
        order = token.argsort(stable=True)
        counts = torch.bincount(token, minlength=tokens)
        code = SparseCode(feature[order], value[order], counts.cumsum(0) - counts)
        return Sample(decode(code, self.atoms) + self.bias, coefficients, None)

    def _entries(
        self,
        token: Int[Tensor, " entries"],
        feature: Int[Tensor, " entries"],
        factor: Float[Tensor, " entries"] | None,
        group: Int[Tensor, " n_features"],
        generator: Generator,
    ) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"], Float[Tensor, " kept"]]:
        """Return the tokens, features and positive coefficients that are left after exclusive groups."""
        noise = torch.randn(len(feature), generator=generator)
        value = (self.means[feature] + self.stds[feature] * noise).relu()
        value = value if factor is None else value * factor
        token, feature, value = token[value > 0], feature[value > 0], value[value > 0]
        kept = _one_of_each(token, group[feature], generator)
        return token[kept], feature[kept], value[kept]

    @cached_property
    def _tables(self) -> tuple[Int[Tensor, " free"], Int[Tensor, " n_features"], list[Int[Tensor, "n_features children"]]]:
        """Features without a parent, exclusive groups (-1: none), and children as places in a level's features (-1: none)."""
        group, number = torch.full((self.n_features,), -1), 0
        free, children = torch.ones(self.n_features, dtype=torch.bool), []
        for level in self.forest:
            free[level.features] = False
            row, column = (level.exclusive >= 0).nonzero(as_tuple=True)
            group[level.exclusive[row, column]] = number + row
            number += len(level.exclusive)
            order = level.parents.argsort(stable=True)
            counts = torch.bincount(level.parents, minlength=self.n_features)
            table = torch.full((self.n_features, int(counts.max())), -1)
            parents = level.parents[order]
            table[parents, torch.arange(len(order)) - (counts.cumsum(0) - counts)[parents]] = order
            children.append(table)
        return free.nonzero()[:, 0], group, children


def _one_of_each(
    token: Int[Tensor, " entries"], group: Int[Tensor, " entries"], generator: Generator
) -> Bool[Tensor, " entries"]:
    """Return a mask that keeps one entry, chosen at random, of every group of every token, and all without a group."""
    kept, grouped = group < 0, (group >= 0).nonzero()[:, 0]
    if len(grouped):
        bag = token[grouped] * (int(group.max()) + 1) + group[grouped]
        # In random order within a bag: the first one stays.
        order = torch.randperm(len(bag), generator=generator)
        order = order[bag[order].argsort(stable=True)]
        first = torch.ones(len(bag), dtype=torch.bool)
        first[1:] = bag[order][1:] != bag[order][:-1]
        kept[grouped[order[first]]] = True
    return kept


def load_planted(path_or_id: str, revision: str | None = None) -> PublishedModel:
    """Load a synthetic model from a directory or a Hugging Face Hub repository.

    Args:
        path_or_id: For example ``decoderesearch/synth-sae-bench-16k-v1``. It contains ``synthetic_model_config.json``,
            ``synthetic_model.safetensors`` and, if features form trees, ``hierarchy.json``.
        revision: Of the repository.

    Raises:
        ValueError: If a file is missing or damaged, or does not determine the model.
    """
    source = SourceFiles(path_or_id) if Path(path_or_id).exists() else HubSource(path_or_id, revision)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not source.has(name):
            raise ValueError(f"{source}: expected a synthetic model of SAELens, with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config, tensors = source.config(CONFIG_FILE), source.tensors(WEIGHTS_FILE)
    where = source.path(WEIGHTS_FILE)
    require_keys(where, tensors, ("feature_vectors", "bias", "firing_probabilities"))
    atoms, p = tensors["feature_vectors"].float(), tensors["firing_probabilities"].float()
    require_shape(where, "feature_vectors", tuple(atoms.shape), (None, None))
    n_features, d = atoms.shape
    require_shape(where, "bias", tuple(tensors["bias"].shape), (d,))
    require_shape(where, "firing_probabilities", tuple(p.shape), (n_features,))
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"{where}: firing_probabilities: expected 0 to 1, got {float(p.min()):g} to {float(p.max()):g}.")
    firing = Independent(p)
    if "correlation_factor" in tensors:
        factors, diagonal = tensors["correlation_factor"].float(), tensors["correlation_diag"].float()
        require_shape(where, "correlation_factor", tuple(factors.shape), (n_features, None))
        require_shape(where, "correlation_diag", tuple(diagonal.shape), (n_features,))
        off = float((factors.pow(2).sum(-1) + diagonal - 1).abs().max())
        if off > VARIANCE_TOLERANCE:
            raise ValueError(f"{where}: correlation_factor, correlation_diag: expected variances of 1, got some {off:.2g} off.")
        firing = Copula(p, factors)
    seed = config.get("seed")
    means = _magnitudes(source, config, "mean_firing_magnitudes", 1.0, n_features, None if seed is None else seed + 2)
    stds = _magnitudes(source, config, "std_firing_magnitudes", 0.0, n_features, None if seed is None else seed + 1)
    forest, depths = _forest(source, n_features)
    names = {-1: "loners", 0: "roots"}
    groups = {names.get(depth, f"depth_{depth}"): (depths == depth).nonzero()[:, 0] for depth in depths.unique().tolist()}
    return PublishedModel(atoms, tensors["bias"].float(), firing, means, stds, groups=groups, forest=forest)


def _magnitudes(
    source: SourceFiles, config: Mapping[str, Any], key: str, default: float, n: int, seed: int | None
) -> Float[Tensor, " n"]:
    """Return the magnitudes that a configuration describes; its writer draws them anew from the seed."""
    value = config.get(key, default)
    where = f"{source}/{CONFIG_FILE}: {key}"
    if isinstance(value, int | float):
        return torch.full((n,), float(value))
    kind = value.get("generator_name") if isinstance(value, Mapping) else None
    try:
        if kind == "constant":
            return torch.full((n,), float(value["value"]))
        if kind in ("linear", "exponential"):
            start, end = float(value["start"]), float(value["end"])
            if kind == "linear":
                return torch.linspace(start, end, n)
            return start * (end / start) ** torch.linspace(0, 1, n)
        if kind == "folded_normal":
            if seed is None:
                raise ValueError(
                    f"{where}: expected a seed, as folded_normal is random, got none. Write the model with a seed."
                )
            noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
            found = (float(value["mean"]) + float(value["std"]) * noise).abs()
            return found.clamp(value.get("min_value"), value.get("max_value")) if _bounded(value) else found
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected the numbers of {kind}, got {value!r} ({error!r}).") from None
    raise ValueError(f"{where}: expected a number, constant, linear, exponential or folded_normal, got {value!r}.")


def _bounded(value: Mapping[str, Any]) -> bool:
    return value.get("min_value") is not None or value.get("max_value") is not None


class _Node(NamedTuple):
    feature: int | None
    parent: int  # the nearest feature above, -1 if there is none
    scaled: bool
    depth: int
    exclusive: list[int]


def _forest(source: SourceFiles, n_features: int) -> tuple[tuple[Level, ...], Int[Tensor, " n_features"]]:
    """Return the levels of ``hierarchy.json``, if there is one, and each feature's depth, -1 outside the trees."""
    depths = torch.full((n_features,), -1)
    if not source.has(HIERARCHY_FILE):
        return (), depths
    where = source.path(HIERARCHY_FILE)
    try:
        nodes = list(_nodes(source.config(HIERARCHY_FILE)["roots"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected roots with feature_index and children ({error!r} is missing or wrong).") from None
    features = [node.feature for node in nodes if node.feature is not None]
    if len(set(features)) < len(features) or any(not 0 <= feature < n_features for feature in features):
        raise ValueError(f"{where}: expected every feature_index once, and from 0 to {n_features - 1}.")
    levels = []
    for depth in range(max((node.depth for node in nodes), default=-1) + 1):
        here = [node for node in nodes if node.depth == depth]
        for node in here:
            if node.feature is not None:
                depths[node.feature] = depth
        below = [node for node in here if node.feature is not None and node.parent >= 0]
        groups = [node.exclusive for node in here if len(node.exclusive) > 1]
        width = max(map(len, groups), default=0)
        levels.append(
            Level(
                torch.tensor([node.feature for node in below], dtype=torch.long),
                torch.tensor([node.parent for node in below], dtype=torch.long),
                torch.tensor([node.scaled for node in below], dtype=torch.bool),
                torch.tensor([group + [-1] * (width - len(group)) for group in groups], dtype=torch.long).view(
                    len(groups), width
                ),
            )
        )
    return tuple(levels), depths


def _nodes(roots: list[dict[str, Any]]) -> Iterator[_Node]:
    """Yield the nodes of a forest; nodes without a feature only group their children."""
    waiting = [(root, -1, False, 0) for root in roots]
    while waiting:
        node, parent, scaled, depth = waiting.pop()
        feature, children = node.get("feature_index"), node.get("children") or []
        rivals = [child["feature_index"] for child in children if child.get("feature_index") is not None]
        exclusive = rivals if node.get("mutually_exclusive_children") else []
        yield _Node(feature, parent, scaled, depth, exclusive)
        below = parent if feature is None else feature
        scales = bool(node.get("scale_children_by_parent"))
        waiting += [(child, below, scales, depth + 1) for child in children]
