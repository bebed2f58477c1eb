"""The report as one self-contained HTML page: no scripts, no fonts, nothing fetched; plots are inline SVG."""

import base64
import hashlib
import json
import re
from html import escape
from typing import Any

from .plots import PALETTE, PLOTS, UNDEFINED, UNMEASURED, UNRECORDED, Curve, Palette, Report, figure_element, finite, show
from .reconstruction import DENSE

PROVENANCE = "Dictionary and data"
EXPLANATIONS: dict[str, dict[str, str]] = {
    PROVENANCE: {
        "report_version": "Version of this report's format. A changed definition gets a new name.",
        "checkpoint": "Where the dictionary was loaded from.",
        "kind": "What is mapped: an sae maps an activation to itself, a transcoder what a part of the model reads to what it "
        "writes. What is to be reconstructed, for an sae the activation itself, is called the target.",
        "encoder": "How latents are chosen: the variant and its arguments.",
        "d_in": "Width of the activation that is read.",
        "d_out": "Width of the activation that is written; d_in for an sae.",
        "n_latents": "How many latents (learned units) the dictionary has.",
        "selection": "How latents were chosen while judging; 'per token' is how a dictionary is used.",
        "hook": "Module path and side of the activation the dictionary was trained on; of a transcoder, of both activations.",
        "model": "The language model whose activations these are.",
        "text": "The corpus. Only documents held out from training are evaluated.",
        "training_tokens": "Tokens trained on; a token seen twice counts twice.",
        "git_commit": "Version of the code that trained the dictionary.",
        "documents": "Held-out documents scored. The mean and the linear error were fitted on others.",
        "tokens": "Tokens scored. Excluded positions (special tokens, the first few of a context) are not among them.",
    },
    "Reconstruction": {
        "fvu": "Fraction of variance unexplained, a ratio of sums: squared error of the whole set over squares about the mean "
        "of the whole set. 0 is perfect, 1 is no better than the mean. A mean of per-token ratios is another number.",
        "fvu_affine": "The fvu of the best affine map from what a transcoder reads to the target, fitted on other documents: "
        "the floor to beat. With few tokens for the fit (see dark_matter_enough_tokens) it comes out too high.",
        "cosine": "Cosine between target and reconstruction, mean over tokens. 1 is perfect.",
        "l2_ratio": "Norm of the reconstruction over norm of the target, mean over tokens. Below 1 is shrinkage.",
        "relative_reconstruction_bias": "Sum of squared reconstruction norms over sum of reconstruction times target. 1 is "
        "unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10).",
    },
    "Sparsity": {
        "l0_mean": "Latents that fire on a token, mean over tokens.",
        "l0_p10": "A tenth of the tokens have at most so many latents firing.",
        "l0_median": "Half of the tokens have at most so many latents firing.",
        "l0_p90": "Nine tenths of the tokens have at most so many latents firing.",
        "dead_fraction": "Share of latents silent on the whole window of tokens. A longer one finds fewer: compare equal ones.",
        "dead_window_tokens": "That window, in tokens.",
        "dense_fraction": f"Share of latents that fire on more than {DENSE:g} of the tokens.",
    },
    "Effect on the model": {
        "downstream_tokens": "Predictions scored: at replaced positions whose next token is of the same document. Excluded "
        "positions keep the model's own activation.",
        "ce_clean": "Cross-entropy of the untouched model, nats per token.",
        "ce_spliced": "Cross-entropy with reconstructions in place of the targets, nats per token.",
        "ce_zero": "Cross-entropy with zeros in their place, nats per token.",
        "ce_mean": "Cross-entropy with the mean target in their place, nats per token.",
        "kl_spliced": "KL divergence from the untouched model's predictions to those on reconstructions, nats per token.",
        "kl_zero": "The same KL divergence with zeros, nats per token.",
        "kl_mean": "The same KL divergence with the mean target, nats per token.",
        "ce_increase": "ce_spliced - ce_clean: what the dictionary costs the model, nats per token.",
        "top1_agreement": "Share of predictions whose likeliest token stays the same.",
        "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), ablated to zero. 1 is perfect, 0 no better "
        "than zeros; undefined where the ablation costs nothing.",
        "ce_recovered_mean": "The same fraction, ablated to the mean target: the fairer yardstick.",
        "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
        "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
    },
    "Error, linear and nonlinear": {
        "fvu_total": "fvu on the tokens that score the regression: linear and nonlinear error together.",
        "fvu_nonlinear": "What is left of fvu_total once a linear map of what is read, fitted on other data, has predicted "
        "the error. Low alone is no merit, an empty dictionary has none: read it beside fvu_total.",
        "linear_error_share": "1 - fvu_nonlinear / fvu_total: share of the squared error that is linear in the activation.",
        "fvu_rescaled": "fvu_total after the best single factor on the reconstruction; what that takes off is shrinkage.",
        "err_vec_r2_mean_dim": "R\u00b2 of the linear prediction of the error, per dimension, then averaged.",
        "err_norm_r2": "R\u00b2 of the linear prediction of the squared error norm.",
        "dark_matter_noise_floor": "About the linear_error_share of an error unrelated to the activation: the map fits noise.",
        "dark_matter_fit_tokens": "Tokens the linear map was fitted on.",
        "dark_matter_score_tokens": "Tokens it was scored on.",
        "dark_matter_enough_tokens": "Whether the fit had ten tokens per coefficient. If not, the linear share is understated.",
    },
}


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
    """A whole page in this project's style. ``body`` is HTML; ``css`` comes after the common rules; ``script`` runs last.

    The script may not hold ``</script``. No other one runs.
    """
    allowed = f"; script-src '{_source_hash(script)}'" if script else ""
    if script:
        body += f"<script>{script}</script>\n"
    return DOCUMENT.format(title=escape(title), style=_variables(palette) + CSS + css, body=body, allowed=allowed)


def _source_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


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
        f'<td role="cell">{escape(show(report[key], none, digits=6))}</td><td role="cell">{escape(explanation)}</td></tr>'
        for key, explanation in explanations.items()
        if key in report and _is_scalar(report[key])
    ]
    missing = f'<tr role="row"><td role="cell" colspan="3" class="none">{UNMEASURED}</td></tr>'
    head = f'<tr role="row" class="group"><th role="columnheader" colspan="3" scope="rowgroup">{escape(title)}</th></tr>'
    return f'<tbody role="rowgroup">{head}{"".join(rows) or missing}</tbody>'


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

# The policy lets the page's own style and script in and nothing else, whatever text a report brings along.
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
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
only over equal windows of tokens. Positions excluded from training are neither replaced nor scored.</p>
</footer>
"""
