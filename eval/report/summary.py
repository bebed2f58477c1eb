"""Summary table of a report for the console."""

from typing import Any

from ..pages.document import encoder_words
from ..pages.numbers import dead_words, show
from .stack import stack_summary


def report_summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as (name, value) pairs."""
    if "layer_hooks" in report:
        return stack_summary(report)
    lines = [
        (
            "dictionary",
            f"{report['kind']} {report['d_in']} -> {report['n_latents']}  {encoder_words(report['encoder'])}  "
            + (report["hook"] or ""),
        ),
        ("selection", report["selection"]),
        (
            "fvu",
            f"{show(report['fvu'])}   "
            + (f"affine map {show(report['fvu_affine'])}   " if "fvu_affine" in report else "")
            + f"cosine {show(report['cosine'])}   on {report['tokens']:,} held-out tokens",
        ),
        (
            "l0",
            f"{show(report['l0_mean'])}   median {report['l0_median']:.0f}   10 to 90 %: "
            f"{report['l0_p10']:.0f}-{report['l0_p90']:.0f}",
        ),
        ("latents", f"{dead_words(report)}   dense {report['dense_fraction']:.2%}"),
    ]
    if "ce_clean" in report:
        names = ("clean", "spliced", "zero", "mean", "resample")
        ends = [report[f"ce_increase_{end}"] for end in ("low", "high")]
        lines += [
            ("cross-entropy", "   ".join(f"{name} {show(report[f'ce_{name}'])}" for name in names)),
            (
                "increase",
                f"{show(report['ce_increase'])}"
                + (f"   95 % interval {show(ends[0])} to {show(ends[1])}" if None not in ends else ""),
            ),
            (
                "recovered",
                f"{show(report['ce_recovered_zero'])} of zero   {show(report['ce_recovered_mean'])} of mean ablation",
            ),
            ("KL", f"{show(report['kl_spliced'])}   same top token {show(report['top1_agreement'])}"),
        ]
    lines.append(
        (
            "dark matter",
            f"fvu total {show(report['fvu_total'])}   nonlinear {show(report['fvu_nonlinear'])}   linear share of the "
            f"error {show(report['linear_error_share'])}   norm R2 {show(report['err_norm_r2'])}",
        )
    )
    return lines
