"""GPT-2 of four layers that plays 6x6 Othello: trained from a seed on random legal games until its moves are legal.

    python docs/studies/othello_model.py --out runs/othello/model

Games are generated as they are needed. The target of every token is the exact distribution of the next one, uniform over the
legal moves, rather than the move that was drawn. Matrices of the blocks are trained with Muon (orthogonalized momentum),
everything else with Adam; the learning rate warms up, stays, and falls linearly over the last part of the steps. Every step's
games depend on the seed and the step only, and the state is saved: a run that was interrupted continues with the same command.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from othello_rules import BOS, CONTEXT, END, PASS, VOCABULARY, Games, random_games
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LAYERS, WIDTH, HEADS = 4, 128, 8
STEPS, BATCH = 8000, 64
# Share of moves that are to be legal.
GOAL = 0.995
WARM_UP, DECAY = 100, 0.5
MUON_LR, ADAM_LR, MOMENTUM = 0.02, 2e-3, 0.95
# Seeds of held-out games stand apart from those of training steps.
HELDOUT = 1 << 40
# Coefficients of the Newton-Schulz iteration (Jordan et al. 2024, Muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of squares, ``pass``, ``<bos>`` and ``<end>``, separated by spaces."""
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<end>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<end>", pad_token="<end>", model_max_length=CONTEXT
    )


def build_model(seed: int) -> GPT2LMHeadModel:
    """Return the untrained model of a seed."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of every matrix is replaced by the nearest orthogonal matrix.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. In float32: torch's own rounds to bfloat16, which is
    slow on processors without it.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient, state = matrix.grad, self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                rows, columns = matrix.shape
                update = orthogonalized(gradient.lerp(state["momentum"], group["momentum"]))
                # Rows are inputs in GPT-2's matrices.
                matrix.add_(update, alpha=-group["lr"] * max(1.0, columns / rows) ** 0.5)


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return approximately the nearest matrix with orthonormal rows or columns, whichever are fewer."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def build_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and Adam for the rest."""
    matrices = [each for name, each in model.named_parameters() if ".h." in name and each.ndim == 2]
    others = [each for name, each in model.named_parameters() if not (".h." in name and each.ndim == 2)]
    return [Muon(matrices, MUON_LR, MOMENTUM), torch.optim.Adam(others, ADAM_LR, betas=(0.9, 0.98))]


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest."""
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / (DECAY * steps))


def loss_on(model: GPT2LMHeadModel, games: Games) -> Tensor:
    """Return the mean cross-entropy to the exact distributions of the next token."""
    targets, known = games.targets()
    logits = model(input_ids=torch.from_numpy(games.inputs()), use_cache=False).logits
    known = torch.from_numpy(known)
    return F.cross_entropy(logits[known], torch.from_numpy(targets)[known])


@torch.no_grad()
def legality(model: GPT2LMHeadModel, games: Games) -> dict[str, float]:
    """Return how the model does on games.

    ``legal_moves`` is the share of positions with a legal move whose likeliest token is one; ``legal_mass`` the mean
    probability of legal tokens there, which is the rate of legal moves when it plays at random; ``passes_and_ends`` the
    share of forced tokens that are the likeliest; ``excess_nats`` the cross-entropy above that of the exact distribution.
    """
    model.eval()
    targets, known = games.targets()
    parts = torch.from_numpy(games.inputs()).split(256)
    scores = torch.cat([model(input_ids=part, use_cache=False).logits.log_softmax(-1) for part in parts]).numpy()
    model.train()
    move = known & games.allowed[..., :PASS].any(-1)
    forced = known & ~games.allowed[..., :PASS].any(-1)
    best = np.take_along_axis(games.allowed, scores.argmax(-1)[..., None], -1)[..., 0]
    entropy = np.log(np.maximum(games.allowed.sum(-1), 1))[known].mean()
    return {
        "legal_moves": float(best[move].mean()),
        "legal_mass": float((np.exp(scores) * games.allowed).sum(-1)[move].mean()),
        "passes_and_ends": float(best[forced].mean()),
        "excess_nats": float(-(targets * scores).sum(-1)[known].mean() - entropy),
        "games": len(games.tokens),
        "moves": int(move.sum()),
    }


def train(out: Path, seed: int, steps: int, batch: int, every: int) -> dict[str, Any]:
    """Train the model, or continue, and save it; return how it does on new games, with its history on held-out ones."""
    model = build_model(seed)
    optimizers = build_optimizers(model)
    state_file, history, tokens, first = out / "state.pt", [], 0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, tokens, history = state["step"], state["tokens"], state["history"]
    model.train()
    heldout, losses = random_games(500, np.random.default_rng([seed, HELDOUT])), []
    begun, before = time.process_time(), history[-1]["cpu_seconds"] if history else 0.0
    for step in range(first, steps):
        games = random_games(batch, np.random.default_rng([seed, step]))
        for optimizer, lr in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_on(model, games)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        tokens += int(games.played.sum()) + batch
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {"step": step + 1, "tokens": tokens, "loss": float(torch.stack(losses).mean())}
            row |= legality(model, heldout) | {"cpu_seconds": before + time.process_time() - begun}
            history.append(row)
            losses = []
            print(json.dumps(row), flush=True)
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"step": step + 1, "tokens": tokens, "history": history}
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    model.eval()
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    result = {"seed": seed, "steps": steps, "batch_games": batch, "tokens": tokens, "parameters": model.num_parameters()}
    result |= legality(model, random_games(2000, np.random.default_rng([seed, HELDOUT + 1]))) | {"history": history}
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/othello/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="games of a step")
    parser.add_argument("--every", type=int, default=100, help="steps between looks at held-out games, when the state is saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = train(options.out, options.seed, options.steps, options.batch, options.every)
    print(json.dumps({key: value for key, value in result.items() if key != "history"}))


if __name__ == "__main__":
    main()
