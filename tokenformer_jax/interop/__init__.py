"""Other people's checkpoints: the released PyTorch models' names and files, to ours and back."""
