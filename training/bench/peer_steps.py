"""Training steps of other libraries, each run by the library's own training loop in the peers' Python environment.

    .venv-peers/bin/python -I training/bench/peer_steps.py '{"library": "sparsify", "family": "topk", "tokens": 2048, ...}'

Each library's loop or step function runs unmodified, with its default settings, on one CPU in float32. Its data source waits
for an order before it returns a batch, so a step is everything between two batches. No latent stays dead long enough for an
auxiliary loss on dead latents. Steps, in the versions of tests/parity/peers.txt:

- sparsify, ``topk``: ``Trainer.fit``. Decoder normalization, forward, FVU copied to the host, backward, gradients projected
  orthogonal to decoder rows, optimizer, firing counts. ``sparsify`` uses the Trainer's default optimizer, schedule-free sign
  descent; ``sparsify_adam`` uses ``optimizer="adam"``. AuxK is off by default. Neither clips gradients.
- saelens, ``topk``, ``batch_topk`` (also beside ``mutual_choice``), ``matryoshka``, ``relu`` (its standard SAE), ``gated``,
  ``jumprelu``, and ``matching_pursuit``: ``SAETrainer.fit``. Dense codes (its default), forward, firing statistics, backward,
  norm clipped at 1, Adam. Matching pursuit runs at most k iterations without a residual threshold (``residual_threshold=0``);
  as by default, it may stop when a latent repeats.
- dictionary_learning, ``topk``, ``batch_topk`` (also beside ``mutual_choice``) and ``matryoshka``: the trainer's ``update``.
  Dense codes, forward, backward, gradients projected orthogonal to decoder columns, norm clipped at 1, Adam, unit-norm decoder,
  loss copied to the host. ``gradient_pursuit``: ``grad_pursuit`` of a batch with a random unit-norm dictionary (inference).
- overcomplete, ``topk`` and ``batch_topk``: ``train_sae`` with Adam and its ``top_k_auxiliary_loss``, which decodes half of all
  latents in every step; logging is off (``monitoring=0``). Dense codes, norm clipped at 1. ``matching_pursuit``: ``MpSAE`` with
  the mean squared error, in the same loop.
"""

# The libraries are installed in the peers' environment only.
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

# Long enough that no learning-rate schedule ends during the measurement.
STEPS = 1_000_000
# The nested dictionaries of Matryoshka are these parts of the whole.
PREFIXES = (16, 8, 4, 2, 1)


def _beside(name: str) -> Any:
    """Import a module of this folder by path: sparsary is not installed here, and the folder must not be on ``sys.path``."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses look up their module in sys.modules.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


worker = _beside("worker")


class BatchSource(nn.Module):
    """Minimal language model accepted by sparsify's Trainer; its only layer returns the current batch."""

    class Layer(nn.Module):
        current: Tensor

        def forward(self, _: Tensor) -> Tensor:
            return self.current

    def __init__(self, d: int):
        super().__init__()
        self.rows = self.Layer()
        self.rows.current = torch.zeros(1, 1, d)
        self.device = torch.device("cpu")
        # The Trainer runs these once to infer the width.
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


class Orders(torch.utils.data.Dataset):
    """Data set for sparsify's Trainer, which requests an item when the previous step is complete."""

    def __init__(self, tokens: int, steps: Iterator[Tensor], source: BatchSource):
        self.ids, self.steps, self.source = torch.zeros(tokens, dtype=torch.long), steps, source

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        self.source.rows.current = next(self.steps)[None]
        return {"input_ids": self.ids}


def sparsify(task: Any, turns: Any) -> None:
    """Run sparsify's ``Trainer.fit`` with its default optimizer or with Adam."""
    # Read when sparsify is imported; its Triton kernels do not run on a CPU.
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
    """Run SAELens's ``SAETrainer.fit`` on one of its training classes."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    size = {"d_in": task.d_in, "d_sae": task.n_latents}
    kind, arguments = {
        "topk": ("TopKTrainingSAE", {"k": task.k}),
        "mutual_choice": ("BatchTopKTrainingSAE", {"k": task.k}),
        "batch_topk": ("BatchTopKTrainingSAE", {"k": task.k}),
        "matryoshka": (
            "MatryoshkaBatchTopKTrainingSAE",
            {"k": task.k, "matryoshka_widths": [task.n_latents // n for n in PREFIXES]},
        ),
        "relu": ("StandardTrainingSAE", {}),
        "gated": ("GatedTrainingSAE", {}),
        "jumprelu": ("JumpReLUTrainingSAE", {}),
        "matching_pursuit": ("MatchingPursuitTrainingSAE", {"max_iterations": task.k, "residual_threshold": 0.0}),
    }[task.family]
    turns.build_from_here()
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**size, **arguments))
    # SAELens's runner sets lr_end; the constant schedule ignores it but rejects None.
    cfg = SAETrainerConfig(task.tokens * STEPS, task.tokens, lr_end=3e-5)
    steps = turns.steps(lambda: worker.held_bytes(sae.parameters(), trainer.optimizer.state), version("sae-lens"))
    trainer = sae_lens.SAETrainer(cfg, sae, steps)
    trainer.fit()


def dictionary_learning(task: Any, turns: Any) -> None:
    """Run the trainer's ``update`` as dictionary_learning's ``trainSAE`` calls it."""
    skip_package_init("dictionary_learning")
    arguments: dict[str, Any] = {}
    if task.family == "matryoshka":
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer as Trainer

        widths = [task.n_latents // n for n in PREFIXES]
        arguments["group_fractions"] = [(b - a) / task.n_latents for a, b in itertools.pairwise([0, *widths])]
    elif task.family == "topk":
        from dictionary_learning.trainers.top_k import TopKTrainer as Trainer
    else:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as Trainer
    turns.build_from_here()
    trainer: Any = Trainer(STEPS, task.d_in, task.n_latents, task.k, layer=0, lm_name="activations", device="cpu", **arguments)

    def held() -> int:
        return worker.held_bytes(trainer.ae.parameters(), trainer.optimizer.state)

    for number, x in enumerate(turns.steps(held, version("dictionary-learning"))):
        trainer.update(number, x)


def grad_pursuit(task: Any, turns: Any) -> None:
    """Run dictionary_learning's gradient pursuit on a random unit-norm dictionary."""
    skip_package_init("dictionary_learning")
    from dictionary_learning.grad_pursuit import grad_pursuit

    turns.build_from_here()
    atoms = nn.functional.normalize(torch.randn(task.n_latents, task.d_in), dim=-1).T.contiguous()
    for x in turns.steps(lambda: worker.held_bytes([atoms], {}), version("dictionary-learning")):
        grad_pursuit(x, atoms, task.k)


def overcomplete(task: Any, turns: Any) -> None:
    """Run overcomplete's ``train_sae``."""
    skip_package_init("overcomplete")
    from overcomplete.sae import BatchTopKSAE, MpSAE, TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss

    turns.build_from_here()
    if task.family == "matching_pursuit":
        sae, criterion = MpSAE(task.d_in, task.n_latents, k=task.k), squared_error
    elif task.family == "batch_topk":
        # It counts over the whole batch.
        sae, criterion = BatchTopKSAE(task.d_in, task.n_latents, top_k=task.k * task.tokens), top_k_auxiliary_loss
    else:
        sae, criterion = TopKSAE(task.d_in, task.n_latents, top_k=task.k), top_k_auxiliary_loss
    optimizer = torch.optim.Adam(sae.parameters())
    steps = turns.steps(lambda: worker.held_bytes(sae.parameters(), optimizer.state), version("overcomplete"))
    train_sae(sae, steps, criterion, optimizer, nb_epochs=1, monitoring=0)


def squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
    """Return the mean squared error, with the signature of overcomplete's criteria."""
    return (x - x_hat).square().mean()


def skip_package_init(package: str) -> None:
    """Make a package's modules importable without its ``__init__``, which needs dependencies left out by peers-nodeps.txt."""
    spec: ModuleSpec | None = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = module_from_spec(spec)


PEERS: dict[tuple[str, str], Callable[[Any, Any], None]] = {
    **dict.fromkeys(itertools.product(["topk"], ["sparsify", "sparsify_adam"]), sparsify),
    **dict.fromkeys(
        itertools.product(
            ["topk", "mutual_choice", "batch_topk", "matryoshka", "relu", "gated", "jumprelu", "matching_pursuit"], ["saelens"]
        ),
        saelens,
    ),
    **dict.fromkeys(
        itertools.product(["topk", "mutual_choice", "batch_topk", "matryoshka"], ["dictionary_learning"]), dictionary_learning
    ),
    **dict.fromkeys(itertools.product(["topk", "batch_topk", "matching_pursuit"], ["overcomplete"]), overcomplete),
    ("gradient_pursuit", "dictionary_learning"): grad_pursuit,
}


def _main() -> None:
    task = worker.BenchTask(**json.loads(sys.argv[1]))
    PEERS[task.family, task.library](task, worker.Turns(task))


if __name__ == "__main__":
    _main()
