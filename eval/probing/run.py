"""Probing tasks of ``sparsary probe``: latents scored against known properties of the text, and the result files."""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...sae.files import file_crc32, write_json, write_text
from ...sae.suggestions import require_choice
from ...training.activations.model import LanguageModel, load_model
from ...training.recipe import HarvestSection, ModelSection, TextSection
from ...training.stages import stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import LoadedCheckpoint, of_one_model, open_checkpoint, section_of_vectors, with_model
from ..name.names_file import recorded_names
from ..pages.render import CLASSES_DIGEST, CLASSES_FILE, FACTORS_DIGEST, render_file
from ..result import Report
from . import factors
from .bottleneck import bottleneck, bottleneck_lines, bottleneck_table, with_names
from .datasets import Labelled, NameFactors, Pooled, Tokens, embedded_tokens, no_factors, pool, read_labelled
from .factor_file import read_factors, tokens_of_file, value_names
from .infomec import infomec, infomec_table
from .ioi import score as supervised
from .labelled_vectors import VECTORS, concept_names, labelled_vectors
from .saebench.absorption import ABSORPTION_TOKENS, absorption
from .saebench.datasets import embedded_data
from .saebench.output import SaebenchResult, result_file
from .saebench.scr_tpp import scr, tpp
from .saebench.sparse_probing import sparse_probing
from .subject import ProbeTarget, factors_known, probe_source, probe_target, sparse_codes

if TYPE_CHECKING:
    import pandas

PROBING_VERSION = 1
TASKS = ("factors", "infomec", "supervised", "sparse_probing", "bottleneck", "scr", "tpp", "absorption")
# Tasks that need the factors of every token, and those that read ``labels``; the other generates prompts.
OF_TOKENS = ("factors", "infomec")
LABELLED = ("sparse_probing", "bottleneck", "scr", "tpp", "absorption")
# Those that run on labelled vectors from files, too.
OF_VECTORS = ("bottleneck",)
NO_LABELS = "--labels: expected a JSONL file of labelled text: only the embedded corpus comes with labels of its own."


@dataclass
class ProbingResults:
    """Results of ``probe``: the flat report, the path of ``probing.json``, and tables and lines for the terminal.

    Example::

        results = sparsary.probe("runs/topk", tasks=["factors"])
        results.report["factors_latent_f1"], results.report["factors_probe_f1"]
    """

    report: Report
    path: Path
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the report as a table of one row. Needs pandas."""
        return self.report.to_pandas()

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def probe(
    checkpoint: str | Path,
    tasks: Iterable[str] | None = None,
    labels: str | Path | None = None,
    out: str | Path | None = None,
    tokens: int | None = None,
    seed: int = 0,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
    factor_file: str | Path | None = None,
) -> ProbingResults:
    """Run probing tasks on a checkpoint; write ``probing.json``, ``probing.html`` and one result file per task.

    Args:
        tasks: Names from ``TASKS``. Default: every task that can run; the report gives the reason for each one left out.
        labels: JSONL file of labelled text for the last five tasks, instead of the embedded corpus.
        out: Output folder. Default: ``CHECKPOINT/probing``.
        tokens: Number of tokens for ``factors``, ``infomec`` and ``absorption``, instead of their defaults.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.
        factor_file: JSONL file with the factors of tokens for the first two tasks, instead of the embedded corpus: lines
            ``{"text": ..., "spans": [{"start": 0, "end": 4, "factors": {...}}]}``, or
            ``{"tokens": [...], "factors": [{...}, ...]}``.

    Raises:
        ValueError: If a task is unknown, or a requested task cannot run on this checkpoint or text.

    Example::

        results = sparsary.probe("runs/topk", tasks=["sparse_probing"], labels="reviews.jsonl")
        results.report["sparse_probing_sae_top_1_test_accuracy"]
    """
    wanted = require_tasks(tasks)
    data = None if labels is None else read_labelled(labels)
    opened = of_one_model(open_checkpoint(checkpoint, with_model(options, model, tokenizer)), "sparsary probe")
    section = section_of_vectors(opened)
    if section is not None:
        return _probe_vectors(opened, section, tasks, data, out, tokens, seed)
    dictionary, source = probe_source(opened)
    if tasks and not factors_known(source):
        # Before the model, which takes longer.
        _require_labels(wanted, data, source, factor_file)
    subject = probe_target(dictionary, load_model(ModelSection.model_validate(source["model"])), source)
    target = Path(out) if out is not None else opened.results / "probing"
    report = Report(
        {
            "probing_version": PROBING_VERSION,
            "checkpoint": str(checkpoint),
            "encoder": json.dumps(dictionary.arguments()["encoder"]),
            "n_latents": dictionary.n_latents,
            "hook": subject.hook,
            "model": subject.model.id,
            "labels": None if labels is None else str(labels),
            "factor_file": None if factor_file is None else str(factor_file),
            "seed": seed,
        }
    )
    found = ProbingResults(report, target / "probing.json")
    pooled: list[Pooled] = []

    def texts() -> list[Pooled]:
        if not pooled:
            if data is None and not subject.embedded:
                raise ValueError(NO_LABELS)
            some = [data] if data is not None else embedded_data(seed)
            pooled.extend(pool(subject, one) for one in some)
        return pooled

    labelled = None if factor_file is None else read_factors(factor_file, subject.model.tokenizer)

    @functools.cache
    def known() -> tuple[Tokens, NameFactors]:
        wished = tokens or factors.DEFAULT_TOKENS
        if labelled is None:
            return embedded_tokens(subject, wished), factors.names_of
        return tokens_of_file(subject, labelled, wished), value_names

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "factors": lambda: _factors(subject, *known(), seed, found, target),
        "infomec": lambda: _infomec(subject, *known(), seed, found),
        "supervised": lambda: _supervised(subject, seed, found, target),
        "sparse_probing": lambda: _benchmark("sparse_probing", sparse_probing(subject, texts(), seed), subject, found),
        "bottleneck": lambda: _bottleneck(texts(), opened, seed, found, target),
        "scr": lambda: _benchmark("scr", scr(subject, texts(), seed), subject, found),
        "tpp": lambda: _benchmark("tpp", tpp(subject, texts(), seed), subject, found),
        "absorption": lambda: _benchmark("absorption", _absorption(subject, data, texts, tokens, seed), subject, found),
    }
    target.mkdir(parents=True, exist_ok=True)
    with stage("probing", len(wanted), "tasks") as shown:
        for done, task in enumerate(wanted):
            shown.update(done, task)
            try:
                report |= runs[task]()
            except ValueError as error:
                if tasks:
                    raise
                report |= {f"{task}_done": False, f"{task}_why": str(error)}
                found.lines.append((task, f"skipped: {error}"))
            else:
                report[f"{task}_done"] = True
        shown.update(len(wanted), "")
    write_json(found.path, report, sealed=True)
    render_file(found.path)
    return found


def _probe_vectors(
    opened: LoadedCheckpoint,
    section: HarvestSection,
    tasks: Iterable[str] | None,
    data: Labelled | None,
    out: str | Path | None,
    rows: int | None,
    seed: int,
) -> ProbingResults:
    """Run the tasks of labelled vectors; as ``probe``."""
    wanted = require_tasks(tasks or OF_VECTORS)
    if other := [task for task in wanted if task not in OF_VECTORS]:
        raise ValueError(
            f"--task {other[0]}: expected {', '.join(OF_VECTORS)}, because this dictionary is of vectors from files."
        )
    if data is not None:
        raise ValueError("--labels: expected none for a dictionary of vectors: their labels are in the table harvest.rows.")
    dictionary = opened.members[0].dictionary
    vectors = labelled_vectors(section, dictionary, rows or VECTORS, seed)
    target = Path(out) if out is not None else opened.results / "probing"
    report = Report(
        {
            "probing_version": PROBING_VERSION,
            "checkpoint": opened.name,
            "encoder": json.dumps(dictionary.arguments()["encoder"]),
            "n_latents": dictionary.n_latents,
            "hook": None,
            "model": None,
            "labels": section.rows,
            "factor_file": None,
            "seed": seed,
            "rows": len(vectors.labels),
        }
    )
    found = ProbingResults(report, target / "probing.json")
    target.mkdir(parents=True, exist_ok=True)
    report |= _bottleneck([vectors], opened, seed, found, target) | {"bottleneck_done": True}
    write_json(found.path, report, sealed=True)
    render_file(found.path)
    return found


def require_tasks(tasks: Iterable[str] | None) -> tuple[str, ...]:
    """Return the tasks in their fixed order; all of them if ``tasks`` is empty.

    Raises:
        ValueError: If a task does not exist.
    """
    wanted = list(tasks or TASKS)
    for task in wanted:
        require_choice("--task", task, TASKS)
    return tuple(task for task in TASKS if task in wanted)


def _require_labels(
    tasks: Iterable[str], data: Labelled | None, source: dict[str, Any], factor_file: str | Path | None
) -> None:
    """Raise ``ValueError`` if one of the tasks needs labels of texts or tokens that nobody knows."""
    for task in tasks:
        if task in OF_TOKENS and factor_file is None:
            raise no_factors(source["model"]["id"], TextSection.model_validate(source["text"]).source)
        if task in LABELLED and data is None:
            raise ValueError(NO_LABELS)


def _factors(
    subject: ProbeTarget, known: Tokens, named: NameFactors, seed: int, found: ProbingResults, target: Path
) -> dict[str, Any]:
    report, rows = factors.factor_scores(subject, seed=seed, known=known, named=named)
    _write_lines(target / "factors.jsonl", rows)
    found.tables.append(factors.factors_table(report, rows))
    return report | {FACTORS_DIGEST: file_crc32(target / "factors.jsonl")}


def _infomec(subject: ProbeTarget, known: Tokens, named: NameFactors, seed: int, found: ProbingResults) -> dict[str, Any]:
    report, rows = infomec(known, sparse_codes(subject, known.x), named, seed)
    found.tables.append(infomec_table(rows))
    return report


def _supervised(subject: ProbeTarget, seed: int, found: ProbingResults, target: Path) -> dict[str, Any]:
    report, rows = supervised.score_supervised(subject, seed)
    _write_lines(target / "supervised.jsonl", rows)
    found.tables.append(supervised.supervised_table(report))
    return report


def _bottleneck(data: list[Pooled], opened: LoadedCheckpoint, seed: int, found: ProbingResults, target: Path) -> dict[str, Any]:
    report, classes = bottleneck(data, seed, recorded_names(opened.directory))
    latents = {concept["latent"] for row in classes for concept in row["concepts"]}
    rows = with_names(classes, concept_names(opened, latents))
    _write_lines(target / CLASSES_FILE, rows)
    found.tables.append(bottleneck_table(rows))
    found.lines += bottleneck_lines(report)
    return report | {CLASSES_DIGEST: file_crc32(target / CLASSES_FILE)}


def _absorption(
    subject: ProbeTarget, data: Any, texts: Callable[[], list[Pooled]], tokens: int | None, seed: int
) -> SaebenchResult:
    some = None if data is None and subject.embedded else texts()
    return absorption(subject, some, seed, tokens or ABSORPTION_TOKENS)


def _benchmark(name: str, task: SaebenchResult, subject: ProbeTarget, found: ProbingResults) -> dict[str, Any]:
    result = result_file(subject, found.report["checkpoint"], name, task)
    write_json(found.path.parent / f"{name}.json", result)
    found.tables.append(task.table)
    found.lines += task.notes
    return task.summary


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
