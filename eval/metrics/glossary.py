"""Generator of docs/report.md from the glossary, and the version of the report format."""

from textwrap import dedent

from ..pages.glossary import EXPLANATIONS

REPORT_VERSION = 1


def report_markdown() -> str:
    """Return the text of docs/report.md: how a report is computed, and its schema."""
    parts = [INTRODUCTION.format(version=REPORT_VERSION)]
    for section, entries in EXPLANATIONS.items():
        rows = [f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in entries.items()]
        parts.append("\n".join([f"## {section}", "", "| entry | what it says |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


INTRODUCTION = dedent("""\
    # The report

    `sparsary eval CHECKPOINT...` writes `report.json`, the entries below, and `report.html`, which shows them. This page is
    made from the texts of the report's own page, and a test compares the two:

    ```
    python -c "from sparsary.eval.metrics.glossary import report_markdown; print(report_markdown(), end='')" > docs/report.md
    ```

    **Schema.** One flat JSON object, version {version} (`report_version`). Values are strings, numbers, lists of numbers, or
    `null`; the one exception is `reasons`, which says of every `null` entry why it is null. There is no NaN and no infinity.
    Fractions are 0 to 1, losses are in nats, budgets in tokens. New entries may come within a version; the version goes up
    when one goes, and what is defined anew gets a new name. Given activations instead of a model, a report has no entries
    that need the model. A directory of checkpoints, a cross-layer transcoder, or a crosscoder has a report of another kind
    (`stack_report_version`): all layers in place at once, and each alone.

    **How it is measured.** Documents held out from training are cut in two halves. The first fits what has to be fitted (means,
    usual norms, the linear map of the error); the second is scored, and only it. Sums run in float64 over all tokens before
    any division: how the text is cut into batches changes no figure, and memory does not grow with tokens (a row of sums per
    document aside). Positions left out of training are neither replaced nor scored.

    **Intervals.** Entries that end in `_low` and `_high` are 95 % percentile intervals: scored documents are drawn anew with
    replacement, a thousand times with a fixed seed, and the figure is computed from their sums. They are about other
    documents, not about other seeds of the training. Sums by document are kept in `documents.safetensors` beside the report.

    **Dead latents** have two windows. `dead_fraction` is of the tokens scored, `dead_training_fraction` of the training's last
    tokens: `usage.safetensors` in a checkpoint holds how long each latent had been silent (`load(...).training_usage`). A share
    is small where its window is long: say the window, compare equal ones, and count on a million tokens or more before a claim.
    Where a corpus is too small, a small model writes one: `docs/studies/sample_text.py`.

    **Comparisons.** `sparsary compare` gives every figure of a family an interval over seeds and documents together, the
    standard deviation over seeds, and its difference to one family (`--against`) with a verdict: better or worse after Holm's
    correction over the figure's differences; equivalent where two one-sided tests put it below a margin (2 % of the other's
    figure, 0.01 of the latents); undecided where neither is shown, with the smallest difference that would have been. With one
    seed nothing is decided. A family whose l0 is off the common one by more than 2 % is marked, not called best, and compared
    with none as an equal; `--match-l0 L0` interpolates sweeps over budgets instead. Runs whose recipes differ in the seed only
    are taken for one family.

    **Several at once.** `sparsary eval A B C` runs the model once for all dictionaries of one model and text, whatever their
    hooks; figures are those of judging each alone. `sparsary compare A B C --out DIR` sets them side by side.

    **What was measured is kept** in `eval_cache` beside the checkpoint, by content: weights, model and its revision, text,
    tokens, selection, and the version of each group of metrics. A new group is measured without the others. `--no-cache`
    ignores it, and it may be deleted at any time.

    **Explained variance** is quoted by at least six definitions. On one made-up reconstruction, 20 % too small, off by a
    constant and noisy, of targets whose seven dimensions vary by factors of up to 250, they say:

    | `ev_global` | `ev_mean_dim` | `ev_residual_variance` | `ev_scalar_mean` | `ev_uncentred` | `ev_mean_token` |
    |---|---|---|---|---|---|
    | 0.948 | -33.890 | 0.958 | 0.957 | 0.963 | 0.954 |

    Compare within one column only; `fvu`, 1 - `ev_global`, is the one this package quotes. A seventh, the mean over batches of
    a ratio within each batch, is not offered: it depends on the size of the batches, since each is centred on its own mean,
    which takes variance away from small ones. Nor is the ratio within a token about the batch's mean, for the same reason.
    """)
