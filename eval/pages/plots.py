"""Plots as inline SVG that follows the page's light and dark colors."""

import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .glossary import DENSE
from .numbers import finite, show

Report = dict[str, Any]
Curve = list[dict[str, Any]]
# Draws into the axes and returns a text alternative, or None if there is nothing to draw.
Draw = Callable[[Axes, Report, Curve], str | None]
# CSS variable -> color in light and in dark mode.
Palette = dict[str, tuple[str, str]]

# Plots are drawn in the light colors, which are then replaced by variables, so that one SVG serves both modes.
PALETTE: Palette = {
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
    # Keep text as text: the reader's font, selectable, and no glyph outlines.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # matplotlib's bundled font measures the text, so the layout is the same on every machine.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    # Names may contain dollar signs.
    "text.parse_math": False,
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
    "legend.fontsize": 11.5,
    "legend.handlelength": 1.4,
}
# A card is about 350 CSS pixels wide on desktops and phones; at one SVG unit per pixel, text keeps its size.
FIGURE_INCHES = (350 / 72, 255 / 72)
CURVE_POINTS = 300
LOG_TICKS = 7
LONGEST_NAME, NAME_POINTS = 26, 10.5
L0_BARS = 60


def fvu_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw the training fvu over tokens, with the held-out value."""
    drawn = _draw_series(ax, curve, "fvu")
    heldout = finite(report.get("fvu"))
    if drawn is None:
        return None
    values, words = drawn
    if heldout is not None:
        ax.axhline(heldout, color=WARN, linestyle="--", linewidth=1.2, label=f"held-out {show(heldout)}")
        values, words = [*values, heldout], f"{words} Held-out: {show(heldout)}."
    span = max(values) / min(values) if min(values) > 0 else 0
    if span > 10:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
    ax.set_ylabel("fvu, log scale" if span > 10 else "fvu")
    ax.legend(loc="upper right")
    return words


def dead_curve(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw the fraction of dead latents over training tokens."""
    drawn = _draw_series(ax, curve, "dead")
    if drawn is None:
        return None
    values, words = drawn
    # At least 0.01 high, so that a run without dead latents is a flat line at the bottom and not noise.
    ax.set(ylim=(0, max(0.01, max(values) * 1.15)), ylabel="fraction of dead latents")
    return words


def error_split(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw the variance as one bar and, below it, the error alone, enlarged."""
    total, nonlinear = finite(report.get("fvu_total")), finite(report.get("fvu_nonlinear"))
    if total is None or nonlinear is None:
        return None
    # A fit on too few tokens can give negative shares, which no bar shows; legend and text give the numbers.
    linear, explained = max(0.0, total - nonlinear), max(0.0, 1 - total)
    whole, error = explained + total, total or 1.0
    parts = (("explained", 1 - total, explained), ("linear error", total - nonlinear, linear))
    parts = (*parts, ("nonlinear error", nonlinear, total - linear))
    left = 0.0
    for (label, value, part), color in zip(parts, (ACCENT, WARN, BAD), strict=True):
        ax.barh(1, part / whole, left=left / whole, height=0.42, color=color, label=f"{label} {show(value)}")
        if color != ACCENT:
            ax.barh(0, part / error, left=(left - explained) / error, height=0.42, color=color)
        left += part
    for top, bottom in ((explained / whole, 0), (1, 1)):
        ax.plot([top, bottom], [0.79, 0.21], color=MUTED, linewidth=1, linestyle=":")
    ax.text(0, 1.29, "variance of the activations", va="bottom")
    doubt = "; linear fit on too few tokens" if report.get("dark_matter_enough_tokens") is False else ""
    ax.text(0, -0.29, f"error alone ({show(total)}), enlarged{doubt}", va="top")
    ax.set(xlim=(0, 1), ylim=(-0.62, 1.62))
    ax.axis("off")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, columnspacing=1.2)
    words = ", ".join(f"{label} {show(value)}" for label, value, _ in parts)
    return f"Shares of the variance: {words}. Linear share of the error: {show(report.get('linear_error_share'))}{doubt}."


def _density_histogram(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw a histogram of log10 firing densities, with dead latents in a separate bar."""
    counts = np.asarray(report.get("density_histogram_counts") or [], dtype=float)
    edges = np.asarray(report.get("density_histogram_log10_edges") or [], dtype=float)
    if len(counts) == 0 or len(edges) != len(counts) + 1:
        return None
    share, n_latents = finite(report.get("dead_fraction")), finite(report.get("n_latents"))
    dead = None if share is None or n_latents is None else round(share * n_latents)
    centers, threshold, filled = (edges[:-1] + edges[1:]) / 2, math.log10(DENSE), np.flatnonzero(counts)
    dense = round(counts[centers > threshold].sum())
    low = math.floor(edges[filled[0]]) if len(filled) else -1
    # A tall bar of dead latents would flatten the rest, so it is cut; its label gives the count.
    top = 1.3 * max(float(counts.max()), 1.0)
    at, height = low - 0.75, min(dead or 0, 0.86 * top)
    ax.bar(centers, counts, np.diff(edges) * 0.92, color=[WARN if center > threshold else ACCENT for center in centers])
    ax.bar(at, height, 0.5, color=BAD)
    ax.text(at, height + 0.015 * top, show(dead) + " \u2191" * ((dead or 0) > height), ha="center", va="bottom")
    ax.axvline(threshold, color=MUTED, linestyle="--", linewidth=1)
    ax.text(threshold + 0.06, 0.98 * top, f"dense:\n{show(dense)}", va="top")
    ax.set(xlim=(low - 1.15, 0), ylim=(0, top), ylabel="latents", xlabel="log10 of firing density")
    ticks = range(low, 1)
    ax.set_xticks([at, *ticks], ["dead", *(f"{tick}".replace("-", "\u2212") for tick in ticks)])
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.grid(visible=True, axis="y")
    often = f", most commonly on about {10 ** centers[counts.argmax()]:.2g} of the tokens" if len(filled) else ""
    words = f"{show(round(counts.sum()))} latents fire{often}; dead: {show(dead)}"
    return f"{words}; dense, firing on more than {DENSE:g} of the tokens: {show(dense)}."


def l0_histogram(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw a histogram of the number of latents firing per token."""
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
        # A fixed k gives a single bar, which is labelled instead of quantiles.
        ax.set(xlim=(low - 4.5, low + 4.5), ylim=(0, bars[0] * 1.2))
        ax.text(low, bars[0] * 1.02, f"every token: {low}", ha="center", va="bottom")
        return f"Exactly {low} latents fire on every one of {show(int(counts.sum()))} tokens."
    # `show` prints NaN as undefined; such lines are not drawn.
    named = (finite(report.get(f"l0_{key}")) for key in ("mean", "median", "p10", "p90"))
    mean, median, p10, p90 = (math.nan if value is None else value for value in named)
    span = f"10\u201390%: {show(p10)}\u2013{show(p90)}"
    # Undefined ones have no mark, and would make the legend wider than the plot.
    if not math.isnan(p10 + p90):
        ax.axvspan(p10 - 0.5, p90 + 0.5, color=SOFT, zorder=0, linewidth=0, label=span)
    for value, name, line in ((median, "median", (INK, 1.2, "--")), (mean, "mean", (WARN, 1.6, "-"))):
        if not math.isnan(value):
            ax.axvline(value, color=line[0], linewidth=line[1], linestyle=line[2], label=f"{name} {show(value)}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=1.1)
    return f"Latents firing on a token: mean {show(mean)}, median {show(median)}, {span} of the tokens, at most {high}."


def _cross_entropy(ax: Axes, report: Report, curve: Curve) -> str | None:
    """Draw the cross-entropies as bars."""
    bars = {"clean": MUTED, "spliced": ACCENT, "mean": WARN, "zero": BAD, "resample": INK}
    losses = {name: value for name in bars if (value := finite(report.get(f"ce_{name}"))) is not None}
    if not losses:
        return None
    labels = [f"{name}-ablated" if name in ("mean", "zero", "resample") else name for name in losses]
    ax.barh(labels, list(losses.values()), height=0.62, color=[bars[name] for name in losses])
    widest = max(losses.values()) or 1.0
    for row, value in enumerate(losses.values()):
        ax.text(value + 0.015 * widest, row, show(value), va="center")
    ax.invert_yaxis()
    ax.set(xlabel="cross-entropy, nats per token", xlim=(0, 1.2 * widest))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    words = ", ".join(f"{label} {show(value)}" for label, value in zip(labels, losses.values(), strict=True))
    return f"Cross-entropy in nats per token: {words}."


# Title, note, drawing function.
PLOTS: tuple[tuple[str, str, Draw], ...] = (
    ("Training curve", "Lower is better. Line: median of neighboring log lines. Band: their range.", fvu_curve),
    ("Dead latents in training", "Fraction of latents silent for dead_after_tokens of the recipe.", dead_curve),
    ("Where the variance goes", "Linear error: predictable by a linear map of the activation.", error_split),
    ("Firing density", "Dense latents carry little information. An arrow marks a truncated bar.", _density_histogram),
    ("Latents per token", "Number of active latents per token.", l0_histogram),
    (
        "Cost to the model",
        "Spliced: the model runs on reconstructions. Ablated: on the mean, zeros, or activations of other tokens.",
        _cross_entropy,
    ),
)


class PlotCard(NamedTuple):
    """A plot for the templates: the SVG's view box and content (``None`` if not measured), and a text alternative."""

    title: str
    note: str
    words: str = ""
    view_box: str = ""
    drawing: Markup | None = None


def plot_card(
    title: str,
    note: str,
    draw: Callable[[Axes], str | None],
    inches: tuple[float, float] = FIGURE_INCHES,
    palette: Palette = PALETTE,
) -> PlotCard:
    """Draw a plot; ``draw`` returns a text alternative, or ``None`` if there is nothing to draw."""
    with matplotlib.rc_context():
        # Ignore the user's matplotlibrc, so that pages look the same everywhere. The salt keeps the ids of plots distinct.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = title
        figure = Figure(figsize=inches, layout="constrained")
        words = draw(figure.subplots())
        return PlotCard(title, note) if words is None else PlotCard(title, note, words, *_svg(figure, palette))


def _svg(figure: Figure, palette: Palette) -> tuple[str, Markup]:
    """Return the view box and content of the figure's SVG, with colors replaced by CSS variables."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    found = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', text.getvalue(), re.DOTALL)
    assert found is not None
    view_box, svg = found.groups()
    # A style element would apply to the whole page; ids such as axes_1 repeat in every plot and are unused.
    svg = re.sub(r"<defs>\s*<(style).*?</\1>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for name, (light, _) in palette.items():
        svg = svg.replace(light, f"var(--{name})")
    # Safe as markup: matplotlib escapes texts.
    return view_box, Markup(svg.replace("'DejaVu Sans', sans-serif", "inherit"))


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain round numbers, at least three where its range has them. Call after drawing."""
    low, high = sorted(axis.get_view_interval())
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10)):
        ticks = [tick for e in exponents for step in steps if low <= (tick := step * 10.0**e) <= high]
        if len(ticks) >= 3:
            break
    else:
        # A range within a factor of about two is nearly linear.
        ticks = [tick for tick in MaxNLocator(LOG_TICKS - 1).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: 1 + (len(ticks) - 1) // LOG_TICKS]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(NullLocator())


def name_points(ax: Axes, points: dict[str, tuple[str, float, float]]) -> None:
    """Write names next to points, keyed by the id of the text; a name that fits nowhere without overlap is left out."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    at = {key: ax.transData.transform((x, y)) for key, (_, x, y) in points.items()}
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at.values()]
    frame = ax.get_window_extent()
    for key, (name, x, y) in points.items():
        text = name if len(name) <= LONGEST_NAME else f"\u2026{name[1 - LONGEST_NAME :]}"
        # DejaVu's mean width; the reader's font is narrower.
        wide, (left, low) = 0.58 * NAME_POINTS * len(text) * figure.dpi / 72, at[key]
        for dx, dy, anchor in ((7, -4, 0), (-7, -4, 1), (0, 8, 0.5), (0, -16, 0.5), (7, 8, 0), (-7, 8, 1), (7, -16, 0)):
            x0, y0 = left + dx * figure.dpi / 72 - anchor * wide, low + dy * figure.dpi / 72
            box = (x0, y0, x0 + wide, y0 + NAME_POINTS * figure.dpi / 72)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                align = {0: "left", 1: "right", 0.5: "center"}[anchor]
                label = ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=NAME_POINTS)
                label.set_gid(key)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(count: float) -> str:
    """Format a count for an axis: 2.5M instead of 2500000."""
    power = min(4, int(math.log10(max(abs(count), 1)) / 3 + 1e-9))
    return f"{count / 1000**power:g}{('', 'k', 'M', 'B', 'T')[power]}"


def _draw_series(ax: Axes, curve: Curve, key: str) -> tuple[list[float], str] | None:
    """Draw a training curve and return its values and text, or ``None`` if no log line has both tokens and ``key``."""
    rows = [(finite(row.get("tokens")), finite(row.get(key))) for row in curve]
    points = np.array([row for row in rows if None not in row], dtype=float)
    if len(points) == 0:
        return None
    # Medians and ranges of neighboring lines keep the page of a long run small.
    pieces = np.array_split(points, min(CURVE_POINTS, len(points)))
    x = [piece[-1, 0] for piece in pieces]
    low, middle, high = ([float(summary(piece[:, 1])) for piece in pieces] for summary in (np.min, np.median, np.max))
    ax.fill_between(x, low, high, color=SOFT, linewidth=0)
    # With few log lines, mark the points, which are the data.
    ax.plot(x, middle, color=ACCENT, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=4, label="training batches")
    ax.grid(visible=True)
    ax.set_xlim(left=0)
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    first, last = (f"{show(float(values))} at {show(int(tokens))} tokens" for tokens, values in points[[0, -1]])
    return middle, f"Training {key} goes from {first} to {last}."
