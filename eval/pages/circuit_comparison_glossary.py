"""Explanations of the entries of ``circuit_comparison.json``, for its page and docs/circuit_comparison.md."""

OVERLAP = {
    "at": "Sizes of the circuits: equal for all (the median of those with faithfulness 0.8), or each task's own smallest "
    "circuit of faithfulness 0.8.",
    "jaccard": "Shared units divided by the units in either circuit. The interval is over resampled pairs, whose scores are "
    "noisier: it tends to lie low.",
    "share_of_smaller": "Shared units divided by those of the smaller circuit: 1 if it is part of the larger one.",
    "spearman": "Rank correlation of absolute scores, over the units that have a score in either task.",
    "ceiling": "Jaccard index of the circuits that two halves of the pairs of the same task give, mean over 50 random halves "
    "and both tasks. Overlaps of different tasks can hardly be higher.",
    "jaccard_halves": "The same with one half of each task's pairs: compare it with the ceiling, as both are of halves.",
    "floor": "Mean Jaccard index of random circuits with as many units per hook, drawn from the units that have a score in "
    "the task. Where a hook has one unit (an MLP), chance has no choice.",
    "p": "Fraction of 9,999 such random draws that share as many units; p_holm is corrected for the number of overlaps.",
    "shared_on_a": "Faithfulness of the shared units alone on task a; shared_on_b on task b.",
}
CROSS = {
    "faithfulness": "Faithfulness of the row's circuit on the column's task, on pairs that chose neither units nor sizes: 1 "
    "is the whole model, 0 everything ablated.",
    "floor_best": "Best of the random circuits (equal counts per hook), whose mean is the floor.",
}
DIFFERENCE = {
    "difference": "Jaccard index of a and b minus that of a and c, at equal sizes. p is of an exact sign test on the units of"
    " a that are in only one of b and c, corrected for the number of rows.",
}
CHANGED = {
    "status": "gained: in the tuned model's circuit of faithfulness 0.8 only; lost: in the base model's only; kept: in both.",
    "gain": "Absolute score in the tuned model minus that in the base model. Units that changed ones read, or that read them,"
    " gain too.",
    "exchanged": "Effect of exchanging this unit's weights alone: of giving it the tuned model's in the base model "
    "(into_base), or the base model's in the tuned one (into_tuned), whichever is larger in each pair. 0 for a unit whose "
    "weights did not change.",
    "ceiling_exchanged": "Largest difference of any unit between two halves of the pairs: the noise of the choice of pairs. "
    "Marked figures exceed it.",
    "lost": "Fraction of the tuned model's metric (above everything ablated) that is lost with the gained units ablated.",
    "closed": "Fraction of the difference between the two models' metrics that is closed if the gained units of the base "
    "model write what they write in the tuned one.",
}
REPAIR = {
    "accuracy_after": "Accuracy of task b with the units of a's circuit that b's lacks doing what they do on a prompt of a "
    "with the same answer.",
    "accuracy_opposite": "The same with prompts of a that have the opposite answer: near 0 if the units say the answer of "
    "their own prompt.",
    "random": "The same with random units outside b's circuit, with equal counts per hook: their mean.",
    "accuracy_all_of_a": "The same with all units of a's circuit.",
}
EXPLANATIONS = {
    "Overlaps": OVERLAP,
    "Cross-faithfulness": CROSS,
    "Differences of overlaps": DIFFERENCE,
    "Two models": CHANGED,
    "Repair": REPAIR,
}


def comparison_markdown() -> str:
    """Return the table of docs/circuit_comparison.md as Markdown."""
    rows = [f"| `{key}` | {text} |" for entries in EXPLANATIONS.values() for key, text in entries.items()]
    return "\n".join(["| entry | meaning |", "|---|---|", *rows]) + "\n"
