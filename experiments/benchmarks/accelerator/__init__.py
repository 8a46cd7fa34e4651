"""What this package does on the accelerator at hand; `__main__` says how to run it."""
