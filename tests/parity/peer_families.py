"""Worker of ``compare_families.py``: train other libraries' dictionaries of every family, in the peers' Python environment.

    .venv-peers/bin/python tests/parity/peer_families.py < orders.jsonl

Reads one order per line from standard input (the fields of ``Order``) and answers each with one line of JSON; what the trained
dictionary makes of the held-out activations goes to the order's ``out``, a safetensors file. Every library's own training code
runs with its default settings, except for what ``Order`` names and the following, all through public arguments:

- All: Adam's rate rises linearly over ``warmup`` steps and falls linearly to 0 over the last ``decay`` steps. Penalties rise
  over the same ``warmup`` steps where a library has such a schedule. sparsify's Signum is schedule-free, as in its Trainer.
- saelens: BatchTopK and Matryoshka are judged as saved for inference, with a threshold. ``normalize`` is
  ``normalize_activations="expected_average_only_in"``; the batches of its estimate are the first ten of the same stream.
- dictionary_learning: the running threshold of BatchTopK and Matryoshka starts at half the steps with a decay of 0.99: its
  defaults (step 1000, 0.999) would never set it in a run this short. ``normalize`` is what
  ``trainSAE(normalize_activations=True)`` does. Its JumpReLU reaches ``target_l0`` by itself; its penalty is left as it is.
- overcomplete: BatchTopK counts ``top_k`` over the whole batch. Its library has no L0 loss for JumpReLU, so it is written with
  the library's ``heaviside``, as in the paper; ``normalize`` standardises the inputs, as its docstring asks.
- sparsify: transcoders read and write by its own hook on a module whose input and output are rows of a table.
"""

# The libraries are installed in the peers' environment only.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import functools
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from train_peers import RowNumbers, skip_package_init

# Limits the memory of dense codes.
ROWS = 4096
# Batches from which SAELens and dictionary_learning estimate the scale of the activations.
SCALE_BATCHES = 10
NAMES = {
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
    "overcomplete": "overcomplete",
}


@dataclass(frozen=True)
class Order:
    """One dictionary to train.

    ``knob`` is what sets the sparsity: ``k`` of families with a budget, a target, or the weight of a penalty. ``codes``: write
    the held-out codes too, not only their number of entries.
    """

    library: str
    family: str
    data: str
    n_latents: int
    batch: int
    warmup: int
    decay: int
    dead_tokens: int
    seed: int
    knob: float
    lr: float
    optimizer: str
    normalize: bool
    prefixes: list[int]
    threads: int
    codes: bool
    out: str

    @property
    def k(self) -> int:
        return round(self.knob)


class Trained(NamedTuple):
    """A trained dictionary: ``encode`` returns dense codes of inputs, ``decode`` the outputs of inputs and their codes."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    W_dec: Tensor


@functools.lru_cache
def tensors_of(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    return load_file(path)


class Data:
    """Activations of a folder: training rows in their order, and held-out rows; a transcoder's targets are ``y``."""

    def __init__(self, order: Order):
        self.train, self.heldout = (tensors_of(f"{order.data}/{split}.safetensors") for split in ("train", "heldout"))
        self.x, self.y = self.train["x"], self.train.get("y")
        self.batch = order.batch
        self.steps = len(self.x) // order.batch
        self.decay_start = self.steps - order.decay

    def batches(self) -> Iterator[Tensor]:
        for start in range(0, self.steps * self.batch, self.batch):
            # A copy: a trainer may change its batch in place.
            yield self.x[start : start + self.batch].clone()

    def lr_factor(self, order: Order, step: int) -> float:
        """Return the share of the learning rate at a step."""
        if step < order.warmup:
            return step / order.warmup
        return 1.0 if step < self.decay_start else (self.steps - step) / order.decay


def saelens(order: Order, data: Data) -> Trained:
    """Train by ``SAETrainer.fit``."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    penalty = {"l1_coefficient": order.knob, "l1_warm_up_steps": order.warmup}
    kind, arguments = {
        "topk": ("TopK", {"k": order.k}),
        "batch_topk": ("BatchTopK", {"k": order.knob}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": order.knob, "matryoshka_widths": order.prefixes}),
        "relu": ("Standard", penalty),
        "gated": ("Gated", penalty),
        "jumprelu": ("JumpReLU", {"l0_coefficient": order.knob, "l0_warm_up_steps": order.warmup}),
        "matching_pursuit": ("MatchingPursuit", {"max_iterations": order.k, "residual_threshold": 0.0}),
    }[order.family]
    if order.normalize:
        arguments["normalize_activations"] = "expected_average_only_in"
    sae: Any = getattr(sae_lens, f"{kind}TrainingSAE")(
        getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=data.x.shape[1], d_sae=order.n_latents, **arguments)
    )
    cfg = SAETrainerConfig(
        total_training_samples=data.steps * data.batch,
        train_batch_size_samples=data.batch,
        lr=order.lr,
        # Its runner fills this in; the constant schedule ignores it, but None is refused.
        lr_end=order.lr / 10,
        lr_warm_up_steps=order.warmup,
        lr_decay_steps=order.decay,
        n_batches_for_norm_estimate=SCALE_BATCHES,
    )
    head = itertools.islice(data.batches(), SCALE_BATCHES if order.normalize else 0)
    sae_lens.SAETrainer(cfg, sae, itertools.chain(head, data.batches())).fit()
    if order.family in ("batch_topk", "matryoshka"):
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            sae = sae_lens.SAE.load_from_disk(folder)
    sae.eval()
    return Trained(sae.encode, lambda _, code: sae.decode(code), sae.W_dec)


def dictionary_learning(order: Order, data: Data) -> Trained:
    """Train by the trainer's ``update``, as ``trainSAE`` does."""
    skip_package_init("dictionary_learning")
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    batch_wide = {"threshold_start_step": data.steps // 2, "threshold_beta": 0.99}
    sizes = [b - a for a, b in itertools.pairwise([0, *order.prefixes])]
    penalised = {"sparsity_warmup_steps": order.warmup}
    trainer_class, arguments = {
        "topk": (top_k.TopKTrainer, {"k": order.k}),
        "batch_topk": (batch_top_k.BatchTopKTrainer, {"k": order.k} | batch_wide),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            {"k": order.k, "group_fractions": [size / order.n_latents for size in sizes]} | batch_wide,
        ),
        "relu": (standard.StandardTrainer, {"l1_penalty": order.knob} | penalised),
        "relu_april": (standard.StandardTrainerAprilUpdate, {"l1_penalty": order.knob} | penalised),
        "gated": (gdm.GatedSAETrainer, {"l1_penalty": order.knob} | penalised),
        "jumprelu": (jumprelu.JumpReluTrainer, {"target_l0": order.knob} | penalised),
    }[order.family]
    trainer: Any = trainer_class(
        steps=data.steps,
        activation_dim=data.x.shape[1],
        dict_size=order.n_latents,
        layer=0,
        lm_name="activations",
        lr=order.lr,
        warmup_steps=order.warmup,
        decay_start=data.decay_start,
        seed=order.seed,
        device="cpu",
        **arguments,
    )
    head = data.x[: SCALE_BATCHES * data.batch]
    norm = head.square().sum(1).mean().sqrt().item() if order.normalize else 1.0
    for step, x in enumerate(data.batches()):
        trainer.update(step, x / norm)
    trainer.ae.scale_biases(norm)
    ae = trainer.ae
    W_dec = ae.W_dec if hasattr(ae, "W_dec") else ae.decoder.weight.T
    return Trained(ae.encode, lambda _, code: ae.decode(code), W_dec)


def overcomplete(order: Order, data: Data) -> Trained:
    """Train by ``train_sae`` for one epoch."""
    skip_package_init("overcomplete")
    from overcomplete import sae as library
    from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss

    size = (data.x.shape[1], order.n_latents)

    def squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def with_l0(x: Tensor, x_hat: Tensor, pre_codes: Tensor, *_: Tensor) -> Tensor:
        fires = library.heaviside(pre_codes.relu(), sae.thresholds.exp(), sae.kernel_fn, sae.bandwidth)
        return (x - x_hat).square().mean() + order.knob * fires.sum(1).mean()

    sae, criterion = {
        "topk": lambda: (library.TopKSAE(*size, top_k=order.k), top_k_auxiliary_loss),
        "batch_topk": lambda: (library.BatchTopKSAE(*size, top_k=round(order.knob * data.batch)), top_k_auxiliary_loss),
        "relu": lambda: (library.SAE(*size), functools.partial(mse_l1, penalty=order.knob)),
        "jumprelu": lambda: (library.JumpSAE(*size), with_l0),
        "matching_pursuit": lambda: (library.MpSAE(*size, k=order.k), squared_error),
    }[order.family]()
    mean, std = (data.x.mean(0), data.x.std(0)) if order.normalize else (torch.zeros(()), torch.ones(()))
    optimizer = torch.optim.Adam(sae.parameters(), lr=order.lr)
    schedule = LambdaLR(optimizer, functools.partial(data.lr_factor, order))
    batches = ((x - mean) / std for x in data.batches())
    library.train_sae(sae, batches, criterion, optimizer, schedule, nb_epochs=1, monitoring=0)
    sae.eval()
    atoms = sae.get_dictionary().detach() * std
    return Trained(lambda x: sae.encode((x - mean) / std)[1], lambda _, code: sae.decode(code) * std + mean, atoms)


class RowPairs(nn.Module):
    """Module with the interface of a language model, whose one hook point maps a table's inputs to its targets."""

    class Rows(nn.Module):
        def __init__(self, y: Tensor):
            super().__init__()
            self.y = nn.Embedding.from_pretrained(y, freeze=True)
            self.numbers = torch.zeros(1, 1, dtype=torch.long)

        def forward(self, _: Tensor) -> Tensor:
            return self.y(self.numbers)

    def __init__(self, x: Tensor, y: Tensor):
        super().__init__()
        self.x = nn.Embedding.from_pretrained(x, freeze=True)
        self.rows = self.Rows(y)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def device(self) -> torch.device:
        return self.x.weight.device

    def forward(self, input_ids: Tensor) -> Tensor:
        self.rows.numbers = input_ids
        return self.rows(self.x(input_ids))


def sparsify(order: Order, data: Data) -> Trained:
    """Train by ``Trainer.fit``, and read the result from its checkpoint, where the schedule-free average is."""
    # Read when sparsify is imported; its Triton kernels do not run on a CPU.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    shape = {"num_latents": order.n_latents, "k": order.k}
    if order.family != "topk":
        shape |= {"transcode": True, "skip_connection": order.family == "skip_transcoder"}
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(**shape),
            # In sequences; one sequence is one batch of rows.
            batch_size=1,
            optimizer=order.optimizer,
            lr=order.lr,
            lr_warmup_steps=order.warmup,
            hookpoints=["rows"],
            init_seeds=[order.seed],
            log_to_wandb=False,
            run_name="peer",
            save_dir=folder,
        )
        # Stand-ins for a data set and a model, by behaviour only.
        dataset: Any = RowNumbers(data.steps, data.batch)
        model: Any = RowPairs(data.x, data.x if data.y is None else data.y)
        trainer = Trainer(cfg, dataset, model)
        if order.optimizer == "adam":
            trainer.lr_schedulers = [LambdaLR(trainer.optimizers[0], functools.partial(data.lr_factor, order))]
        trainer.fit()
        coder = SparseCoder.load_from_disk(Path(folder) / "peer" / "rows")
    # `fit` lowers it for the whole process.
    torch.set_float32_matmul_precision("highest")

    def encode(x: Tensor) -> Tensor:
        acts, indices, _ = coder.encode(x)
        return x.new_zeros(len(x), order.n_latents).scatter_(1, indices, acts)

    def decode(x: Tensor, code: Tensor) -> Tensor:
        y_hat = code @ coder.W_dec + coder.b_dec
        return y_hat if coder.W_skip is None else y_hat + x @ coder.W_skip.mT

    return Trained(encode, decode, coder.W_dec)


PEERS: dict[str, Callable[[Order, Data], Trained]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "sparsify": sparsify,
}


@torch.no_grad()
def write_outputs(trained: Trained, order: Order, data: Data) -> None:
    """Write the output of every held-out row, its code if ordered, and which latents are silent on the last training tokens."""
    y_hat, rows, latents, values, entries = [], [], [], [], torch.zeros((), dtype=torch.long)
    for start in range(0, len(data.heldout["x"]), ROWS):
        x = data.heldout["x"][start : start + ROWS]
        code = trained.encode(x)
        token, latent = code.nonzero(as_tuple=True)
        entries += len(token)
        y_hat.append(trained.decode(x, code))
        if order.codes:
            rows.append(token + start)
            latents.append(latent)
            values.append(code[token, latent])
    fired = torch.zeros(order.n_latents, dtype=torch.bool)
    for x in data.x[: data.steps * data.batch][-order.dead_tokens :].split(ROWS):
        fired |= (trained.encode(x) != 0).any(0)
    joined = {"y_hat": y_hat} | ({"rows": rows, "latents": latents, "values": values} if order.codes else {})
    tensors = {name: torch.cat(parts) for name, parts in joined.items()}
    tensors |= {"entries": entries, "dead": ~fired, "W_dec": trained.W_dec.detach()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, order.out)


def main() -> None:
    # What libraries print must not disturb the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        order = Order(**json.loads(line))
        torch.set_num_threads(order.threads)
        torch.manual_seed(order.seed)
        data = Data(order)
        write_outputs(PEERS[order.library](order, data), order, data)
        answers.write(json.dumps({"version": version(NAMES[order.library])}) + "\n")


if __name__ == "__main__":
    main()
