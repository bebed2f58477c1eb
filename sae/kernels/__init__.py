"""Compiled kernels for the arithmetic of codes. Which ones run is decided by the tensors at hand, at call time.

``cpu`` is compiled by numba, ``gpu`` by Triton. Where neither can be had the plain path in ``sae.sparse_ops`` does the same.
"""
