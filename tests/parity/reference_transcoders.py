"""Outputs of the peers' transcoders for given weights; test_transcoders.py compares them with ours.

    .venv-peers/bin/python tests/parity/reference_transcoders.py LIBRARY GIVEN.safetensors OUT.safetensors

GIVEN holds ``x`` and the weights of a transcoder without scales and centre, under our names and shapes. OUT holds
``CASE/code`` and ``CASE/y_hat``.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@torch.no_grad()
def saelens(given: dict[str, Tensor]) -> dict[str, Tensor]:
    from sae_lens.saes import transcoder as theirs

    results = {}
    for case in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        sizes = {"d_in": given["x"].shape[1], "d_out": given["b_dec"].shape[0], "d_sae": given["W_enc"].shape[0]}
        config = getattr(theirs, f"{case}Config")(**sizes, dtype="float64", apply_b_dec_to_input=False)
        module = getattr(theirs, case)(config).eval()
        for name, parameter in module.named_parameters():
            # Their encoder is transposed.
            parameter.copy_(given[name].T if name == "W_enc" else given[name])
        y_hat, code = module.forward_with_activations(given["x"])
        results |= {f"{case}/code": code, f"{case}/y_hat": y_hat}
    return results


@torch.no_grad()
def sparsify(given: dict[str, Tensor]) -> dict[str, Tensor]:
    from sparsify import SparseCoder
    from sparsify.config import TranscoderConfig

    results = {}
    for case, skip in (("topk", False), ("topk_skip", True)):
        config = TranscoderConfig(num_latents=given["W_enc"].shape[0], k=int(given["k"]), skip_connection=skip)
        coder = SparseCoder(given["x"].shape[1], config, dtype=torch.float64)
        names = {"W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
        for name, parameter in (names | ({"W_skip": coder.W_skip} if skip else {})).items():
            parameter.copy_(given[name])
        output = coder(given["x"], given["y"])
        values, latents, _ = coder.encode(given["x"])
        code = torch.zeros(len(given["x"]), len(given["W_enc"]), dtype=torch.float64).scatter_(1, latents, values.double())
        results |= {f"{case}/code": code, f"{case}/y_hat": output.sae_out, f"{case}/fvu": output.fvu}
    return results


LIBRARIES = {"saelens": saelens, "sparsify": sparsify}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("given", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found = LIBRARIES[arguments.library](load_file(arguments.given))
    save_file({name: tensor.detach().double().contiguous() for name, tensor in found.items()}, arguments.out)


if __name__ == "__main__":
    main()
