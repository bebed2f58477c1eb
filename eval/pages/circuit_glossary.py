"""Glossary of the circuit benchmark: the texts of circuits.html and docs/circuits.md."""

# Entry -> definition, unit, and which values are good.
QUESTION = {
    "task": "Task of the model. Prompts come in pairs, a clean and a corrupted one of the same length.",
    "corruption": "The change made in the corrupted prompt; it determines which part of the task a circuit is about.",
    "metric": "Metric at the end of a prompt, high for the clean answer: logit_diff and max_logit_diff in logits (mean or "
    "largest answer minus foil), prob_diff in probability.",
    "ablation": "Value of a unit outside the circuit: its value on another prompt (resample), its mean, zero (an expert is "
    "off), or the constant that hurts least (optimal).",
    "pairs": "Number of prompt pairs that circuits are evaluated on; as many others are used to find them.",
    "accuracy": "Fraction of clean prompts on which the model prefers the answer; at chance there is nothing to explain.",
    "metric_clean": "Mean metric of the model on clean prompts.",
    "metric_corrupted": "Mean metric of the model on corrupted prompts; the further from the clean one, the more there is to "
    "explain.",
}
FAMILY = {
    "family": "Unit set: latents of a dictionary, with its error as a node, always kept, or always ablated; random features "
    "of equal l0; the model's own neurons, components (attention heads and MLPs), or experts of its mixtures.",
    "method": "Method that scores the units; a circuit holds the units of largest absolute score.",
    "units": "Number of units to choose from.",
    "metric_empty": "Mean metric with every unit ablated, where faithfulness is 0.",
    "faithfulness_all": "Faithfulness with every unit kept: 1, unless errors are ablated; then it measures how much of the "
    "task the dictionary captures.",
    "refused": "Reason for missing figures: ablating everything does not change the metric beyond noise.",
}
CIRCUIT = {
    "cpr": "Area under faithfulness over the fraction of units kept, 0.1 to 100%, most helpful units first; more is better. "
    "About 1 is a faithful circuit at every size; above 1, units that work against the task are left out.",
    "cmd": "Area between faithfulness and 1 over the fraction of units kept, largest absolute scores first; 0 is best.",
    "nodes_50": "Fewest units, largest absolute score first, with faithfulness 0.5 on every second evaluation pair; fewer "
    "is better, never if no size reaches it.",
    "nodes_80": "Fewest units with faithfulness 0.8 on these pairs: the circuit that the figures to its right describe.",
    "nodes_90": "Fewest units with faithfulness 0.9.",
    "faithfulness_80": "Faithfulness of the 0.8 circuit on the evaluation pairs not used to choose its size, as are its "
    "completeness and minimality; the amount below 0.8 is selection bias.",
    "completeness": "Faithfulness of all units outside the 0.8 circuit: 0 is best, since they then have no effect. Compare "
    "circuits of similar size: one of nearly all units leaves nothing out.",
    "minimality": "Faithfulness that the 0.8 circuit loses without one of its units, median over its 20 of largest score; "
    "more is better, near 0 it contains unnecessary units. Compare circuits of similar size.",
    "stability": "Mean Jaccard index of the 0.8 circuit and those found on resampled pairs; 1 is the same units each time. "
    "Undefined for methods that do not score pair by pair.",
    "exact_pearson": "Pearson correlation of scores with the effects of patching units one by one, over the 20 of largest "
    "score and 20 others; 1 is best.",
    "exact_spearman": "Spearman (rank) correlation with the same effects; 1 is best.",
    "auc": "Area under the ROC curve of scores against the ground-truth units: 1 ranks all of them first, 0.5 is chance. Only "
    "for models with a known circuit.",
}
HEADS = {
    "direct": "Direct effect of a node on the answer's logit, minus its mean effect on the logits of answer and foils, with "
    "the denominator of the final norm held fixed; mean over evaluation pairs, in logits. All nodes and the biases sum to the "
    "model's own centred logit.",
    "direct_share": "Direct effect divided by the model's centred logit of the answer.",
    "attention_right": "Attention of a head from the question to the label of the right option, mean over pairs.",
    "attention_others": "Its attention to the other labels, summed.",
    "attends": "Class of a head by its attention to the labels: the right label, one place (the same label whichever is "
    "right), all labels, or elsewhere (less than half of it is on labels).",
    "rank_needed": "Fewest directions that keep 95 % of the accuracy if queries (q, at the question), keys or values (k, v, at "
    "the labels) of the heads of largest direct effect keep only their mean and their part in the directions of largest "
    "variance, fitted on the other pairs.",
    "accuracy_by_rank": "Accuracy with so many of these directions.",
    "accuracy_random": "Accuracy with as many random directions, mean of 3 draws: a floor.",
}
COST = {
    "forwards": "Forward passes of whole batches (32 pairs, unless a method uses another size) for scoring; evaluation of the "
    "circuits is not counted.",
    "backwards": "Backward passes of whole batches for scoring.",
    "seconds": "Wall-clock time of scoring in seconds; affected by other processes on the machine.",
}
DRAWN = {
    "faithfulness": "(m(circuit) - m(empty)) / (m(model) - m(empty)) for metrics m averaged over pairs: 1 matches the model, "
    "0 is no better than ablating everything; the band is a 95% interval.",
    "sizes": "Number of units in the circuit.",
    "weight": "Edge: first-order decrease of the metric if, along this edge alone, the sender is taken from the corrupted "
    "prompt, in the metric's units; wider lines are larger, dashed ones negative.",
    "score": "Node: decrease of the metric if the unit is taken from the corrupted prompt, as estimated by the method, in the "
    "metric's units; negative for units that work against the task.",
}
EXPLANATIONS = {
    "Task": QUESTION,
    "Unit sets": FAMILY,
    "Circuits": CIRCUIT,
    "Heads": HEADS,
    "Cost of scoring": COST,
    "Plots and drawings": DRAWN,
}


def explanation(key: str) -> str:
    """Return the explanation of an entry; interval ends share that of their figure.

    Raises:
        KeyError: If the entry has no explanation.
    """
    stem = key.removesuffix("_low").removesuffix("_high")
    for entries in EXPLANATIONS.values():
        if stem in entries:
            ending = "" if stem == key else f" {'Low' if key.endswith('_low') else 'High'} end of its 95% interval over pairs."
            return entries[stem] + ending
    raise KeyError(key)


def circuit_markdown() -> str:
    """Return the tables of docs/circuits.md as Markdown."""
    parts = []
    for section, entries in EXPLANATIONS.items():
        rows = [f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in entries.items()]
        parts.append("\n".join([f"### {section}", "", "| entry | meaning |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)
