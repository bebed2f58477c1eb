"""Decomposition of the reconstruction error into linear and nonlinear parts ("dark matter")."""
