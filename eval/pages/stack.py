"""Page of a stack's report: all layers replaced at once, and each layer alone."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .document import document, encoder_parts
from .numbers import show
from .plots import ACCENT, BAD, FIGURE_INCHES, INK, MUTED, WARN, plain_log_ticks, plot_card
from .tables import Column, EntryRow, FigureTile, figure_cell

Report = dict[str, Any]
# Characters that fit next to a plot's axis.
LABEL = 16

COLUMNS = (
    Column(
        "fvu",
        "layer_fvu",
        None,
        "Fraction of variance unexplained, against what the layer writes in the untouched model: 0 is perfect.",
    ),
    Column("l0", "layer_l0", None, "Latents of the layer that fire on a token, mean over tokens."),
    Column("dead", "layer_dead_fraction", None, "Share of the layer's latents that are silent on all tokens scored."),
    Column(
        "ce spliced",
        "layer_ce_spliced",
        None,
        "Cross-entropy with this layer alone replaced by its reconstruction, nats per token.",
    ),
    Column("ce mean", "layer_ce_mean", None, "The same with the mean in its place: what the layer is worth to the model."),
    Column("ce zero", "layer_ce_zero", None, "The same with zeros in its place."),
    Column("KL spliced", "layer_kl_spliced", None, "KL divergence from the untouched model's predictions, nats per token."),
    Column("KL mean", "layer_kl_mean", None, "The same divergence with the mean in its place."),
    Column("KL zero", "layer_kl_zero", None, "The same divergence with zeros in its place."),
    Column("top-1 spliced", "layer_top1_spliced", None, "Share of predictions whose likeliest token stays the same."),
    Column("top-1 mean", "layer_top1_mean", None, "The same share with the mean in its place."),
    Column("top-1 zero", "layer_top1_zero", None, "The same share with zeros in its place."),
)
# Entries of the row for all layers at once, in the order of COLUMNS.
TOTALS = (
    *("fvu_layer_mean", "l0_total", "dead_fraction", "ce_spliced", "ce_mean", "ce_zero"),
    *("kl_spliced", "kl_mean", "kl_zero", "top1_agreement", "top1_mean", "top1_zero"),
)
EXPLANATIONS = {
    "layers": "Places of the model that are replaced.",
    "n_latents": "Latents of all layers together.",
    "parameters": "Numbers learned, of all dictionaries together.",
    "documents": "Held-out documents scored. The means were taken on others.",
    "tokens": "Tokens scored. Excluded positions (special tokens, the first few of a context) are neither replaced nor scored.",
    "tokens_asked": "Tokens asked for, half of them to be scored. Held-out text that is shorter is cut in halves.",
    "documents_shared": "Documents partly scored and partly not: 0, unless there are too few to keep them whole.",
    "fvu_layer_mean": "Mean over layers of the layers' fvu, on the untouched model's activations.",
    "l0_total": "Latents firing on a token, of all layers together, on the untouched model's activations.",
    "dead_fraction": "Share of all latents that are silent on the whole window of tokens.",
    "dead_window_tokens": "That window, in tokens.",
    "dead_training_fraction": "Share of all latents that were silent on the last tokens of their training.",
    "dead_training_window_tokens": "That window, in tokens; of several, the shortest.",
    "downstream_tokens": "Predictions scored: at replaced positions whose next token is of the same document.",
    "ce_clean": "Cross-entropy of the untouched model, nats per token.",
    "ce_spliced": "Cross-entropy with reconstructions in place at all layers at once, each reading what the earlier ones left.",
    "ce_zero": "Cross-entropy with zeros in place at all layers at once.",
    "ce_mean": "Cross-entropy with the means in place at all layers at once.",
    "kl_spliced": "KL divergence from the untouched model's predictions to those with all layers replaced, nats per token.",
    "kl_zero": "The same divergence with zeros at all layers.",
    "kl_mean": "The same divergence with the means at all layers.",
    "ce_increase": "ce_spliced - ce_clean: what it costs to replace all layers, nats per token.",
    "top1_agreement": "Share of predictions whose likeliest token stays the same with all layers replaced.",
    "top1_zero": "The same share with zeros at all layers.",
    "top1_mean": "The same share with the means at all layers.",
    "ce_recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean). 1 is perfect, 0 no better than zeros.",
    "ce_recovered_mean": "The same fraction, against the means: the fairer yardstick.",
    "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
    "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
}
# Label, key, and the note below the number.
TILES = (
    ("fvu", "fvu_layer_mean", "variance unexplained, mean over {layers} layers"),
    ("l0", "l0_total", "latents per token, all layers together"),
    ("ce increase", "ce_increase", "nats per token, all layers replaced, on {ce_clean}"),
    ("ce recovered", "ce_recovered_mean", "against mean ablation of all layers"),
    ("ce recovered", "ce_recovered_zero", "against zero ablation of all layers"),
    ("KL", "kl_spliced", "nats per token, all layers replaced"),
    ("same top token", "top1_agreement", "share of predictions, all layers replaced"),
    ("dead share", "dead_fraction", "of {n_latents} latents, in {dead_window_tokens} tokens"),
)


def render_stack(report: Report) -> str:
    """Render the report of a stack as a page. Equal input gives equal bytes."""
    name, arguments = encoder_parts(report["encoder"])
    trained, commit = report["training_tokens"], report["git_commit"]
    heading = f"{report['kind']}, {report['layers']} layers"
    size = (FIGURE_INCHES[0], max(FIGURE_INCHES[1], 0.32 * (report["layers"] + 4)))
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
            "encoder": f"{name} {arguments}".strip(),
            "trained on": None if trained is None else f"{show(trained)} tokens",
            "evaluated on": f"{show(report['tokens'])} tokens, {show(report['documents'])} documents",
            "git commit": None if commit is None else str(commit)[:12],
            **({"doubts": "; ".join(report["doubts"])} if report.get("doubts") else {}),
        },
        tiles=[FigureTile(key, label, show(report[key]), _filled(note, report)) for label, key, note in TILES],
        columns=COLUMNS,
        layers=[
            (short(hook), [figure_cell({column.key: report[column.key][number]}, column.key) for column in COLUMNS])
            for number, hook in enumerate(report["layer_hooks"])
        ],
        total=[figure_cell(report, key) for key in TOTALS],
        plots=[plot_card(title, note, lambda ax, draw=draw: draw(ax, report), size) for title, note, draw in PLOTS],
        entries=[EntryRow(key, show(report[key], digits=6), text) for key, text in EXPLANATIONS.items() if key in report],
    )


def _filled(note: str, report: Report) -> str:
    return note.format(**{name: show(report[name]) for name in ("layers", "ce_clean", "n_latents", "dead_window_tokens")})


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
    span = 1000.0
    for name, color in bars:
        costs = [ce - clean for ce in (*report[f"layer_ce_{name}"], report[f"ce_{name}"])]
        # Costs of zero or below do not fit on a logarithmic axis; their numbers are in the table.
        ax.scatter(
            [max(cost, smallest) for cost in costs], range(len(names)), color=color, s=34, zorder=3, label=_variant(name)
        )
        words.append(
            f"{_variant(name)}: " + ", ".join(f"{label} {show(cost)}" for label, cost in zip(names, costs, strict=True))
        )
        span = max(span, max(costs) / smallest)
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", xlabel="cross-entropy above the untouched model's, nats", ylim=(len(names) - 0.5, -0.5))
    plain_log_ticks(ax.xaxis, span)
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
        "What replacing one layer alone, and all at once, costs the model. Below 0.0001, or a gain, stands at the edge.",
        _costs,
    ),
    ("Variance unexplained", "By layer, on the untouched model's activations. Lower is better.", _fvus),
)
