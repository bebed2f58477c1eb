"""Transformer trained to answer multiple choice at two given heads: the option's index, then its letter (SIIT).

Prompts: BOS, then for every option a random letter and a color, then one of the colors again; the answer is that option's
letter. The program has two variables, at the last position: the index of the option asked about, which head 1 of the first
layer computes, and its letter, which head 2 of the second looks up. Losses as in ``siit``, with cross-entropy at the last
position, and two changes. A linear readout of the first head's output must tell the index: without it accuracy stays at that of
guessing among the letters of the prompt for at least 400 steps. And half of the time all other heads are patched together, in
the interchange loss from prompts of their own: where they are only patched one at a time, two heads of the first layer learn to
do the same beside the circuit, of which either is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..tasks.pairs import PromptPairs, Question
from .handbuilt import equal_pairs, made
from .known_circuit import Known, node_names
from .siit import BEHAVIOUR, CLIP, INTERCHANGE, STRICT, nodes_patched, nodes_recorded
from .toy import ToyConfig, ToyTransformer

INDEX, LETTER = "a0.h1", "a1.h2"
PLACES = {"index": INDEX, "letter": LETTER}
LETTERS, COLORS = 5, 6
BATCH, LR, CHECK_EVERY = 256, 3e-3, 100
# Weight of the readout's loss.
READ = 1.0
# Accuracy that counts as trained: unpatched, and with nodes patched from other prompts, as ``accuracies_of`` does.
ACCURACY = 0.995


@dataclass(frozen=True)
class Choices:
    """Prompts with as many options; letters are tokens 1 to 5, colors 6 to 11."""

    options: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.options <= LETTERS:
            raise ValueError(f"options: expected 2 to {LETTERS}, as there are {LETTERS} letters, got {self.options}.")

    @property
    def config(self) -> ToyConfig:
        length, vocabulary = 2 * self.options + 2, 1 + LETTERS + COLORS
        return ToyConfig(2, 4, 32, 8, length, vocabulary, vocabulary)

    def draw(self, count: int, random: torch.Generator) -> Int[Tensor, "contexts positions"]:
        """Return prompts: letters and colors are distinct within each."""
        letters = torch.rand(count, LETTERS, generator=random).argsort(1)[:, : self.options] + 1
        colors = torch.rand(count, COLORS, generator=random).argsort(1)[:, : self.options] + 1 + LETTERS
        asked = torch.randint(0, self.options, (count, 1), generator=random)
        start = torch.zeros(count, 1, dtype=torch.long)
        return torch.cat([start, torch.stack([letters, colors], 2).flatten(1), colors.gather(1, asked)], 1)

    def run(
        self, token_ids: Int[Tensor, "contexts positions"], given: Mapping[str, Tensor]
    ) -> dict[str, Int[Tensor, " contexts"]]:
        """Return the variables of every prompt, index and letter; those ``given`` are not computed."""
        letters, colors = token_ids[:, 1:-1:2], token_ids[:, 2:-1:2]
        index = given.get("index", (colors == token_ids[:, -1:]).int().argmax(1))
        return {"index": index, "letter": given.get("letter", letters.gather(1, index[:, None])[:, 0])}


def trained_choice(options: int = 3, n_pairs: int = 16, seed: int = 0, max_steps: int = 8000) -> Known:
    """Train a two-layer transformer with four heads to answer, in about 20 seconds on one core (with more options, minutes).

    In corrupted prompts another option is asked about. Pairs have the roles of multiple choice tasks: the positions of the
    right label and of the others.

    Raises:
        ValueError: If ``options`` is not 2 to 5, or ``max_steps`` were not enough.
    """
    choices = Choices(options)
    return known_choice(choices, train_choice(choices, seed, max_steps), n_pairs, seed)


def known_choice(choices: Choices, model: ToyTransformer, n_pairs: int, seed: int) -> Known:
    """Return a trained model as a known circuit."""
    edges = f"embed->{INDEX}.q {INDEX}->{LETTER}.q {LETTER}->logits"
    known = made("siit_choice", model, choice_pairs(choices, n_pairs, seed), {"resample": edges}, {})
    return replace(known, exact=False)


def train_choice(choices: Choices, seed: int, max_steps: int) -> ToyTransformer:
    """Train a model until every accuracy of ``accuracies_of`` is ``ACCURACY``.

    Raises:
        ValueError: If ``max_steps`` were not enough.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyTransformer(choices.config)
        readout = nn.Linear(choices.config.d_head, choices.options)
    for table in (model.wte, model.wpe):
        nn.init.normal_(table.weight, std=choices.config.d_model**-0.5, generator=draw)
    optimizer = torch.optim.Adam([*model.parameters(), *readout.parameters()], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    accuracies: dict[str, float] = {}
    for step in range(max_steps):
        loss = _loss(model, readout, choices, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == max_steps:
            accuracies = accuracies_of(model, choices, seed + 1)
            if min(accuracies.values()) >= ACCURACY:
                return model
    raise ValueError(
        f"max_steps: multiple choice is not yet learnt after {max_steps} steps: accuracies are "
        f"{', '.join(f'{value:.3f} ({what})' for what, value in accuracies.items())}, expected {ACCURACY}. Give more."
    )


def _choose(names: list[str], draw: torch.Generator) -> str:
    return names[int(torch.randint(0, len(names), (), generator=draw))]


def _others(config: ToyConfig) -> list[str]:
    """Return the heads that are in no variable's place."""
    return [node for node in node_names(config)[1:] if node not in PLACES.values()]


def _loss(model: ToyTransformer, readout: nn.Module, choices: Choices, draw: torch.Generator) -> Tensor:
    variable, others = _choose(list(PLACES), draw), _others(model.config)
    together = bool(torch.rand((), generator=draw) < 0.5)
    base, source, elsewhere = (choices.draw(BATCH, draw) for _ in range(3))
    right, there = choices.run(base, {})["letter"], choices.run(source, {})
    taken = choices.run(base, {variable: there[variable]})["letter"]
    with nodes_recorded(model) as written:
        model(source)
    with nodes_recorded(model) as unrelated:
        model(elsewhere)
    with nodes_patched(model, [PLACES[variable]], written), nodes_patched(model, others if together else [], unrelated):
        interchange = _cross_entropy(model(base).logits, taken)
    with nodes_patched(model, others if together else [_choose(others, draw)], written):
        strict = _cross_entropy(model(base).logits, right)
    layer, head = (int(number) for number in INDEX.removeprefix("a").split(".h"))
    z = written[f"a{layer}"].unflatten(-1, (-1, model.config.d_head))[:, :, head]
    read = _cross_entropy(readout(z), there["index"])
    return BEHAVIOUR * _cross_entropy(model(base).logits, right) + INTERCHANGE * interchange + STRICT * strict + READ * read


def _cross_entropy(logits: Float[Tensor, "contexts positions vocabulary"], letters: Int[Tensor, " contexts"]) -> Tensor:
    return nn.functional.cross_entropy(logits[:, -1], letters)


@torch.no_grad()
def accuracies_of(model: ToyTransformer, choices: Choices, seed: int, n_prompts: int = 1024) -> dict[str, float]:
    """Return the share of prompts with the program's answer, unpatched and with nodes patched from other prompts.

    Nodes are patched one at a time; all those outside the circuit (``others``); and each of the circuit with these from third
    prompts (``a0.h1 and others``).
    """
    draw = torch.Generator().manual_seed(seed)
    base, source, elsewhere = (choices.draw(n_prompts, draw) for _ in range(3))
    there, right = choices.run(source, {}), choices.run(base, {})["letter"]
    expected = {node: choices.run(base, {name: there[name]})["letter"] for name, node in PLACES.items()}
    others = _others(model.config)
    with nodes_recorded(model) as written:
        model(source)
    with nodes_recorded(model) as unrelated:
        model(elsewhere)

    def share(letters: Tensor) -> float:
        return float((model(base).logits[:, -1].argmax(-1) == letters).double().mean())

    accuracies = {"as it is": share(right)}
    for node in node_names(model.config)[1:]:
        with nodes_patched(model, [node], written):
            accuracies[node] = share(expected.get(node, right))
    with nodes_patched(model, others, unrelated):
        accuracies["others"] = share(right)
        for node, letters in expected.items():
            with nodes_patched(model, [node], written):
                accuracies[f"{node} and others"] = share(letters)
    return accuracies


def choice_pairs(choices: Choices, n_pairs: int, seed: int) -> PromptPairs:
    """Return pairs whose corrupted prompt asks about another option."""
    draw = torch.Generator().manual_seed(seed + 2)
    clean = choices.draw(n_pairs, draw)
    index = choices.run(clean, {})["index"]
    other = (index + torch.randint(1, choices.options, (n_pairs,), generator=draw)) % choices.options
    corrupted = clean.clone()
    corrupted[:, -1] = clean[torch.arange(n_pairs), 2 + 2 * other]
    questions, roles = [], []
    for row, right in zip(clean.tolist(), index.tolist(), strict=True):
        others = [place for place in range(choices.options) if place != right]
        end = len(row) - 1
        questions.append((Question(end, (row[1 + 2 * right],), tuple(row[1 + 2 * place] for place in others)),))
        places = {f"other_label_{number}": 1 + 2 * place for number, place in enumerate(others)}
        roles.append({"right_label": 1 + 2 * right} | places | {"end": end})
    return replace(equal_pairs("siit_choice", "other asked", clean, corrupted, questions), roles=tuple(roles))
