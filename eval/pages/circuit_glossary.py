"""Glossary of the circuit benchmark: the texts of circuits.html and docs/circuits.md."""

# Entry -> definition, unit, and which values are good.
QUESTION = {
    "task": "What the model is asked to do; prompts come in pairs, a clean one and a corrupted one of the same length.",
    "corruption": "What the corrupted prompt changes, and so which part of the task a circuit is about.",
    "metric": "What is measured at the end of a prompt, high for the clean answer: logit_diff and max_logit_diff in logits "
    "(mean or largest answer less foil), prob_diff in probability.",
    "ablation": "What takes the place of a unit that a circuit leaves out: its value on another prompt (resample), its mean, "
    "zero, or the constant that hurts least (optimal).",
    "pairs": "Prompt pairs that circuits were judged on; as many others chose them.",
    "accuracy": "Share of clean prompts on which the model prefers the answer; at chance there is nothing to explain.",
    "metric_clean": "Mean metric of the model on clean prompts.",
    "metric_corrupted": "Mean metric of the model on corrupted prompts; the further from the clean one, the more there is to "
    "explain.",
}
FAMILY = {
    "family": "What nodes are: latents of a dictionary, with its error as a node, always kept, or always ablated; random "
    "features of equal l0; neurons and components (heads and MLPs) of the model itself.",
    "method": "How units were scored; a circuit is the units whose scores are largest, whichever their sign.",
    "units": "How many units there are to choose from.",
    "metric_empty": "Mean metric with every unit ablated: where faithfulness is 0.",
    "faithfulness_all": "Faithfulness with every unit kept: 1, unless errors are ablated, when it is as much as the dictionary "
    "carries of the task.",
    "refused": "Why there are no figures: ablating everything does not move the metric beyond noise.",
}
CIRCUIT = {
    "cpr": "Area under faithfulness over the share of units kept, 0.1 to 100 %, units that help most first; more is better, "
    "about 1 is a faithful circuit at every size, above 1 where units that work against the task are left out.",
    "cmd": "Area between faithfulness and 1 over the share of units kept, units that matter most either way first; 0 is best.",
    "nodes_50": "Fewest units, those that matter most either way first, with faithfulness 0.5 on every other of the judged "
    "pairs; fewer is better, never where no size has it.",
    "nodes_80": "Fewest units with faithfulness 0.8 on these pairs: the circuit that the figures to its right are about.",
    "nodes_90": "Fewest units with faithfulness 0.9.",
    "faithfulness_80": "Faithfulness of the circuit of 0.8 on the judged pairs that did not choose its size, as its "
    "completeness and minimality are: less than 0.8 by as much as the size was too small by luck.",
    "completeness": "Faithfulness of all units but the circuit of 0.8: 0 is best, since what was left out then does nothing. "
    "Compare circuits of like size: one of nearly all units leaves nothing out.",
    "minimality": "Faithfulness that the circuit of 0.8 loses without one of its units, median over its 20 of largest score; "
    "more is better, near 0 it holds units it does not need. Compare circuits of like size.",
    "stability": "Mean Jaccard index of the circuit of 0.8 and those found on pairs drawn anew; 1 is the same units each time. "
    "Undefined for methods that do not score pair by pair.",
    "exact_pearson": "Pearson correlation of scores with the effects of patching units one by one, over the 20 of largest "
    "score and 20 others; 1 is best.",
    "exact_spearman": "Spearman (rank) correlation with the same effects; 1 is best.",
    "auc": "Area under the ROC curve of scores against the units that are known to do the task: 1 ranks all of them first, "
    "0.5 is chance. For models whose circuit is known.",
}
COST = {
    "forwards": "Forward passes of whole batches (of 32 pairs, unless a method says otherwise) that scoring took; judging "
    "circuits is not counted.",
    "backwards": "Backward passes of whole batches that scoring took.",
    "seconds": "Wall clock of scoring, in seconds; whatever else ran on the machine slowed it.",
}
DRAWN = {
    "faithfulness": "(m(circuit) - m(empty)) / (m(model) - m(empty)), of metrics m averaged over pairs: 1 does what the model "
    "does, 0 no better than everything ablated; the band is a 95 % interval.",
    "sizes": "Number of units in the circuit.",
    "weight": "Edge: fall of the metric, to first order, if along this edge alone the sender is taken from the corrupted "
    "prompt, in the metric's units; drawn wider the larger, dashed where negative.",
    "score": "Node: fall of the metric when the unit is taken from the corrupted prompt, as the method estimates it, in the "
    "metric's units; negative where the unit works against the task.",
}
EXPLANATIONS = {
    "The question": QUESTION,
    "The nodes": FAMILY,
    "The circuits": CIRCUIT,
    "The cost": COST,
    "What is drawn": DRAWN,
}


def explanation(key: str) -> str:
    """Return the explanation of an entry; interval ends share that of their figure.

    Raises:
        KeyError: If the entry has no explanation.
    """
    stem = key.removesuffix("_low").removesuffix("_high")
    for entries in EXPLANATIONS.values():
        if stem in entries:
            ending = "" if stem == key else f" {'Low' if key.endswith('_low') else 'High'} end of its 95 % interval over pairs."
            return entries[stem] + ending
    raise KeyError(key)


def circuit_markdown() -> str:
    """Return the tables of docs/circuits.md as Markdown."""
    parts = []
    for section, entries in EXPLANATIONS.items():
        rows = [f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in entries.items()]
        parts.append("\n".join([f"### {section}", "", "| entry | what it says |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)
