"""Synthetic model with the configuration of SynthSAEBench-16k, written by SAELens for ``sparsary bench truth --data FOLDER``.

    .venv-peers/bin/python tests/parity/synth_sae_bench_16k.py runs/synth-sae-bench-16k

The published model (``decoderesearch/synth-sae-bench-16k-v1``) was drawn on a GPU, where the same seed gives other random
numbers: features, trees and magnitudes here are others of the same distribution. Configuration: SAELens's documentation of
SynthSAEBench, and for the norm of the bias the script in decoderesearch/synth-sae-bench-experiments that made the model.
"""

# The library is installed in the peers' environment only.
# pyright: reportMissingImports=false

import argparse

import torch
import torch.nn.functional as F
from sae_lens.synthetic.feature_dictionary import FeatureDictionary
from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
from sae_lens.synthetic.hierarchy import HierarchyConfig
from sae_lens.synthetic.synthetic_model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)

SPREAD = OrthogonalizationConfig(num_steps=100, lr=3e-4)
CONFIG = SyntheticModelConfig(
    num_features=16_384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=SPREAD,
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)


def push_apart(features: FeatureDictionary) -> None:
    """Minimize the loss of SAELens's own initializer, which takes twenty times as long.

    The sum of all squared inner products is that of the (768, 768) matrix of the transposed product.
    """
    rows = features.feature_vectors.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=SPREAD.lr)
    for _ in range(SPREAD.num_steps):
        optimizer.zero_grad()
        squares = rows.square().sum(1)
        off = (rows.T @ rows).square().sum() - squares.square().sum()
        (off + len(rows) * (squares - 1).square().sum()).backward()
        optimizer.step()
    features.feature_vectors.data = F.normalize(rows.detach(), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    size = CONFIG.num_features, CONFIG.hidden_dim
    features = FeatureDictionary(*size, bias=CONFIG.bias, initializer=push_apart, seed=CONFIG.seed)
    SyntheticModel(CONFIG, feature_dict=features).save(parser.parse_args().folder)


if __name__ == "__main__":
    main()
