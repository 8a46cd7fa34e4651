"""Measuring models: log-likelihoods, perplexity, multiple choice, the lm-evaluation-harness."""
