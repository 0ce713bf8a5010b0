"""Numerical kernels. `grouped_matmul.py` is the one API; the files beside it are ways to compute it."""
