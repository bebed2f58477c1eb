"""Training data selected by latents (`sparsary select`) where the right answer is known: documents of one embedded task.

    OMP_NUM_THREADS=1 .venv/bin/python docs/studies/data_selection.py --out docs/results/data-selection.json
    .venv/bin/python docs/studies/data_selection.py --help

A pool holds documents of ten kinds in equal parts: the embedded corpus's tasks, with agreement in its four kinds, which share
their nouns and verbs; the two relative clauses ("that the dogs like", "that likes the dogs") share all words. A document has
two to six passages of one kind. For every kind, the 5 % of the pool most like 16 examples (of held-out combinations of words)
are chosen by every method of `sparsary select`; printed are the share of the chosen ones that are of that kind, and the average
precision of the whole ranking.

Then a half-trained embedded model (the first steps of its own training) is fine-tuned on the chosen 5 %, or on as many random
documents, from the same weights and in the same order of steps. Printed are the losses on held-out documents of the kind, and
the difference to random documents, paired by seed, with its 95 % interval over seeds (Student's t).
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results
from safetensors.torch import load_file, save_file
from scipy import stats

import sparsary
from sparsary.training.embedded import lexicon
from sparsary.training.embedded.corpus import TASKS, DocumentChoices, FilledPassage, embedded_documents, join
from sparsary.training.embedded.train import CONTEXT_LENGTH, build_model
from sparsary.training.text import pack

# Kinds of agreement -> kind of the generator, and the word after "that".
AGREEMENT = {"simple": ("simple", ""), "across_pp": ("across_pp", "")}
AGREEMENT |= {"object_rc": ("across_rc", "relative"), "subject_rc": ("across_rc", "inner_verb")}
KINDS = (*(name for name in TASKS if name != "agreement"), *(f"agreement {name}" for name in AGREEMENT))
EXAMPLES, TESTS = 16, 150
BASE_LR, BASE_CONTEXTS, TUNE_LR, TUNE_CONTEXTS, EPOCHS = 2e-3, 32, 3e-4, 8, 3
ARMS = ("latents", "tfidf", "random")


def kind_document(kind: str, seed: int, index: int, split: str) -> list[str]:
    """Return the text and the words of a document of two to six passages of one kind."""
    task, _, agreement = kind.partition(" ")
    draw = DocumentChoices(f"select/{seed}/{split}/{kind}/{index}", split)
    topic = int(draw.random.random() * lexicon.N_TOPICS)
    words = []
    for _ in range(2 + int(draw.random.random() * 5)):
        words += passage_of(task, agreement, draw, topic).words
    return [join(words), *(word.text for word in words)]


def passage_of(task: str, agreement: str, draw: DocumentChoices, topic: int) -> FilledPassage:
    """Return a passage of a task, of one of the kinds of agreement if it is that."""
    kind, after_that = AGREEMENT.get(agreement, ("", ""))
    while True:
        passage = FilledPassage(task)
        TASKS[task][0](draw, passage, topic, **({"kind": kind} if kind else {}))
        roles = [word.factors["role"] for word in passage.words]
        if not after_that or roles[[word.text for word in passage.words].index("that") + 1] == after_that:
            return passage


def write_documents(path: Path, kinds: Sequence[str], count: int, seed: int, split: str) -> None:
    """Write ``count`` documents of each kind as JSON lines, in a random order."""
    rows = [
        {"text": kind_document(kind, seed, index, split)[0], "kind": kind, "index": index}
        for kind in kinds
        for index in range(count)
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    path.write_text("".join(json.dumps(rows[place]) + "\n" for place in order), encoding="utf-8")


def contexts_of(documents: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return documents as contexts, packed end to end."""
    ids = {word: number for number, word in enumerate(lexicon.vocabulary())}
    numbered = ((number, [ids[word] for word in words]) for number, words in enumerate(documents))
    packed = [context.token_ids for context in pack(numbered, CONTEXT_LENGTH, bos_id=ids["<bos>"], bos="context")]
    return torch.from_numpy(np.stack(packed)).long()


def half_trained(steps: int) -> dict[str, torch.Tensor]:
    """Return the weights of the embedded model after the first steps of a training like its own; they are kept in runs."""
    kept = Path("runs/data-selection", f"half-trained-{steps}.safetensors")
    if kept.is_file():
        return load_file(kept)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_LR, total_steps=steps, pct_start=0.2)
    batches = _training_batches()
    for _ in range(steps):
        batch = next(batches)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"half-trained: {steps} steps, loss {loss.item():.3f}", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(found, kept)
    return found


def _training_batches() -> Iterator[torch.Tensor]:
    ids = {word: number for number, word in enumerate(lexicon.vocabulary())}
    numbered = ((number, [ids[word] for word in document.words]) for number, document in enumerate(embedded_documents(0)))
    packed = pack(numbered, CONTEXT_LENGTH, bos_id=ids["<bos>"], bos="context")
    while True:
        yield torch.from_numpy(np.stack([next(packed).token_ids for _ in range(BASE_CONTEXTS)])).long()


def tuned_loss(start: dict[str, torch.Tensor], documents: Sequence[Sequence[str]], test: torch.Tensor, seed: int) -> float:
    """Return the loss on test contexts after fine-tuning on documents; on none, that of the start."""
    model = build_model()
    model.load_state_dict(start)
    contexts = contexts_of(documents) if documents else torch.zeros(0, CONTEXT_LENGTH, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(contexts), generator=generator) for _ in range(EPOCHS)]
    steps = [rows for order in orders for rows in order.split(TUNE_CONTEXTS)] if documents else []
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNE_LR, betas=(0.9, 0.98), weight_decay=0.05)
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = TUNE_LR * min(1.0, (number + 1) / 5) * (1 - number / len(steps))
        loss = model(contexts[rows], labels=contexts[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return float(model.eval()(test, labels=test).loss)


def chosen_by(
    checkpoint: str, pool: Path, like: Path, kind: str, method: str, out: Path, pooling: str
) -> tuple[Any, list[int]]:
    """Return the results of a selection, and the lines of the pool that it chose."""
    found = sparsary.select(checkpoint, pool, like, by=method, truth=f"kind={kind}", out=out, pooling=pooling)
    rows = [json.loads(line) for line in (out / "chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    return found, [(row["kind"], row["index"]) for row in rows]


def interval(values: Sequence[float]) -> str:
    """Return a mean and its 95 % interval over seeds (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart", help="an SAE of the embedded model")
    parser.add_argument("--documents", type=int, default=200, help="documents of each kind in the pool")
    parser.add_argument("--seeds", type=int, default=5, help="number of pools, each with its own examples")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds to select")
    parser.add_argument("--tune", default="agreement simple,agreement object_rc", help="kinds to fine-tune on; empty: none")
    parser.add_argument("--steps", type=int, default=150, help="steps of the half-trained model")
    parser.add_argument("--pooling", default="max")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every seed")
    arguments = parser.parse_args()
    start = half_trained(arguments.steps) if arguments.tune else {}
    names = ("documents", "steps", "pooling")
    settings = {name: getattr(arguments, name) for name in names}
    found: dict[str, Any] = settings | {"seeds": 0, "precision": {}, "average_precision": {}, "loss": {}}
    if arguments.out and arguments.out.is_file():
        # Seeds that another run has done are not done again.
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        found = before if {name: before[name] for name in names} == settings else found
    for seed in range(found["seeds"], arguments.seeds):
        one_seed(arguments, seed, start, found)
        found["seeds"] = seed + 1
        if arguments.out:
            write_results(arguments.out, found)
    print_tables(found)


def one_seed(arguments: argparse.Namespace, seed: int, start: dict[str, torch.Tensor], found: dict[str, Any]) -> None:
    """Add the figures of one pool to those found."""
    kinds, tune = ([kind for kind in given.split(",") if kind] for given in (arguments.kinds, arguments.tune))
    with tempfile.TemporaryDirectory() as folder:
        pool, out = Path(folder, "pool.jsonl"), Path(folder, "out")
        write_documents(pool, KINDS, arguments.documents, seed, "train")
        everything = [(kind, index) for kind in KINDS for index in range(arguments.documents)]
        for kind in kinds:
            like = Path(folder, f"{kind}.jsonl")
            write_documents(like, [kind], EXAMPLES, seed, "heldout")
            report, rows = chosen_by(arguments.checkpoint, pool, like, kind, "latents", out, arguments.pooling)
            for row in report["methods"]:
                for name in ("precision", "average_precision"):
                    found[name].setdefault(kind, {}).setdefault(row["method"], []).append(row[name])
            said = (f"{row['method']} {row['precision']:.3f} {row['average_precision']:.3f}" for row in report["methods"])
            print(f"seed {seed}, {kind}: {', '.join(said)}", flush=True)
            if kind not in tune:
                continue
            order = np.random.default_rng(seed).permutation(len(everything))
            _, by_words = chosen_by(arguments.checkpoint, pool, like, kind, "tfidf", out, arguments.pooling)
            arms = {"latents": rows, "tfidf": by_words, "random": [everything[place] for place in order[: len(rows)]]}
            test = contexts_of([kind_document(kind, seed, 10_000 + index, "heldout")[1:] for index in range(TESTS)])
            lines = found["loss"].setdefault(kind, {})
            lines.setdefault("before", []).append(tuned_loss(start, [], test, seed))
            for arm, own in arms.items():
                documents = [kind_document(other, seed, index, "train")[1:] for other, index in own]
                lines.setdefault(arm, []).append(tuned_loss(start, documents, test, seed))
            print(f"seed {seed}, {kind}: {', '.join(f'{arm} {x[-1]:.3f}' for arm, x in lines.items())}", flush=True)


def print_tables(found: dict[str, Any]) -> None:
    """Print the means over seeds as tables."""
    for name in ("precision", "average_precision"):
        methods = list(next(iter(found[name].values()), {}))
        print(f"\n| {name} | {' | '.join(methods)} |\n|{'---|' * (len(methods) + 1)}")
        for kind, row in found[name].items():
            print(f"| {kind} | {' | '.join(f'{statistics.fmean(row[method]):.3f}' for method in methods)} |")
    print(f"\n| loss | before | {' | '.join(ARMS)} | latents less random | latents less TF-IDF |\n|{'---|' * (len(ARMS) + 4)}")
    for kind, row in found["loss"].items():
        cells = [f"{statistics.fmean(row[arm]):.3f}" for arm in ("before", *ARMS)]
        less = [[a - b for a, b in zip(row["latents"], row[other], strict=True)] for other in ("random", "tfidf")]
        print(f"| {kind} | {' | '.join(cells)} | {' | '.join(map(interval, less))} |")


if __name__ == "__main__":
    main()
