"""Mixture of experts with two tasks by hand: in the second layer one expert does each.

A prompt is a mark, an item, and a token at which the answer is asked. The mark says which task is to be done: ``a`` asks for
the next item, ``b`` for the one after it, and ``none`` for nothing. The first layer's heads fetch mark and item; its experts,
chosen by the token, write what nothing reads. In the second layer expert 3 does task a and expert 5 task b; they are chosen
where their mark is, and others by the item. Every token has two experts, the second of which has next to no weight beside that
of a task.
"""

from dataclasses import dataclass

import torch

from ....training.activations.model import LanguageModel
from ..tasks.pairs import PromptPairs, Question
from .handbuilt import BETA, equal_pairs
from .toy import ToyConfig, ToyTransformer, blank
from .wiring import ResidualLayout, write_head

MARKS, ITEMS, EXPERTS = ("a", "b", "none"), 5, 8
ASK = len(MARKS) + ITEMS
# Expert of each task, and how far its answer is from the item.
TASKS = {"a": (3, 1), "b": (5, 2)}
OTHERS = tuple(expert for expert in range(EXPERTS) if expert not in {expert for expert, _ in TASKS.values()})
# Logit of a task's expert where its mark is: far above those of others, which are at most 2.
CHOSEN = 20.0


@dataclass(frozen=True, eq=False)
class KnownMixture:
    """Model, prompt pairs of both tasks (without the mark in the corrupted prompts), and the name of each task's expert."""

    model: LanguageModel
    pairs: dict[str, PromptPairs]
    experts: dict[str, str]


def known_mixture(n_pairs: int = 20, seed: int = 0) -> KnownMixture:
    """Return the model with ``n_pairs`` prompt pairs of each task."""
    stream = ResidualLayout(token=ASK + 1, position=3, mark=len(MARKS), item=ITEMS, answer=ITEMS, spare=1)
    config = ToyConfig(
        2, 2, stream.width, ASK + 1, n_ctx=3, d_vocab=ASK + 1, d_vocab_out=ASK + 1, d_mlp=ITEMS, n_experts=EXPERTS
    )
    model = blank(config)
    tokens = stream.all("token")
    with torch.no_grad():
        model.wte.weight.copy_(tokens)
        model.wpe.weight.copy_(stream.all("position"))
        model.lm_head.weight[len(MARKS) : ASK] = stream.all("answer")
    fetched = ((0, tokens[: len(MARKS)], stream.all("mark")), (1, tokens[len(MARKS) : ASK], stream.all("item")))
    for position, value, output in fetched:
        key, bias = stream.at("position", position)[None], torch.tensor([BETA])
        write_head(model, 0, position, value, output, key=key, query_bias=bias)
    _write_experts(model, stream)
    pairs = {task: _pairs(task, n_pairs, seed) for task in TASKS}
    experts = {task: f"e1/{expert}" for task, (expert, _) in TASKS.items()}
    return KnownMixture(LanguageModel(model, None, "known:mixture", None), pairs, experts)


@torch.no_grad()
def _write_experts(model: ToyTransformer, stream: ResidualLayout) -> None:
    first, second = model.mixture(0), model.mixture(1)
    items, answers = stream.all("item"), stream.all("answer")
    for token in range(ASK + 1):
        for rank in range(2):
            first.gate.weight[(token + rank) % EXPERTS] += (2.0 - rank) * stream.at("token", token)
    for item in range(ITEMS):
        for rank in range(2):
            second.gate.weight[OTHERS[(item + rank) % len(OTHERS)]] += (2.0 - rank) * items[item]
    for rank in range(2):
        # No item is fetched there yet: without this the logits would be equal, and the choice that of a tie.
        second.gate.weight[OTHERS[rank]] += (2.0 - rank) * stream.at("position", 0)
    for each in (first, second):
        each.experts.up_proj[:, 0] = stream.at("position", 2)
        each.experts.down_proj[:, :, 0] = stream.at("spare")
    for task, (expert, distance) in TASKS.items():
        second.gate.weight[expert] = CHOSEN * stream.at("mark", MARKS.index(task))
        second.experts.up_proj[expert] = items
        second.experts.down_proj[expert] = answers.roll(-distance, 0).T


def _pairs(task: str, n_pairs: int, seed: int) -> PromptPairs:
    draw = torch.Generator().manual_seed(seed)
    items = torch.randint(ITEMS, (n_pairs,), generator=draw)
    _, distance = TASKS[task]
    foils = (distance + torch.randint(1, ITEMS, (n_pairs,), generator=draw)) % ITEMS

    def prompts(mark: str) -> torch.Tensor:
        start, end = torch.full_like(items, MARKS.index(mark)), torch.full_like(items, ASK)
        return torch.stack([start, items + len(MARKS), end], dim=1)

    questions: list[tuple[Question, ...]] = [
        (Question(2, (len(MARKS) + (item + distance) % ITEMS,), (len(MARKS) + (item + foil) % ITEMS,)),)
        for item, foil in zip(items.tolist(), foils.tolist(), strict=True)
    ]
    return equal_pairs(f"mixture_{task}", "no mark", prompts(task), prompts("none"), questions)
