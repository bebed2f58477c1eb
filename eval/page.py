"""The report as one self-contained HTML page: no scripts, no fonts, nothing fetched; plots are inline SVG."""

import base64
import hashlib
import json
import re
from html import escape
from typing import Any

from .metrics.glossary import EXPLANATIONS, PROVENANCE
from .plots import PALETTE, PLOTS, UNDEFINED, UNMEASURED, UNRECORDED, Curve, Palette, Report, figure_element, finite, show


def render(report: Report, curve: Curve) -> str:
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


def document(title: str, body: str, css: str = "", palette: Palette = PALETTE, script: str = "") -> str:
    """A whole page in this project's style. ``body`` is HTML; ``css`` comes after the common rules.

    The page runs ``script``, if any, and no other: the policy names its hash.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return DOCUMENT.format(
        title=escape(title),
        style=_variables(palette) + CSS + css,
        body=body,
        policy=f"; script-src 'sha256-{digest}'" if script else "",
        script=f"<script>{script}</script>\n" if script else "",
    )


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


def encoder_parts(text: Any) -> tuple[str, str]:
    """Name and arguments, from the JSON text that a report holds; any other text is taken as the name."""
    try:
        entries = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(f"{key} = {value}" for key, value in entries.items())


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


def _variables(palette: Palette) -> str:
    """The palette as CSS, once for each colour scheme."""
    light, dark = ("".join(f"--{name}:{colors[i]};" for name, colors in palette.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 16px 40px}
h1{font-size:27px;line-height:1.2;margin:0;overflow-wrap:anywhere} h2{font-size:15px;margin:0 0 6px}
.over{color:var(--muted);font-size:13px;letter-spacing:.04em;margin:0 0 4px}
.shape{font-size:17px;color:var(--muted);margin:4px 0 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px 20px;margin:18px 0 22px}
dt,.label{color:var(--muted);font-size:12.5px} dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(8,1fr);gap:10px;margin-bottom:16px}
@media (max-width:1080px){.tiles{grid-template-columns:repeat(4,1fr)}}
.tile,figure,.entries{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 12px} .value{font-size:24px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.note,figcaption,footer{color:var(--muted);font-size:12.5px;line-height:1.35}
.none{color:var(--muted);font-weight:400} .value.none{font-size:16px;line-height:31px} figure .none{margin:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px}
figure{margin:0;padding:14px;display:flex;flex-direction:column} figcaption{margin-top:8px}
svg{display:block;width:100%;height:auto;max-width:520px;margin:auto} svg *{stroke-linejoin:round;stroke-linecap:butt}
.entries{margin-top:16px;padding:14px} table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-top:1px solid var(--rule);font-weight:400}
th+td{width:190px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums} td:last-child{color:var(--muted);padding-right:0}
.group th{border-top:0;padding-top:18px;font-weight:600;font-size:14px} tbody:first-of-type .group th{padding-top:4px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:18px;max-width:90ch} footer p{margin:0 0 6px}
@media (max-width:700px){main{padding:18px 12px} .tiles{grid-template-columns:1fr 1fr} dl{grid-template-columns:1fr 1fr}
tr{display:grid;grid-template-columns:1fr auto;border-top:1px solid var(--rule);padding:5px 0} th,td{border:0;padding:0}
th+td{width:auto;text-align:right;padding-left:12px} td:last-child,.group th{grid-column:1/-1} .group{border:0}}
"""

# The policy lets the page's own style in and nothing else, whatever text a report brings along.
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
{script}</body>
</html>
"""

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
