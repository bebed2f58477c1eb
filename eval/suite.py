"""Checkpoint in, one flat ``report.json`` and one ``report.html`` out."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import SparseCode, SparseDictionary, load_dictionary
from sae.checkpoint import read_config
from sae.files import write_json, write_text
from sae.hub import local_directory
from sae.pursuit import PURSUITS
from training.activations.harvest import batches, excluded
from training.activations.model import LanguageModel, load_model
from training.recipe import HarvestSection, ModelSection, TextSection
from training.text import Cursor, contexts

from .dark_matter import DarkMatter, LinearFit
from .downstream import Downstream
from .page import render
from .reconstruction import Reconstruction

REPORT_VERSION = 1
DEFAULT_TOKENS = 200_000
# Logits over a large vocabulary dominate memory; eight contexts of 128 tokens and GPT-2's vocabulary are 0.2 GB.
BATCH_CONTEXTS = 8
ROWS_AT_ONCE = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A few contexts on the model's device: what the model saw, and which positions count."""

    token_ids: Tensor
    kept: Tensor
    # Kept positions whose next token is of the same document.
    counted: Tensor
    cursor: Cursor
    documents: set[int]


@dataclass(frozen=True)
class Selection:
    """How latents are chosen while a dictionary is judged; every report says it.

    By default the encoder reads one token at a time. ``oracle`` lets a gradient SAE choose by the gradient of the loss it
    is then judged by. ``pursuit`` finds the code anew from the atoms alone, with ``k`` latents per token.
    """

    oracle: bool = False
    pursuit: str | None = None
    k: int | None = None

    def require_valid(self, dictionary: SparseDictionary) -> None:
        if self.oracle and not dictionary.encoder.needs_gradient:
            raise ValueError("--oracle: expected a dictionary that chooses by gradients (gradient_topk). Leave it out.")
        if self.pursuit is not None and self.pursuit not in PURSUITS:
            raise ValueError(f"--pursuit: expected one of {', '.join(PURSUITS)}, got {self.pursuit!r}.")
        if (self.pursuit is None) != (self.k is None) or (self.k is not None and self.k < 1):
            raise ValueError(f"--k: expected a number of latents above 0 together with --pursuit, and only then, got {self.k}.")
        if self.oracle and self.pursuit is not None:
            raise ValueError("--oracle: expected either it or --pursuit, got both.")

    def describe(self) -> str:
        if self.oracle:
            return "oracle: latents chosen by the gradient of the loss that is measured"
        return "per token" if self.pursuit is None else f"{self.pursuit} of the atoms, {self.k} latents"

    def code(self, dictionary: SparseDictionary, x: Tensor, grad: Tensor | None) -> SparseCode:
        """The code of raw activations."""
        if self.pursuit is not None and self.k is not None:
            return dictionary.pursue(x, self.k, self.pursuit)
        return dictionary.encode(x, grad if self.oracle else None)


PER_TOKEN = Selection()


def evaluate(
    checkpoint: str,
    out: str | None = None,
    activations: Tensor | None = None,
    tokens: int | None = None,
    selection: Selection = PER_TOKEN,
) -> dict[str, Any]:
    """Judge a dictionary; the report is written to ``out`` (or beside the checkpoint) and returned.

    Half of the held-out documents fit the dark-matter regression and the mean, the other half are scored; a document is
    never in both. A ``selection`` other than the usual one needs an ``out`` of its own.

    Raises:
        ValueError: If the checkpoint, its model or its text cannot be had, or do not fit each other.
    """
    directory = local_directory(checkpoint)
    dictionary = load_dictionary(directory)
    config = read_config(directory)
    selection.require_valid(dictionary)
    if selection != PER_TOKEN and out is None:
        raise ValueError("--out: required with --oracle or --pursuit, so that the usual report is not replaced.")
    if selection.oracle and activations is not None:
        raise ValueError("--oracle: needs the model, not activations alone.")
    source: dict[str, Any] = config["provenance"]
    wanted = tokens or source.get("recipe", {}).get("eval_tokens", DEFAULT_TOKENS)
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "checkpoint": str(checkpoint),
        "kind": config["dictionary"]["kind"],
        "encoder": json.dumps(config["dictionary"]["encoder"]),
        "selection": selection.describe(),
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "n_latents": dictionary.n_latents,
        "hook": source.get("hook"),
        "model": (source.get("model") or {}).get("id"),
        "text": (source.get("text") or {}).get("source"),
        "training_tokens": source.get("training_tokens"),
        "git_commit": source.get("git_commit"),
    }
    if activations is not None:
        report |= judge_tensor(dictionary, activations, selection)
    elif not source.get("model"):
        raise ValueError(
            f"{checkpoint}: this dictionary was trained on tensors, not on a model. Give held-out ones: "
            "sparsary.evaluate(directory, activations=x)."
        )
    else:
        report |= judge_on_model(dictionary, source, wanted, selection)
    target = Path(out) if out is not None else Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    metrics = Path(directory) / "metrics.jsonl"
    curve = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    write_json(target / "report.json", report)
    write_text(target / "report.html", render(report, curve))
    return report | {"report_path": str(target / "report.html")}


@torch.no_grad()
def judge_tensor(dictionary: SparseDictionary, x: Tensor, selection: Selection = PER_TOKEN) -> dict[str, Any]:
    """Reconstruction and dark matter of given activations: the first half fits, the second is scored.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    half = x.shape[0] // 2
    if half == 0:
        raise ValueError(f"activations: expected at least 2 tokens, got {x.shape[0]}.")
    fit = LinearFit(dictionary.d_in, dictionary.d_out)
    for rows in x[:half].float().split(ROWS_AT_ONCE):
        fit.update(rows, rows - dictionary.decode(selection.code(dictionary, rows, None)))
    reconstruction, dark = Reconstruction(dictionary, torch.device("cpu")), DarkMatter(fit)
    for rows in x[half:].float().split(ROWS_AT_ONCE):
        code = selection.code(dictionary, rows, None)
        y_hat = dictionary.decode(code)
        reconstruction.update(rows, y_hat, code)
        dark.update(rows, rows, y_hat)
    return reconstruction.report() | dark.report()


@torch.no_grad()
def judge_on_model(
    dictionary: SparseDictionary, source: dict[str, Any], tokens: int, selection: Selection = PER_TOKEN
) -> dict[str, Any]:
    """Everything that needs the model the dictionary was trained on."""
    text = TextSection.model_validate(source["text"])
    exclusions = HarvestSection(hooks=(source["hook"],), tokens=1, **source["harvest"])
    model = load_model(ModelSection.model_validate(source["model"]))
    hook = source["hook"]
    width = model.widths((hook,))[hook]
    if width != dictionary.d_in:
        raise ValueError(f"{hook}: expected width {dictionary.d_in}, the dictionary's d_in, got {width} from {model.id}.")
    dictionary = dictionary.to(model.device)
    fit = LinearFit(dictionary.d_in, dictionary.d_out, model.device)
    total, cursor, documents = torch.zeros(dictionary.d_out, dtype=torch.float64, device=model.device), Cursor(0, 0), set()
    for piece in _pieces(model, text, exclusions, Cursor(0, 0), tokens // 2):
        x, grad = _rows(model, hook, piece, selection)
        fit.update(x, x - dictionary.decode(selection.code(dictionary, x, grad)))
        total += x.double().sum(0)
        cursor = piece.cursor
    if fit.tokens == 0:
        raise ValueError("text: no held-out document was found. Raise harvest.heldout, or give longer text.")
    # The document the first half ended in is not scored.
    after = Cursor(cursor.document + 1, 0)
    reconstruction, dark = Reconstruction(dictionary, model.device), DarkMatter(fit)
    downstream = Downstream(model, hook, (total / fit.tokens).float())
    for piece in _pieces(model, text, exclusions, after, tokens - tokens // 2):
        seen: dict[str, Tensor] = {}
        with model.replacing(hook, lambda x, seen=seen: seen.setdefault("x", x)):
            clean_logits = model.logits(piece.token_ids)
        x, grad = seen["x"][piece.kept].float(), _rows(model, hook, piece, selection)[1] if selection.oracle else None
        code = selection.code(dictionary, x, grad)
        x_hat = dictionary.decode(code)
        reconstruction.update(x, x_hat, code)
        dark.update(x, x, x_hat)
        full = torch.zeros_like(seen["x"], dtype=torch.float32)
        full[piece.kept] = x_hat
        downstream.update(piece.token_ids, piece.kept, piece.counted, clean_logits, full)
        documents |= piece.documents
    if reconstruction.tokens == 0:
        raise ValueError(
            f"text: the held-out documents hold only {fit.tokens} tokens, not the {tokens} asked for, and none was left to "
            "score. Lower --tokens, raise harvest.heldout, or give longer text."
        )
    return {"documents": len(documents)} | reconstruction.report() | downstream.report() | dark.report()


def _rows(model: LanguageModel, hook: str, piece: Piece, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """What the hook sees at the kept positions, and the loss's gradient there if latents are chosen by it."""
    if not selection.oracle:
        return model.activations(piece.token_ids, (hook,))[hook][piece.kept].float(), None
    values, gradients = model.activations_and_gradients(piece.token_ids, (hook,))
    return values[hook][piece.kept].float(), gradients[hook][piece.kept].float()


def _pieces(model: LanguageModel, text: TextSection, section: HarvestSection, start: Cursor, tokens: int) -> Iterator[Piece]:
    """Held-out contexts from ``start`` on until so many tokens were kept."""
    kept_tokens = 0
    special = frozenset(model.tokenizer.all_special_ids)
    for batch in batches(contexts(text, model.tokenizer, start, section.heldout), BATCH_CONTEXTS):
        token_ids = np.stack([context.token_ids for context in batch])
        document_ids = np.stack([context.document_ids for context in batch])
        kept = ~excluded(token_ids, document_ids, special, section)
        counted = kept[:, :-1] & (document_ids[:, 1:] == document_ids[:, :-1])
        yield Piece(
            torch.from_numpy(token_ids).long().to(model.device),
            torch.from_numpy(kept).to(model.device),
            torch.from_numpy(counted).to(model.device),
            batch[-1].cursor,
            set(document_ids[kept].tolist()),
        )
        kept_tokens += int(kept.sum())
        if kept_tokens >= tokens:
            return


def summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures a person looks at first, as pairs of name and value."""
    lines = [
        (
            "dictionary",
            f"{report['kind']} {report['d_in']} -> {report['n_latents']}  {report['encoder']}  {report['hook'] or ''}",
        ),
        ("selection", report["selection"]),
        ("fvu", f"{report['fvu']:.4f}   cosine {report['cosine']:.4f}   on {report['tokens']:,} held-out tokens"),
        (
            "l0",
            f"{report['l0_mean']:.2f}   median {report['l0_median']:.0f}   10 to 90 %: "
            f"{report['l0_p10']:.0f}-{report['l0_p90']:.0f}",
        ),
        ("latents", f"dead {report['dead_fraction']:.2%}   dense {report['dense_fraction']:.2%}"),
    ]
    if "ce_clean" in report:
        lines += [
            (
                "cross-entropy",
                f"clean {report['ce_clean']:.4f}   spliced {report['ce_spliced']:.4f}   zero {report['ce_zero']:.4f}   "
                f"mean {report['ce_mean']:.4f}",
            ),
            (
                "recovered",
                f"{_number(report['ce_recovered_zero'])} of zero   {_number(report['ce_recovered_mean'])} of mean ablation",
            ),
            ("KL", f"{report['kl_spliced']:.4f}   same top token {report['top1_agreement']:.2%}"),
        ]
    lines.append(
        (
            "dark matter",
            f"fvu total {_number(report['fvu_total'])}   nonlinear {_number(report['fvu_nonlinear'])}   linear share of the "
            f"error {_number(report['linear_error_share'])}   norm R2 {_number(report['err_norm_r2'])}",
        )
    )
    return lines


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
