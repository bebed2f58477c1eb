"""Summary table of a report for the console."""

from typing import Any

from ..pages.numbers import dead_words
from .stack import stack_summary


def report_summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as (name, value) pairs."""
    if "layer_hooks" in report:
        return stack_summary(report)
    lines = [
        (
            "dictionary",
            f"{report['kind']} {report['d_in']} -> {report['n_latents']}  {report['encoder']}  {report['hook'] or ''}",
        ),
        ("selection", report["selection"]),
        (
            "fvu",
            f"{_number(report['fvu'])}   "
            + (f"affine map {_number(report['fvu_affine'])}   " if "fvu_affine" in report else "")
            + f"cosine {_number(report['cosine'])}   on {report['tokens']:,} held-out tokens",
        ),
        (
            "l0",
            f"{report['l0_mean']:.2f}   median {report['l0_median']:.0f}   10 to 90 %: "
            f"{report['l0_p10']:.0f}-{report['l0_p90']:.0f}",
        ),
        ("latents", f"{dead_words(report)}   dense {report['dense_fraction']:.2%}"),
    ]
    if "ce_clean" in report:
        names = ("clean", "spliced", "zero", "mean", "resample")
        ends = [report[f"ce_increase_{end}"] for end in ("low", "high")]
        lines += [
            ("cross-entropy", "   ".join(f"{name} {_number(report[f'ce_{name}'])}" for name in names)),
            (
                "increase",
                f"{_number(report['ce_increase'])}"
                + (f"   95 % interval {_number(ends[0])} to {_number(ends[1])}" if None not in ends else ""),
            ),
            (
                "recovered",
                f"{_number(report['ce_recovered_zero'])} of zero   {_number(report['ce_recovered_mean'])} of mean ablation",
            ),
            ("KL", f"{_number(report['kl_spliced'])}   same top token {_number(report['top1_agreement'])}"),
        ]
    lines.append(
        (
            "dark matter",
            f"fvu total {_number(report['fvu_total'])}   nonlinear {_number(report['fvu_nonlinear'])}   linear share of the "
            f"error {_number(report['linear_error_share'])}   norm R2 {_number(report['err_norm_r2'])}",
        )
    )
    return lines


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
