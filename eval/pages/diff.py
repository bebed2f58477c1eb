"""Page of a diff of two models, without scripts."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from .document import document, encoder_label
from .examples import ExampleLatent, example_of, is_gapped
from .numbers import UNDEFINED, finite, show, show_interval
from .plots import ACCENT, MUTED, SOFT, plot_card
from .tables import FigureTile

SIZE = (430 / 72, 300 / 72)
# Change of the base's activations -> its name and what it is.
CHANGES = {
    "activation": ("tuned activation", "the tuned model's own activation: the most that any change at this hook can do"),
    "reconstruction_difference": ("all latents and biases", "the difference of the two reconstructions"),
    "all": ("all latents", "what all latents write in the tuned model minus what they write in the base"),
    "exclusive": ("exclusive latents", "the latents of one model alone"),
    "changed": ("changed latents", "exclusive latents, and those whose decoder rows differ in direction"),
    "unchanged": ("other latents", "all latents that are neither"),
    "mean_difference": ("mean difference", "floor: the mean activation difference, added everywhere"),
    "pca": ("principal directions", "floor: the difference, projected onto as many principal directions as changed latents"),
    "random": ("random latents", "floor: as many of the other latents, drawn at random"),
    "difference_sae": (
        "SAE on the difference",
        "floor: the difference, as an SAE trained on it by the same recipe reconstructs it",
    ),
    "difference_sae_few": ("SAE on the difference, few", "floor: as many of its latents as changed latents, the largest"),
}
KIND_WORDS = {
    "base_only": "base only",
    "shared": "shared",
    "rotated": "rotated",
    "tuned_only": "tuned only",
    "uneven": "uneven",
    "dead": "dead",
}
NU = (
    "nu error: how much of the latent the other model's errors contain, relative to its own model; nu reconstruction: how much "
    "of it the other model's latents already reconstruct. An exclusive latent is true if they are below 0.2 and 0.5 "
    "(arXiv:2504.02922)."
)


class ClosedRow(NamedTuple):
    """Row of the table of changes: share of the KL divergence closed, its interval, and the divergence left."""

    name: str
    share: str
    interval: str
    left: str
    meaning: str


def render_diff(found: dict[str, Any]) -> str:
    """Render the content of ``diff.json``. Equal input gives equal bytes."""
    models, hooks, patching = found["models"], found["hooks"], found["patching"]
    latents = [_example(row, _figures(row)) for row in found["latents"]]
    tokens = (token for latent in latents for context in latent.contexts for token in context)
    facts = {
        "base": f"{models['base']} at {hooks['base']}",
        "tuned": f"{models['tuned']} at {hooks['tuned']}",
        "text": found["text"],
        "latents read on": f"{show(found['tokens'])} tokens of {show(found['documents'])} documents",
        "KL measured on": f"{show(patching['tokens'])} tokens of {show(patching['documents'])} documents" if patching else None,
    }
    return document(
        "diff.html",
        f"sparsary diff \u00b7 {models['tuned']}",
        ("diff.css",),
        command="diff",
        heading=f"{models['base']} and {models['tuned']}",
        shape=f"{found['n_latents']:,} latents \u00b7 {encoder_label(found['encoder'])}",
        facts=facts,
        tiles=_tiles(found),
        plots=[
            plot_card(
                "Relative decoder norms",
                "Norm in the tuned model divided by the sum of both. 0: base only, 1: tuned only. Silent latents are left out.",
                lambda ax: bars(ax, found["relative_norms"], (0.0, 1.0), "relative norm of the tuned model"),
                SIZE,
            ),
            plot_card(
                "Cosines of latents in both models",
                "Between a latent's decoder rows in the two models. 1: the same direction.",
                lambda ax: bars(ax, found["cosines"], (-1.0, 1.0), "cosine"),
                SIZE,
            ),
            plot_card(
                "KL divergence closed",
                "Share that closes when the base runs on changed activations. Bars: 95% intervals over documents.",
                lambda ax: _closed(ax, patching),
                SIZE,
            ),
        ],
        closed=_rows(patching),
        same=patching is not None and not patching["kl_base"],
        latents=latents,
        sae=_sae(found.get("difference_sae")),
        nu=NU,
        gapped=is_gapped(token.text for token in tokens),
        differences=_differences(found),
        reasons=found["reasons"],
    )


def _tiles(found: dict[str, Any]) -> list[FigureTile]:
    counts, patching, true = found["counts"], found["patching"] or {}, found.get("true_exclusive", {})
    closed = (patching.get("closed") or {}).get("changed")
    share = None if closed is None else closed["share"]
    notes = {kind: f"{true[kind]:,} confirmed by latent scaling" for kind in true}
    return [
        FigureTile("tuned_only", "tuned only", show(counts["tuned_only"]), notes.get("tuned_only", "")),
        FigureTile("base_only", "base only", show(counts["base_only"]), notes.get("base_only", "")),
        FigureTile("rotated", "rotated", show(counts["rotated"]), "in both, in other directions"),
        FigureTile("shared", "shared", show(counts["shared"]), _shared_note(found)),
        FigureTile(
            "kl_closed",
            "KL closed",
            show(share, UNDEFINED, 3),
            "by changed latents alone",
            missing=share is None,
            interval="" if closed is None else _interval(closed),
        ),
        FigureTile(
            "kl_base",
            "KL",
            show(patching.get("kl_base"), UNDEFINED),
            "nats per token, base from tuned",
            missing=finite(patching.get("kl_base")) is None,
        ),
        FigureTile("fvu_base", "fvu, base", show(found["fvu"]["base"]), f"{show(found['l0'])} latents per token"),
        FigureTile("fvu_tuned", "fvu, tuned", show(found["fvu"]["tuned"]), "fraction of variance unexplained"),
    ]


def _shared_note(found: dict[str, Any]) -> str:
    counts, median = found["counts"], found["cosine_median"]
    cosine = "" if median is None else f"median cosine {show(median, digits=3)}; "
    return f"{cosine}{show(counts['uneven'])} uneven, {show(counts['dead'])} silent"


def _interval(entry: dict[str, Any]) -> str:
    return "" if entry["low"] is None or entry["high"] is None else show_interval(entry["low"], entry["high"])


def _rows(patching: dict[str, Any] | None) -> list[ClosedRow]:
    closed = (patching or {}).get("closed") or {}
    return [
        ClosedRow(
            CHANGES[name][0],
            show(entry["share"], digits=3),
            _interval(entry),
            show(entry["kl"], digits=3),
            CHANGES[name][1],
        )
        for name, entry in closed.items()
        if entry is not None
    ]


def _sae(found: dict[str, Any] | None) -> tuple[str, list[ExampleLatent]] | None:
    """Return what is said of the SAE on the difference, and its largest latents; ``None`` if there is none."""
    if found is None:
        return None
    words = (
        f"{show(found['n_latents'])} latents, {encoder_label(found['encoder'])}: fvu {show(found['fvu'])} of the difference, "
        f"{show(found['l0'])} latents per token, {show(found['dead'])} silent."
    )
    latents = [
        _example(row, f"{show(row['contribution'], digits=3)} of the summed squared contributions") for row in found["latents"]
    ]
    return words, latents


def _example(row: dict[str, Any], words: str) -> ExampleLatent:
    logits = row["logits"]
    example = example_of(row | {"explanation": None, "logits": None if isinstance(logits, str) else logits})
    return example._replace(words=words)


def _figures(row: dict[str, Any]) -> str:
    words = [KIND_WORDS[row["kind"]], f"relative norm {show(row['relative_norm'], digits=3)}"]
    words += [] if row["cosine"] is None else [f"cosine {show(row['cosine'], digits=2)}"]
    if row["nu_error"] is not None and row["nu_reconstruction"] is not None:
        ratios = f"nu error {show(row['nu_error'], digits=2)}, nu reconstruction {show(row['nu_reconstruction'], digits=2)}"
        words += [ratios, "true" if row["true"] else "also present in the other model"]
    return "; ".join(words)


def _differences(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of the table of differences without a dictionary: name, size, promoted tokens."""
    if found["mean_difference"] is None:
        return []
    rows = [
        ("mean difference", f"norm {show(found['mean_difference']['norm'])}", _promoted(found["mean_difference"]["logits"]))
    ]
    for number, each in enumerate(found["principal"], 1):
        words = f"{show(each['share'], digits=3)} of the variance"
        rows.append((f"principal direction {number}", words, _promoted(each["logits"])))
    return rows


def _promoted(logits: dict[str, Any] | str) -> str:
    if isinstance(logits, str):
        return logits
    return " ".join(entry["token"] for entry in logits["promoted"][:8])


def bars(ax: Axes, counts: list[int] | None, ends: tuple[float, float], label: str) -> str | None:
    if not counts or not sum(counts):
        return None
    edges = np.linspace(*ends, len(counts) + 1)
    width = edges[1] - edges[0]
    exclusive = (edges[:-1] < 0.1 - 1e-9) | (edges[1:] > 0.9 + 1e-9)
    colors = [ACCENT if special and ends[0] == 0 else MUTED for special in exclusive]
    ax.bar(edges[:-1], counts, width=width * 0.9, align="edge", color=colors)
    if max(counts) > 20 * max(1, sorted(counts)[len(counts) // 2]):
        ax.set_yscale("symlog", linthresh=1)
        # Plain numbers: the few exclusive latents must be seen beside hundreds of shared ones.
        ax.set_yticks([tick for tick in (0, 1, 10, 100, 1000, 10_000, 100_000) if tick <= max(counts) * 2])
        ax.set_yticklabels([f"{tick:,}" for tick in ax.get_yticks().astype(int)])
    ax.set(xlabel=label, ylabel="latents", xlim=ends, xticks=np.linspace(*ends, 5))
    filled = [(edge, count) for edge, count in zip(edges, counts, strict=False) if count]
    return f"Histogram of the {label}: " + ", ".join(f"{count} from {edge:.3g}" for edge, count in filled) + "."


def _closed(ax: Axes, patching: dict[str, Any] | None) -> str | None:
    rows = [(name, entry) for name, entry in ((patching or {}).get("closed") or {}).items() if entry is not None]
    if not rows:
        return None
    for place, (name, entry) in enumerate(reversed(rows)):
        ax.barh(place, entry["share"], color=ACCENT if name == "changed" else SOFT, edgecolor=MUTED, linewidth=0.6)
        if entry["low"] is not None and entry["high"] is not None:
            ax.plot([entry["low"], entry["high"]], [place, place], color=MUTED, linewidth=1.4)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [CHANGES[name][0] for name, _ in reversed(rows)])
    low = min(0.0, *(entry["share"] for _, entry in rows))
    # Changes that only do harm may reach far below 0.
    ax.set(xlabel="share of the KL divergence closed", xlim=(max(low * 1.1, -1.0), 1.05))
    return "Share of the KL divergence closed: " + ", ".join(
        f"{CHANGES[name][0]} {show(entry['share'], digits=3)}" for name, entry in rows
    )
