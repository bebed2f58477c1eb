"""Page of a contrast steering, without scripts: curves, edits, latents and samples."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from .diff import bars
from .document import document, encoder_label
from .examples import ExampleLatent, example_of, is_gapped
from .numbers import UNDEFINED, finite, show, show_interval
from .plots import ACCENT, BAD, INK, MUTED, WARN, plain_log_ticks, plot_card
from .tables import FigureTile

Found = dict[str, Any]
# Of the latents set to zero, which may be many.
ZEROED_SHOWN = 10
SIZE = (430 / 72, 300 / 72)
# Edit -> its name and what it is.
EDITS = {
    "latents": ("latents", "the latents with the largest effect raised at least that far, those of the other text set to zero"),
    "raised": (
        "latents, raised only",
        "the same latents raised by the difference of their means, none set to zero: a vector, which can be exported",
    ),
    "random": (
        "random latents",
        "control: as many other latents of equal density, raised and set to zero likewise; mean of the draws",
    ),
    "mean": ("difference in means", "control: the difference of the two texts' mean activations, added"),
    "directions": ("leading directions", "that difference, projected onto the directions before the eigengap"),
    "prefix": ("prompt prefix", "control: the beginning of a document of the text steered towards, before the prompt"),
}
COLORS = {"latents": ACCENT, "raised": INK, "random": MUTED, "mean": WARN, "directions": BAD}


class SteerRow(NamedTuple):
    """Row of the table of edits at their chosen strengths."""

    name: str
    meaning: str
    strength: str
    share: str
    interval: str
    mass: str
    kl: str
    kl_interval: str
    ce: str
    towards_kl: str


class SteerSample(NamedTuple):
    """A prompt with its continuations, each behind the name of the edit."""

    prompt: str
    texts: list[tuple[str, str]]


def render_steer(found: Found, features: str | None = None) -> str:
    """Render the content of ``steer.json``. Equal input gives equal bytes.

    Args:
        features: Address of the features page, to which latents link.
    """
    zeroed = [row for row in found["latents"] if row["role"] == "zeroed"]
    shown = [row for row in found["latents"] if row["role"] == "raised"] + zeroed[:ZEROED_SHOWN]
    latents = [_example(row, f"{features}#{row['latent']}" if features else "") for row in shown]
    tokens = (token for latent in latents for context in latent.contexts for token in context)
    documents, lengths = found["documents"], found["lengths"]
    facts = {
        "model": found["model"],
        "hook": found["hook"],
        "towards": f"{found['towards']}: {show(documents['towards'])} documents",
        "from": f"{found['from']}: {show(documents['from'])} documents",
        "cost measured on": neutral_words(found),
        "target tokens": _token_words(found["target_tokens"]),
        "contrast tokens": _token_words(found["contrast_tokens"]),
        "seed": found["seed"],
    }
    return document(
        "steer.html",
        f"sparsary steer \u00b7 {Path(found['towards']).name}",
        ("table.css", "steer.css"),
        command="steer",
        heading=f"Towards {Path(found['towards']).name}, from {Path(found['from']).name}",
        shape=f"{found['n_latents']:,} latents \u00b7 {encoder_label(found['encoder'])}",
        facts=facts,
        tiles=_tiles(found),
        plots=[
            plot_card(
                "Success against cost",
                "A point for every strength; filled: the chosen one. Dashed: the largest cost at which one may be chosen.",
                lambda ax: _front(ax, found),
                SIZE,
            ),
            plot_card(
                "Target mass by strength",
                "Mean probability of the target tokens behind prompts. Dashed: in the text steered towards, without an edit.",
                lambda ax: _masses(ax, found),
                SIZE,
            ),
            plot_card(
                "Selectivity of latents",
                f"AUROC of the {pooled_words(found)}, on the reporting halves. Silent latents are left out.",
                lambda ax: bars(ax, found["selectivity"], (0.0, 1.0), "AUROC"),
                SIZE,
            ),
            plot_card(
                "Spectrum of the mean differences",
                f"By position. Effective rank {show(found['directions']['effective_rank'], digits=3)}.",
                lambda ax: _spectrum(ax, found["directions"]["shares"]),
                SIZE,
            ),
        ],
        rows=edit_rows(found),
        most_kl=show(found["most_kl"]),
        lengths=lengths,
        pooled=pooled_words(found),
        selective=found["most_selective"],
        directions=found["directions"],
        latents=latents,
        left_out=len(found["latents"]) - len(shown),
        samples=[_sample(each) for each in found["samples"]],
        gapped=is_gapped(token.text for token in tokens),
        export=found.get("export"),
        accuracy=show(found["classifier_accuracy"], digits=3),
    )


def neutral_words(found: Found) -> str:
    """Return the text on which the cost is measured."""
    return found["neutral"] or f"{found['towards']} (no neutral text was given)"


def pooled_words(found: Found) -> str:
    """Return the value whose AUROC is a latent's selectivity."""
    kind = "mean" if found["pooling"] == "mean" else "largest"
    return f"{kind} activation over {found['lengths']['piece']} tokens"


def groups_of(found: Found) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every kind of edit: the draws of random latents together, the others alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found["edits"]:
        groups.setdefault(row["name"].partition("_")[0], []).append(row)
    return groups


def chosen_figures(rows: list[dict[str, Any]], found: Found) -> dict[str, float | None]:
    """Return the means of the figures at the chosen strengths; an edit without one leaves the model as it is."""
    clean = found["clean"]
    none = {"strength": 0.0, "kl": 0.0, "ce": None, "towards_kl": 0.0}
    none |= {key: clean[key] for key in ("share", "share_low", "share_high", "target_mass")}
    points = [row["chosen"] or none for row in rows]
    keys = (
        "strength",
        "share",
        "share_low",
        "share_high",
        "target_mass",
        "kl",
        "kl_low",
        "kl_high",
        "ce",
        "towards_kl",
        "ce_clean",
    )
    found_means: dict[str, float | None] = {}
    for key in keys:
        values = [value for point in points if (value := finite(point.get(key))) is not None]
        found_means[key] = float(np.mean(values)) if values else None
    return found_means


def edit_rows(found: Found) -> list[SteerRow]:
    """Return the table of edits."""
    rows = []
    for name, members in groups_of(found).items():
        point, (label, meaning) = chosen_figures(members, found), EDITS[name]
        chosen = [row for row in members if row["chosen"]]
        many = len(members) > 1
        strength = "-" if name == "prefix" else _strengths([row["chosen"]["strength"] for row in chosen], len(members))
        shares = sorted((row["chosen"] or found["clean"])["share"] for row in members)
        interval = f"draws {show(shares[0])} to {show(shares[-1])}" if many else _interval(point, "share")
        rose = None if point["ce"] is None or point["ce_clean"] is None else point["ce"] - point["ce_clean"]
        rows.append(
            SteerRow(
                label,
                meaning,
                strength,
                show(point["share"], digits=3),
                interval,
                show(point["target_mass"], digits=3),
                show(point["kl"], digits=2),
                "" if many else _interval(point, "kl"),
                show(rose, "-", digits=2),
                show(point["towards_kl"], digits=2),
            )
        )
    return rows


def _strengths(chosen: list[float], draws: int) -> str:
    """Return the range of chosen strengths, and the number of draws without one."""
    if not chosen:
        return "none"
    ends = dict.fromkeys(show(strength, digits=3) for strength in (min(chosen), max(chosen)))
    return "\u2013".join(ends) + (f", {draws - len(chosen)} none" if len(chosen) < draws else "")


def _interval(point: dict[str, float | None], key: str) -> str:
    low, high = point[f"{key}_low"], point[f"{key}_high"]
    return "" if low is None or high is None else show_interval(low, high)


def _tiles(found: Found) -> list[FigureTile]:
    groups = groups_of(found)
    own = chosen_figures(groups["latents"], found)
    best = [row["auroc"] for row in found["most_selective"]]
    tiles = [
        FigureTile(
            "share",
            "continuations steered",
            show(own["share"], digits=3),
            f"without an edit {show(found['clean']['share'], digits=3)}",
            interval=_interval(own, "share"),
        ),
        FigureTile("kl", "KL", show(own["kl"], digits=2), "nats per token of neutral text", interval=_interval(own, "kl")),
        FigureTile(
            "target_mass",
            "target mass",
            show(own["target_mass"], digits=3),
            f"without {show(found['clean']['target_mass'], digits=2)}, in the text towards "
            f"{show(found['clean']['towards_target_mass'], digits=3)}",
        ),
    ]
    for name in ("random", "mean", "prefix"):
        point = chosen_figures(groups[name], found)
        tiles.append(FigureTile(f"{name}_share", EDITS[name][0], show(point["share"], digits=3), _budget_note(groups[name])))
    tiles.append(
        FigureTile(
            "auroc",
            "AUROC",
            show(min(best), UNDEFINED, 3) if best else UNDEFINED,
            f"lowest of the {len(best)} most selective latents",
            missing=not best,
        )
    )
    accuracy = show(found["classifier_accuracy"], digits=3)
    tiles.append(FigureTile("classifier", "classifier", accuracy, f"balanced accuracy on {found['lengths']['new']} tokens"))
    return tiles


def _budget_note(rows: list[dict[str, Any]]) -> str:
    return "continuations steered" if any(row["chosen"] for row in rows) else "no strength within the budget"


def _token_words(entry: dict[str, Any]) -> str:
    words = " ".join(entry["most_frequent"])
    return f"{show(entry['count'])}, {show(entry['share'], digits=3)} of its tokens: {words}"


def _example(row: dict[str, Any], href: str) -> ExampleLatent:
    words = [row["role"], f"AUROC {show(row['auroc'], digits=3)}", f"effect {show(row['effect'], digits=3)}"]
    if row["role"] == "raised":
        words.insert(1, f"to {show(row['mean'], digits=3)} at strength 1")
    words += [row["label"]] if row["label"] else []
    return example_of(row | {"explanation": None, "details": {}, "logits": None}, href)._replace(words="; ".join(words))


def _sample(entry: dict[str, Any]) -> SteerSample:
    texts = []
    for name, text in entry["texts"].items():
        kind = name.partition("_")[0]
        texts.append((EDITS[kind][0] if kind in EDITS else "no edit", text))
    return SteerSample(entry["prompt"], texts)


def _front(ax: Axes, found: Found) -> str | None:
    words = []
    for row in found["edits"]:
        name = row["name"].partition("_")[0]
        color, points = COLORS.get(name), row["points"]
        # A logarithmic axis has no zero.
        x, y = [max(point["kl"], 1e-4) for point in points], [point["share"] for point in points]
        label = EDITS[name][0] if row["name"] in EDITS or row["name"].endswith("_0") else None
        if color is None:
            ax.plot(x, y, marker="D", markersize=6, linestyle="", color=ACCENT, markerfacecolor="none", label=label)
        else:
            ax.plot(x, y, marker="o", markersize=3.5, linewidth=1.2, color=color, label=label, markerfacecolor="none")
        if (chosen := row["chosen"]) is not None and color is not None:
            ax.plot([max(chosen["kl"], 1e-4)], [chosen["share"]], marker="o", markersize=7, color=color)
        if label:
            words.append(f"{label} from {show(y[0], digits=3)} to {show(y[-1], digits=3)}")
    ax.axvline(found["most_kl"], color=MUTED, linestyle="--", linewidth=1)
    ax.set_xscale("log")
    plain_log_ticks(ax.xaxis)
    ax.set(xlabel="KL divergence on neutral text, nats per token", ylabel="continuations steered", ylim=(-0.03, 1.03))
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    return "Share of continuations steered, by strength: " + ", ".join(words) + "."


def _masses(ax: Axes, found: Found) -> str | None:
    words = []
    for row in found["edits"]:
        name = row["name"].partition("_")[0]
        if name not in COLORS:
            continue
        x, y = [0.0, *(point["strength"] for point in row["points"])], [point["target_mass"] for point in row["points"]]
        y = [found["clean"]["target_mass"], *y]
        label = EDITS[name][0] if row["name"] in EDITS or row["name"].endswith("_0") else None
        ax.plot(x, y, marker="o", markersize=3.5, linewidth=1.2, color=COLORS[name], label=label)
        if label:
            words.append(f"{label} {show(max(y), digits=3)} at most")
    ax.axhline(found["clean"]["towards_target_mass"], color=MUTED, linestyle="--", linewidth=1)
    ax.set(xlabel="strength", ylabel="target mass", ylim=(-0.03, 1.03))
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    return "Target mass: " + ", ".join(words) + "."


def _spectrum(ax: Axes, shares: list[float]) -> str | None:
    if not shares:
        return None
    ax.bar(range(1, len(shares) + 1), shares, color=ACCENT, width=0.8)
    ax.set(xlabel="direction", ylabel="share of squared singular values", ylim=(0, 1), xticks=range(1, len(shares) + 1))
    return "Shares of the squared singular values: " + ", ".join(show(share, digits=3) for share in shares) + "."
