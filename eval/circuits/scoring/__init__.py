"""Evaluation of circuits: faithfulness, edge circuits, and ROC against known circuits."""
