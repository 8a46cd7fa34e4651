"""Whole models, made of the modules in `nn`."""
