"""Page of a dictionary's report, without scripts."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from .document import document, encoder_label, encoder_parts, kind_label
from .examples import ExampleLatent, is_gapped
from .glossary import EXPLANATIONS, PROVENANCE
from .numbers import UNDEFINED, UNMEASURED, UNRECORDED, finite, show, show_interval
from .plots import PLOTS, Curve, Report, plot_card
from .tables import NOTES, EntryRow, FigureTile


def render_report(report: Report, curve: Curve, examples: Sequence[ExampleLatent] = ()) -> str:
    """Render a report with the training ``curve`` (lines of ``metrics.jsonl``; may be empty) and example latents.

    Absent entries read "not measured", entries of ``None`` "undefined". Equal input gives equal bytes.
    """
    name, arguments = encoder_parts(report.get("encoder"))
    kind, trained, commit = (report.get(key) for key in ("kind", "training_tokens", "git_commit"))
    evaluated = [f"{show(report[key])} {key}" for key in ("tokens", "documents") if report.get(key) is not None]
    facts = {key: report.get(key) for key in ("model", "hook", "text")} | {
        "trained on": None if trained is None else f"{show(trained)} tokens",
        "evaluated on": ", ".join(evaluated) or None,
        "git commit": None if commit is None else str(commit)[:12],
    }
    if report.get("fvu_before_training") is not None:
        facts["before training"] = _before_training(report)
    if report.get("doubts"):
        facts["doubts"] = "; ".join(report["doubts"])
    if report.get("selection", "per token") != "per token":
        facts = {"selection": report["selection"]} | facts
    shape = f"{show(report.get('d_in'))} \u2192 {show(report.get('n_latents'))} latents"
    if report.get("d_out") not in (None, report.get("d_in")):
        shape += f" \u2192 {show(report['d_out'])}"
    return document(
        "report.html",
        " \u00b7 ".join(str(part) for part in (name, kind_label(kind), report.get("hook")) if part),
        command="report",
        heading=f"{name} {kind_label(kind)}".strip(),
        shape=f"{shape} \u00b7 {arguments}" if arguments else shape,
        facts=facts,
        tiles=report_tiles(report),
        plots=[plot_card(name, note, lambda ax, draw=draw: draw(ax, report, curve)) for name, note, draw in PLOTS],
        examples=examples,
        gapped=is_gapped(token.text for example in examples for tokens in example.contexts for token in tokens),
        features_command=shlex.join(["sparsary", "features", str(report.get("checkpoint") or "CHECKPOINT")]),
        sections={title: _rows(report, title, texts) for title, texts in _sections(report).items()},
    )


def _before_training(report: Report) -> str:
    """Return the figures of the dictionary that training began with, and those after it, as text."""
    before, after = (f"fvu {show(report.get(f'fvu_{when}_training'))}" for when in ("before", "after"))
    return f"{before}, after it {after} (on {show(report.get('start_tokens'))} {report.get('start_judged_on')} tokens)"


# Label, key, and the note below the number; braces name other entries of the report.
KEY_FIGURES = (
    ("fvu", "fvu", "fraction of variance unexplained; 0 is perfect"),
    ("l0", "l0_mean", "latents per token, median {l0_median}"),
    ("ce recovered", "ce_recovered_zero", "against zero ablation"),
    ("ce recovered", "ce_recovered_mean", "against mean ablation"),
    ("ce increase", "ce_increase", "nats per token, above {ce_clean}"),
    ("KL", "kl_spliced", "nats per token; same top token {top1_agreement}"),
    ("dead fraction", "dead_fraction", "of {n_latents} latents, on {dead_window_tokens} tokens"),
    ("linear error share", "linear_error_share", "of the squared error"),
)

# Lists that are shown as numbers; others are drawn.
SHORT_LISTS = ("prefix_latents", "prefix_fvu", "prefix_l0", "mlp_active_share")
DEFINITIONS = {key: text for entries in EXPLANATIONS.values() for key, text in entries.items()} | NOTES


def report_tiles(report: Report) -> list[FigureTile]:
    """Return the key figures of a report."""
    return [_tile(report, *entry) for entry in KEY_FIGURES]


def _tile(report: Report, label: str, key: str, note: str) -> FigureTile:
    if key == "fvu" and "fvu_affine" in report:
        note = "fraction of variance unexplained; {fvu_affine} for an affine map"
    if key == "dead_fraction" and report.get("dead_training_fraction") is not None:
        note += "; in the last {dead_training_window_tokens} of training: {dead_training_fraction}"
    value = show(report[key]) if key in report else UNMEASURED
    # A note that quotes other entries is dropped if the figure itself is missing.
    words = re.sub(r"{(\w+)}", lambda match: show(report.get(match[1])), note) if key in report or "{" not in note else ""
    low, high = (finite(report.get(f"{key}_{end}")) for end in ("low", "high"))
    missing, text = finite(report.get(key)) is None, DEFINITIONS.get(key, "")
    return FigureTile(key, label, value, words, missing, text, "" if low is None or high is None else show_interval(low, high))


def _sections(report: Report) -> dict[str, dict[str, str]]:
    """Return the explanations by section; entries without an explanation come last."""
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    unknown = [key for key, value in report.items() if _is_scalar(value) and key not in known]
    return EXPLANATIONS | ({"Other entries": dict.fromkeys(unknown, "No explanation available.")} if unknown else {})


def _rows(report: Report, title: str, explanations: dict[str, str]) -> list[EntryRow]:
    none, reasons = UNRECORDED if title == PROVENANCE else UNDEFINED, report.get("reasons") or {}
    return [
        EntryRow(key, _entry(report, key, none), text, str(reasons.get(key) or ""))
        for key, text in explanations.items()
        if key in report and (_is_scalar(report[key]) or key in SHORT_LISTS)
    ]


def _entry(report: Report, key: str, none: str) -> str:
    value = report[key]
    if isinstance(value, list):
        return ", ".join(show(each, none) for each in value)
    return encoder_label(value) if key == "encoder" else show(value, none, digits=6)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
