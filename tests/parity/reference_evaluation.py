"""Other libraries' own evaluation of a TopK dictionary on given activations; test_evaluation.py compares it with ours.

    .venv-peers/bin/python tests/parity/reference_evaluation.py LIBRARY GIVEN.safetensors OUT.json

GIVEN holds ``x`` and the dictionary's weights under our names, and ``k``. Everything is one batch, because both libraries
average over batches what should be divided only once all is summed up.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor
from train_peers import skip_package_init


@torch.no_grad()
def dictionary_learning(given: dict[str, Tensor]) -> dict[str, float]:
    skip_package_init("dictionary_learning")
    # Of it only names are imported, for losses that need a model.
    for name, attributes in (
        ("nnsight", ("LanguageModel",)),
        ("dictionary_learning.buffer", ("ActivationBuffer", "NNsightActivationBuffer")),
    ):
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
    from dictionary_learning.evaluation import evaluate
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    coder = AutoEncoderTopK(given["x"].shape[1], len(given["W_enc"]), int(given["k"])).double()
    coder.encoder.weight.copy_(given["W_enc"])
    coder.encoder.bias.copy_(given["b_enc"])
    coder.decoder.weight.copy_(given["W_dec"].T)
    coder.b_dec.copy_(given["b_dec"])
    return evaluate(coder, iter([given["x"]]), n_batches=1)


@torch.no_grad()
def saelens(given: dict[str, Tensor]) -> dict[str, float]:
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    x, hook = given["x"], "blocks.0.hook_resid_post"
    config = TopKSAEConfig(d_in=x.shape[1], d_sae=len(given["W_enc"]), k=int(given["k"]), dtype="float64")
    sae = TopKSAE(config)
    sae.cfg.metadata.hook_name = hook
    for name in ("b_enc", "W_dec", "b_dec"):
        getattr(sae, name).copy_(given[name])
    sae.W_enc.copy_(given["W_enc"].T)
    model = SimpleNamespace(run_with_cache=lambda *_, **__: (None, {hook: x.unsqueeze(0)}))
    store = SimpleNamespace(get_batch_tokens=lambda _: torch.zeros(1, len(x), dtype=torch.long))
    figures, features = get_sparsity_and_variance_metrics(
        sae, model, store, ActivationScaler(), 1, True, True, True, True, 1, {}
    )
    return figures | {"feature_density": features["feature_density"]}


LIBRARIES = {"dictionary_learning": dictionary_learning, "saelens": saelens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("given", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(LIBRARIES[arguments.library](load_file(arguments.given))))


if __name__ == "__main__":
    main()
