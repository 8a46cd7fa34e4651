"""Writing text with a trained model: sampling, cached decoding, streaming."""
