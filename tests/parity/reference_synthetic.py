"""Synthetic models written by SAELens, and frequencies and moments of the coefficients that it samples from them.

    .venv-peers/bin/python tests/parity/reference_synthetic.py tests/golden/synthetic

makes the folders that tests/eval/synthetic/test_published.py loads.
"""

import argparse
import json
from pathlib import Path

import torch
from sae_lens.synthetic.firing_magnitudes import ExponentialMagnitudeConfig, FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
from sae_lens.synthetic.hierarchy import HierarchyConfig
from sae_lens.synthetic.synthetic_model import LowRankCorrelationConfig, SyntheticModel, SyntheticModelConfig

TOKENS = 500_000
TREES = {"total_root_nodes": 3, "branching_factor": 3, "max_depth": 2, "mutually_exclusive_portion": 1.0}
MODELS = {
    # Everything that the published model has: scaled children, exclusive siblings, correlations, random magnitudes.
    "trees": {
        "hierarchy": HierarchyConfig(**TREES, compensate_probabilities=True, scale_children_by_parent=True),
        "correlation": LowRankCorrelationConfig(rank=2, correlation_scale=0.3),
        "std_firing_magnitudes": FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        "mean_firing_magnitudes": LinearMagnitudeConfig(start=5.0, end=4.0),
    },
    # Some exclusive siblings, children that a parent only gates, and magnitudes that are often cut at 0.
    "gated": {
        "hierarchy": HierarchyConfig(total_root_nodes=3, branching_factor=(2, 4), max_depth=3, mutually_exclusive_portion=0.5),
        "std_firing_magnitudes": 1.0,
        "mean_firing_magnitudes": ExponentialMagnitudeConfig(start=2.0, end=0.5),
        "bias": False,
    },
    "flat": {"std_firing_magnitudes": FoldedNormalMagnitudeConfig(mean=0.5, std=0.5, max_value=0.8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, changes in MODELS.items():
        firing = ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.05)
        SyntheticModel(SyntheticModelConfig(41, 8, firing_probability=firing, seed=7, **changes)).save(folder / name)
        model = SyntheticModel.load_from_disk(folder / name)
        torch.manual_seed(0)
        x, coefficients = model.sample_with_features(TOKENS)
        fires = (coefficients > 0).double()
        found = {
            "tokens": TOKENS,
            "fires": fires.mean(0).tolist(),
            "fires_with_next": (fires[:, :-1] * fires[:, 1:]).mean(0).tolist(),
            "mean": coefficients.double().mean(0).tolist(),
            "square": coefficients.double().pow(2).mean(0).tolist(),
            "x": x.double().mean(0).tolist(),
        }
        rounded = {key: value if key == "tokens" else [float(f"{v:.6g}") for v in value] for key, value in found.items()}
        (folder / name / "sampled.json").write_text(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
