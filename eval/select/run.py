"""Training data selected by latents: ``chosen.jsonl``, ``select.json`` and ``select.html``.

A document is represented by its pooled code; the prototype is the mean of the examples' pooled codes; documents are ranked by
generalised Jaccard similarity to it, after MoNA (monosemantic neuron activations for task data). The paper's layer, truncation
and pooling could not be read: those here, and the prototype, are ours.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from ...sae.files import replacing, write_json
from ...sae.suggestions import require_choice
from ...training.activations.model import LanguageModel, load_model
from ...training.activations.model_source import section_content
from ...training.bad_rows import BadTexts
from ...training.content import file_digest
from ...training.recipe import ModelSection, TextSection
from ...training.text import documents
from ...training.text_files import listed_files
from ...training.text_rows import rows_at
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import LoadedCheckpoint, of_one_model, open_checkpoint, with_model
from ..pages.examples import features_files, latent_label, records_of
from ..pages.render import render_file
from ..probing.subject import ProbeTarget, probe_source, probe_target
from ..result import Report
from .cover import coverage, greedy_cover
from .held_back import Reference, held_back, score_pool
from .pooled import POOLINGS, TOP_ENTRIES, PooledDocuments, PoolReader, SparseRows, Vocabulary, joined_documents
from .similarity import METHODS, PoolStatistics, contributions, contributions_to_minimum, mean_row
from .store import PooledPool, store_pool, stored_pool

SELECT_VERSION = 1
SELECT_FILE, CHOSEN_FILE, POOL_FOLDER = "select.json", "chosen.jsonl", "pool"
KEEP = 0.05
# Candidates of a diverse choice, for each document that is kept: similarity comes first.
CANDIDATES = 2
# Latents named for each document, and in all.
CAUSES, LATENTS = 5, 25
# Documents on the page: the best, and those around the limit of the choice.
BEST, AROUND, EXCERPT = 20, 5, 240
BINS = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectSettings:
    """Settings of a selection, as the command has them."""

    keep: float = KEEP
    by: str = "latents"
    pooling: str = "max"
    top: int = TOP_ENTRIES
    diverse: bool = False
    column: str = "text"
    truth: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("--by", self.by, METHODS)
        require_choice("--pooling", self.pooling, POOLINGS)
        if not self.keep > 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise ValueError(f"--keep: expected a share below 1 or a number of documents, got {self.keep:g}.")
        if self.top < 1:
            raise ValueError(f"--top: expected at least 1, got {self.top}.")
        if self.truth is not None and "=" not in self.truth:
            raise ValueError(f"--truth: expected KEY=VALUE, as task=summaries, got {self.truth!r}.")
        if self.diverse and self.by != "latents":
            raise ValueError(f"--diverse: expected --by latents, which it covers, got --by {self.by}.")

    def kept(self, documents: int) -> int:
        """Return the number of documents to choose."""
        wanted = int(self.keep) if self.keep >= 1 else max(1, round(self.keep * documents))
        if wanted > documents:
            raise ValueError(f"--keep: expected at most {documents:,}, the documents of the pool, got {wanted:,}.")
        return wanted


def select(
    checkpoint: str | Path,
    pool: str | Path,
    like: str | Path,
    settings: SelectSettings | None = None,
    out: str | Path | None = None,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
    **keys: Any,
) -> Report:
    """Choose the documents of a pool that are most like some examples by their latents; write three files.

    Args:
        pool: Documents to choose from: a .jsonl, .json, .txt or .parquet file, a pattern, or a folder.
        like: Examples of the task, in a file of the same kinds.
        settings: Share to keep and method; or give its attributes by name: ``keep=0.05``, ``pooling="mean"``.
        out: Folder of the files. Default: ``CHECKPOINT/select``. The pooled codes in it are used again for the same pool.
        options: Model and hook, where the checkpoint does not record them.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.

    Raises:
        ValueError: If the checkpoint or a file cannot be read, or there are fewer documents than asked for.

    Example::

        found = sparsary.select("runs/topk", "pool.jsonl", "examples.jsonl", keep=0.05)
        found["path"], found["methods"][0]["recovered"]
    """
    asked = settings or SelectSettings(**keys)
    opened = of_one_model(open_checkpoint(checkpoint, with_model(options, model, tokenizer)), "sparsary select")
    dictionary, source = probe_source(opened)
    texts = {name: _text_of(source, place, asked.column, name) for name, place in (("--pool", pool), ("--like", like))}
    # Before the model, which takes longer to load.
    bad = BadTexts(texts["--pool"])
    counts = {name: _count(name, text, bad if name == "--pool" else BadTexts(text)) for name, text in texts.items()}
    wanted_documents = asked.kept(counts["--pool"])
    log.info("select: %s of %s documents, like %s", f"{wanted_documents:,}", f"{counts['--pool']:,}", f"{counts['--like']:,}")
    harvest = source["harvest"]
    if "harvest.exclude_leading" not in options.settings:
        # Documents may be shorter than what training leaves out. The first position is BOS, or holds norms like BOS's.
        harvest = harvest | {"exclude_leading": min(harvest.get("exclude_leading", 1), 1)}
    section = ModelSection.model_validate(source["model"])
    subject = probe_target(dictionary, load_model(section), source | {"harvest": harvest})
    target = Path(out) if out is not None else opened.results / "select"
    target.mkdir(parents=True, exist_ok=True)
    key = {
        "dictionary": opened.members[0].weights if opened.members[0].files else None,
        "model": section_content(section),
        "hook": subject.hook,
        "text": texts["--pool"].model_dump(mode="json"),
        "harvest": subject.section.model_dump(mode="json"),
        "files": {str(path): file_digest(path) for path in listed_files(texts["--pool"])},
        "pooling": asked.pooling,
        "top": asked.top,
    }
    # As JSON has it.
    key = json.loads(json.dumps(key, default=str))
    stored = None if key["dictionary"] is None else stored_pool(target / POOL_FOLDER, key)
    if stored is None:
        reader = PoolReader(subject, texts["--pool"], asked.pooling, Vocabulary(), True, asked.top, bad)
        stored = store_pool(target / POOL_FOLDER, key, reader, counts["--pool"])
    else:
        log.info("select: the pooled codes in %s are of this pool: not read again", stored.folder)
    own = PoolReader(subject, texts["--like"], asked.pooling, stored.vocabulary, False, asked.top)
    windows = list(own.windows())
    if not windows:
        raise ValueError(f"--like: expected examples with tokens in {like}, got none.")
    examples = joined_documents(windows)
    return _Selection(asked, opened, subject, stored, examples, target, (str(pool), str(like))).written()


def _text_of(source: Mapping[str, Any], place: str | Path, column: str, option: str) -> TextSection:
    """Return the section of a file of documents, each of which has contexts of its own."""
    kept = {key: value for key, value in source["text"].items() if not key.startswith(("dataset", "mix"))}
    found = kept | {"source": "files", "files": [str(place)], "column": column, "packing": "separate"}
    text = TextSection.model_validate(found)
    try:
        listed_files(text)
    except ValueError as error:
        message = str(error).replace("text.files", option, 1).replace(", or set text.source: embedded", "")
        raise ValueError(message) from None
    return text


def _count(option: str, text: TextSection, bad: BadTexts) -> int:
    try:
        found = sum(1 for _ in documents(text, 0, lambda _: True, bad))
    except ValueError as error:
        raise ValueError(str(error).replace("text.column", "--column", 1)) from None
    if not found:
        raise ValueError(f"{option}: expected documents in {', '.join(text.files)}, got none.")
    return found


class _Selection:
    """Scores of a pool, the choice, and what the files say about them."""

    def __init__(
        self,
        asked: SelectSettings,
        opened: LoadedCheckpoint,
        subject: ProbeTarget,
        pool: PooledPool,
        examples: PooledDocuments,
        target: Path,
        names: tuple[str, str],
    ):
        self.asked, self.opened, self.subject, self.pool, self.target, self.names = asked, opened, subject, pool, target, names
        self.examples = examples
        self.statistics = PoolStatistics.of(pool)
        self.reference = Reference(examples, self.statistics, asked.seed)
        scored = score_pool(pool, self.reference)
        # A document that is an example itself would be chosen for being known.
        own = np.isin(scored.digests, examples.digests)
        self.identical = int(own.sum())
        self.index = np.flatnonzero(~own)
        self.scored = scored.rows(self.index)
        self.count = asked.kept(len(self.index))
        self.prototype = mean_row(examples.units["latents"])
        self.ranked = {name: np.argsort(-scores, kind="stable") for name, scores in self.scored.scores.items()}
        self.chosen = self.ranked[asked.by][: self.count]
        self.cover: dict[str, float] | None = None
        if asked.diverse:
            self._diversify()

    def _diversify(self) -> None:
        candidates = self.ranked["latents"][: CANDIDATES * self.count]
        rows = contributions_to_minimum(self._rows(candidates).units["latents"], self.prototype)
        order = greedy_cover(rows, self.count)
        self.cover = {
            "candidates": len(candidates),
            "coverage": coverage(rows, self.prototype, order),
            "coverage_of_best": coverage(rows, self.prototype, np.arange(min(self.count, len(candidates)))),
        }
        self.chosen = candidates[order]

    def _rows(self, some: np.ndarray) -> PooledDocuments:
        """Return pooled documents by their index among those that can be chosen, in this order."""
        wanted = self.index[some]
        parts, first = [], 0
        for part in self.pool:
            here = np.flatnonzero((wanted >= first) & (wanted < first + len(part)))
            if len(here):
                parts.append((here, part.rows(wanted[here] - first)))
            first += len(part)
        order = np.argsort(np.concatenate([here for here, _ in parts]), kind="stable")
        return joined_documents([rows for _, rows in parts]).rows(order)

    def written(self) -> Report:
        asked, dictionary = self.asked, self.subject.dictionary
        pool_means, pool_density = self._of_pool()
        rows = self._rows(self.chosen)
        parts = contributions(rows.units["latents"], self.prototype)
        latents = self._latents(parts, rows.units["latents"], pool_means, pool_density)
        labels = self._labels({entry["latent"] for entry in latents} | self._caused(parts, pool_means))
        for entry in latents:
            entry["label"] = labels.get(entry["latent"], "")
        truth = self._truth()
        causes = [self._causes(parts, place, pool_means, labels) for place in range(len(self.chosen))]
        self._write_chosen(causes)
        scores = self.scored.scores[asked.by]
        top = float(max(scores.max(), max(self.reference.own[asked.by])))
        low = float(min(scores.min(), 0.0))
        counts, edges = np.histogram(scores, BINS, (low, max(top, low + 1e-9)))
        entries: dict[str, Any] = {
            "select_version": SELECT_VERSION,
            "checkpoint": str(self.opened.name),
            "encoder": json.dumps(dictionary.arguments()["encoder"]),
            "n_latents": dictionary.n_latents,
            "model": self.subject.model.id,
            "hook": self.subject.hook,
            "pool": self.names[0],
            "like": self.names[1],
            "keep": asked.keep,
            "by": asked.by,
            "pooling": asked.pooling,
            "top": asked.top,
            "diverse": self.cover,
            "truth": asked.truth,
            "column": asked.column,
            "seed": asked.seed,
            "documents": len(self.pool),
            "tokens": self.pool.manifest["tokens"],
            "skipped": self.pool.manifest["skipped"],
            "examples": len(self.examples),
            "identical": self.identical,
            "chosen": len(self.chosen),
            "limit": float(scores[self.chosen].min()),
            "relevant_share": None if truth is None else float(truth.mean()),
            "methods": self._methods(truth),
            "latents": latents,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist(), "examples": sorted(self.reference.own[asked.by])},
            "shown": self._shown(causes, truth),
        }
        path = self.target / SELECT_FILE
        write_json(path, entries, sealed=True)
        page = render_file(path)
        return Report(entries | {"path": str(path), "page_path": str(page)}, self.target / CHOSEN_FILE)

    def _of_pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each entry's mean part of the similarity over the pool, and the share of documents that have it."""
        width = len(self.prototype)
        sums, counts, documents_read = np.zeros(width), np.zeros(width), 0
        for part in self.pool:
            own = contributions(part.units["latents"], self.prototype)
            sums += np.bincount(own.indices, own.data, width)
            counts += np.bincount(own.indices, minlength=width)
            documents_read += len(part)
        return sums / documents_read, counts / documents_read

    def _latents(
        self, parts: SparseRows, rows: SparseRows, pool_means: np.ndarray, pool_density: np.ndarray
    ) -> list[dict[str, Any]]:
        """Return the latents by which the chosen documents are more like the examples than the pool is, the largest first."""
        chosen_means = mean_row(parts)
        density = np.bincount(rows.indices, minlength=len(chosen_means)) / rows.shape[0]
        excess = chosen_means - pool_means
        order = np.argsort(-excess, kind="stable")[:LATENTS]
        n_latents = self.subject.dictionary.n_latents
        return [
            {
                "latent": int(entry % n_latents),
                "negative": bool(entry >= n_latents),
                "prototype": float(self.prototype[entry]),
                "chosen": float(chosen_means[entry]),
                "pool": float(pool_means[entry]),
                "density_chosen": float(density[entry]),
                "density_pool": float(pool_density[entry]),
            }
            for entry in order.tolist()
            if excess[entry] > 0
        ]

    def _strongest(self, parts: SparseRows, place: int, pool_means: np.ndarray) -> list[tuple[int, float]]:
        """Return the entries that lift a document's similarity most above the pool's mean, with that lift."""
        inside = slice(parts.indptr[place], parts.indptr[place + 1])
        entries = parts.indices[inside]
        lift = parts.data[inside] - pool_means[entries]
        best = np.argsort(-lift, kind="stable")[:CAUSES]
        return [(int(entries[each]), float(lift[each])) for each in best if lift[each] > 0]

    def _caused(self, parts: SparseRows, pool_means: np.ndarray) -> set[int]:
        n_latents = self.subject.dictionary.n_latents
        return {entry % n_latents for place in range(parts.shape[0]) for entry, _ in self._strongest(parts, place, pool_means)}

    def _causes(self, parts: SparseRows, place: int, pool_means: np.ndarray, labels: Mapping[int, str]) -> list[dict[str, Any]]:
        n_latents = self.subject.dictionary.n_latents
        return [
            {"latent": entry % n_latents, "lift": round(lift, 6), "label": labels.get(entry % n_latents, "")}
            for entry, lift in self._strongest(parts, place, pool_means)
        ]

    def _labels(self, latents: set[int]) -> dict[int, str]:
        """Return labels of latents from the checkpoint's features, if they are there."""
        files = features_files([self.opened.directory], self.subject.dictionary.n_latents)
        if files is None:
            return {}
        return {latent: latent_label(record) for latent, record in records_of(files.records, latents).items()}

    def _write_chosen(self, causes: list[list[dict[str, Any]]]) -> None:
        rows = dict(self._pool_rows(self.chosen))
        scores = self.scored.scores[self.asked.by]
        with replacing(self.target / CHOSEN_FILE) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for rank, (place, because) in enumerate(zip(self.chosen.tolist(), causes, strict=True), 1):
                about = {"rank": rank, "score": round(float(scores[place]), 6), "causes": because}
                handle.write(json.dumps(rows[place] | {"selection": about}, ensure_ascii=False, default=str) + "\n")

    def _pool_rows(self, some: np.ndarray) -> Iterable[tuple[int, dict[str, Any]]]:
        """Yield the pool's rows of some documents, file by file."""
        text = _text_of({"text": self.pool.manifest["key"]["text"]}, self.names[0], self.asked.column, "--pool")
        places = self.scored.places[some]
        for number, path in enumerate(self.pool.files):
            here = some[places[:, 0] == number]
            by_row = {int(self.scored.places[place, 1]): int(place) for place in here}
            for row, values in rows_at(path, by_row.keys(), text) if by_row else ():
                yield by_row[row], values

    def _truth(self) -> np.ndarray | None:
        """Return which documents have the value that ``truth`` names.

        Raises:
            ValueError: If none has it.
        """
        if self.asked.truth is None:
            return None
        key, _, value = self.asked.truth.partition("=")
        found, keys = np.zeros(len(self.index), bool), set[str]()
        for place, row in self._pool_rows(np.arange(len(self.index))):
            found[place] = key in row and str(row[key]) == value
            keys |= row.keys()
        if not found.any():
            raise ValueError(
                f"--truth: expected documents of the pool with {key} = {value}, got none. Keys: {', '.join(sorted(keys))}."
            )
        return found

    def _methods(self, truth: np.ndarray | None) -> list[dict[str, Any]]:
        """Return a row for each way of ranking: what it finds of the examples, and how far it agrees with the latents."""
        rows = []
        chosen = set(self.ranked["latents"][: self.count].tolist())
        for name, order in self.ranked.items():
            own = order[: self.count]
            found = held_back(self.reference, name, self.scored.fold_scores[name], self.count / len(self.index))
            row = {"method": name, **found, "shared": len(chosen & set(own.tolist())) / self.count}
            if truth is not None:
                scores = self.scored.scores[name]
                row |= {
                    "precision": float(truth[own].mean()),
                    "average_precision": float(average_precision_score(truth, scores)),
                }
            rows.append(row)
        if self.cover is not None:
            own = set(self.chosen.tolist())
            row = {"method": "latents, diverse", "shared": len(chosen & own) / self.count}
            rows.insert(1, row | ({} if truth is None else {"precision": float(truth[self.chosen].mean())}))
        return rows

    def _shown(self, causes: list[list[dict[str, Any]]], truth: np.ndarray | None) -> list[dict[str, Any]]:
        """Return documents for the page: the best, the last chosen, and the first that were not."""
        scores = self.scored.scores[self.asked.by]
        last = [rank for rank in range(len(self.chosen) - AROUND, len(self.chosen)) if rank >= BEST]
        ranks = [*range(min(BEST, len(self.chosen))), *last]
        chosen = set(self.chosen.tolist())
        after = [place for place in self.ranked[self.asked.by].tolist() if place not in chosen][:AROUND]
        some = np.array([*(self.chosen[rank] for rank in ranks), *after], np.int64)
        rows = dict(self._pool_rows(some))
        entries = [{"rank": rank + 1, "place": int(self.chosen[rank]), "causes": causes[rank]} for rank in ranks] + [
            {"rank": None, "place": place, "causes": []} for place in after
        ]
        for entry in entries:
            place = entry.pop("place")
            words = " ".join(str(rows[place].get(self.asked.column, "")).split())
            entry |= {"score": float(scores[place]), "text": words if len(words) <= EXCERPT else f"{words[:EXCERPT]}\u2026"}
            if truth is not None:
                entry["relevant"] = bool(truth[place])
        return entries


def select_summary(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    lines = [
        ("pool", f"{found['documents']:,} documents, {found['tokens']:,} tokens of {found['pool']}"),
        ("examples", f"{found['examples']:,} of {found['like']}"),
        ("chosen", f"{found['chosen']:,}, similarity {found['limit']:.3g} or more by {found['by']}, {found['pooling']} pooled"),
    ]
    if found["identical"]:
        lines.append(("left out", f"{found['identical']:,} documents of the pool that are examples"))
    if found["diverse"]:
        cover = found["diverse"]
        lines.append(
            ("cover", f"{cover['coverage']:.1%} of the prototype, {cover['coverage_of_best']:.1%} by the most similar alone")
        )
    lines += [("skipped", line) for line in found["skipped"]]
    return lines


def select_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of methods for the console: head and rows."""
    has_truth = found["truth"] is not None
    head = ["ranked by", "examples found", "AUROC", "shared with latents", *(["precision", "AP"] if has_truth else [])]
    rows = []
    for row in found["methods"]:
        recovered = "-" if row.get("recovered") is None else f"{row['recovered']:.3f}"
        if row.get("recovered_low") is not None:
            recovered += f" ({row['recovered_low']:.3f} to {row['recovered_high']:.3f})"
        auroc = "-" if row.get("auroc") is None else f"{row['auroc']:.3f}"
        rows.append([row["method"], recovered, auroc, f"{row['shared']:.3f}"])
        if has_truth:
            rows[-1] += [f"{row[key]:.3f}" if key in row else "-" for key in ("precision", "average_precision")]
    return head, rows
