"""Encoders that train, as recipes name them: what several ranks share is tested for each of them."""

# Small budgets, for dictionaries of some thirty latents. Encoders that only load are left out.
TRAINED = (
    {"name": "topk", "k": 3},
    {"name": "mutual_choice", "k": 3},
    {"name": "batch_topk", "k": 3},
    {"name": "feature_choice", "k": 3, "rerank_every": 2},
    {"name": "matryoshka", "k": 3},
    {"name": "lista", "k": 3, "steps": 2},
    {"name": "lista", "k": 3, "budget": "token"},
    {"name": "lista", "k": 3, "select": "soft"},
    {"name": "lista", "k": 3, "budget": "token", "select": "soft"},
    {"name": "multi_topk", "k": 2},
    {"name": "signed_topk", "k": 3, "by": "size"},
    {"name": "gradient_topk", "k": 3, "beta": 2},
    {"name": "relu", "target_l0": 3},
    {"name": "gated", "target_l0": 3},
    {"name": "jumprelu", "target_l0": 3},
    {"name": "jumprelu", "target_l0": 3, "penalty": "tanh"},
    {"name": "matching_pursuit", "k": 3},
)
# Those whose latents are not divided among ranks; each says why.
UNDIVIDED = ("feature_choice", "matching_pursuit")
DIVIDED = tuple(spec for spec in TRAINED if spec["name"] not in UNDIVIDED)

# Those whose whole runs by processes are compared; threads compare the steps of all.
STARTED = tuple(spec for spec in TRAINED if spec["name"] not in ("lista", "multi_topk", "signed_topk"))


def spec_id(spec):
    """Return the name of a spec in test ids."""
    return "-".join(map(str, spec.values()))
