"""Transformers trained to implement a program at given nodes only: strict interchange intervention training (SIIT).

Each variable of a program has one node of the model. Three losses make the model implement the program: outputs are correct
(behavior); with a variable's node patched from another prompt they match the program with that variable patched (interchange;
Geiger et al. 2022, arXiv:2112.00826); with any other node patched they do not change (strict; Gupta et al. 2024,
arXiv:2407.14494, whose loss weights these are).

The circuit is known for resampling only, because training never replaces a node by zero. It is not exact: other nodes keep a
small effect, below ``TOLERANCE`` of the output's range on average. Edges are those of the program; training does not constrain
them one by one, and two edges outside the circuit may cancel at the same reader. Patched alone, such an edge had up to half the
effect of an edge in the circuit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ....sae.suggestions import require_choice
from ..tasks.pairs import PromptPairs, Question
from .handbuilt import equal_pairs, made
from .known_circuit import Known, node_names
from .toy import ToyConfig, ToyTransformer

BEHAVIOUR, INTERCHANGE, STRICT = 1.0, 1.0, 0.4
LENGTH, BATCH, LR, CLIP = 7, 128, 3e-3, 1.0
# Outputs are shares from 0 to 1. Limit on their mean distance from the program's, and on the mean effect of an irrelevant node.
TOLERANCE = 0.01
CHECK_EVERY = 100

Values = dict[str, Float[Tensor, "contexts positions"]]


@dataclass(frozen=True)
class Program:
    """Program of named variables: ``run(token_ids, given)`` computes all of them except those in ``given``.

    ``places`` maps variables to nodes. ``circuits`` maps the variables that are outputs, one logit each, to the edges that
    compute them. Tokens are 0 (BOS, always first) to ``d_vocab - 1``.
    """

    name: str
    places: dict[str, str]
    circuits: dict[str, str]
    d_vocab: int
    run: Callable[[Int[Tensor, "contexts positions"], Mapping[str, Tensor]], Values]

    def outputs(
        self, token_ids: Int[Tensor, "contexts positions"], given: Mapping[str, Tensor]
    ) -> Float[Tensor, "contexts positions outputs"]:
        """Return the outputs, in the order of the logits."""
        values = self.run(token_ids, given)
        return torch.stack([values[name] for name in self.circuits], -1)

    def task(self, output: str) -> str:
        """Return the name of the task to compute an output."""
        return f"siit_{self.name}" if len(self.circuits) == 1 else f"siit_{self.name}_{output}"


def _mean_so_far(x: Float[Tensor, "contexts positions"]) -> Float[Tensor, "contexts positions"]:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)


def _share_of_x(token_ids: Int[Tensor, "contexts positions"], given: Mapping[str, Tensor]) -> Values:
    is_x = given.get("is_x", (token_ids == 2).float())
    return {"is_x": is_x, "share": given.get("share", _mean_so_far(is_x))}


def _share_of_repeats(token_ids: Int[Tensor, "contexts positions"], given: Mapping[str, Tensor]) -> Values:
    # BOS counts as its own predecessor.
    previous = given.get("previous", torch.cat([token_ids[:, :1], token_ids[:, :-1]], 1).float())
    repeats = given.get("repeats", ((previous == token_ids) & (token_ids > 0)).float())
    return {"previous": previous, "repeats": repeats, "share": given.get("share", _mean_so_far(repeats))}


def _x_three_ways(token_ids: Int[Tensor, "contexts positions"], given: Mapping[str, Tensor]) -> Values:
    is_x = given.get("is_x", (token_ids == 2).float())
    # BOS, which is no x, counts as its own predecessor.
    before = given.get("before", torch.cat([is_x[:, :1], is_x[:, :-1]], 1))
    return {"is_x": is_x, "before": before, "share": given.get("share", _mean_so_far(is_x))}


PROGRAMS = {
    "share_of_x": Program(
        "share_of_x",
        {"is_x": "m0", "share": "a1.h2"},
        {"share": "embed->m0 m0->a1.h2.v a1.h2->logits"},
        4,
        _share_of_x,
    ),
    "share_of_repeats": Program(
        "share_of_repeats",
        {"previous": "a0.h1", "repeats": "m0", "share": "a1.h0"},
        {"share": "embed->a0.h1.v a0.h1->m0 embed->m0 m0->a1.h0.v a1.h0->logits"},
        4,
        _share_of_repeats,
    ),
}
# Programs that share a variable, which is an output too: circuits that have a unit in common.
SHARING = Program(
    "x_three_ways",
    {"is_x": "m0", "before": "a1.h0", "share": "a1.h2"},
    {
        "is_x": "embed->m0 m0->logits",
        "before": "embed->m0 m0->a1.h0.v a1.h0->logits",
        "share": "embed->m0 m0->a1.h2.v a1.h2->logits",
    },
    4,
    _x_three_ways,
)


def trained(name: str, n_pairs: int = 16, seed: int = 0, max_steps: int = 3000) -> Known:
    """Train a two-layer transformer with four heads to implement a program, in 10 to 30 seconds on one core.

    Raises:
        ValueError: If the program is unknown, or ``max_steps`` were not enough.
    """
    require_choice("name", name, PROGRAMS)
    program = PROGRAMS[name]
    (known,) = _known(program, train_siit(program, seed, max_steps), n_pairs, seed).values()
    return known


def trained_together(n_pairs: int = 16, seed: int = 0, max_steps: int = 6000) -> dict[str, Known]:
    """Train one transformer to implement three programs that share a variable; return the circuit of each output.

    Takes about a minute on one core.

    Raises:
        ValueError: If ``max_steps`` were not enough.
    """
    return _known(SHARING, train_siit(SHARING, seed, max_steps), n_pairs, seed)


def _known(program: Program, model: ToyTransformer, n_pairs: int, seed: int) -> dict[str, Known]:
    """Return the known circuit of every output."""
    found = {}
    for column, (output, edges) in enumerate(program.circuits.items()):
        pairs = _pairs(program, n_pairs, seed, column)
        known = made(program.task(output), model, pairs, {"resample": edges}, {})
        found[output] = replace(known, exact=False)
    return found


def train_siit(program: Program, seed: int, max_steps: int) -> ToyTransformer:
    """Train a model to implement the program to within ``TOLERANCE``."""
    draw = torch.Generator().manual_seed(seed)
    config = ToyConfig(2, 4, 32, 8, LENGTH, program.d_vocab, len(program.circuits), d_mlp=64, activation="gelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyTransformer(config)
    for table in (model.wte, model.wpe):
        nn.init.normal_(table.weight, std=config.d_model**-0.5, generator=draw)
    others = [node for node in node_names(config) if node != "embed" and node not in program.places.values()]
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for step in range(max_steps):
        variable = _choose(list(program.places), draw)
        loss = _loss(model, program, variable, _choose(others, draw), draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECK_EVERY == 0 and max(distances_of(model, program, seed + 1).values()) < TOLERANCE:
            return model
    distances = distances_of(model, program, seed + 1)
    raise ValueError(
        f"max_steps: {program.name} is not yet the program after {max_steps} steps: outputs are off by "
        f"{', '.join(f'{value:.3f} ({what})' for what, value in distances.items())}, expected below {TOLERANCE}. Give more."
    )


def _loss(model: ToyTransformer, program: Program, variable: str, other: str, draw: torch.Generator) -> Tensor:
    base, source = (siit_prompts(program, BATCH, draw) for _ in range(2))
    right, swapped = program.outputs(base, {}), program.outputs(base, {variable: program.run(source, {})[variable]})
    scale = right.var((0, 1))

    def off(said: Tensor, expected: Tensor) -> Tensor:
        return ((said - expected).pow(2) / scale).mean()

    with nodes_recorded(model) as written:
        model(source)
    with node_patched(model, program.places[variable], written):
        interchange = off(model(base).logits, swapped)
    with node_patched(model, other, written):
        strict = off(model(base).logits, right)
    behaviour = off(model(base).logits, right)
    return BEHAVIOUR * behaviour + INTERCHANGE * interchange + STRICT * strict


@torch.no_grad()
def distances_of(model: ToyTransformer, program: Program, seed: int, n_prompts: int = 512) -> dict[str, float]:
    """Return the mean distance of the worst output from its target, unpatched and with each node patched from other prompts."""
    draw = torch.Generator().manual_seed(seed)
    base, source = (siit_prompts(program, n_prompts, draw) for _ in range(2))
    there = program.run(source, {})
    with nodes_recorded(model) as written:
        model(source)
    expected = {node: program.outputs(base, {name: there[name]}) for name, node in program.places.items()}
    right = program.outputs(base, {})

    def distance(said: Tensor, target: Tensor) -> float:
        return float((said - target).abs().mean((0, 1)).max())

    distances = {"as it is": distance(model(base).logits, right)}
    for node in node_names(model.config)[1:]:
        with node_patched(model, node, written):
            said = model(base).logits
        distances[node] = distance(said, expected.get(node, right))
    return distances


def siit_prompts(program: Program, count: int, draw: torch.Generator) -> Int[Tensor, "contexts positions"]:
    """Return prompts of BOS and random tokens; token frequencies differ between prompts, so that shares vary."""
    weights = torch.rand(count, program.d_vocab - 1, generator=draw) ** 2 + 0.05
    tokens = torch.multinomial(weights, LENGTH - 1, replacement=True, generator=draw) + 1
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), tokens], 1)


def _choose(names: list[str], draw: torch.Generator) -> str:
    return names[int(torch.randint(0, len(names), (), generator=draw))]


@contextmanager
def nodes_recorded(model: ToyTransformer) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of heads' output projections and the outputs of MLPs by layer: ``a0``, ``m0``."""
    written: dict[str, Tensor] = {}
    handles = []

    def reading(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def read(_module: nn.Module, args: tuple[Tensor]) -> None:
            written[name] = args[0]

        return read

    def writing(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def write(_module: nn.Module, _args: tuple[Tensor], y: Tensor) -> None:
            written[name] = y

        return write

    for layer in range(model.config.n_layers):
        handles.append(model.attention(layer).o_proj.register_forward_pre_hook(reading(f"a{layer}")))
        if model.config.d_mlp:
            handles.append(model.mlp(layer).register_forward_hook(writing(f"m{layer}")))
    try:
        yield written
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def node_patched(model: ToyTransformer, node: str, written: dict[str, Tensor]) -> Iterator[None]:
    """Patch ``node`` with recorded activations, while open."""
    part, _, head = node.partition(".h")
    layer, donor = int(part[1:]), written[part]

    def mixed(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        columns = torch.arange(donor.shape[-1]) // model.config.d_head == int(head)
        return (torch.where(columns, donor, args[0]),)

    if head:
        handle = model.attention(layer).o_proj.register_forward_pre_hook(mixed)
    else:
        handle = model.mlp(layer).register_forward_hook(lambda _module, _args, _y: donor)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def nodes_patched(model: ToyTransformer, nodes: Iterable[str], written: dict[str, Tensor]) -> Iterator[None]:
    """Patch several nodes with recorded activations, while open."""
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(node_patched(model, node, written))
        yield


def _pairs(program: Program, n_pairs: int, seed: int, column: int) -> PromptPairs:
    """Return pairs whose clean prompt has the larger values of an output, asked where they are larger by more than 0.2."""
    draw = torch.Generator().manual_seed(seed + 2)
    clean, corrupted, questions = [], [], []
    while len(clean) < n_pairs:
        both = siit_prompts(program, 2, draw)
        shares = program.outputs(both, {})[..., column]
        more = int(shares[1].sum() > shares[0].sum())
        asked = ((shares[more] - shares[1 - more]) > 0.2).nonzero()[:, 0].tolist()
        if asked:
            clean.append(both[more])
            corrupted.append(both[1 - more])
            questions.append(tuple(Question(position, (column,), ()) for position in asked))
    task = program.task(list(program.circuits)[column])
    return equal_pairs(task, "other prompt", torch.stack(clean), torch.stack(corrupted), questions)
