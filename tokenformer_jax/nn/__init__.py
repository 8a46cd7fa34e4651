"""Flax NNX modules, one idea a file."""
