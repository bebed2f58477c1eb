"""The report as one self-contained HTML page: no scripts, no fonts, nothing fetched; plots are inline SVG."""

import re
from html import escape
from typing import Any

from .document import document, encoder_parts
from .glossary import EXPLANATIONS, PROVENANCE
from .numbers import UNDEFINED, UNMEASURED, UNRECORDED, finite, show
from .plots import PLOTS, Curve, Report, figure_element


def render_report(report: Report, curve: Curve) -> str:
    """One page that shows ``report`` and, where there is one, the training ``curve`` (lines of ``metrics.jsonl``).

    Entries that are absent read "not measured", those that are ``None`` "undefined". Equal input gives equal bytes.
    """
    name, arguments = encoder_parts(report.get("encoder"))
    kind, trained, commit = (report.get(key) for key in ("kind", "training_tokens", "git_commit"))
    evaluated = [f"{show(report[key])} {key}" for key in ("tokens", "documents") if report.get(key) is not None]
    facts = {key: report.get(key) for key in ("model", "hook", "text")} | {
        "trained on": None if trained is None else f"{show(trained)} tokens",
        "evaluated on": ", ".join(evaluated) or None,
        "git commit": None if commit is None else str(commit)[:12],
    }
    if report.get("selection", "per token") != "per token":
        facts = {"selection": report["selection"]} | facts
    shape = f"{show(report.get('d_in'))} \u2192 {show(report.get('n_latents'))} latents"
    if report.get("d_out") not in (None, report.get("d_in")):
        shape += f" \u2192 {show(report['d_out'])}"
    title = " \u00b7 ".join(str(part) for part in (name, kind, report.get("hook")) if part) or "dictionary"
    body = BODY.format(
        heading=escape(f"{name} {kind or 'dictionary'}".strip()),
        shape=escape(f"{shape} \u00b7 {arguments}" if arguments else shape),
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(show(value, UNRECORDED))}</dd></div>" for key, value in facts.items()),
        figures="".join(_key_figure(report, *entry) for entry in KEY_FIGURES),
        plots="".join(figure_element(name, note, lambda ax, draw=draw: draw(ax, report, curve)) for name, note, draw in PLOTS),
        rows="".join(_table_group(report, *entry) for entry in _groups(report).items()),
    )
    return document(title, body)


# Label, key, and what stands below the number; braces name other entries of the report.
KEY_FIGURES = (
    ("fvu", "fvu", "variance unexplained; 0 is perfect"),
    ("l0", "l0_mean", "latents per token, median {l0_median}"),
    ("ce recovered", "ce_recovered_zero", "against zero ablation"),
    ("ce recovered", "ce_recovered_mean", "against mean ablation"),
    ("ce increase", "ce_increase", "nats per token, on {ce_clean}"),
    ("KL", "kl_spliced", "nats per token; same top token {top1_agreement}"),
    ("dead share", "dead_fraction", "of {n_latents} latents, in {dead_window_tokens} tokens"),
    ("linear error share", "linear_error_share", "of the squared error"),
)


def _key_figure(report: Report, label: str, key: str, note: str) -> str:
    if key == "fvu" and "fvu_affine" in report:
        note = "variance unexplained; an affine map leaves {fvu_affine}"
    value = show(report[key]) if key in report else UNMEASURED
    # A note that quotes other entries says nothing beside a figure that is not there.
    words = re.sub(r"{(\w+)}", lambda match: show(report.get(match[1])), note) if key in report or "{" not in note else ""
    ends = [finite(report.get(f"{key}_{end}")) for end in ("low", "high")]
    words += f" ({show(ends[0], digits=3)}\u2013{show(ends[1], digits=3)})" if None not in ends else ""
    kind = "value" if finite(report.get(key)) is not None else "value none"
    return (
        f'<div class="tile" data-key="{escape(key)}"><div class="label">{escape(label)}</div>'
        f'<div class="{kind}">{escape(value)}</div><div class="note">{escape(words)}</div></div>'
    )


def _groups(report: Report) -> dict[str, dict[str, str]]:
    """Explanations of what the report holds; entries that nobody explained come last."""
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    unknown = [key for key, value in report.items() if _is_scalar(value) and key not in known]
    return EXPLANATIONS | ({"Other entries": dict.fromkeys(unknown, "No explanation is known.")} if unknown else {})


def _table_group(report: Report, title: str, explanations: dict[str, str]) -> str:
    none = UNRECORDED if title == PROVENANCE else UNDEFINED
    rows = [
        f'<tr role="row"><th role="rowheader" scope="row"><code>{escape(key)}</code></th>'
        f'<td role="cell">{escape(show(report[key], none, digits=6))}{_reason(report, key)}</td>'
        f'<td role="cell">{escape(explanation)}</td></tr>'
        for key, explanation in explanations.items()
        if key in report and _is_scalar(report[key])
    ]
    missing = f'<tr role="row"><td role="cell" colspan="3" class="none">{UNMEASURED}</td></tr>'
    head = f'<tr role="row" class="group"><th role="columnheader" colspan="3" scope="rowgroup">{escape(title)}</th></tr>'
    return f'<tbody role="rowgroup">{head}{"".join(rows) or missing}</tbody>'


def _reason(report: Report, key: str) -> str:
    """Why an entry is ``None``, where the report says so."""
    reason = (report.get("reasons") or {}).get(key)
    return f'<div class="note">{escape(str(reason))}</div>' if reason else ""


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


BODY = """<header>
<p class="over">sparsary report</p>
<h1>{heading}</h1>
<p class="shape">{shape}</p>
<dl>{facts}</dl>
</header>
<section class="tiles" aria-label="Key figures">{figures}</section>
<section class="plots" aria-label="Plots">{plots}</section>
<section class="entries" aria-label="All entries">
<h2>All entries</h2>
<table role="table">{rows}</table>
</section>
<footer>
<p>Recovered fractions flatter: an ablation to zero wrecks the model so thoroughly that even poor dictionaries come out near 1.
The increase in nats is the more honest figure, and the mean the fairer ablation.</p>
<p>A low fvu_nonlinear alone is no merit: a dictionary that reconstructs nothing leaves only linear error. Dead shares compare
only over equal windows of tokens. Positions excluded from training are neither replaced nor scored. Ranges below figures are
95 % intervals over documents.</p>
</footer>
"""
