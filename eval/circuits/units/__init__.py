"""Units of a circuit: nodes, edges, rankings, and ablations."""
