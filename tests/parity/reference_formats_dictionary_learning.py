"""Dictionaries in dictionary_learning's classes and its outputs for them; or its outputs for dictionaries that we wrote.

    .venv-peers/bin/python tests/parity/reference_formats_dictionary_learning.py golden tests/golden/formats/dictionary_learning
    .venv-peers/bin/python tests/parity/reference_formats_dictionary_learning.py run DIRECTORY...

``golden`` makes the folders that tests/sae/formats/test_dictionary_learning.py loads: random weights, biases that are not
zero, norms that are not one, saved as its training does. ``run`` loads each directory by its class, reads ``x`` from
``given.safetensors`` and writes ``code`` and ``y`` into ``theirs.safetensors``.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import torch

# It drives language models with this, which nothing here needs.
sys.modules["nnsight"] = MagicMock()

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

D, LATENTS, TOKENS, K = 8, 24, 11, 5
# What inputs were divided by in training.
NORM = 2.7
CLASSES = {
    "AutoEncoder": lambda: AutoEncoder(D, LATENTS),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, LATENTS),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, LATENTS),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, LATENTS),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, LATENTS, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, LATENTS, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, LATENTS, K, [6, 18]),
}
LOADERS = {c.__name__: c for c in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)}
LOADERS |= {c.__name__: c for c in (AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE)}
BUFFER = {"d_submodule": D, "io": "out", "n_ctxs": 30, "ctx_len": 128, "refresh_batch_size": 4, "out_batch_size": 8}


@torch.no_grad()
def filled(kind, seed):
    torch.manual_seed(seed)
    ae = CLASSES[kind]()
    for name, parameter in ae.named_parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
        if name == "threshold":
            parameter.abs_()
    if "Batch" in kind:
        ae.threshold.fill_(0.6)
    return ae


@torch.no_grad()
def keep(directory, ae, x):
    code = ae.encode(x)
    save_file({"x": x, "code": code.contiguous(), "y": ae.decode(code).contiguous()}, directory / "expected.safetensors")


def configured(directory, kind):
    directory.mkdir(parents=True, exist_ok=True)
    trainer = {"dict_class": kind, "trainer_class": "Trainer", "activation_dim": D, "dict_size": LATENTS, "lr": 1e-3}
    trainer |= {"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "gpt_neox.layers.3", "wandb_name": ""}
    trainer |= {"k": K} if "TopK" in kind else {}
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": BUFFER}, indent=4))
    return trainer


def golden(out: Path) -> None:
    torch.manual_seed(3)
    x = 1.5 * torch.randn(TOKENS, D) + torch.randn(D)
    for number, kind in enumerate(CLASSES):
        configured(out / kind, kind)
        ae = filled(kind, number)
        torch.save({k: v.cpu() for k, v in ae.state_dict().items()}, out / kind / "ae.pt")
        keep(out / kind, ae, x)
    # The state that a training leaves when it is interrupted, as later versions save it; its end is what scale_biases makes.
    for number, kind in enumerate(("BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder")):
        directory = out / f"{kind}-backup"
        trainer = configured(directory, kind)
        ae = filled(kind, 20 + number)
        optimizer = torch.optim.Adam(ae.parameters(), lr=1e-3)
        ae(x).square().sum().backward()
        optimizer.step()
        state = {"step": 100, "ae": ae.state_dict(), "optimizer": optimizer.state_dict(), "config": trainer}
        torch.save(state | {"norm_factor": NORM}, directory / "ae.pt")
        ae.scale_biases(NORM)
        keep(directory, ae, x)
    checkpoint = out / "AutoEncoderTopK-checkpoint"
    configured(checkpoint, "AutoEncoderTopK")
    (checkpoint / "checkpoints").mkdir(exist_ok=True)
    ae = filled("AutoEncoderTopK", 30)
    torch.save(ae.state_dict(), checkpoint / "checkpoints" / "ae_100.pt")
    keep(checkpoint, ae, x)
    about = {"library": "dictionary-learning", "version": version("dictionary-learning"), "torch": torch.__version__}
    about |= {"seed": 3, "command": ".venv-peers/bin/python " + " ".join(sys.argv), "sizes": [D, LATENTS, TOKENS]}
    (out / "header.json").write_text(json.dumps(about, indent=2) + "\n")


@torch.no_grad()
def run(directories) -> None:
    for directory in directories:
        kind = json.loads((directory / "config.json").read_text())["trainer"]["dict_class"]
        ae = LOADERS[kind].from_pretrained(str(directory / "ae.pt"))
        x = load_file(directory / "given.safetensors")["x"]
        code = ae.encode(x)
        save_file({"code": code.contiguous(), "y": ae.decode(code).contiguous()}, directory / "theirs.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("golden", "run"))
    parser.add_argument("directories", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "golden":
        golden(arguments.directories[0])
    else:
        run(arguments.directories)


if __name__ == "__main__":
    main()
