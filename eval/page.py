"""The report as one self-contained HTML page: no scripts, no fonts, nothing fetched; plots are inline SVG."""

import io
import json
import math
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .reconstruction import DENSE

# Name of the CSS variable: colour in light and in dark mode. Plots are drawn in the light ones, then each is replaced
# by its variable, so that one SVG serves both modes.
PALETTE = {
    "ink": ("#1f2937", "#e5e7eb"),
    "muted": ("#667085", "#9aa4b2"),
    "rule": ("#e4e7ec", "#333d4d"),
    "page": ("#f6f7f9", "#10141b"),
    "card": ("#ffffff", "#1a202b"),
    "accent": ("#2f6fde", "#6ea3f7"),
    "soft": ("#d5e3fb", "#24385c"),
    "warn": ("#e08a1e", "#f0a94a"),
    "bad": ("#c2413b", "#e8746c"),
}
INK, MUTED, RULE, _, _, ACCENT, SOFT, WARN, BAD = (light for light, _ in PALETTE.values())
STYLE = {
    # Text stays text: the reader's font, selectable, and no glyph outlines to carry.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # matplotlib's own font measures the text, so the layout is the same on every machine.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
}
# A card is about 350 CSS pixels wide on a desk and on a phone; at one SVG unit per pixel, text keeps its size.
FIGURE_INCHES = (350 / 72, 225 / 72)
CURVE_POINTS = 300
L0_BARS = 60
UNMEASURED, UNDEFINED, UNRECORDED = "not measured", "undefined", "not recorded"

PROVENANCE = "Dictionary and data"
UNKNOWN = "Other entries"
EXPLANATIONS: dict[str, dict[str, str]] = {
    PROVENANCE: {
        "report_version": "Version of this report's format. A changed definition gets a new name.",
        "checkpoint": "Where the dictionary was loaded from.",
        "kind": "What is mapped: an sae maps an activation to itself.",
        "encoder": "How latents are chosen: the variant and its arguments.",
        "d_in": "Width of the activation that is read.",
        "d_out": "Width of the activation that is written; d_in for an sae.",
        "n_latents": "How many latents (learned units) the dictionary has.",
        "hook": "Module path and side of the activation the dictionary was trained on.",
        "model": "The language model whose activations these are.",
        "text": "The corpus. Only documents held out from training are evaluated.",
        "training_tokens": "Tokens trained on; a token seen twice counts twice.",
        "git_commit": "Version of the code that trained the dictionary.",
        "documents": "Held-out documents scored. None of them took part in fitting the mean or the linear error.",
        "tokens": "Tokens scored. Positions excluded from training (special tokens and the first few of every context, as "
        "the recipe says) are not among them.",
    },
    "Reconstruction": {
        "fvu": "Fraction of variance unexplained: squared error summed over the whole set, divided by the summed squares "
        "about the mean of the whole set. A ratio of sums, not a mean of per-token ratios. 0 is perfect, 1 is no better "
        "than the mean.",
        "cosine": "Cosine between activation and reconstruction, mean over tokens. 1 is perfect.",
        "l2_ratio": "Norm of the reconstruction over norm of the activation, mean over tokens. Below 1 is shrinkage.",
        "relative_reconstruction_bias": "Sum of squared reconstruction norms over sum of reconstruction times activation. 1 is "
        "unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10).",
    },
    "Sparsity": {
        "l0_mean": "Latents that fire on a token, mean over tokens.",
        "l0_p10": "A tenth of the tokens have at most so many latents firing.",
        "l0_median": "Half of the tokens have at most so many latents firing.",
        "l0_p90": "Nine tenths of the tokens have at most so many latents firing.",
        "dead_fraction": "Share of latents that fired on no token of the window. It depends on the window: a longer one finds "
        "fewer dead, so compare only equal windows.",
        "dead_window_tokens": "That window, in tokens.",
        "dense_fraction": f"Share of latents that fire on more than {DENSE:g} of the tokens.",
    },
    "Effect on the model": {
        "downstream_tokens": "Predictions scored: at positions that were replaced and whose next token is of the same document. "
        "Excluded positions keep the model's own activation.",
        "ce_clean": "Cross-entropy of the untouched model, nats per token.",
        "ce_spliced": "Cross-entropy with reconstructions in place of the activations, nats per token.",
        "ce_zero": "Cross-entropy with zeros in their place, nats per token.",
        "ce_mean": "Cross-entropy with the mean activation in their place, nats per token.",
        "kl_spliced": "KL divergence from the untouched model's predictions to those on reconstructions, nats per token.",
        "kl_zero": "The same KL divergence with zeros, nats per token.",
        "kl_mean": "The same KL divergence with the mean activation, nats per token.",
        "ce_increase": "ce_spliced - ce_clean: what the dictionary costs the model, nats per token.",
        "top1_agreement": "Share of predictions whose likeliest token stays the same.",
        "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), the ablation being zero. 1 is perfect, 0 is "
        "no better than zeros. Undefined where the ablation costs nothing.",
        "ce_recovered_mean": "The same fraction, the ablation being the mean activation: the stricter yardstick.",
        "kl_recovered_zero": "1 - kl_spliced / kl_zero.",
        "kl_recovered_mean": "1 - kl_spliced / kl_mean.",
    },
    "Error, linear and nonlinear": {
        "fvu_total": "fvu on the tokens that score the regression: linear and nonlinear part together.",
        "fvu_nonlinear": "What is left of fvu_total once a linear map of the activation, fitted on other data, has predicted "
        "the error. Low alone is no merit: an empty dictionary has none. Read it beside fvu_total.",
        "linear_error_share": "1 - fvu_nonlinear / fvu_total: share of the squared error that is linear in the activation.",
        "fvu_rescaled": "fvu_total after the best single factor on the reconstruction; what that takes off is shrinkage.",
        "err_vec_r2_mean_dim": "R\u00b2 of the linear prediction of the error, per dimension, then averaged.",
        "err_norm_r2": "R\u00b2 of the linear prediction of the squared error norm.",
        "dark_matter_noise_floor": "About what linear_error_share would be for an error unrelated to the activation: below 0, "
        "because the map fits noise.",
        "dark_matter_fit_tokens": "Tokens the linear map was fitted on.",
        "dark_matter_score_tokens": "Tokens it was scored on.",
        "dark_matter_enough_tokens": "Whether the fit had ten tokens per coefficient. If not, the linear share is understated.",
    },
}

Report = dict[str, Any]
Curve = list[dict[str, Any]]


def render(report: Report, curve: Curve) -> str:
    """One page that shows ``report`` and, where there is one, the training ``curve`` (lines of ``metrics.jsonl``).

    Entries that are absent read "not measured", those that are ``None`` "undefined". Equal input gives equal bytes.
    """
    name, arguments = _encoder(report)
    kind = str(report.get("kind") or "dictionary")
    widths = " \u2192 ".join(_show(report.get(key)) for key in ("d_in", "n_latents"))
    title = " \u00b7 ".join(str(part) for part in (kind, name, report.get("hook")) if part)
    return PAGE.format(
        title=escape(title),
        style=_variables() + CSS,
        heading=escape(f"{name} {kind}".strip()),
        shape=escape(f"{widths} latents" + (f", {arguments}" if arguments else "")),
        facts="".join(f"<div><dt>{term}</dt><dd>{escape(value)}</dd></div>" for term, value in _facts(report)),
        figures="".join(_key_figure(report, *entry) for entry in KEY_FIGURES),
        plots="".join(_plot(report, curve, *entry) for entry in PLOTS),
        rows="".join(_table_group(report, *entry) for entry in _groups(report).items()),
    )


def fvu_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Training fvu over tokens, with the held-out value."""
    tokens, values = _series(curve, "fvu")
    if len(tokens) == 0:
        return None
    heldout = _finite(report.get("fvu"))
    _draw_series(ax, tokens, values, "training batches")
    if heldout is not None:
        ax.axhline(heldout, color=WARN, linestyle="--", linewidth=1.2, label=f"held-out {_show(heldout)}")
    _tokens_axis(ax)
    ax.set_ylabel("fvu")
    drawn = [value for value in (float(values.min()), float(values.max()), heldout) if value is not None]
    if min(drawn) > 0 and max(drawn) / min(drawn) > 10:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) / min(drawn) < 300 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel("fvu, log scale")
    ax.legend(loc="upper right")
    return _words_of_series("fvu", tokens, values) + (f" Held-out: {_show(heldout)}." if heldout is not None else "")


def dead_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Share of dead latents over training tokens."""
    tokens, values = _series(curve, "dead")
    if len(tokens) == 0:
        return None
    _draw_series(ax, tokens, values, "training")
    _tokens_axis(ax)
    # Never less than a hundredth in height: a run without dead latents is a flat line at the bottom, not noise.
    ax.set_ylim(0, max(0.01, float(values.max()) * 1.15))
    ax.set_ylabel("dead share of latents")
    return _words_of_series("dead share", tokens, values)


def error_split(ax: Axes, report: Report, curve: Curve) -> str | None:
    """The variance as one bar, and below it the error alone, enlarged."""
    total, nonlinear = _finite(report.get("fvu_total")), _finite(report.get("fvu_nonlinear"))
    if total is None or nonlinear is None:
        return None
    # A fit on too few tokens predicts worse than nothing; a bar cannot show that, the words and the table do.
    shown = min(nonlinear, total)
    explained, linear = max(0.0, 1 - total), total - shown
    whole = explained + total
    parts = [("explained", explained, ACCENT), ("linear error", linear, WARN), ("nonlinear error", shown, BAD)]
    left = 0.0
    for label, part, color in parts:
        value = nonlinear if color == BAD else part
        ax.barh(1, part / whole, left=left / whole, height=0.42, color=color, label=f"{label} {_show(value)}")
        left += part
    ax.text(0, 1.29, "variance of the activations", va="bottom")
    if total > 0:
        ax.barh(0, linear / total, height=0.42, color=WARN)
        ax.barh(0, shown / total, left=linear / total, height=0.42, color=BAD)
        for top, bottom in ((explained / whole, 0), (1, 1)):
            ax.plot([top, bottom], [0.79, 0.21], color=MUTED, linewidth=0.8, linestyle=":")
        ax.text(0, -0.29, f"the error alone ({_show(total)}), enlarged", va="top")
    ax.set(xlim=(0, 1), ylim=(-0.62, 1.62))
    ax.axis("off")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, columnspacing=1.2)
    share = report.get("linear_error_share")
    return (
        f"Of the variance, {_show(explained)} is explained, {_show(total - nonlinear)} is linear error and {_show(nonlinear)} "
        f"nonlinear error. The linear share of the error is {_show(share)}."
    )


def density_histogram(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Latents by log10 of their firing density, dead ones in a bar of their own."""
    counts = np.asarray(report.get("density_histogram_counts") or [], dtype=float)
    edges = np.asarray(report.get("density_histogram_log10_edges") or [], dtype=float)
    if len(counts) == 0 or len(edges) != len(counts) + 1:
        return None
    dead = round((_finite(report.get("dead_fraction")) or 0) * (report.get("n_latents") or 0))
    dense = round(counts[edges[:-1] >= math.log10(DENSE) - 1e-9].sum())
    filled = np.flatnonzero(counts)
    low = math.floor(edges[filled[0]]) if len(filled) else -1
    centers, threshold = (edges[:-1] + edges[1:]) / 2, math.log10(DENSE)
    ax.bar(centers, counts, np.diff(edges) * 0.92, color=[WARN if center > threshold else ACCENT for center in centers])
    # One tall bar of dead latents would flatten the rest; it is cut, and its label says how many they are.
    top = max(counts.max() * 1.3, 1.0) if len(filled) else dead * 1.3 + 1
    at, width = low - 0.6, 0.5
    ax.bar(at, min(dead, top * 0.86), width, color=BAD)
    ax.text(
        at,
        min(dead, top * 0.86) + top * 0.015,
        _show(dead) + (" \u2191" if dead > top * 0.86 else ""),
        ha="center",
        va="bottom",
    )
    ax.axvline(threshold, color=MUTED, linestyle="--", linewidth=1)
    ax.text(threshold + 0.06, top * 0.98, f"dense:\n{_show(dense)}", va="top")
    ax.set(xlim=(low - 1, max(0, edges[-1])), ylim=(0, top), ylabel="latents", xlabel="log10 of firing density")
    ticks = range(low, 1)
    ax.set_xticks([at, *ticks], ["dead", *(str(tick).replace("-", "\u2212") for tick in ticks)])
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.grid(visible=True)
    if not len(filled):
        return f"All {_show(dead)} latents are dead."
    peak = centers[int(counts.argmax())]
    return (
        f"{_show(round(counts.sum()))} latents fire, most often on about 1 token in {_show(round(10**-peak))}; {_show(dead)} are dead; "
        f"{_show(dense)} are dense, firing on more than {DENSE:g} of the tokens."
    )


def l0_histogram(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Tokens by how many latents fire on them."""
    counts = np.asarray(report.get("l0_histogram_counts") or [], dtype=float)
    if counts.sum() == 0:
        return None
    filled = np.flatnonzero(counts)
    low, high = int(filled[0]), int(filled[-1])
    step = -(-(high - low + 1) // L0_BARS)
    starts = np.arange(low, high + 1, step)
    bars = np.add.reduceat(counts[: high + 1], starts)
    centers = starts + (step - 1) / 2
    ax.bar(centers, bars, step * (0.92 if step == 1 else 1), color=ACCENT, zorder=2)
    ax.set(xlabel="latents firing on a token (l0)", ylabel="tokens" if step == 1 else f"tokens per {step} values")
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.grid(visible=True)
    if low == high:
        # A fixed budget: one bar is the whole story, so it gets a name instead of quantiles.
        ax.set(xlim=(low - 4.5, low + 4.5), ylim=(0, bars[0] * 1.2))
        ax.text(low, bars[0] * 1.02, f"every token: {low}", ha="center", va="bottom")
        return f"Exactly {low} latents fire on every one of {_show(int(counts.sum()))} tokens."
    mean, median, p10, p90 = (_finite(report.get(f"l0_{key}")) for key in ("mean", "median", "p10", "p90"))
    if p10 is not None and p90 is not None:
        ax.axvspan(
            p10 - 0.5, p90 + 0.5, color=SOFT, zorder=0, linewidth=0, label=f"10\u201390 %: {_show(p10)}\u2013{_show(p90)}"
        )
    if median is not None:
        ax.axvline(median, color=INK, linewidth=1.2, linestyle="--", label=f"median {_show(median)}")
    if mean is not None:
        ax.axvline(mean, color=WARN, linewidth=1.6, label=f"mean {_show(mean)}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.1)
    return (
        f"On a token, {_show(mean)} latents fire on average; the median is {_show(median)}, from 10 to 90 percent of the tokens "
        f"{_show(p10)} to {_show(p90)}, at most {high}."
    )


def cross_entropy(ax: Axes, report: Report, curve: Curve) -> str | None:
    """The four losses as bars."""
    bars = {"clean": MUTED, "spliced": ACCENT, "mean": WARN, "zero": BAD}
    losses = {name: value for name in bars if (value := _finite(report.get(f"ce_{name}"))) is not None}
    if not losses:
        return None
    labels = [f"{name}-ablated" if name in ("mean", "zero") else name for name in losses]
    ax.barh(labels, list(losses.values()), height=0.62, color=[bars[name] for name in losses])
    for row, value in enumerate(losses.values()):
        ax.text(value, row, f" {_show(value)}", va="center")
    ax.invert_yaxis()
    ax.set(xlabel="cross-entropy, nats per token", xlim=(0, max(losses.values()) * 1.2))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    words = ", ".join(f"{label} {_show(value)}" for label, value in zip(labels, losses.values(), strict=True))
    return f"Cross-entropy in nats per token: {words}."


# Title, what to look for, the function that draws it and says it in words.
PLOTS: tuple[tuple[str, str, Callable[[Axes, Report, Curve], str | None]], ...] = (
    ("Training curve", "Lower is better. The line is the median of neighbouring log lines, the band their range.", fvu_curve),
    ("Dead latents in training", "Share of latents silent for the recipe's window of tokens.", dead_curve),
    (
        "Where the variance goes",
        "Linear error can be predicted from the activation by a linear map; the rest cannot.",
        error_split,
    ),
    (
        "Firing density",
        "Healthy dictionaries have one hump; latents that always fire say little about any token.",
        density_histogram,
    ),
    ("Latents per token", "How many latents it takes to describe one token.", l0_histogram),
    ("Cost to the model", "Spliced: the model runs on reconstructions. Ablated: on the mean, or on zeros.", cross_entropy),
)

# Label, key, and what stands below the number; braces name other entries of the report.
KEY_FIGURES = (
    ("fvu", "fvu", "variance unexplained; 0 is perfect"),
    ("l0", "l0_mean", "latents per token, median {l0_median}"),
    ("ce recovered, zero", "ce_recovered_zero", "of what zero ablation destroys"),
    ("ce recovered, mean", "ce_recovered_mean", "of what mean ablation destroys"),
    ("ce increase", "ce_increase", "nats per token, on {ce_clean}"),
    ("KL", "kl_spliced", "nats per token; same top token {top1_agreement}"),
    ("dead share", "dead_fraction", "of {n_latents} latents, in {dead_window_tokens} tokens"),
    ("linear error share", "linear_error_share", "of the squared error"),
)


def _facts(report: Report) -> list[tuple[str, str]]:
    commit = report.get("git_commit")
    evaluated = [f"{_show(report[key])} {key}" for key in ("tokens", "documents") if report.get(key) is not None]
    return [
        ("model", _show(report.get("model"), UNRECORDED)),
        ("hook", _show(report.get("hook"), UNRECORDED)),
        ("text", _show(report.get("text"), UNRECORDED)),
        (
            "trained on",
            f"{_show(report['training_tokens'])} tokens" if report.get("training_tokens") is not None else UNRECORDED,
        ),
        ("evaluated on", ", ".join(evaluated) or UNRECORDED),
        ("git commit", UNRECORDED if commit is None else str(commit)[:12]),
    ]


def _encoder(report: Report) -> tuple[str, str]:
    """Name and arguments, from the JSON text that the report holds; any other text is taken as the name."""
    text = report.get("encoder") or ""
    try:
        entries = dict(json.loads(text))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(
        f"{key} = {_show(value) if _is_scalar(value) else json.dumps(value)}" for key, value in entries.items()
    )


def _key_figure(report: Report, label: str, key: str, note: str) -> str:
    value = _show(report[key]) if key in report else UNMEASURED
    words = re.sub(r"{(\w+)}", lambda match: _show(report.get(match[1])), note) if key in report else ""
    kind = "value" if _finite(report.get(key)) is not None else "value none"
    return (
        f'<div class="tile" data-key="{escape(key)}"><div class="label">{escape(label)}</div>'
        f'<div class="{kind}">{escape(value)}</div><div class="note">{escape(words)}</div></div>'
    )


def _plot(report: Report, curve: Curve, title: str, note: str, draw: Callable[[Axes, Report, Curve], str | None]) -> str:
    with matplotlib.rc_context():
        # Not the user's matplotlibrc: the page looks the same everywhere. The salt keeps ids of two plots apart.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": draw.__name__})
        figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
        words = draw(figure.subplots(), report, curve)
        body = f'<p class="none">{UNMEASURED}</p>' if words is None else _svg(figure, words)
    return f"<figure><h2>{escape(title)}</h2>{body}<figcaption>{escape(note)}</figcaption></figure>"


def _svg(figure: Figure, words: str) -> str:
    """The figure as an element to put into HTML, its colours replaced by CSS variables."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style element would apply to the whole page; ids such as axes_1 occur in every plot and nothing refers to them.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="@" viewBox="\1">', svg, count=1)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.replace("'DejaVu Sans', sans-serif", "inherit").replace('"@"', f'"{escape(words)}"', 1)


def _groups(report: Report) -> dict[str, dict[str, str]]:
    """Explanations of what the report holds; entries that nobody explained come last."""
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    unknown = {
        key: "No explanation is known for this entry."
        for key, value in report.items()
        if _is_scalar(value) and key not in known
    }
    return EXPLANATIONS | ({UNKNOWN: unknown} if unknown else {})


def _table_group(report: Report, title: str, explanations: dict[str, str]) -> str:
    none = UNRECORDED if title == PROVENANCE else UNDEFINED
    rows = [
        f'<tr role="row"><th role="rowheader" scope="row"><code>{escape(key)}</code></th>'
        f'<td role="cell">{escape(_show(report[key], none, digits=6))}</td><td role="cell">{escape(explanation)}</td></tr>'
        for key, explanation in explanations.items()
        if key in report and _is_scalar(report[key])
    ]
    missing = f'<tr role="row"><td role="cell" colspan="3" class="none">{UNMEASURED}</td></tr>'
    return (
        f'<tbody role="rowgroup"><tr role="row" class="group"><th role="columnheader" colspan="3" scope="rowgroup">{escape(title)}'
        f"</th></tr>{''.join(rows) or missing}</tbody>"
    )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _show(value: Any, none: str = UNDEFINED, digits: int = 4) -> str:
    """A scalar as text: thousands separated, floats to so many significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    number = _finite(value)
    if number is None:
        return none
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number:,.{1 if number % 1 else 0}f}" if abs(number) >= 1000 else f"{number:.{digits}g}"


def _short(count: float) -> str:
    """Token counts on an axis: 2.5M instead of 2500000."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _series(curve: Curve, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the log lines that have both."""
    rows = [(_finite(row.get("tokens")), _finite(row.get(key))) for row in curve]
    points = np.array([row for row in rows if None not in row], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _draw_series(ax: Axes, tokens: np.ndarray, values: np.ndarray, label: str) -> None:
    """A line through medians of neighbours, so that a long run makes no large page, and their range behind it."""
    pieces = [chunk for chunk in np.array_split(np.stack([tokens, values]), min(CURVE_POINTS, len(tokens)), axis=1)]
    x = [float(chunk[0, -1]) for chunk in pieces]
    if len(tokens) > CURVE_POINTS:
        ax.fill_between(x, [chunk[1].min() for chunk in pieces], [chunk[1].max() for chunk in pieces], color=SOFT, linewidth=0)
    # A run logged only a few times: the lines between its points are not data, the points are.
    marker = "o" if len(x) <= 30 else ""
    ax.plot(
        x,
        [float(np.median(chunk[1])) for chunk in pieces],
        color=ACCENT,
        linewidth=1.6,
        marker=marker,
        markersize=4,
        label=label,
    )
    ax.grid(visible=True)


def _tokens_axis(ax: Axes) -> None:
    ax.set_xlim(left=0)
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _words_of_series(name: str, tokens: np.ndarray, values: np.ndarray) -> str:
    first, last = (f"{_show(float(values[i]))} at {_show(int(tokens[i]))} tokens" for i in (0, -1))
    return f"Training {name} goes from {first} to {last}."


def _variables() -> str:
    """The palette as CSS, once for each colour scheme."""
    light, dark = ("".join(f"--{name}:{colors[i]};" for name, colors in PALETTE.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 16px 40px}
h1{font-size:27px;line-height:1.2;margin:0;overflow-wrap:anywhere} h2{font-size:15px;margin:0 0 6px}
.over{color:var(--muted);font-size:13px;letter-spacing:.04em;margin:0 0 4px} .shape{font-size:17px;color:var(--muted);margin:4px 0 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px 20px;margin:18px 0 22px}
dt,.label{color:var(--muted);font-size:12.5px} dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin-bottom:16px}
.tile,figure,.entries{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 12px} .value{font-size:24px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.note,figcaption,footer{color:var(--muted);font-size:12.5px;line-height:1.35}
.none{color:var(--muted);font-weight:400} .value.none{font-size:16px;line-height:31px} figure .none{margin:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px}
figure{margin:0;padding:14px;display:flex;flex-direction:column} figcaption{margin-top:8px}
svg{display:block;width:100%;height:auto;max-width:520px;margin:auto} svg *{stroke-linejoin:round;stroke-linecap:butt}
.entries{margin-top:16px;padding:14px} table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-top:1px solid var(--rule);font-weight:400}
th+td{min-width:110px;max-width:260px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums} td:last-child{color:var(--muted);padding-right:0}
.group th{border-top:0;padding-top:18px;font-weight:600;font-size:14px} tbody:first-of-type .group th{padding-top:4px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:18px;max-width:90ch} footer p{margin:0 0 6px}
@media (max-width:700px){main{padding:18px 12px} .tiles{grid-template-columns:1fr 1fr} dl{grid-template-columns:1fr 1fr}
tr{display:grid;grid-template-columns:1fr auto;border-top:1px solid var(--rule);padding:5px 0} th,td{border:0;padding:0}
th+td{max-width:none;min-width:0;text-align:right;padding-left:12px} td:last-child,.group th{grid-column:1/-1} .group{border:0}}
"""

# The policy lets the page's own style in and nothing else, whatever text a report brings along.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
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
</main>
</body>
</html>
"""
