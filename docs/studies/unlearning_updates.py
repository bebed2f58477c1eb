"""Units of the study of unlearning, what their weights descend along, and the losses. See unlearning.py."""

import math
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import Trials, circuit_members, curve, growing_sizes, ranked, smallest_size
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace, Part
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import find_block, neuron_hook

GRAINS = ("heads and MLPs", "heads and neurons")
LEVEL = 0.9
# Weight in the forget loss of the difference between a prompt and the one with a name of the other gender.
EQUAL = 5.0
# Euclidean length to which longer gradients are clipped.
LONGEST = 10.0
# Roles of a unit.
NONE, FORGET_ONLY, SHARED, RETAIN_ONLY = range(4)

Grads = dict[str, Tensor]


def unit_space(model: LanguageModel, grain: str) -> NodeSpace:
    """Return heads and MLPs of a GPT-2 as units, or heads and the neurons of the MLPs."""
    parts: list[Part] = []
    for part in components(model):
        if grain == GRAINS[1] and part.name.startswith("m"):
            hook = neuron_hook(model, f"{find_block(model.module, int(part.name[1:])).path}:out")
            assert hook is not None
            parts.append(Coordinates(part.name, hook, model.widths((hook,))[hook], 1))
        else:
            parts.append(part)
    return NodeSpace(model, parts)


def owners(space: NodeSpace) -> dict[str, Int[Tensor, "..."]]:
    """Return the unit that each weight of a GPT-2 belongs to, by parameter; -1 for none.

    A head owns its queries, keys, values and its rows of the output projection; an MLP all its weights; a neuron what it reads,
    its bias and what it writes. Output biases of attention, norms and embeddings are of no unit.
    """
    found = {name: torch.full(weight.shape, -1) for name, weight in space.model.module.named_parameters()}
    for part in space.parts:
        assert isinstance(part, Coordinates)
        block = f"transformer.h.{part.name[1:]}"
        units = torch.arange(part.n_units) + space.groups[part.name].start
        if part.name.startswith("a"):
            rows = units.repeat_interleave(part.group)
            found[f"{block}.attn.c_attn.weight"][:] = rows.repeat(3)
            found[f"{block}.attn.c_attn.bias"][:] = rows.repeat(3)
            found[f"{block}.attn.c_proj.weight"][:] = rows[:, None]
            continue
        bias = found[f"{block}.mlp.c_fc.bias"]
        bias[:] = units.repeat_interleave(len(bias) // len(units))
        found[f"{block}.mlp.c_fc.weight"][:] = bias
        found[f"{block}.mlp.c_proj.weight"][:] = bias[:, None]
        if part.n_units == 1:
            found[f"{block}.mlp.c_proj.bias"][:] = units
    return found


def circuit(space: NodeSpace, pairs: PromptPairs) -> Tensor:
    """Return a mask of the smallest circuit of faithfulness ``LEVEL``: half of the pairs rank units, half size it."""
    half = len(pairs) // 2
    chosen_on, sized_on = pairs.take(slice(0, half)), pairs.take(slice(half, len(pairs)))
    order = ranked(METHODS["attribution"]().discover(space, chosen_on), "absolute")
    trials = Trials(space, sized_on, ablation_values(space, "resample", chosen_on))
    along = curve(trials, order, growing_sizes(space.size), complements=())
    size = smallest_size(trials, order, LEVEL, along)
    return circuit_members(order, space.size if size is None else size)


def roles_of(forget: Tensor, retain: Tensor) -> Int[Tensor, " units"]:
    """Return the role of every unit from the masks of the two circuits."""
    roles = torch.zeros(len(forget), dtype=torch.long)
    roles[forget & ~retain], roles[forget & retain], roles[retain & ~forget] = FORGET_ONLY, SHARED, RETAIN_ONLY
    return roles


def shuffled(space: NodeSpace, roles: Tensor, seed: int) -> Tensor:
    """Return the roles of other units: as many of each role in every block's heads and in every block's MLP, at random.

    MLPs as single units are exchanged among themselves.
    """
    draw, found = torch.Generator().manual_seed(seed), roles.clone()
    groups = [list(range(group.start, group.stop)) for group in space.groups.values()]
    single = [unit for group in groups if len(group) == 1 for unit in group]
    for group in [*(group for group in groups if len(group) > 1), *([single] if single else [])]:
        found[group] = roles[group][torch.randperm(len(group), generator=draw)]
    return found


def by_weight(roles: Tensor, owner: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the role of every weight."""
    return {name: torch.where(units >= 0, roles[units.clamp_min(0)], NONE) for name, units in owner.items()}


def updates(forget: Grads, retain: Grads, roles: Mapping[str, Tensor], project: bool = True) -> Grads:
    """Return the directions to descend along: each weight by its role, the shared ones projected together.

    The forget gradient of the shared weights loses its component along their retain gradient, whatever its sign.
    """
    masks = {name: role == SHARED for name, role in roles.items()}
    share = torch.zeros(())
    if project:
        along = sum(((forget[name] * retain[name])[mask].sum() for name, mask in masks.items()), torch.zeros(()))
        size = sum((retain[name][mask].square().sum() for name, mask in masks.items()), torch.zeros(()))
        share = along / size.clamp_min(1e-30)
    found = {}
    for name, role in roles.items():
        shared = forget[name] - share * retain[name] + retain[name]
        own = torch.where(role == FORGET_ONLY, forget[name], torch.where(role == RETAIN_ONLY, retain[name], 0.0))
        found[name] = torch.where(masks[name], shared, own)
    return found


def sides(pairs: PromptPairs, logits: Tensor) -> Float[Tensor, "2 pairs"]:
    """Return the log probability of the answers of every pair's question, and that of its foils."""
    rows = pairs.asked_rows(logits).log_softmax(-1)
    questions = [question for questions in pairs.questions for question in questions]
    answers = [row[list(question.answers)].logsumexp(0) for row, question in zip(rows, questions, strict=True)]
    foils = [row[list(question.foils)].logsumexp(0) for row, question in zip(rows, questions, strict=True)]
    return torch.stack([torch.stack(answers), torch.stack(foils)])


def retain_loss(model: LanguageModel, pairs: PromptPairs) -> Tensor:
    """Return minus the log probability of all right answers."""
    return -sides(pairs, model.run(pairs.clean))[0].mean()


def forget_loss(model: LanguageModel, pairs: PromptPairs) -> Tensor:
    """Return how far answers and foils are from chance, on clean and corrupted prompts.

    The cross-entropy of answer and foil as equally likely, and ``EQUAL`` times that of the two prompts as equally likely by
    their log odds. The first alone hardly changes log odds that are small, whose signs are then still the right ones.
    """
    clean, corrupted = (sides(pairs, model.run(prompts)) for prompts in (pairs.clean, pairs.corrupted))
    apart = (clean[0] - clean[1]) - (corrupted[0] - corrupted[1])
    same = (F.softplus(apart) + F.softplus(-apart)).mean() / 2
    return EQUAL * same - torch.stack([clean, corrupted]).mean()


def gradients(model: LanguageModel, value: Tensor) -> Grads:
    """Return the gradient of every parameter; zeros where the loss does not depend on it."""
    named = dict(model.module.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(named.items(), found, strict=True)}


@torch.no_grad()
def descend(model: LanguageModel, direction: Grads, rate: float) -> None:
    """Take a step against a direction, which is shortened to the length ``LONGEST`` if it exceeds it."""
    length = math.sqrt(sum(float(part.square().sum()) for part in direction.values()))
    for name, weight in model.module.named_parameters():
        weight.sub_(rate * min(1.0, LONGEST / max(length, 1e-30)) * direction[name])


def draws(pairs: PromptPairs, size: int, seed: int) -> Iterator[PromptPairs]:
    """Yield random pairs, without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield pairs.take(torch.randperm(len(pairs), generator=draw)[:size])
