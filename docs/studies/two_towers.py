"""A planted pair of towers: images are sparse sums of concepts and noise, word vectors are concepts and noise.

An image has one of the first ``CLASSES`` concepts, which is its class, or none of them, and two of the others.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

CONCEPTS, CLASSES, D = 30, 6, 40


def write_towers(folder, images=1200, seed=0, orthonormal=True):
    """Write images.npy, rows.jsonl and words.safetensors; return the concepts' directions."""
    generator = np.random.default_rng(seed)
    concepts = generator.normal(size=(D, CONCEPTS))
    concepts = (np.linalg.qr(concepts)[0] if orthonormal else concepts / np.linalg.norm(concepts, axis=0)).T
    labels = generator.integers(0, CLASSES + 1, images)
    codes = np.zeros((images, CONCEPTS))
    codes[np.arange(images), labels] = (1 + generator.random(images)) * (labels < CLASSES)
    for row in codes:
        row[generator.choice(np.arange(CLASSES, CONCEPTS), 2, replace=False)] = 1 + generator.random(2)
    np.save(folder / "images.npy", (codes @ concepts + 0.03 * generator.normal(size=(images, D))).astype(np.float32))
    names = [*(f"class {place}" for place in range(CLASSES)), "none"]
    rows = [{"label": names[label], "name": f"image {place}"} for place, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = concepts + 0.3 * generator.normal(size=concepts.shape) / D**0.5
    others = generator.normal(size=(60, D)) / D**0.5
    names = [f"concept {place}" for place in range(CONCEPTS)] + [f"word {place}" for place in range(60)]
    vectors = torch.from_numpy(np.concatenate([words, others]).astype(np.float32))
    save_file({"vectors": vectors}, folder / "words.safetensors", {"names": json.dumps(names)})
    return concepts.astype(np.float32)


def planted_sae(folder, concepts, extra=10, seed=0):
    """Save an SAE with the concepts as its first latents, and random directions that never fire, as one of these images."""
    from sparsary.sae import ENCODERS, SAE

    sae = SAE(D, len(concepts) + extra, ENCODERS["topk"](k=3))
    directions = np.random.default_rng(seed + 1).normal(size=(extra, D))
    # Orthogonal to all concepts: silent.
    directions -= directions @ concepts.T @ concepts
    rows = np.concatenate([concepts, directions / np.linalg.norm(directions, axis=1, keepdims=True)])
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(rows))
        sae.W_dec.copy_(torch.from_numpy(rows))
        sae.b_dec.zero_()
    harvest = {"files": [str(folder / "images.npy")], "rows": str(folder / "rows.jsonl"), "heldout": 0.2}
    sae.save(folder / "run", {"recipe": {"harvest": harvest}})
    return folder / "run"


def trained_sae(folder, seed=0, latents=60):
    """Train an SAE on the images and return its folder."""
    import sparsary

    recipe = {
        "harvest": {"files": [str(folder / "images.npy")], "rows": str(folder / "rows.jsonl"), "heldout": 0.1},
        "dictionary": {"n_latents": latents, "encoder": {"name": "topk", "k": 3}, "init": "random"},
        "tokens": 400_000,
        "batch_tokens": 512,
        "lr": 3e-3,
        "dead_after_tokens": 20_000,
        "seed": seed,
        "out_dir": str(folder / "run"),
    }
    return sparsary.train(recipe)
