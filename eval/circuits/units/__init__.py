"""Units of a circuit: nodes, edges, rankings, and how they are ablated."""
