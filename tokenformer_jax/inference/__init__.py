"""Text generation with a trained model: sampling, decoding with a cache, streaming, int8."""
