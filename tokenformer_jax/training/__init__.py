"""Training: optimizer, state, step, loop, checkpoints, metrics."""
