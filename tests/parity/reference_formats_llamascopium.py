"""Crosscoders written by llamascopium, and its outputs for them.

    .venv-peers/bin/python tests/parity/reference_formats_llamascopium.py tests/golden/formats/llamascopium

Makes the folders that tests/sae/formats/test_llamascopium.py loads: random weights that nobody trained. Gates other than relu
are at sites with equal decoder norms, because the library gates each site by the norm there. ``expected.safetensors`` has
inputs ``x`` and outputs ``y`` (tokens, sites, width) in raw units, and which latents ``fires`` (tokens, latents).
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from train_peers import skip_package_init

for package in ("llamascopium", "llamascopium.models", "llamascopium.backend"):
    skip_package_init(package)

from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig  # noqa: E402

SEED, SITES, D, EXPANSION, TOKENS, K = 7, 3, 8, 3, 11, 5
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in (2, 5, 9)]
NORMS = dict(zip(HOOKS, (5.0, 7.0, 11.0), strict=True))
# case -> activation function, whether the norms are folded into the weights.
CASES = {
    "crosscoder_relu": ("relu", False),
    "crosscoder_relu_folded": ("relu", True),
    "crosscoder_topk": ("topk", False),
    "crosscoder_jumprelu": ("jumprelu", False),
}


@torch.no_grad()
def filled(act_fn: str) -> Crosscoder:
    """Random weights in place of zeros, thresholds around the middle of what is positive."""
    about = CrosscoderConfig(hook_points=HOOKS, d_model=D, expansion_factor=EXPANSION, act_fn=act_fn, top_k=K)
    model = Crosscoder(about)
    for name, parameter in model.named_parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
        if "threshold" in name:
            parameter.add_(2.0)
    if act_fn != "relu":
        model.W_D.mul_(torch.rand(model.cfg.d_sae)[:, None].add(0.5) / model.decoder_norm(keepdim=True))
    model.set_dataset_average_activation_norm(NORMS)
    return model.eval()


@torch.no_grad()
def expected(model: Crosscoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return inputs, outputs, and which latents fire, as the library computes them."""
    raw = {hook: x[:, site] for site, hook in enumerate(HOOKS)}
    batch, factors = model.normalize_activations(raw, return_scale_factor=True)
    acts = model.encode(model.prepare_input(batch)[0])
    made = model.decode(acts)
    y = model.denormalize_activations({hook: made[:, site] for site, hook in enumerate(HOOKS)}, factors)
    fires = acts != 0
    assert all(torch.equal(fires[:, site], fires[:, 0]) for site in range(SITES))
    assert 0.02 < float(fires.float().mean()) < 0.9
    return {"x": x, "y": torch.stack([y[hook] for hook in HOOKS], dim=1), "fires": fires[:, 0].contiguous()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.manual_seed(SEED)
    x = 1.5 * torch.randn(TOKENS, SITES, D) + torch.randn(SITES, D)
    for number, (case, (act_fn, folded)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = filled(act_fn)
        model.save_pretrained(out / case, fold_activation_scale=folded)
        model.cfg.save_hyperparameters(out / case)
        save_file(expected(model, x), out / case / "expected.safetensors")
    about = {"library": "llamascopium", "version": version("llamascopium"), "torch": torch.__version__, "seed": SEED}
    about |= {"command": ".venv-peers/bin/python " + " ".join(sys.argv), "sizes": [SITES, D, D * EXPANSION, TOKENS, K]}
    (out / "header.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
