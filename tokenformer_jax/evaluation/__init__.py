"""Evaluation of models: log-likelihoods, perplexity, multiple choice and EleutherAI's lm-evaluation-harness."""
