"""Exchange of gradients between processes: entries of sparse codes beside dense matrices.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 docs/studies/exchange.py [--shapes 2048,768,65536,32]
    .venv/bin/python docs/studies/exchange.py --help

For every shape (tokens of each process, width, latents, active latents per token), the TopK gradients of a random batch are
exchanged both ways. Prints the bytes that a process sends, the time of exchange and update together (median, since a dense
gradient also changes the update), and which way is chosen by bytes and which one was faster.
"""

import argparse
import statistics
import time

import torch

from sparsary.sae import SAE
from sparsary.sae.encoders import ENCODERS
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.fused_adam import FusedAdam
from sparsary.training.gradient_exchange import ExchangedBytes
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.training.phases import Phases
from sparsary.training.processes import leave, own_ranks
from sparsary.training.recipe import check_recipe

# Around the break-even, where the tokens of all processes are about as many as the latents, and far from it on both sides.
SHAPES = ["2048,768,65536,32", "2048,256,4096,16", "2048,256,16384,16", "4096,128,1024,16"]


def build(d: int, n_latents: int, k: int) -> tuple[SAE, Objective, FusedAdam]:
    """Return a dictionary of this process's ranks, its objective and its optimizer."""
    torch.manual_seed(0)
    sae = SAE(d, n_latents, ENCODERS["topk"](k))
    sae.ranks = own_ranks()
    recipe = check_recipe(
        {
            "dictionary": {"hook": "a:out", "n_latents": n_latents, "encoder": {"name": "topk", "k": k}},
            "tokens": 1,
            "out_dir": "-",
            "batch_tokens": 1,
        },
        "recipe",
    )
    return sae, Objective(sae, float(d), AuxSettings(0.0, 1)), FusedAdam(sae, Phases(sae, recipe), recipe)


def measure(tokens: int, d: int, n_latents: int, k: int, repeats: int) -> dict[str, tuple[int, float]]:
    """Return the bytes sent and the median seconds of a step's exchange and update, by way."""
    sae, objective, optimizer = build(d, n_latents, k)
    ranks = sae.ranks
    usage = LatentUsage(torch.zeros(n_latents, dtype=torch.bool), torch.zeros(n_latents).double())
    found = {}
    for way, dense in (("entries", False), ("matrices", True)):
        optimizer.exchange.dense, seconds, sent = dense, [], 0
        for _ in range(repeats + 1):
            loss, _terms = objective(ActivationBatch(torch.randn(tokens, d)), usage)
            loss.backward()
            ranks.wait()
            before, start = ranks.sent_bytes, time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            sent = ranks.sent_bytes - before
            optimizer.zero_grad()
        found[way] = (sent, statistics.median(seconds[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens of each process, width, latents, k")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    first = own_ranks().rank == 0
    for shape in options.shapes:
        sizes = [int(number) for number in shape.split(",")]
        found = measure(*sizes, options.repeats)
        if not first:
            continue
        (entries, entry_seconds), (matrices, matrix_seconds) = found["entries"], found["matrices"]
        chosen = "matrices" if ExchangedBytes(entries, matrices).prefers_dense else "entries"
        faster = "matrices" if matrix_seconds < entry_seconds else "entries"
        print(
            f"{shape:22} entries {entries / 1e6:7.1f} MB {entry_seconds * 1e3:7.1f} ms   matrices {matrices / 1e6:7.1f} MB "
            f"{matrix_seconds * 1e3:7.1f} ms   share {entries / matrices:.3f}   chosen {chosen}, faster {faster}",
            flush=True,
        )
    leave()


if __name__ == "__main__":
    main()
