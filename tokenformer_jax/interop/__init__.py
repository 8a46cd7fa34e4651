"""Conversion of models to and from the released PyTorch checkpoints and Hugging Face folders."""
