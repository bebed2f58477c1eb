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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .reconstruction import DENSE

# CSS variables: colour in light and in dark mode. Plots are drawn in the light ones, then each is replaced by its variable,
# so that one SVG serves both modes.
PALETTE = {
    "ink": ("#1f2937", "#e5e7eb"),
    "muted": ("#667085", "#9aa4b2"),
    "rule": ("#e4e7ec", "#333d4d"),
    "accent": ("#2f6fde", "#6ea3f7"),
    "soft": ("#d5e3fb", "#24385c"),
    "warn": ("#e08a1e", "#f0a94a"),
    "bad": ("#c2413b", "#e8746c"),
    "page": ("#f6f7f9", "#10141b"),
    "card": ("#ffffff", "#1a202b"),
}
INK, MUTED, RULE, ACCENT, SOFT, WARN, BAD, *_ = (light for light, _ in PALETTE.values())
STYLE: dict[Any, Any] = {
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
        "documents": "Held-out documents scored. The mean and the linear error were fitted on others.",
        "tokens": "Tokens scored. Excluded positions (special tokens, the first few of a context) are not among them.",
    },
    "Reconstruction": {
        "fvu": "Fraction of variance unexplained, a ratio of sums: squared error of the whole set over squares about the mean "
        "of the whole set. 0 is perfect, 1 is no better than the mean. A mean of per-token ratios is another number.",
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
        "dead_fraction": "Share of latents silent on the whole window of tokens. A longer one finds fewer: compare equal ones.",
        "dead_window_tokens": "That window, in tokens.",
        "dense_fraction": f"Share of latents that fire on more than {DENSE:g} of the tokens.",
    },
    "Effect on the model": {
        "downstream_tokens": "Predictions scored: at replaced positions whose next token is of the same document. Excluded "
        "positions keep the model's own activation.",
        "ce_clean": "Cross-entropy of the untouched model, nats per token.",
        "ce_spliced": "Cross-entropy with reconstructions in place of the activations, nats per token.",
        "ce_zero": "Cross-entropy with zeros in their place, nats per token.",
        "ce_mean": "Cross-entropy with the mean activation in their place, nats per token.",
        "kl_spliced": "KL divergence from the untouched model's predictions to those on reconstructions, nats per token.",
        "kl_zero": "The same KL divergence with zeros, nats per token.",
        "kl_mean": "The same KL divergence with the mean activation, nats per token.",
        "ce_increase": "ce_spliced - ce_clean: what the dictionary costs the model, nats per token.",
        "top1_agreement": "Share of predictions whose likeliest token stays the same.",
        "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), ablated to zero. 1 is perfect, 0 no better "
        "than zeros; undefined where the ablation costs nothing.",
        "ce_recovered_mean": "The same fraction, ablated to the mean activation: the fairer yardstick.",
        "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
        "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
    },
    "Error, linear and nonlinear": {
        "fvu_total": "fvu on the tokens that score the regression: linear and nonlinear error together.",
        "fvu_nonlinear": "What is left of fvu_total once a linear map of the activation, fitted on other data, has predicted "
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

Report = dict[str, Any]
Curve = list[dict[str, Any]]
Draw = Callable[[Axes, Report, Curve], str | None]


def render(report: Report, curve: Curve) -> str:
    """One page that shows ``report`` and, where there is one, the training ``curve`` (lines of ``metrics.jsonl``).

    Entries that are absent read "not measured", those that are ``None`` "undefined". Equal input gives equal bytes.
    """
    name, arguments = _encoder(report.get("encoder"))
    kind, trained, commit = (report.get(key) for key in ("kind", "training_tokens", "git_commit"))
    evaluated = [f"{_show(report[key])} {key}" for key in ("tokens", "documents") if report.get(key) is not None]
    facts = {key: report.get(key) for key in ("model", "hook", "text")} | {
        "trained on": None if trained is None else f"{_show(trained)} tokens",
        "evaluated on": ", ".join(evaluated) or None,
        "git commit": None if commit is None else str(commit)[:12],
    }
    shape = f"{_show(report.get('d_in'))} \u2192 {_show(report.get('n_latents'))} latents"
    if report.get("d_out") not in (None, report.get("d_in")):
        shape += f" \u2192 {_show(report['d_out'])}"
    return PAGE.format(
        title=escape(" \u00b7 ".join(str(part) for part in (name, kind, report.get("hook")) if part) or "dictionary"),
        style=_variables() + CSS,
        heading=escape(f"{name} {kind or 'dictionary'}".strip()),
        shape=escape(f"{shape} \u00b7 {arguments}" if arguments else shape),
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(_show(value, UNRECORDED))}</dd></div>" for key, value in facts.items()),
        figures="".join(_key_figure(report, *entry) for entry in KEY_FIGURES),
        plots="".join(_plot(report, curve, *entry) for entry in PLOTS),
        rows="".join(_table_group(report, *entry) for entry in _groups(report).items()),
    )


def fvu_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Training fvu over tokens, with the held-out value."""
    drawn = _draw_series(ax, curve, "fvu")
    heldout = _finite(report.get("fvu"))
    if drawn is None:
        return None
    values, words = drawn
    if heldout is not None:
        ax.axhline(heldout, color=WARN, linestyle="--", linewidth=1.2, label=f"held-out {_show(heldout)}")
        values, words = [*values, heldout], f"{words} Held-out: {_show(heldout)}."
    span = max(values) / min(values) if min(values) > 0 else 0
    if span > 10:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1000 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("fvu, log scale" if span > 10 else "fvu")
    ax.legend(loc="upper right")
    return words


def dead_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Share of dead latents over training tokens."""
    drawn = _draw_series(ax, curve, "dead")
    if drawn is None:
        return None
    values, words = drawn
    # Never less than a hundredth in height: a run without dead latents is a flat line at the bottom, not noise.
    ax.set(ylim=(0, max(0.01, max(values) * 1.15)), ylabel="dead share of latents")
    return words


def error_split(ax: Axes, report: Report, curve: Curve) -> str | None:
    """The variance as one bar, and below it the error alone, enlarged."""
    total, nonlinear = _finite(report.get("fvu_total")), _finite(report.get("fvu_nonlinear"))
    if total is None or nonlinear is None:
        return None
    # A fit on too few tokens can do worse than none. No bar shows a negative share; legend and words give the numbers.
    linear, explained = max(0.0, total - nonlinear), max(0.0, 1 - total)
    whole, error = explained + total, total or 1.0
    parts = (("explained", 1 - total, explained), ("linear error", total - nonlinear, linear))
    parts = (*parts, ("nonlinear error", nonlinear, total - linear))
    left = 0.0
    for (label, value, part), color in zip(parts, (ACCENT, WARN, BAD), strict=True):
        ax.barh(1, part / whole, left=left / whole, height=0.42, color=color, label=f"{label} {_show(value)}")
        if color != ACCENT:
            ax.barh(0, part / error, left=(left - explained) / error, height=0.42, color=color)
        left += part
    for top, bottom in ((explained / whole, 0), (1, 1)):
        ax.plot([top, bottom], [0.79, 0.21], color=MUTED, linewidth=1, linestyle=":")
    ax.text(0, 1.29, "variance of the activations", va="bottom")
    doubt = "; the linear fit had too few tokens" if report.get("dark_matter_enough_tokens") is False else ""
    ax.text(0, -0.29, f"the error alone ({_show(total)}), enlarged{doubt}", va="top")
    ax.set(xlim=(0, 1), ylim=(-0.62, 1.62))
    ax.axis("off")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, columnspacing=1.2)
    words = ", ".join(f"{label} {_show(value)}" for label, value, _ in parts)
    return f"Shares of the variance: {words}. Linear share of the error: {_show(report.get('linear_error_share'))}{doubt}."


def density_histogram(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Latents by log10 of their firing density, dead ones in a bar of their own."""
    counts = np.asarray(report.get("density_histogram_counts") or [], dtype=float)
    edges = np.asarray(report.get("density_histogram_log10_edges") or [], dtype=float)
    if len(counts) == 0 or len(edges) != len(counts) + 1:
        return None
    share, n_latents = _finite(report.get("dead_fraction")), _finite(report.get("n_latents"))
    dead = None if share is None or n_latents is None else round(share * n_latents)
    centers, threshold, filled = (edges[:-1] + edges[1:]) / 2, math.log10(DENSE), np.flatnonzero(counts)
    dense = round(counts[centers > threshold].sum())
    low = math.floor(edges[filled[0]]) if len(filled) else -1
    # One tall bar of dead latents would flatten the rest; it is cut, and its label says how many they are.
    top = 1.3 * max(float(counts.max()), 1.0)
    at, height = low - 0.6, min(dead or 0, 0.86 * top)
    ax.bar(centers, counts, np.diff(edges) * 0.92, color=[WARN if center > threshold else ACCENT for center in centers])
    ax.bar(at, height, 0.5, color=BAD)
    ax.text(at, height + 0.015 * top, _show(dead) + " \u2191" * ((dead or 0) > height), ha="center", va="bottom")
    ax.axvline(threshold, color=MUTED, linestyle="--", linewidth=1)
    ax.text(threshold + 0.06, 0.98 * top, f"dense:\n{_show(dense)}", va="top")
    ax.set(xlim=(low - 1, 0), ylim=(0, top), ylabel="latents", xlabel="log10 of firing density")
    ticks = range(low, 1)
    ax.set_xticks([at, *ticks], ["dead", *(f"{tick}".replace("-", "\u2212") for tick in ticks)])
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.grid(visible=True, axis="y")
    often = f", most often on about {10 ** centers[counts.argmax()]:.2g} of the tokens" if len(filled) else ""
    words = f"{_show(round(counts.sum()))} latents fire{often}; dead: {_show(dead)}"
    return f"{words}; dense, firing on more than {DENSE:g} of the tokens: {_show(dense)}."


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
    ax.grid(visible=True, axis="y")
    if low == high:
        # A fixed budget: one bar is the whole story, so it gets a name instead of quantiles.
        ax.set(xlim=(low - 4.5, low + 4.5), ylim=(0, bars[0] * 1.2))
        ax.text(low, bars[0] * 1.02, f"every token: {low}", ha="center", va="bottom")
        return f"Exactly {low} latents fire on every one of {_show(int(counts.sum()))} tokens."
    # NaN draws nothing and shows as undefined.
    named = (_finite(report.get(f"l0_{key}")) for key in ("mean", "median", "p10", "p90"))
    mean, median, p10, p90 = (math.nan if value is None else value for value in named)
    span = f"10\u201390 %: {_show(p10)}\u2013{_show(p90)}"
    ax.axvspan(p10 - 0.5, p90 + 0.5, color=SOFT, zorder=0, linewidth=0, label=span)
    ax.axvline(median, color=INK, linewidth=1.2, linestyle="--", label=f"median {_show(median)}")
    ax.axvline(mean, color=WARN, linewidth=1.6, label=f"mean {_show(mean)}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.1)
    return f"Latents firing on a token: mean {_show(mean)}, median {_show(median)}, {span} of the tokens, at most {high}."


def cross_entropy(ax: Axes, report: Report, curve: Curve) -> str | None:
    """The four losses as bars."""
    bars = {"clean": MUTED, "spliced": ACCENT, "mean": WARN, "zero": BAD}
    losses = {name: value for name in bars if (value := _finite(report.get(f"ce_{name}"))) is not None}
    if not losses:
        return None
    labels = [f"{name}-ablated" if name in ("mean", "zero") else name for name in losses]
    ax.barh(labels, list(losses.values()), height=0.62, color=[bars[name] for name in losses])
    widest = max(losses.values()) or 1.0
    for row, value in enumerate(losses.values()):
        ax.text(value + 0.015 * widest, row, _show(value), va="center")
    ax.invert_yaxis()
    ax.set(xlabel="cross-entropy, nats per token", xlim=(0, 1.2 * widest))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    words = ", ".join(f"{label} {_show(value)}" for label, value in zip(labels, losses.values(), strict=True))
    return f"Cross-entropy in nats per token: {words}."


# Title, what to look for, the function that draws it and says it in words.
PLOTS: tuple[tuple[str, str, Draw], ...] = (
    ("Training curve", "Lower is better. The line is the median of neighbouring log lines, the band their range.", fvu_curve),
    ("Dead latents in training", "Share of latents silent for the recipe's window of tokens.", dead_curve),
    ("Where the variance goes", "Linear error is what a linear map of the activation can predict.", error_split),
    ("Firing density", "Dense latents say little about any token. An arrow marks a bar cut short.", density_histogram),
    ("Latents per token", "How many latents it takes to describe one token.", l0_histogram),
    ("Cost to the model", "Spliced: the model runs on reconstructions. Ablated: on the mean, or on zeros.", cross_entropy),
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


def _encoder(text: Any) -> tuple[str, str]:
    """Name and arguments, from the JSON text that a report holds; any other text is taken as the name."""
    try:
        entries = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return str(text), ""
    name = str(entries.pop("name", ""))
    return name, ", ".join(f"{key} = {value}" for key, value in entries.items())


def _key_figure(report: Report, label: str, key: str, note: str) -> str:
    value = _show(report[key]) if key in report else UNMEASURED
    # A note that quotes other entries says nothing beside a figure that is not there.
    words = re.sub(r"{(\w+)}", lambda match: _show(report.get(match[1])), note) if key in report or "{" not in note else ""
    kind = "value" if _finite(report.get(key)) is not None else "value none"
    return (
        f'<div class="tile" data-key="{escape(key)}"><div class="label">{escape(label)}</div>'
        f'<div class="{kind}">{escape(value)}</div><div class="note">{escape(words)}</div></div>'
    )


def _plot(report: Report, curve: Curve, title: str, note: str, draw: Draw) -> str:
    with matplotlib.rc_context():
        # Not the user's matplotlibrc: the page looks the same everywhere. The salt keeps ids of two plots apart.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = title
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
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" aria-label="@" viewBox="\1">', svg, count=1)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.replace("'DejaVu Sans', sans-serif", "inherit").replace('"@"', f'"{escape(words)}"', 1)


def _groups(report: Report) -> dict[str, dict[str, str]]:
    """Explanations of what the report holds; entries that nobody explained come last."""
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    unknown = [key for key, value in report.items() if _is_scalar(value) and key not in known]
    return EXPLANATIONS | ({"Other entries": dict.fromkeys(unknown, "No explanation is known.")} if unknown else {})


def _table_group(report: Report, title: str, explanations: dict[str, str]) -> str:
    none = UNRECORDED if title == PROVENANCE else UNDEFINED
    rows = [
        f'<tr role="row"><th role="rowheader" scope="row"><code>{escape(key)}</code></th>'
        f'<td role="cell">{escape(_show(report[key], none, digits=6))}</td><td role="cell">{escape(explanation)}</td></tr>'
        for key, explanation in explanations.items()
        if key in report and _is_scalar(report[key])
    ]
    missing = f'<tr role="row"><td role="cell" colspan="3" class="none">{UNMEASURED}</td></tr>'
    head = f'<tr role="row" class="group"><th role="columnheader" colspan="3" scope="rowgroup">{escape(title)}</th></tr>'
    return f'<tbody role="rowgroup">{head}{"".join(rows) or missing}</tbody>'


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
    power = min(4, int(math.log10(max(abs(count), 1)) / 3 + 1e-9))
    return f"{count / 1000**power:g}{('', 'k', 'M', 'B', 'T')[power]}"


def _draw_series(ax: Axes, curve: Curve, key: str) -> tuple[list[float], str] | None:
    """A training curve; its values and the words for it, or ``None`` where no log line has both tokens and ``key``."""
    rows = [(_finite(row.get("tokens")), _finite(row.get(key))) for row in curve]
    points = np.array([row for row in rows if None not in row], dtype=float)
    if len(points) == 0:
        return None
    # Medians of neighbours, so that a long run makes no large page, and their range behind them.
    pieces = np.array_split(points, min(CURVE_POINTS, len(points)))
    x = [piece[-1, 0] for piece in pieces]
    low, middle, high = ([float(summary(piece[:, 1])) for piece in pieces] for summary in (np.min, np.median, np.max))
    ax.fill_between(x, low, high, color=SOFT, linewidth=0)
    # Where a run logged only a few times, the points are the data, not the lines between them.
    ax.plot(x, middle, color=ACCENT, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=4, label="training batches")
    ax.grid(visible=True)
    ax.set_xlim(left=0)
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    first, last = (f"{_show(float(values))} at {_show(int(tokens))} tokens" for tokens, values in points[[0, -1]])
    return middle, f"Training {key} goes from {first} to {last}."


def _variables() -> str:
    """The palette as CSS, once for each colour scheme."""
    light, dark = ("".join(f"--{name}:{colors[i]};" for name, colors in PALETTE.items()) for i in (0, 1))
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
