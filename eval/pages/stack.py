"""Page of a report of several sites (stack, cross-layer transcoder, crosscoder): all replaced at once, and each alone."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .document import document, encoder_label, kind_label
from .numbers import show
from .plots import ACCENT, BAD, FIGURE_INCHES, INK, MUTED, WARN, plain_log_ticks, plot_card
from .tables import Cell, Column, EntryRow, FigureTile, figure_cell

Report = dict[str, Any]
# Characters that fit next to a plot's axis.
LABEL = 16
# Two plots stand side by side.
WIDTH_INCHES = 470 / 72

COLUMNS = (
    Column(
        "fvu",
        "layer_fvu",
        None,
        "Fraction of variance unexplained of the layer's output in the original model: 0 is perfect.",
    ),
    Column("l0", "layer_l0", None, "Number of active latents of the layer per token, mean over tokens."),
    Column("dead", "layer_dead_fraction", None, "Fraction of the layer's latents that never fire on the scored tokens."),
    Column(
        "ce spliced",
        "layer_ce_spliced",
        None,
        "Cross-entropy with only this layer replaced by its reconstruction, nats per token.",
    ),
    Column("ce mean", "layer_ce_mean", None, "The same with mean ablation: the importance of the layer to the model."),
    Column("ce zero", "layer_ce_zero", None, "The same with zero ablation."),
    Column("KL spliced", "layer_kl_spliced", None, "KL divergence from the original model's predictions, nats per token."),
    Column("KL mean", "layer_kl_mean", None, "The same divergence with mean ablation."),
    Column("KL zero", "layer_kl_zero", None, "The same divergence with zero ablation."),
    Column("top-1 spliced", "layer_top1_spliced", None, "Fraction of predictions whose most likely token is unchanged."),
    Column("top-1 mean", "layer_top1_mean", None, "The same fraction with mean ablation."),
    Column("top-1 zero", "layer_top1_zero", None, "The same fraction with zero ablation."),
)
SAME_AT_ALL_SITES = ("layer_l0", "layer_dead_fraction")
# Columns of a crosscoder, in place of those that are the same at all its sites.
OF_CROSSCODER = (
    Column(
        "norm share",
        "layer_norm_share",
        None,
        "Mean over latents of the share of a latent's decoder norm at this site, in units of each site's scale.",
    ),
    Column("exclusive", "layer_exclusive", None, "Number of latents with at least 0.9 of their decoder norm at this site."),
)
# Entries of the row for all layers at once, in the order of COLUMNS.
TOTALS = (
    *("fvu_layer_mean", "l0_total", "dead_fraction", "ce_spliced", "ce_mean", "ce_zero"),
    *("kl_spliced", "kl_mean", "kl_zero", "top1_agreement", "top1_mean", "top1_zero"),
)
EXPLANATIONS = {
    "layers": "Number of replaced layers.",
    "n_latents": "Total number of latents of all layers.",
    "parameters": "Total number of learned parameters of all dictionaries.",
    "documents": "Number of held-out documents scored. The means are computed on other documents.",
    "tokens": "Number of tokens scored. Excluded positions (special or leading tokens) are not replaced either.",
    "tokens_asked": "Number of tokens requested, half of them for scoring. Shorter held-out text is split in half.",
    "documents_shared": "Number of documents scored only in part: 0, unless there are too few to keep them whole.",
    "fvu_layer_mean": "Mean fvu over layers, on the original model's activations.",
    "l0_total": "Number of active latents of all layers per token (a crosscoder's, once for all sites), on the original "
    "model's activations.",
    "dead_fraction": "Fraction of all latents that never fire within a window of tokens.",
    "dead_window_tokens": "Length of that window in tokens.",
    "dead_training_fraction": "Fraction of all latents that did not fire on the last tokens of their training.",
    "dead_training_window_tokens": "Length of that window in tokens; the shortest if they differ.",
    "downstream_tokens": "Number of predictions scored: replaced positions whose next token belongs to the same document.",
    "ce_clean": "Cross-entropy of the original model, nats per token.",
    "ce_spliced": "Cross-entropy with all layers replaced at once, each reading the output of the replaced earlier ones; a "
    "crosscoder's code is that of the original model's activations.",
    "ce_zero": "Cross-entropy with zero ablation of all layers at once.",
    "ce_mean": "Cross-entropy with mean ablation of all layers at once.",
    "kl_spliced": "KL divergence from the original predictions to those with all layers replaced, nats per token.",
    "kl_zero": "The same divergence with zero ablation of all layers.",
    "kl_mean": "The same divergence with mean ablation of all layers.",
    "ce_increase": "ce_spliced - ce_clean: the cost of replacing all layers, nats per token.",
    "top1_agreement": "Fraction of predictions whose most likely token is unchanged with all layers replaced.",
    "top1_zero": "The same fraction with zero ablation of all layers.",
    "top1_mean": "The same fraction with mean ablation of all layers.",
    "ce_recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean). 1 is perfect, 0 no better than zeros.",
    "ce_recovered_mean": "The same fraction with mean ablation: the fairer baseline.",
    "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
    "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
}
# Label, key, and the note below the number.
TILES = (
    ("fvu", "fvu_layer_mean", "fraction of variance unexplained, mean over {layers} {places}"),
    ("l0", "l0_total", "latents per token, {in_total}"),
    ("ce increase", "ce_increase", "nats per token, all {places} replaced, above {ce_clean}"),
    ("ce recovered", "ce_recovered_mean", "against mean ablation of all {places}"),
    ("ce recovered", "ce_recovered_zero", "against zero ablation of all {places}"),
    ("KL", "kl_spliced", "nats per token, all {places} replaced"),
    ("same top token", "top1_agreement", "fraction of predictions, all {places} replaced"),
    ("dead fraction", "dead_fraction", "of {n_latents} latents, on {dead_window_tokens} tokens"),
)


def render_stack(report: Report) -> str:
    """Render the report of a stack as a page. Equal input gives equal bytes."""
    trained, commit = report["training_tokens"], report["git_commit"]
    heading = f"{kind_label(report['kind'])}, {report['layers']} {places_word(report)}"
    columns, place = stack_columns(report), places_word(report)[:-1]
    size = (WIDTH_INCHES, max(FIGURE_INCHES[1], 0.32 * (report["layers"] + 4)))
    return document(
        "stack.html",
        heading,
        ("table.css",),
        ("page.js", "table.js", "comparison.js"),
        command="report",
        heading=heading,
        shape=f"{show(report['n_latents'])} latents \u00b7 {show(report['parameters'])} parameters",
        facts={
            "model": report["model"],
            "text": report["text"],
            "encoder": encoder_label(report["encoder"]),
            "trained on": None if trained is None else f"{show(trained)} tokens",
            "evaluated on": f"{show(report['tokens'])} tokens, {show(report['documents'])} documents",
            "git commit": None if commit is None else str(commit)[:12],
            **({"doubts": "; ".join(report["doubts"])} if report.get("doubts") else {}),
        },
        tiles=stack_tiles(report),
        columns=columns,
        place=place,
        layers=[
            (short(hook), [figure_cell({column.key: report[column.key][number]}, column.key) for column in columns])
            for number, hook in enumerate(report["layer_hooks"])
        ],
        total=_totals(report),
        plots=[plot_card(title, note, lambda ax, draw=draw: draw(ax, report), size) for title, note, draw in PLOTS],
        entries=[EntryRow(key, show(report[key], digits=6), text) for key, text in EXPLANATIONS.items() if key in report],
    )


def places_word(report: Report) -> str:
    """Return what a report calls the places that it replaces: layers, or the sites of a crosscoder."""
    return "sites" if report["kind"] == "crosscoder" else "layers"


def stack_columns(report: Report) -> tuple[Column, ...]:
    """Return the columns of a report's table."""
    if report["kind"] != "crosscoder":
        return COLUMNS
    return (COLUMNS[0], *OF_CROSSCODER, *(column for column in COLUMNS[1:] if column.key not in SAME_AT_ALL_SITES))


def _totals(report: Report) -> list[Cell]:
    """Return the row of all places at once."""
    totals = dict(zip((column.key for column in COLUMNS), TOTALS, strict=True))
    sums = {column.key: sum(report[column.key]) for column in OF_CROSSCODER if column.key in report}
    return [
        figure_cell(sums, column.key) if column.key in sums else figure_cell(report, totals[column.key])
        for column in stack_columns(report)
    ]


def stack_tiles(report: Report) -> list[FigureTile]:
    """Return the key figures of a stack's report."""
    return [
        FigureTile(key, label, show(report[key]), _filled(note, report), text=EXPLANATIONS[key]) for label, key, note in TILES
    ]


def _filled(note: str, report: Report) -> str:
    numbers = {name: show(report[name]) for name in ("layers", "ce_clean", "n_latents", "dead_window_tokens")}
    places = places_word(report)
    return note.format(
        places=places, in_total="total over layers" if places == "layers" else "one code for all sites", **numbers
    )


def short(hook: str) -> str:
    """Shorten ``a.mlp:in -> a.mlp:out`` to ``a.mlp``; return anything else unchanged."""
    reads, arrow, writes = hook.partition(" -> ")
    path = reads.rpartition(":")[0]
    return path if arrow and reads == f"{path}:in" and writes == f"{path}:out" else hook


def _costs(ax: Axes, report: Report) -> str:
    names = [_label(hook) for hook in report["layer_hooks"]] + ["all at once"]
    bars = (("spliced", ACCENT), ("mean", WARN), ("zero", BAD))
    clean, words = report["ce_clean"], []
    smallest = 1e-4
    for name, color in bars:
        costs = [ce - clean for ce in (*report[f"layer_ce_{name}"], report[f"ce_{name}"])]
        # Costs of zero or below do not fit on a logarithmic axis; their numbers are in the table.
        ax.scatter(
            [max(cost, smallest) for cost in costs], range(len(names)), color=color, s=34, zorder=3, label=_variant(name)
        )
        words.append(
            f"{_variant(name)}: " + ", ".join(f"{label} {show(cost)}" for label, cost in zip(names, costs, strict=True))
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", xlabel="increase of cross-entropy, nats, log scale", ylim=(len(names) - 0.5, -0.5))
    plain_log_ticks(ax.xaxis)
    ax.axhline(len(names) - 1.5, color=MUTED, linewidth=0.8)
    ax.grid(visible=True, axis="both")
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.0)
    return "Increase of the cross-entropy in nats. " + "; ".join(words) + "."


def _fvus(ax: Axes, report: Report) -> str:
    names, values = [_label(hook) for hook in report["layer_hooks"]], report["layer_fvu"]
    ax.barh(range(len(names)), values, height=0.62, color=ACCENT)
    for row, value in enumerate(values):
        ax.text(value + 0.015 * max(*values, 1e-9), row, show(value, digits=3), va="center", color=INK)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="fvu", xlim=(0, 1.2 * max(*values, 1e-9)), ylim=(len(names) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    return "fvu by layer: " + ", ".join(f"{name} {show(value)}" for name, value in zip(names, values, strict=True)) + "."


def _label(hook: str) -> str:
    """Return the end of a hook, short enough for a plot's axis."""
    text = short(hook)
    while len(text) > LABEL and "." in text:
        text = text.partition(".")[2]
    return text if len(text) <= LABEL else f"\u2026{text[1 - LABEL :]}"


def _variant(name: str) -> str:
    return name if name == "spliced" else f"{name}-ablated"


# Title, note, drawing function.
PLOTS = (
    (
        "Cost of each layer",
        "Increase in loss from replacing one layer, or all at once. Values below 0.0001 are drawn at the edge.",
        _costs,
    ),
    ("Variance unexplained", "By layer, on the original model's activations. Lower is better.", _fvus),
)
