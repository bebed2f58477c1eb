"""Feature circuits: do latents carry a task in fewer nodes than neurons, heads or random features do? All families, equal l0.

    python tests/studies/feature_circuits.py embedded [--seeds 3]
    python tests/studies/feature_circuits.py stories3M --pairs PAIRS_DIRECTORY

Trains, for every family and seed, an SAE behind every block (recipes/circuits/NAME.yaml), of one width and one budget.
What is there is not done again.
"""

import argparse
from pathlib import Path

from training.grid import check_grid
from training.recipe import read_values
from training.run import train_all

K = {"embedded": 16, "stories3M": 32}


def families(k: int) -> dict[str, dict]:
    """What each changes in the recipe."""
    mutual = {"dictionary.encoder": {"name": "mutual_choice", "k": k}, "aux_zipf_tau": 0.1}
    return {
        "topk": {},
        "mutual_choice": mutual,
        "feature_choice": mutual | {"phases": [{"start": 0.8, "blend": 0.05, "encoder": {"name": "feature_choice", "k": k}}]},
        "gradient_topk": {
            "dictionary.encoder": {"name": "gradient_topk", "k": k, "beta": 11.0},
            "schedules": {"beta": [[0.0, 0.0], [0.1, 11.0], [0.8, 11.0], [0.95, 0.0]]},
        },
        "matching_pursuit": {"dictionary.encoder": {"name": "matching_pursuit", "k": k}},
    }


def directory(name: str, family: str, seed: int) -> Path:
    return Path("runs/circuits") / f"{name}-study" / family / f"seed-{seed}"


def train(name: str, family: str, seed: int) -> Path:
    """The stack of one family and seed."""
    out = directory(name, family, seed)
    changes = families(K[name])[family] | {"seed": seed, "out_dir": str(out)}
    train_all(check_grid(read_values(f"recipes/circuits/{name}.yaml", changes), family).recipes)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=K)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    for seed in range(options.seeds):
        for family in families(K[options.name]):
            print(train(options.name, family, seed), flush=True)


if __name__ == "__main__":
    main()
