"""Fronts of sweeps on the page of a comparison: plots along l0 with intervals, and the table of areas between them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from .charts import COLORS, look, seed_spread
from .numbers import finite, show, show_interval
from .plots import PlotCard, plain_log_ticks, plot_card

SIZE = (430 / 72, 330 / 72)
NOTE = "Sweeps over budgets; down and left is better. Bars: 95% intervals of means. Lines join a sweep's means."
PLOTS = (("fvu", "Fronts of reconstruction"), ("ce_increase", "Fronts of the cost to the model"))
LEGEND = (
    "Mean ratio of the figure at equal l0 (exponential of the area between the two fronts in logs, over the range of l0 that "
    "both cover), with its 95% interval over seeds; below 1, the front is better than the reference. Verdicts are corrected "
    "for the number of fronts."
)


class AreaRow(NamedTuple):
    """Row of the table of areas."""

    front: str
    figure: str
    ratio: str
    interval: str
    l0: str
    verdict: str
    kind: str


def front_cards(comparison: Mapping[str, Any]) -> list[PlotCard]:
    """Return the plots of a comparison's fronts; none without a sweep, as in files of older versions."""
    found = comparison.get("fronts") or []
    cards = [plot_card(title, NOTE, lambda ax, key=key: _fronts(ax, found, key), SIZE, COLORS) for key, title in PLOTS]
    return cards if found else []


def area_rows(comparison: Mapping[str, Any]) -> list[AreaRow]:
    """Return the table of areas between fronts."""
    return [
        AreaRow(
            f"{row['front']} / {row['against']}",
            row["figure"],
            show(row["ratio"], digits=3),
            "" if row["ratio_low"] is None else show_interval(row["ratio_low"], row["ratio_high"], " to "),
            f"{show(row['l0_low'], digits=3)} to {show(row['l0_high'], digits=3)}",
            "undecided: one seed" if row["seed_sd"] is None else row["verdict"],
            row["verdict"] if row["verdict"] in ("better", "worse", "equivalent") else "open",
        )
        for row in comparison.get("areas") or []
    ]


def _fronts(ax: Axes, found: list[dict[str, Any]], key: str) -> str | None:
    words, xs, ys = [], [], []
    for number, front in enumerate(found):
        points = [point for point in front["points"] if key in point and finite(point[key]["mean"]) is not None]
        if len(points) < 2:
            continue
        color, marker = look(number)
        x, y = ([point[name]["mean"] for point in points] for name in ("l0_mean", key))
        ax.plot(x, y, color=color, linewidth=1.4, marker=marker, markersize=5, label=front["name"])
        for point, at in zip(points, x, strict=True):
            low, high = point[key]["low"], point[key]["high"]
            if low is not None and high is not None:
                ax.plot([at, at], [max(low, 0.2 * point[key]["mean"]), high], color=color, linewidth=1.2)
        xs, ys = [*xs, *x], [*ys, *y]
        words.append(f"{front['name']} from {show(y[0])} at l0 {show(x[0])} to {show(y[-1])} at {show(x[-1])}")
    if not words:
        return None
    for values, axis, name in ((xs, ax.xaxis, "x"), (ys, ax.yaxis, "y")):
        if seed_spread(values) > 2:
            getattr(ax, f"set_{name}scale")("log")
            plain_log_ticks(axis)
    ax.set(xlabel="l0", ylabel=key.replace("_", " "))
    ax.grid(visible=True)
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.3)
    return f"{key} along l0: {'; '.join(words)}."
