"""Figures of a contrast steering for the terminal."""

from typing import Any

from ..pages.steer import edit_rows, neutral_words


def steer_summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    selective, directions, clean = found["most_selective"], found["directions"], found["clean"]
    target = found["target_tokens"]
    lines = [
        ("texts", f"{found['documents']['towards']:,} and {found['documents']['from']:,} documents, half of each reported on"),
        (
            "target tokens",
            f"{target['count']:,}, {target['share']:.3g} of the text towards: {' '.join(target['most_frequent'])}",
        ),
        ("classifier", f"balanced accuracy {found['classifier_accuracy']:.3g} on {found['lengths']['new']} tokens"),
        ("most selective", f"{len(selective)} latents, AUROC {min(row['auroc'] for row in selective):.4g} or more"),
        ("directions", f"effective rank {directions['effective_rank']:.3g}, {directions['directions']} before the eigengap"),
        ("cost measured on", neutral_words(found)),
        ("without an edit", f"steered {clean['share']:.3g}, in the text towards {clean['towards_share']:.3g}"),
    ]
    if "export" in found:
        lines.append(("exported", f"{found['export']['path']} for {found['export']['format']}"))
    return lines


def steer_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of edits at their chosen strengths for the console."""
    head = ["edit", "strength", "steered", "interval", "target mass", "KL", "ce rise", "KL towards"]
    rows = [
        [row.name, row.strength, row.share, row.interval, row.mass, row.kl, row.ce, row.towards_kl] for row in edit_rows(found)
    ]
    return head, rows
