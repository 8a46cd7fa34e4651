"""Accuracy on questions, by the log-likelihood of their answers."""

import math
from collections.abc import Sequence

import numpy as np

from tokenformer_jax.evaluation.log_likelihood import Score, encode_pair, log_likelihoods
from tokenformer_jax.evaluation.tasks import Question
from tokenformer_jax.models.language_model import LanguageModel


def answer(
  model: LanguageModel, tokenizer, questions: Sequence[Question], *, progress: str | None = None
) -> dict[str, float]:
  """Metrics over questions, each with its standard error `…_stderr`.

  With answers to choose from: `acc`, by the largest log-likelihood, and `acc_norm`, by the largest one a
  character; the first of equals is chosen. With one answer each (LAMBADA): `acc`, whether it is the
  greedy continuation, and its `perplexity`. Groups (BLiMP's paradigms) get an `acc/GROUP` each.
  """
  pairs = [encode_pair(tokenizer, *pair) for q in questions for pair in zip(q.contexts, q.continuations)]
  scores = iter(log_likelihoods(model, pairs, tokenizer.vocab_size, progress=progress))
  scored = [(question, [next(scores) for _ in question.contexts]) for question in questions]
  if all(len(question.contexts) == 1 for question in questions):
    return _last_words([score for _, (score,) in scored])
  lengths = [np.array(question.lengths, float) for question in questions]
  values = [np.array([score.log_likelihood for score in row]) for _, row in scored]
  right = np.array([v.argmax() == q.gold for v, q in zip(values, questions)], float)
  right_norm = np.array([(v / n).argmax() == q.gold for v, n, q in zip(values, lengths, questions)], float)
  metrics = _mean("acc", right) | _mean("acc_norm", right_norm)
  groups = [question.group for question in questions]
  for group in sorted(set(groups) - {""}):
    metrics[f"acc/{group}"] = float(right[[g == group for g in groups]].mean())
  return metrics | {"questions": len(questions)}


def _last_words(scores: Sequence[Score]) -> dict[str, float]:
  nats = -np.array([score.log_likelihood for score in scores])
  perplexity = math.exp(nats.mean())
  metrics = _mean("acc", np.array([score.greedy for score in scores], float))
  metrics["perplexity"] = perplexity
  metrics["perplexity_stderr"] = perplexity * _mean("nats", nats)["nats_stderr"]  # By the delta method.
  return metrics | {"questions": len(scores)}


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
  error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return {name: float(values.mean()), f"{name}_stderr": float(error)}
