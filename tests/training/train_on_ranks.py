"""Started by torchrun in test_processes.py: trains small dictionaries of all families on random activations.

Usage: train_on_ranks.py DIRECTORY RECIPE...
"""

import json
import sys
from pathlib import Path

import torch

import sparsary

D, ROWS = 13, 480


def activations():
    """Return activations of a planted dictionary with their gradients, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    atoms = torch.randn(40, D, generator=generator)
    codes = torch.rand(ROWS, 40, generator=generator) * (torch.rand(ROWS, 40, generator=generator) < 0.1)
    return codes @ atoms + 0.05 * torch.randn(ROWS, D, generator=generator), torch.randn(ROWS, D, generator=generator)


def side_by_side(x):
    """Return the activations of a crosscoder's two sites: these, and the same in another order of columns."""
    return torch.cat([x, 2 * x.flip(1)], dim=1)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    for number, text in enumerate(sys.argv[2:]):
        recipe, (x, grad) = json.loads(text), activations()
        given = side_by_side(x) if recipe["dictionary"].get("kind") == "crosscoder" else (x, grad)
        sparsary.train(recipe, [given], out_dir=str(directory / str(number)))
