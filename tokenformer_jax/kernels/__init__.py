"""Kernels in Pallas, each beside a reference in plain JAX that gives the same numbers."""
