"""Unlearning by circuits (after CURE) on the embedded model: pronouns forgotten, agreement retained.

    python docs/studies/unlearning.py [--seeds 4]
    python docs/studies/unlearning.py --tables

Units (heads with MLPs, or heads with MLP neurons) are scored as by `sparsary circuits` on the task to forget and on the tasks
to retain. A unit of the first circuit only is forget-only, of the others only retain-only, of both shared. Forget-only
weights descend on the forget loss, retain-only ones on the retain loss, and shared ones on both, with the forget gradient
made orthogonal to the retain gradient; all other weights stay. The paper's exact rules could not be had: these three, the
level of the circuits, plain gradient descent with clipped steps, and the losses are ours. The forget loss is to chance and
not gradient ascent, which would end with the opposite of the task: answer and foil equally likely, and as likely as after a
name of the other gender.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results
from scipy.stats import t as student
from torch import Tensor
from unlearning_updates import (
    EQUAL,
    FORGET_ONLY,
    GRAINS,
    LEVEL,
    SHARED,
    by_weight,
    circuit,
    descend,
    draws,
    forget_loss,
    gradients,
    owners,
    retain_loss,
    roles_of,
    shuffled,
    sides,
    unit_space,
    updates,
)

from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.sae.files import read_json, write_json
from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.activations.model import LanguageModel
from sparsary.training.embedded.corpus import embedded_document

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "unlearning.json"
RUNS = Path("runs/unlearning")
FORGET = "pronoun"
RETAIN = ("agreement_simple", "agreement_pp", "agreement_across_rc")
OTHERS = ("ioi", "greater_than", "induction", "docstring")
# Mean share of the right pronoun at which it counts as relearned.
BACK = 0.9
# Roles of a unit, in the order of their numbers.
ROLES = ("none", "forget only", "shared", "retain only")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a run: learning rate, prompts of a step for each loss, and when to stop.

    A run stops when ``checks`` checks in a row, on ``checked`` prompts of the training split, have an accuracy within
    ``near_accuracy`` of 0.5 and the right pronoun's share of both pronouns' probability ``near_share`` 0.5 (mean distance).
    """

    rate: float = 0.01
    batch: int = 24
    most_steps: int = 200
    check_every: int = 5
    checks: int = 2
    checked: int = 300
    near_accuracy: float = 0.05
    near_share: float = 0.1
    pairs: int = 200
    documents: int = 100


@torch.no_grad()
def forgetting(model: LanguageModel, pairs: PromptPairs) -> Row:
    """Return accuracy, the right answer's mean share of both answers' probability, its mean distance from 0.5, and AUROC.

    The AUROC is that of one pronoun's log odds between the prompts with this answer and those with the other. Unlike accuracy,
    it isn't at chance only because one pronoun is always the likelier.
    """
    answers, foils = torch.cat([sides(some, model.logits(some.clean)) for some in pairs.batches(64)], dim=1)
    share, first = (answers - foils).sigmoid(), torch.tensor([one.answers < one.foils for (one,) in pairs.questions])
    return {
        "accuracy": float((answers > foils).double().mean()),
        "share": float(share.mean()),
        "distance": float((share - 0.5).abs().mean()),
        "auroc": roc_auc(torch.where(first, answers - foils, foils - answers), first),
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
        self.checked = pairs(FORGET, "train", 1, settings.checked)
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
        step, passed, now = 0, 0, {}
        while passed < settings.checks and step < settings.most_steps:
            forget = gradients(model, forget_loss(model, next(some)))
            kept = torch.stack([retain_loss(model, next(stream)) for stream in others.values()]).mean()
            retain = gradients(model, kept)
            descend(model, updates(forget, retain, roles, project), settings.rate)
            step += 1
            if step % settings.check_every == 0:
                now = forgetting(model, self.checked)
                near = now["distance"] <= settings.near_share and abs(now["accuracy"] - 0.5) <= settings.near_accuracy
                passed = passed + 1 if near else 0
        return model, {"steps": step, "reached": passed == settings.checks, "checked_accuracy": now["accuracy"]}

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
            descend(model, gradients(model, retain_loss(model, next(some))), settings.rate)
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
        "pronoun_auroc": 3,
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
    parser.add_argument("--seeds", type=int, default=4)
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
        settings = {"level": LEVEL, "back": BACK, "equal": EQUAL, **vars(Settings())}
        write_results(RESULTS, {"settings": settings, "rows": rows})
    print_tables(read_json(RESULTS)["rows"])


if __name__ == "__main__":
    main()
