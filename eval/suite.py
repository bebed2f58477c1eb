"""Checkpoint in, one flat ``report.json`` and one ``report.html`` out."""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import SparseCode, SparseDictionary, load_dictionary
from sae.checkpoint import read_config
from sae.files import write_json, write_text
from sae.hub import local_directory
from sae.pursuit import PURSUITS
from training.activations.model import LanguageModel
from training.activations.splice import Insertion, model_spliced
from training.text import Cursor
from transcoders.stack import hooks_of, is_stack

from .dark_matter import AffineFloor, DarkMatter, LinearFit
from .downstream import Downstream, ablations
from .heldout import Piece, ground, logits_and_activations, require_fitted, require_scored, require_widths, wanted_tokens
from .page import render
from .reconstruction import Reconstruction
from .stack import evaluate_stack, stack_summary

REPORT_VERSION = 1
ROWS_AT_ONCE = 4096

log = logging.getLogger(__name__)


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

    def code(self, dictionary: SparseDictionary, x: Tensor, y: Tensor, grad: Tensor | None) -> SparseCode:
        """The code of raw activations ``x``; a pursuit knows the target ``y``, which is ``x`` for an SAE only."""
        if self.pursuit is not None and self.k is not None:
            return dictionary.pursue(y, self.k, self.pursuit)
        return dictionary.encode(x, grad if self.oracle else None)


PER_TOKEN = Selection()


def evaluate(
    checkpoint: str,
    out: str | None = None,
    activations: Tensor | tuple[Tensor, Tensor] | None = None,
    tokens: int | None = None,
    selection: Selection = PER_TOKEN,
) -> dict[str, Any]:
    """Judge a dictionary; the report is written to ``out`` (or beside the checkpoint) and returned.

    Half of the held-out documents fit the dark-matter regression and the mean, the other half are scored; a document is
    never in both. A ``selection`` other than the usual one needs an ``out`` of its own. A directory of checkpoints, or a
    cross-layer transcoder, is judged with all of its layers in place: see ``eval.stack``. ``activations`` are ``x``, or
    ``(x, y)`` for a dictionary that does not map ``x`` to itself.

    Raises:
        ValueError: If the checkpoint, its model or its text cannot be had, or do not fit each other.
    """
    directory = local_directory(checkpoint)
    if is_stack(directory):
        if activations is not None or selection != PER_TOKEN:
            raise ValueError(f"{checkpoint}: expected one checkpoint for --oracle, --pursuit or activations, got a stack.")
        return evaluate_stack(checkpoint, out, tokens)
    dictionary = load_dictionary(directory)
    config = read_config(directory)
    selection.require_valid(dictionary)
    if selection != PER_TOKEN and out is None:
        raise ValueError("--out: required with --oracle or --pursuit, so that the usual report is not replaced.")
    if selection.oracle and activations is not None:
        raise ValueError("--oracle: needs the model, not activations alone.")
    source: dict[str, Any] = config["provenance"]
    if activations is None and not source.get("model"):
        raise ValueError(
            f"{checkpoint}: this dictionary was trained on tensors, not on a model. Give held-out ones: "
            "sparsary.evaluate(directory, activations=x)."
        )
    if activations is None and len(dictionary.sites) > 1:
        if selection != PER_TOKEN:
            raise ValueError(
                f"{checkpoint}: expected a dictionary of one hook for --oracle or --pursuit, got a cross-layer one."
            )
        return evaluate_stack(checkpoint, out, tokens)
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "checkpoint": str(checkpoint),
        "kind": config["dictionary"]["kind"],
        "encoder": json.dumps(config["dictionary"]["encoder"]),
        "selection": selection.describe(),
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "n_latents": dictionary.n_latents,
        "hook": _hook(source),
        "model": (source.get("model") or {}).get("id"),
        "text": (source.get("text") or {}).get("source"),
        "training_tokens": source.get("training_tokens"),
        "git_commit": source.get("git_commit"),
    }
    if activations is not None:
        x, y = activations if isinstance(activations, tuple) else (activations, None)
        report |= judge_tensor(dictionary, x, selection, y)
    else:
        report |= judge_on_model(dictionary, source, wanted_tokens(source, tokens), selection)
    target = Path(out) if out is not None else Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    metrics = Path(directory) / "metrics.jsonl"
    curve = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    write_json(target / "report.json", report)
    write_text(target / "report.html", render(report, curve))
    return report | {"report_path": str(target / "report.html")}


def _hook(source: dict[str, Any]) -> str | None:
    """The hook of an SAE; of a transcoder the one it reads and the one it writes."""
    if not source.get("hooks_in") and not source.get("hook"):
        return None
    reads, writes = hooks_of(source)
    return writes[0] if reads == writes else f"{', '.join(reads)} -> {', '.join(writes)}"


@torch.no_grad()
def judge_tensor(
    dictionary: SparseDictionary, x: Tensor, selection: Selection = PER_TOKEN, y: Tensor | None = None
) -> dict[str, Any]:
    """Reconstruction and dark matter of given activations: the first half fits, the second is scored.

    Without targets ``y`` the dictionary is to reproduce ``x``.

    Raises:
        ValueError: If there are fewer than two rows, or targets are missing, superfluous or of another shape.
    """
    half = x.shape[0] // 2
    if half == 0:
        raise ValueError(f"activations: expected at least 2 tokens, got {x.shape[0]}.")
    kind = dictionary.arguments()["kind"]
    if (y is None) != (kind == "sae"):
        raise ValueError(f"activations: expected {'x alone' if kind == 'sae' else 'a pair (x, y)'} for a {kind}.")
    targets = x if y is None else y
    if targets.shape != (x.shape[0], dictionary.d_out):
        raise ValueError(f"activations: y: expected {(x.shape[0], dictionary.d_out)}, got {tuple(targets.shape)}.")
    judge = _Judge(dictionary, torch.device("cpu"), selection, affine=y is not None)
    for rows, wanted in zip(x[:half].float().split(ROWS_AT_ONCE), targets[:half].float().split(ROWS_AT_ONCE), strict=True):
        judge.fit(rows, wanted, None)
    for rows, wanted in zip(x[half:].float().split(ROWS_AT_ONCE), targets[half:].float().split(ROWS_AT_ONCE), strict=True):
        judge.score(rows, wanted, None)
    return judge.reconstruction.report() | judge.floor() | judge.dark.report()


@torch.no_grad()
def judge_on_model(
    dictionary: SparseDictionary, source: dict[str, Any], tokens: int, selection: Selection = PER_TOKEN
) -> dict[str, Any]:
    """Everything that needs the model the dictionary was trained on; for a dictionary of one site."""
    (hook_in,), (hook_out,) = hooks_of(source)
    where = ground(source, (hook_in, hook_out))
    model = where.model
    require_widths(model, (hook_in,), (dictionary.d_in,), "d_in")
    require_widths(model, (hook_out,), (dictionary.d_out,), "d_out")
    dictionary = dictionary.to(model.device)
    judge = _Judge(dictionary, model.device, selection, affine=hook_in != hook_out)
    total, cursor, documents = torch.zeros(dictionary.d_out, dtype=torch.float64, device=model.device), Cursor(0, 0), set()
    for piece in where.pieces(Cursor(0, 0), tokens // 2):
        x, y, grad = _rows(model, hook_in, hook_out, piece, selection)
        judge.fit(x, y, grad)
        total += y.double().sum(0)
        cursor = piece.cursor
    require_fitted(judge.linear.tokens)
    means = {hook_out: (total / judge.linear.tokens).float()}
    downstream, insertion = Downstream(model), Insertion(dictionary, (hook_in,), (hook_out,))
    # The document the first half ended in is not scored.
    for piece in where.pieces(Cursor(cursor.document + 1, 0), tokens - tokens // 2):
        clean_logits, seen = logits_and_activations(model, piece.token_ids, (hook_in, hook_out))
        x, y = (seen[hook][piece.kept].float() for hook in (hook_in, hook_out))
        code = judge.score(x, y, _rows(model, hook_in, hook_out, piece, selection)[2] if selection.oracle else None)
        spliced = model_spliced(model, [insertion], kept=piece.kept, codes={(0, 0): code})
        variants = ablations(model, piece.kept, means) | {"spliced": spliced}
        downstream.update(piece.token_ids, piece.counted, clean_logits, variants)
        documents |= piece.documents
    require_scored(judge.reconstruction.tokens, judge.linear.tokens, tokens)
    reports = judge.reconstruction.report(), judge.floor(), downstream.report(), judge.dark.report()
    return {"documents": len(documents)} | reports[0] | reports[1] | reports[2] | reports[3]


class _Judge:
    """What needs activations only, on a model or without: rows to fit on first, then rows to score."""

    def __init__(self, dictionary: SparseDictionary, device: torch.device, selection: Selection, affine: bool):
        self.dictionary, self.selection = dictionary, selection
        self.linear = LinearFit(dictionary.d_in, dictionary.d_out, device)
        self.affine = LinearFit(dictionary.d_in, dictionary.d_out, device) if affine else None
        self.reconstruction = Reconstruction(dictionary.d_out, dictionary.n_latents, device)

    def fit(self, x: Tensor, y: Tensor, grad: Tensor | None) -> None:
        self.linear.update(x, y - self.dictionary.decode(self.selection.code(self.dictionary, x, y, grad), x))
        if self.affine is not None:
            self.affine.update(x, y)

    @cached_property
    def dark(self) -> DarkMatter:
        return DarkMatter(self.linear)

    @cached_property
    def affine_floor(self) -> AffineFloor | None:
        return None if self.affine is None else AffineFloor(self.affine)

    def score(self, x: Tensor, y: Tensor, grad: Tensor | None) -> SparseCode:
        code = self.selection.code(self.dictionary, x, y, grad)
        y_hat = self.dictionary.decode(code, x)
        self.reconstruction.update(y, y_hat, code)
        self.dark.update(x, y, y_hat)
        if self.affine_floor is not None:
            self.affine_floor.update(x, y)
        return code

    def floor(self) -> dict[str, Any]:
        return {} if self.affine_floor is None else self.affine_floor.report()


def _rows(
    model: LanguageModel, hook_in: str, hook_out: str, piece: Piece, selection: Selection
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the model has at both hooks at the kept positions, and the loss's gradient there if latents are chosen by it."""
    hooks, gradients = tuple(dict.fromkeys((hook_in, hook_out))), None
    if selection.oracle:
        values, gradients = model.activations_and_gradients(piece.token_ids, hooks)
    else:
        values = model.activations(piece.token_ids, hooks)
    x, y = (values[hook][piece.kept].float() for hook in (hook_in, hook_out))
    return x, y, None if gradients is None else gradients[hook_out][piece.kept].float()


def summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures a person looks at first, as pairs of name and value."""
    if "layer_hooks" in report:
        return stack_summary(report)
    lines = [
        (
            "dictionary",
            f"{report['kind']} {report['d_in']} -> {report['n_latents']}  {report['encoder']}  {report['hook'] or ''}",
        ),
        ("selection", report["selection"]),
        (
            "fvu",
            f"{report['fvu']:.4f}   "
            + (f"affine map {_number(report['fvu_affine'])}   " if "fvu_affine" in report else "")
            + f"cosine {report['cosine']:.4f}   on {report['tokens']:,} held-out tokens",
        ),
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
