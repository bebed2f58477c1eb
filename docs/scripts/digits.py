"""Worked example of docs/how_to/vectors.md: hidden activations of a small network on scikit-learn's handwritten digits.

    python docs/scripts/digits.py FOLDER

Writes FOLDER/hidden.npy, FOLDER/rows.csv, FOLDER/digits/*.png and FOLDER/recipe.yaml.
"""

import csv
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import torch
from sklearn.datasets import load_digits

RECIPE = """\
# SAE of the hidden layer of a network that reads handwritten digits.
harvest: {{files: [{folder}/hidden.npy], rows: {folder}/rows.csv, heldout: 0.3}}
dictionary: {{n_latents: 192, encoder: {{name: topk, k: 4}}}}
tokens: 200_000
batch_tokens: 256
dead_after_tokens: 20_000
eval_tokens: 539
out_dir: {folder}/run
"""


def hidden_activations(pixels: torch.Tensor, digits: torch.Tensor, steps: int = 300) -> torch.Tensor:
    """Train a network with one hidden layer to read digits, and return the activations of that layer."""
    torch.manual_seed(0)
    hidden, out = torch.nn.Linear(pixels.shape[1], 64), torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*hidden.parameters(), *out.parameters()], lr=1e-2)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(out(hidden(pixels).relu()), digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return hidden(pixels).relu()


def main(folder: Path) -> None:
    data = load_digits()
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(data.data / 16).float()
    np.save(folder / "hidden.npy", hidden_activations(pixels, torch.from_numpy(data.target)).numpy())
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["label", "image"])
        for number, (image, digit) in enumerate(zip(data.images, data.target, strict=True)):
            matplotlib.image.imsave(folder / "digits" / f"{number}.png", image, cmap="gray_r")
            table.writerow([digit, f"digits/{number}.png"])
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
