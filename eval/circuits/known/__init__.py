"""Transformers with a known circuit for given prompt pairs: ground truth for discovery methods."""

from collections.abc import Callable
from functools import partial

from .choice import trained_choice
from .compiled import EDGES, program
from .files import load_toy
from .handbuilt import and_gate_circuit, fraction, induction_circuit, reverse
from .known_circuit import ABLATIONS, Known, edge_names, node_names
from .modular import clock
from .rotation import rotated
from .siit import PROGRAMS, trained
from .toy import ToyConfig, ToyTransformer

# Models that need no files, by name. Those trained to be a program take up to a minute.
KNOWN: dict[str, Callable[..., Known]] = {
    "and_gate": partial(and_gate_circuit, "and"),
    "or_gate": partial(and_gate_circuit, "or"),
    "adder_gate": partial(and_gate_circuit, "adder"),
    "induction": induction_circuit,
    "induction_query": partial(induction_circuit, corruption="other query"),
    "fraction": fraction,
    "reverse": reverse,
    "clock": clock,
    **{f"siit_{name}": partial(trained, name) for name in PROGRAMS},
    "siit_choice": trained_choice,
}
# Models that are read from a directory, the first argument.
COMPILED: dict[str, Callable[..., Known]] = {name: partial(program, name) for name in EDGES}

__all__ = [
    "ABLATIONS",
    "COMPILED",
    "KNOWN",
    "Known",
    "ToyConfig",
    "ToyTransformer",
    "edge_names",
    "load_toy",
    "node_names",
    "rotated",
]
