"""Train each peer library's TopK autoencoder on the same file of activations, for a side-by-side comparison of quality.

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install -r tests/parity/peers.txt
    .venv-peers/bin/pip install --no-deps -r tests/parity/peers-nodeps.txt
    .venv-peers/bin/python tests/parity/train_peers.py --activations DIR --out peers.json

``DIR/train.safetensors`` holds ``x`` (tokens, d) in float32, already in training order: step i sees rows
``i * batch`` to ``(i + 1) * batch``, once, and what is left over after the last whole batch is not used.
``DIR/heldout.safetensors`` holds ``x`` (tokens, d), on which everything is measured.

Every peer's own training code runs; what this script adds is listed per peer:

- ``sparsify`` (two entries, ``sparsify_adam`` and ``sparsify_signum``): ``sparsify.Trainer.fit`` as it is, which sets
  b_dec to the mean of the first batch, normalises the decoder before every forward, removes the parallel part of its
  gradient, and does not clip. Its Trainer wants a language model, so it gets one whose only layer is a table of the
  activations, read by row number. Adam's schedule is replaced by the one below (the Trainer's own decays from the end
  of the warm-up). Signum is schedule-free, as the Trainer makes it: no warm-up and no decay. The autoencoder is read
  back from the Trainer's checkpoint, because that is where the schedule-free average of the weights is.
- ``dictionary_learning``: ``TopKTrainer.update`` on every batch, with its own schedule: geometric median as b_dec,
  projected gradient, norm clipped at 1, Adam, unit rows. ``dictionary_learning_normalized`` does in addition what its
  ``trainSAE(normalize_activations=True)`` does (off by default): divide by the root mean squared norm of the first 100
  batches and scale the biases back at the end.
- ``saelens``: ``SAETrainer.fit`` on ``TopKTrainingSAE``, batches as its data provider, with its own schedule: norm
  clipped at 1, Adam, decoder rows started at norm 0.1 and left free, their norms counted in the selection.
- ``overcomplete``: ``train_sae`` for one epoch with ``top_k_auxiliary_loss``, norm clipped at 1; the script gives it
  Adam and the schedule below. Its dictionary has no bias.

The learning rate rises linearly over ``warmup`` steps, stays, and falls linearly to 0 over the last ``decay-fraction``
of the steps. Dead-latent thresholds are the libraries' own (10M tokens in sparsify and dictionary_learning, 1000 steps
in SAELens), which a run of a million tokens never reaches: AuxK then never acts. ``--dead-after-tokens`` sets them all,
and switches AuxK on in sparsify (weight 1/32), where it is off by default; overcomplete has no threshold.

``median_step_s`` is the median time from one batch being asked for to the next, with no evaluation in between.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

# From here on "reconstruct" means: x (tokens, d) -> the reconstruction (tokens, d), the dense code (tokens, latents).
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]

AUXK_ALPHA = 1 / 32  # Gao et al. 2024, appendix A.2; sparsify's own default is 0
EVAL_TOKENS = 4096  # one dense code of 3072 latents is then 50 MB
HOOKPOINT = "rows"


@dataclass(frozen=True)
class Case:
    """What all peers have in common: the activations and the settings of the command line."""

    train: Tensor
    heldout: Tensor
    latents: int
    k: int
    batch: int
    lr: float
    warmup: int
    decay_fraction: float
    seed: int
    dead_after_tokens: int | None
    steps: int

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.train.shape[1]

    @property
    def decay_start(self) -> int:
        """First step of the decay."""
        return self.steps - round(self.decay_fraction * self.steps)

    def lr_factor(self, step: int) -> float:
        """Share of ``lr`` at a step: the schedule of dictionary_learning, so that all start from 0 in the same way."""
        if step < self.warmup:
            return step / self.warmup
        if step >= self.decay_start:
            return (self.steps - step) / max(1, self.steps - self.decay_start)
        return 1.0

    def batches(self, clock: list[float]) -> Iterator[Tensor]:
        """The batches in order; ``clock`` receives the moment at which each one was asked for."""
        for start in range(0, self.steps * self.batch, self.batch):
            clock.append(time.perf_counter())
            yield self.train[start : start + self.batch]
        clock.append(time.perf_counter())


@dataclass
class Trained:
    """A trained peer: how to reconstruct with it, and what the report says about its training."""

    reconstruct: Reconstruct
    distribution: str
    settings: dict[str, Any]
    clock: list[float] = field(repr=False)


class RowTable(nn.Module):
    """The smallest thing sparsify's Trainer accepts as a language model: row numbers in, stored activations out."""

    def __init__(self, rows: Tensor, clock: list[float]) -> None:
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(rows, freeze=True)
        self.clock = clock

    @property
    def base_model(self) -> nn.Module:
        """Where the Trainer looks for the hook point."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the Trainer puts the autoencoder."""
        return self.rows.weight.device

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """What the Trainer runs to learn the width of the hook point."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the rows up; the Trainer's hook trains on them."""
        if not torch.is_inference_mode_enabled():  # the width probe is not a step
            self.clock.append(time.perf_counter())
        return self.rows(input_ids)


class RowNumbers(torch.utils.data.Dataset):
    """One item per training step: the numbers of its rows."""

    def __init__(self, steps: int, batch: int) -> None:
        self.steps = steps
        self.batch = batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(step * self.batch, (step + 1) * self.batch)}


def train_sparsify(case: Case, optimizer: Literal["adam", "signum"]) -> Trained:
    """sparsify's Trainer, with the optimizer it calls ``adam`` or ``signum`` (its default)."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when sparsify is imported; its kernels do not run on a CPU
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    clock: list[float] = []
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=case.latents, k=case.k),
        batch_size=1,  # in sequences; one sequence is one batch of rows
        optimizer=optimizer,
        lr=case.lr,
        lr_warmup_steps=case.warmup,
        hookpoints=[HOOKPOINT],
        init_seeds=[case.seed],
        log_to_wandb=False,
        run_name="peer",
    )
    if case.dead_after_tokens is not None:
        cfg.auxk_alpha = AUXK_ALPHA
        cfg.dead_feature_threshold = case.dead_after_tokens
    with tempfile.TemporaryDirectory() as folder:
        cfg.save_dir = folder
        dataset: Any = RowNumbers(case.steps, case.batch)  # Any: stands in for a dataset and a model by behaviour only
        model: Any = RowTable(case.train, clock)
        trainer = Trainer(cfg, dataset, model)
        if optimizer == "adam":
            adam: Any = trainer.optimizers[0]
            trainer.lr_schedulers = [LambdaLR(adam, case.lr_factor)]
        trainer.fit()
        coder = SparseCoder.load_from_disk(Path(folder) / "peer" / HOOKPOINT)
    torch.set_float32_matmul_precision("highest")  # fit lowers it for the whole process

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        top_acts, top_indices, _ = coder.encode(x)
        code = x.new_zeros(len(x), case.latents).scatter_(1, top_indices, top_acts)
        return coder.decode(top_acts, top_indices), code

    settings = {
        "optimizer": type(trainer.optimizers[0]).__name__ if optimizer == "adam" else "ScheduleFreeWrapper(SignSGD)",
        "momentum": None if optimizer == "adam" else 0.95,
        "schedule": "warm-up and decay" if optimizer == "adam" else "schedule-free",
        "grad_clip": None,
        "auxk_alpha": cfg.auxk_alpha,
        "dead_after_tokens": cfg.dead_feature_threshold,
        "normalize_activations": False,
        "b_dec_init": "mean of the first batch",
        "normalize_decoder": cfg.sae.normalize_decoder,
    }
    return Trained(reconstruct, "eai-sparsify", settings, clock)


def train_dictionary_learning(case: Case, normalize: bool) -> Trained:
    """dictionary_learning's TopKTrainer, update by update."""
    skip_package_init("dictionary_learning")
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=case.steps,
        activation_dim=case.d,
        dict_size=case.latents,
        k=case.k,
        layer=0,
        lm_name="activations",
        lr=case.lr,
        warmup_steps=case.warmup,
        decay_start=case.decay_start if case.decay_start < case.steps else None,
        seed=case.seed,
        device="cpu",
    )
    if case.dead_after_tokens is not None:
        trainer.dead_feature_threshold = case.dead_after_tokens
    norm = case.train[: 100 * case.batch].square().sum(1).mean().sqrt().item() if normalize else 1.0
    clock: list[float] = []
    for step, x in enumerate(case.batches(clock)):
        trainer.update(step, x / norm if normalize else x)
    trainer.ae.scale_biases(norm)
    settings = {
        "optimizer": type(trainer.optimizer).__name__,
        "schedule": "warm-up and decay",
        "grad_clip": 1.0,
        "auxk_alpha": trainer.auxk_alpha,
        "dead_after_tokens": trainer.dead_feature_threshold,
        "normalize_activations": f"divided by {norm:.6g}" if normalize else False,
        "b_dec_init": "geometric median of the first batch",
        "normalize_decoder": True,
    }
    return Trained(lambda x: trainer.ae(x, output_features=True), "dictionary-learning", settings, clock)


def train_saelens(case: Case) -> Trained:
    """SAELens' SAETrainer on its TopK training class."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=case.d, d_sae=case.latents, k=case.k))
    cfg = SAETrainerConfig(
        total_training_samples=case.steps * case.batch,
        train_batch_size_samples=case.batch,
        lr=case.lr,
        lr_end=case.lr / 10,  # what its runner fills in; the constant schedule ignores it, but None is refused
        lr_warm_up_steps=case.warmup,
        lr_decay_steps=case.steps - case.decay_start,
    )
    if case.dead_after_tokens is not None:
        cfg.dead_feature_window = max(1, case.dead_after_tokens // case.batch)
    clock: list[float] = []
    trainer = SAETrainer(cfg, sae, case.batches(clock))
    trainer.fit()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        code = sae.encode(x)
        return sae.decode(code), code

    settings = {
        "optimizer": type(trainer.optimizer).__name__,
        "schedule": "warm-up and decay",
        "grad_clip": 1.0,
        "auxk_alpha": sae.cfg.aux_loss_coefficient,
        "dead_after_tokens": cfg.dead_feature_window * case.batch,
        "normalize_activations": sae.cfg.normalize_activations != "none" and sae.cfg.normalize_activations,
        "b_dec_init": "zeros",
        "normalize_decoder": False,
        "decoder_init_norm": sae.cfg.decoder_init_norm,
        "rescale_acts_by_decoder_norm": sae.cfg.rescale_acts_by_decoder_norm,
    }
    return Trained(reconstruct, "sae-lens", settings, clock)


def train_overcomplete(case: Case) -> Trained:
    """overcomplete's train_sae, for one epoch of the batches."""
    skip_package_init("overcomplete")
    from overcomplete.sae import TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss

    sae = TopKSAE(case.d, case.latents, top_k=case.k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=case.lr)
    schedule = LambdaLR(optimizer, case.lr_factor)
    clock: list[float] = []
    train_sae(sae, case.batches(clock), top_k_auxiliary_loss, optimizer, schedule, nb_epochs=1, monitoring=0)
    sae.eval()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        _, code, x_hat = sae(x)
        return x_hat, code

    settings = {
        "optimizer": "Adam",
        "schedule": "warm-up and decay",
        "grad_clip": 1.0,
        "auxk_alpha": 0.1,
        "dead_after_tokens": None,
        "normalize_activations": False,
        "b_dec_init": "no decoder bias",
        "normalize_decoder": True,
    }
    return Trained(reconstruct, "overcomplete", settings, clock)


PEERS: dict[str, dict[str, Callable[[Case], Trained]]] = {
    "sparsify": {
        "sparsify_adam": lambda case: train_sparsify(case, "adam"),
        "sparsify_signum": lambda case: train_sparsify(case, "signum"),
    },
    "dictionary_learning": {"dictionary_learning": lambda case: train_dictionary_learning(case, normalize=False)},
    "dictionary_learning_normalized": {
        "dictionary_learning_normalized": lambda case: train_dictionary_learning(case, normalize=True)
    },
    "saelens": {"saelens": train_saelens},
    "overcomplete": {"overcomplete": train_overcomplete},
}


def skip_package_init(package: str) -> None:
    """Make a package's modules importable without its ``__init__``, which imports what peers-nodeps.txt leaves out."""
    if package not in sys.modules:
        spec: ModuleSpec | None = find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        sys.modules[package] = module_from_spec(spec)


@torch.no_grad()
def evaluate(reconstruct: Reconstruct, heldout: Tensor) -> dict[str, float | int]:
    """Held-out fvu (both sums over the whole set, in float64, then divided), l0, and latents that never fire."""
    mean = heldout.double().mean(0)
    error = variance = nonzeros = 0.0
    fired: Tensor | None = None
    for x in heldout.split(EVAL_TOKENS):
        x_hat, code = reconstruct(x)
        error += (x.double() - x_hat.double()).square().sum().item()
        variance += (x.double() - mean).square().sum().item()
        active = code != 0
        nonzeros += active.sum().item()
        fired = active.any(0) if fired is None else fired | active.any(0)
    if fired is None or variance == 0:
        raise SystemExit("heldout.safetensors: needs tokens that differ from each other, or fvu has no denominator.")
    return {"fvu": error / variance, "l0": nonzeros / len(heldout), "dead": int((~fired).sum())}


def run_peer(name: str, train: Callable[[Case], Trained], case: Case) -> dict[str, Any]:
    """Train one entry and measure it."""
    torch.manual_seed(case.seed)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the libraries' own prints must not mix with the table
            trained = train(case)
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"{name}: the package {missing.name!r} is not installed. Use the environment of tests/parity/peers.txt and "
            "peers-nodeps.txt (commands at the top of this file), or leave the peer out of --peers."
        ) from missing
    seconds = [after - before for before, after in zip(trained.clock, trained.clock[1:], strict=False)]
    settings = {
        "latents": case.latents,
        "k": case.k,
        "batch": case.batch,
        "steps": case.steps,
        "lr": case.lr,
        "warmup": case.warmup,
        "decay_start": case.decay_start,
        "seed": case.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **trained.settings,
    }
    if settings["schedule"] == "schedule-free":
        settings |= {"warmup": 0, "decay_start": None}
    return {
        **evaluate(trained.reconstruct, case.heldout),
        "median_step_s": statistics.median(seconds),
        "settings": settings,
        "version": version(trained.distribution),
    }


def read_activations(folder: Path, name: str) -> Tensor:
    """The tensor ``x`` of one of the two files."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise SystemExit(f"--activations: {path} does not exist. It must hold a float32 tensor x (tokens, d).")
    tensors = load_file(path)
    x = tensors.get("x")
    if x is None or x.ndim != 2 or x.dtype != torch.float32:
        found = {key: (tuple(value.shape), str(value.dtype)) for key, value in tensors.items()}
        raise SystemExit(f"{path}: expected a float32 tensor x (tokens, d), got {found}. Write it again in that form.")
    return x


def make_case(args: argparse.Namespace) -> Case:
    """Read the activations and check what the libraries would only fail on later."""
    train = read_activations(args.activations, "train")
    heldout = read_activations(args.activations, "heldout")
    if train.shape[1] != heldout.shape[1]:
        raise SystemExit(
            f"--activations: train is {train.shape[1]} wide and heldout {heldout.shape[1]}. Harvest both at one place."
        )
    steps = len(train) // args.batch
    if args.max_steps is not None:
        steps = min(steps, args.max_steps)
    if not 0 < args.k <= args.latents:
        raise SystemExit(f"--k: expected 1 to --latents ({args.latents}), got {args.k}.")
    if not 0 < args.decay_fraction < 1:
        raise SystemExit(f"--decay-fraction: expected more than 0 and less than 1, got {args.decay_fraction}.")
    settings = {key: getattr(args, key) for key in ("latents", "k", "batch", "lr", "warmup", "decay_fraction", "seed")}
    case = Case(train, heldout, **settings, dead_after_tokens=args.dead_after_tokens, steps=steps)
    if not 0 < case.warmup < case.decay_start < steps:
        raise SystemExit(
            f"--warmup: {case.warmup} steps of warm-up and a decay from step {case.decay_start} do not fit into "
            f"{steps} steps. Give more tokens, a smaller --batch, or a smaller --warmup (at least 1)."
        )
    return case


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--activations", type=Path, required=True, help="folder of train and heldout .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every peer")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["sparsify", "dictionary_learning", "saelens"])
    parser.add_argument("--latents", type=int, default=3072)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048, help="tokens per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay-fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dead-after-tokens", type=int, help="instead of the libraries' own thresholds; turns AuxK on")
    parser.add_argument("--max-steps", type=int, help="stop the whole schedule after so many steps, for a trial")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Run the chosen peers one after the other and print the table."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    case = make_case(args)
    report: dict[str, dict[str, Any]] = {}
    for peer in dict.fromkeys(args.peers):
        for name, train in PEERS[peer].items():
            report[name] = run_peer(name, train, case)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'peer':32}{'fvu':>9}{'l0':>8}{'dead':>7}{'s/step':>9}  version")
    for name, row in report.items():
        numbers = f"{row['fvu']:9.4f}{row['l0']:8.2f}{row['dead']:7d}{row['median_step_s']:9.3f}"
        print(f"{name:32}{numbers}  {row['version']}")


if __name__ == "__main__":
    main()
