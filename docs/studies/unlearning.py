"""Unlearning by circuits (after CURE) on the embedded model: pronouns forgotten, agreement retained.

    python docs/studies/unlearning.py [--seeds 3]
    python docs/studies/unlearning.py --tables

Units (heads with MLPs, or heads with MLP neurons) are scored as by `sparsary circuits` on the task to forget and on the tasks
to retain. A unit of the first circuit only is forget-only, of the others only retain-only, of both shared. Forget-only
weights descend on the forget loss, retain-only ones on the retain loss, and shared ones on both, with the forget gradient
made orthogonal to the retain gradient; all other weights stay. The paper's exact rules could not be had: these three, the
level of the circuits, plain gradient descent with clipped steps, and the losses are ours. The forget loss is to chance and
not gradient ascent, which would end with the opposite of the task: the cross-entropy of answer and foil as equally likely.

Beside it: the same losses on all weights (uniform), with the projection and without the retain loss; the circuits without the
projection; and random units, as many of each kind. Every arm stops at the same level of forgetting, on prompts of the
training split; all figures are of held-out prompts and documents. Relearning trains all weights on the answers of the names
of one half and counts steps until the other half's pronouns are back. Seeds that are finished are in runs/unlearning and are
not repeated. Writes docs/results/unlearning.json and prints the tables of docs/unlearning.md, with 95 % intervals (Student's
t) over seeds of prompts.
"""

import argparse
import copy
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from results import write_results
from scipy.stats import t as student
from torch import Tensor

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import Trials, circuit_members, curve, growing_sizes, ranked, smallest_size
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace, Part
from sparsary.sae.files import read_json, write_json
from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import find_block, neuron_hook
from sparsary.training.embedded.corpus import embedded_document

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "unlearning.json"
RUNS = Path("runs/unlearning")
FORGET = "pronoun"
RETAIN = ("agreement_simple", "agreement_pp", "agreement_across_rc")
OTHERS = ("ioi", "greater_than", "induction", "docstring")
GRAINS = ("heads and MLPs", "heads and neurons")
LEVEL = 0.9
# Mean share of the right pronoun at which it counts as relearned.
BACK = 0.9
# Euclidean length to which longer gradients are clipped.
LONGEST = 10.0
# Roles of a unit.
NONE, FORGET_ONLY, SHARED, RETAIN_ONLY = range(4)
ROLES = ("none", "forget only", "shared", "retain only")

Grads = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a run: learning rate, prompts of a step for each loss, and when to stop.

    A run stops when the right pronoun's share of both pronouns' probability is ``near`` 0.5 (mean distance) and the accuracy
    within ``near`` of 0.5.
    """

    rate: float = 0.01
    batch: int = 24
    most_steps: int = 200
    check_every: int = 5
    near: float = 0.1
    pairs: int = 200
    documents: int = 100


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


def loss(model: LanguageModel, pairs: PromptPairs, share: float) -> Tensor:
    """Return the cross-entropy of answers and foils, of which answers should have this share."""
    answers, foils = sides(pairs, model.run(pairs.clean))
    return -(share * answers + (1 - share) * foils).mean()


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


@torch.no_grad()
def forgetting(model: LanguageModel, pairs: PromptPairs) -> Row:
    """Return accuracy, the right answer's mean share of both answers' probability, and its mean distance from 0.5."""
    answers, foils = torch.cat([sides(some, model.logits(some.clean)) for some in pairs.batches(64)], dim=1)
    share = (answers - foils).sigmoid()
    return {
        "accuracy": float((answers > foils).double().mean()),
        "share": float(share.mean()),
        "distance": float((share - 0.5).abs().mean()),
        "mass": float((answers.exp() + foils.exp()).mean()),
    }


@torch.no_grad()
def accuracy(model: LanguageModel, pairs: PromptPairs) -> float:
    """Return the accuracy on a task."""
    return float(torch.cat([some.right(model.logits(some.clean)) for some in pairs.batches(64)]).double().mean())


class HeldoutText:
    """Held-out documents, whose loss is taken apart: the pronouns asked for, other words of their passages, and the rest."""

    def __init__(self, model: LanguageModel, documents: int, seed: int):
        ids, bos = model.tokenizer.convert_tokens_to_ids, model.tokenizer.bos_token_id
        self.rows: list[tuple[Tensor, np.ndarray]] = []
        for index in range(documents):
            document = embedded_document(seed, index, "heldout")
            kinds = [
                "rest" if f["task"] != FORGET else "pronouns" if f["role"] == "answer" else "passages" for f in document.factors
            ]
            tokens = torch.tensor([bos, *ids(list(document.words))])[:128]
            self.rows.append((tokens, np.array(kinds[: len(tokens) - 1])))

    @torch.no_grad()
    def losses(self, model: LanguageModel) -> dict[str, float]:
        """Return the cross-entropy in nats per token of each kind of token."""
        found = [next_token_loss(model.logits(tokens[None]), tokens[None])[0].double().numpy() for tokens, _ in self.rows]
        values, kinds = np.concatenate(found), np.concatenate([kinds for _, kinds in self.rows])
        return {f"ce_{kind}": float(values[kinds == kind].mean()) for kind in ("rest", "passages", "pronouns")}


class Study:
    """Prompts, circuits and texts of one seed, and the runs on them."""

    def __init__(self, seed: int, settings: Settings):
        self.seed, self.settings = seed, settings
        self.original = load()
        n = settings.pairs

        def pairs(task: str, split: str, shift: int = 0, n: int = n) -> PromptPairs:
            return make_pairs(task, self.original, n, seed=100 * seed + shift, split=split)

        self.forget = pairs(FORGET, "train")
        self.retain = {task: pairs(task, "train") for task in RETAIN}
        self.checked = pairs(FORGET, "train", 1, 100)
        self.judged = {task: pairs(task, "heldout", 2) for task in (FORGET, *RETAIN, *OTHERS)}
        self.text = HeldoutText(self.original, settings.documents, 100 * seed + 3)

    def circuits(self, grain: str) -> tuple[NodeSpace, Tensor]:
        """Return the units of a grain and their roles; the retain circuit is the union of those of its tasks."""
        space = unit_space(self.original, grain)
        found = {
            task: circuit(space, pairs.take(slice(0, 100))) for task, pairs in [(FORGET, self.forget), *self.retain.items()]
        }
        return space, roles_of(found[FORGET], torch.stack([found[task] for task in RETAIN]).any(0))

    def run(self, roles: Mapping[str, Tensor], project: bool) -> tuple[LanguageModel, Row]:
        """Unlearn until pronouns are at chance on prompts that training does not see, or for the most steps."""
        settings, model = self.settings, load()
        model.module.requires_grad_(True)
        some = draws(self.forget, settings.batch, self.seed)
        others = {task: draws(pairs, settings.batch // len(RETAIN), self.seed) for task, pairs in self.retain.items()}
        step, reached = 0, False
        while not reached and step < settings.most_steps:
            forget = gradients(model, loss(model, next(some), 0.5))
            kept = torch.stack([loss(model, next(stream), 1.0) for stream in others.values()]).mean()
            retain = gradients(model, kept)
            descend(model, updates(forget, retain, roles, project), settings.rate)
            step += 1
            if step % settings.check_every == 0:
                now = forgetting(model, self.checked)
                reached = now["distance"] <= settings.near and abs(now["accuracy"] - 0.5) <= settings.near
        return model, {"steps": step, "reached": reached}

    def judge(self, model: LanguageModel) -> Row:
        """Return all figures of a model on held-out prompts and documents."""
        row: Row = {f"{FORGET}_{name}": value for name, value in forgetting(model, self.judged[FORGET]).items()}
        row |= {task: accuracy(model, pairs) for task, pairs in self.judged.items() if task != FORGET}
        row["agreement"] = statistics.fmean(row[task] for task in RETAIN)
        row["others"] = statistics.fmean(row[task] for task in OTHERS)
        return row | self.text.losses(model)

    def relearn(self, model: LanguageModel) -> int:
        """Return the steps on one half of the names until the pronouns of the other half are back; the most if they are not."""
        settings, half = self.settings, self._names()
        taught, asked = (
            pairs.take([row for row in range(len(pairs)) if (self._name(pairs, row) in half) == inside])
            for pairs, inside in ((self.forget, True), (self.judged[FORGET], False))
        )
        some, asked = draws(taught, settings.batch, self.seed), asked.take(slice(0, 64))
        for step in range(1, settings.most_steps + 1):
            descend(model, gradients(model, loss(model, next(some), 1.0)), settings.rate)
            if forgetting(model, asked)["share"] >= BACK:
                return step
        return settings.most_steps

    def _names(self) -> set[int]:
        names = sorted({self._name(pairs, row) for pairs in (self.forget, self.judged[FORGET]) for row in range(len(pairs))})
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed))
        return {names[place] for place in order[: len(names) // 2]}

    @staticmethod
    def _name(pairs: PromptPairs, row: int) -> int:
        return int(pairs.clean[row, pairs.roles[row]["person"]])


def load() -> LanguageModel:
    """Load the embedded model afresh, in a copy that may be changed."""
    model = LanguageModel.from_pretrained("embedded", device="cpu")
    return LanguageModel(copy.deepcopy(model.module), model.tokenizer, model.id, model.revision, model.section)


def study(seed: int, settings: Settings) -> list[Row]:
    """Return a row for every arm of one seed."""
    here = Study(seed, settings)
    rows: list[Row] = [{"seed": seed, "arm": "before", "grain": "-"} | here.judge(here.original)]
    everywhere = {name: torch.ones_like(weight, dtype=torch.long) for name, weight in here.original.module.named_parameters()}
    arms = [
        ("uniform", "all weights", {name: SHARED * role for name, role in everywhere.items()}, False),
        ("uniform, projected", "all weights", {name: SHARED * role for name, role in everywhere.items()}, True),
        ("uniform, forget loss only", "all weights", {name: FORGET_ONLY * role for name, role in everywhere.items()}, False),
    ]
    counts = {}
    for grain in GRAINS:
        space, roles = here.circuits(grain)
        owner = owners(space)
        counts[grain] = {name: int((roles == role).sum()) for role, name in enumerate(ROLES)}
        chance = by_weight(shuffled(space, roles, seed), owner)
        arms += [("circuits", grain, by_weight(roles, owner), True), ("random units", grain, chance, True)]
        if grain == GRAINS[1]:
            arms.append(("circuits, not projected", grain, by_weight(roles, owner), False))
    for name, grain, roles, project in arms:
        model, row = here.run(roles, project)
        changed = sum(int((role > 0).sum()) for role in roles.values())
        row = {"seed": seed, "arm": name, "grain": grain, "weights": changed} | counts.get(grain, {}) | row | here.judge(model)
        row["relearned"] = here.relearn(model) if row["reached"] else None
        rows.append(row)
        print(
            json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}), flush=True
        )
    return rows


def shown(values: Sequence[float | None], places: int) -> str:
    """Return the mean over seeds and half of its 95 % interval (Student's t), of the known values."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):.{places}f}"
    if len(known) > 1:
        half = float(student.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
        text += f" ± {half:.{places}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"


def with_increases(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the increase of each cross-entropy over that of the same seed's model before."""
    before = {row["seed"]: row for row in rows if row["arm"] == "before"}
    return [row | {f"{ce}_more": row[ce] - before[row["seed"]][ce] for ce in ("ce_rest", "ce_passages")} for row in rows]


def print_tables(rows: Sequence[Row]) -> None:
    """Print the tables of docs/unlearning.md."""
    columns = {
        "steps": 0,
        "pronoun_share": 3,
        "pronoun_accuracy": 3,
        "agreement": 3,
        "others": 3,
        "ce_rest_more": 3,
        "ce_passages_more": 3,
        "relearned": 0,
    }
    rows = with_increases(rows)
    arms = {
        key: [row for row in rows if (row["arm"], row["grain"]) == key] for row in rows if (key := (row["arm"], row["grain"]))
    }
    print("| arm | weights | " + " | ".join(columns).replace("_", " ") + " |\n|" + "---|" * (len(columns) + 2))
    for key, own in arms.items():
        cells = [shown([row.get(name) for row in own], places) for name, places in columns.items()]
        print(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    compared = ("agreement", "others", "ce_rest_more", "ce_passages_more", "relearned")
    print("\n| circuits less | weights | " + " | ".join(compared).replace("_", " ") + " |\n|" + "---|" * (len(compared) + 2))
    for grain in GRAINS:
        for other in (("uniform", "all weights"), ("random units", grain)):
            pairs = list(zip(arms["circuits", grain], arms[other], strict=True))
            cells = [
                shown([None if None in (one[name], two[name]) else one[name] - two[name] for one, two in pairs], columns[name])
                for name in compared
            ]
            print(f"| {other[0]} | {grain} | {' | '.join(cells)} |")
    print("\n| grain | " + " | ".join(ROLES[1:]) + " | none |\n|" + "---|" * 5)
    for grain in GRAINS:
        own = arms["circuits", grain]
        print(f"| {grain} | {' | '.join(shown([row[role] for row in own], 0) for role in (*ROLES[1:], ROLES[0]))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="print the tables of the last run")
    options = parser.parse_args()
    if not options.tables:
        torch.set_num_threads(1)
        rows: list[Row] = []
        for seed in range(options.seeds):
            done = RUNS / f"seed-{seed}.json"
            if not done.exists():
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, {"rows": study(seed, Settings())})
            rows += read_json(done)["rows"]
        settings = {"level": LEVEL, "back": BACK, **vars(Settings())}
        write_results(RESULTS, {"settings": settings, "rows": rows})
    print_tables(read_json(RESULTS)["rows"])


if __name__ == "__main__":
    main()
