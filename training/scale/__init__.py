"""Prediction of a run's step time, memory, disk and duration on any number of devices: ``sparsary plan``."""
