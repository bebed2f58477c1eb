"""Comparison of circuits across tasks and across models: overlap, cross-faithfulness, units gained and lost, repair."""
