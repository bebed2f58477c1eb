"""One training step of another library, taken by its own training loop: run by path with the peers' Python.

    .venv-peers/bin/python -I training/bench/peer_steps.py '{"library": "sparsify", "family": "topk", "tokens": 2048, ...}'

Every library's loop or step function runs as it is, with its default settings, on one CPU in float32; it gets a source of
batches that waits for orders, so a step is all that lies between one batch and the next. No latent is ever dead long
enough for an auxiliary loss that waits for one. What a step is, in versions of tests/parity/peers.txt:

- sparsify, ``topk``: ``Trainer.fit``. Unit decoder rows, forward, the fvu copied to the host, backward, gradients made
  orthogonal to their rows, optimizer, count of firings. ``sparsify`` has the Trainer's default optimizer, schedule-free
  sign descent; ``sparsify_adam`` has ``optimizer="adam"``. AuxK is off by default. Neither clips.
- saelens, ``topk``, ``mutual_choice`` (its BatchTopK) and ``matching_pursuit``: ``SAETrainer.fit``. Dense codes (its
  default), forward, firing statistics, backward, norm clipped at 1, Adam. Matching pursuit takes at most k iterations and
  does not stop at a residual (``residual_threshold=0``); it may stop at a latent that repeats, as it does by default.
- dictionary_learning, ``topk`` and ``mutual_choice`` (its BatchTopK): ``update`` of the trainer. Dense codes, forward,
  backward, gradients made orthogonal to their columns, norm clipped at 1, Adam, unit columns, the loss copied to the host.
  ``gradient_pursuit``: ``grad_pursuit`` of a batch with random unit atoms; inference.
- overcomplete, ``topk``: ``train_sae`` with Adam and its ``top_k_auxiliary_loss``, which decodes half of all latents in
  every step; nothing is logged (``monitoring=0``). Dense codes, norm clipped at 1. ``matching_pursuit``: ``MpSAE`` with the
  mean squared error, in the same loop.
"""

# The libraries are in the peers' environment, not in ours.
# pyright: reportMissingImports=false

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# No library's schedule ends while it is measured.
STEPS = 1_000_000


def _beside(name: str) -> Any:
    """A module of this folder: our packages are not installed here, and the folder must not be on the path."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses look themselves up there.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


worker = _beside("worker")


class BatchSource(nn.Module):
    """The smallest thing sparsify's Trainer accepts as a language model: its one layer gives the batch in turn."""

    class Layer(nn.Module):
        current: Tensor

        def forward(self, _: Tensor) -> Tensor:
            return self.current

    def __init__(self, d: int):
        super().__init__()
        self.rows = self.Layer()
        self.rows.current = torch.zeros(1, 1, d)
        self.device = torch.device("cpu")
        # Run once by the Trainer, to learn the width.
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


class Orders(torch.utils.data.Dataset):
    """sparsify's data set: an item is asked for when the step before it is over."""

    def __init__(self, tokens: int, steps: Iterator[Tensor], source: BatchSource):
        self.ids, self.steps, self.source = torch.zeros(tokens, dtype=torch.long), steps, source

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        self.source.rows.current = next(self.steps)[None]
        return {"input_ids": self.ids}


def sparsify(task: Any, turns: Any) -> None:
    """``Trainer.fit``, with its default optimizer or with Adam."""
    # Read when sparsify is imported; its kernels do not run on a CPU.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    optimizer = {"optimizer": "adam"} if task.library == "sparsify_adam" else {}
    with tempfile.TemporaryDirectory() as folder:
        coder = SparseCoderConfig(num_latents=task.n_latents, k=task.k)
        cfg = TrainConfig(coder, batch_size=1, hookpoints=["rows"], log_to_wandb=False, save_every=STEPS, save_dir=folder)
        for name, value in optimizer.items():
            setattr(cfg, name, value)
        turns.build_from_here()
        source = BatchSource(task.d_in)

        def held() -> int:
            return worker.held_bytes(trainer.saes["rows"].parameters(), trainer.optimizers[0].state)

        orders: Any = Orders(task.tokens, turns.steps(held, version("eai-sparsify")), source)
        model: Any = source
        trainer = Trainer(cfg, orders, model)
        trainer.fit()


def saelens(task: Any, turns: Any) -> None:
    """``SAETrainer.fit`` on one of its training classes."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    size = {"d_in": task.d_in, "d_sae": task.n_latents}
    kind, arguments = {
        "topk": ("TopKTrainingSAE", {"k": task.k}),
        "mutual_choice": ("BatchTopKTrainingSAE", {"k": task.k}),
        "matching_pursuit": ("MatchingPursuitTrainingSAE", {"max_iterations": task.k, "residual_threshold": 0.0}),
    }[task.family]
    turns.build_from_here()
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**size, **arguments))
    # Its runner fills lr_end in; the constant schedule ignores it, but None is refused.
    cfg = SAETrainerConfig(task.tokens * STEPS, task.tokens, lr_end=3e-5)
    steps = turns.steps(lambda: worker.held_bytes(sae.parameters(), trainer.optimizer.state), version("sae-lens"))
    trainer = sae_lens.SAETrainer(cfg, sae, steps)
    trainer.fit()


def dictionary_learning(task: Any, turns: Any) -> None:
    """``update`` of its trainer, as its ``trainSAE`` calls it."""
    skip_package_init("dictionary_learning")
    if task.family == "mutual_choice":
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as Trainer
    else:
        from dictionary_learning.trainers.top_k import TopKTrainer as Trainer
    turns.build_from_here()
    trainer = Trainer(STEPS, task.d_in, task.n_latents, task.k, layer=0, lm_name="activations", device="cpu")

    def held() -> int:
        return worker.held_bytes(trainer.ae.parameters(), trainer.optimizer.state)

    for number, x in enumerate(turns.steps(held, version("dictionary-learning"))):
        trainer.update(number, x)


def grad_pursuit(task: Any, turns: Any) -> None:
    """Its pursuit of random unit atoms."""
    skip_package_init("dictionary_learning")
    from dictionary_learning.grad_pursuit import grad_pursuit

    turns.build_from_here()
    atoms = nn.functional.normalize(torch.randn(task.n_latents, task.d_in), dim=-1).T.contiguous()
    for x in turns.steps(lambda: worker.held_bytes([atoms], {}), version("dictionary-learning")):
        grad_pursuit(x, atoms, task.k)


def overcomplete(task: Any, turns: Any) -> None:
    """``train_sae``."""
    skip_package_init("overcomplete")
    from overcomplete.sae import MpSAE, TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss

    turns.build_from_here()
    if task.family == "matching_pursuit":
        sae, criterion = MpSAE(task.d_in, task.n_latents, k=task.k), squared_error
    else:
        sae, criterion = TopKSAE(task.d_in, task.n_latents, top_k=task.k), top_k_auxiliary_loss
    optimizer = torch.optim.Adam(sae.parameters())
    steps = turns.steps(lambda: worker.held_bytes(sae.parameters(), optimizer.state), version("overcomplete"))
    train_sae(sae, steps, criterion, optimizer, nb_epochs=1, monitoring=0)


def squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
    """The criterion for matching pursuit, in the form overcomplete's loop calls it."""
    return (x - x_hat).square().mean()


def skip_package_init(package: str) -> None:
    """Make a package's modules importable without its ``__init__``, which imports what peers-nodeps.txt leaves out."""
    spec: ModuleSpec | None = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = module_from_spec(spec)


PEERS: dict[tuple[str, str], Callable[[Any, Any], None]] = {
    **dict.fromkeys(itertools.product(["topk"], ["sparsify", "sparsify_adam"]), sparsify),
    **dict.fromkeys(itertools.product(["topk", "mutual_choice", "matching_pursuit"], ["saelens"]), saelens),
    **dict.fromkeys(itertools.product(["topk", "mutual_choice"], ["dictionary_learning"]), dictionary_learning),
    **dict.fromkeys(itertools.product(["topk", "matching_pursuit"], ["overcomplete"]), overcomplete),
    ("gradient_pursuit", "dictionary_learning"): grad_pursuit,
}


def _main() -> None:
    """Hold the ordered library's step ready."""
    task = worker.BenchTask(**json.loads(sys.argv[1]))
    PEERS[task.family, task.library](task, worker.Turns(task))


if __name__ == "__main__":
    _main()
