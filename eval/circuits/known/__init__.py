"""Transformers whose circuit is known for given prompt pairs, so that what finds circuits can be scored."""

from collections.abc import Callable
from functools import partial

from .files import load_toy
from .handbuilt import fraction, gate, induction, reverse
from .known import ABLATIONS, Known, edge_names, node_names
from .toy import ToyConfig, ToyTransformer

# What needs no files, by name.
KNOWN: dict[str, Callable[..., Known]] = {
    "and_gate": partial(gate, "and"),
    "or_gate": partial(gate, "or"),
    "adder_gate": partial(gate, "adder"),
    "induction": induction,
    "induction_query": partial(induction, corruption="other query"),
    "fraction": fraction,
    "reverse": reverse,
}

__all__ = ["ABLATIONS", "KNOWN", "Known", "ToyConfig", "ToyTransformer", "edge_names", "load_toy", "node_names"]
