"""Summary of an attribution graph for the console."""

from typing import Any

from ..pages.numbers import show
from .interventions import EFFECTS, PLACES

# Column heads: what is held at its value on the prompt while the measured effects arise.
PLACE_NAMES = {
    "norms": "patterns and norms frozen",
    "patterns": "patterns frozen",
    "model": "nothing frozen",
}


def graph_summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as (name, value) pairs."""
    fields = [
        ("prompt", f"{show(facts['positions'])} tokens"),
        ("nodes", f"{show(facts['n_nodes'])} shown of {show(facts['n_nodes_all'])}"),
        ("edges", f"{show(facts['n_edges'])} shown of {show(facts['n_edges_all'])}"),
        ("scores", f"replacement {show(facts['replacement_score'])}   completeness {show(facts['completeness_score'])}"),
        (
            "replacement model",
            f"KL {show(facts['kl_last'])} at the last token, {show(facts['kl_mean'])} on average   "
            f"same top token: {show(facts['top1_last'])} at the last, {facts['top1_share']:.1%} of all",
        ),
    ]
    if facts["latents_left_out"]:
        share = facts["left_out_share"]
        fields.append(("left out", f"{show(facts['latents_left_out'])} latents, with {share:.2%} of the influence"))
    if "circuit_size" in facts:
        circuit = f"{show(facts['circuit_size'])} latents at faithfulness {show(facts['circuit_faithfulness'])}"
        passes = f"{show(facts['circuit_passes'])} passes, {show(facts['circuit_flat_passes'])} without levels"
        fields.append(("circuit", f"{circuit}   {passes}"))
    return fields


def graph_tables(facts: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return tables, each a header and rows: the influence of errors by layer, and how interventions bear the graph out."""
    shares = [[str(layer), show(share)] for layer, share in enumerate(facts["error_shares"])]
    places = [place for place in PLACES if place in PLACE_NAMES]
    checks = [[kind, *(show(facts[f"{kind}_spearman_{place}"]) for place in places)] for kind in EFFECTS]
    return [
        (["layer", "error influence (share)"], shares),
        (["effect: Spearman, predicted and measured", *(PLACE_NAMES[place] for place in places)], checks),
    ]
