"""Accuracy on questions, by the log-likelihoods of their answers."""

import math
from collections.abc import Sequence

import numpy as np
from absl import logging

from tokenformer_jax.evaluation.log_likelihood import Request, Score, encode_pair, log_likelihoods
from tokenformer_jax.evaluation.perplexity import exp
from tokenformer_jax.evaluation.report import Metrics
from tokenformer_jax.evaluation.tasks import Question
from tokenformer_jax.models.language_model import LanguageModel


def answer(model: LanguageModel, tokenizer, questions: Sequence[Question], *, progress: str | None = None) -> Metrics:
  """Computes metrics over questions, each with its standard error `…_stderr`.

  Questions with several answers give `acc`, the accuracy of choosing the answer with the largest log-likelihood, and
  `acc_norm`, that of choosing the largest log-likelihood per character; the first of equal answers is chosen.
  Questions with one answer (LAMBADA) give `acc`, the share of answers that are the greedy continuation, the
  `perplexity` of the answers and its logarithm `log_perplexity`, which is finite where the perplexity is not.
  Each group (a paradigm of BLiMP) gives `acc/GROUP`.

  A question cannot be scored if one of its answers has no tokens of its own, because the tokenizer merges it into the
  last token of its context, or has more tokens than the model reads. EleutherAI's harness fails there. Here such
  questions are left out of all metrics, counted in `left_out` and reported by file and line.

  Args:
    model: the model.
    tokenizer: the model's tokenizer.
    questions: either all with one answer, or all with several.
    progress: the description of the progress bar; None shows none.

  Raises:
    ValueError: no question that can be scored, an id outside the vocabulary, or a model with NaN or infinite logits.
  """
  encoded = [[encode_pair(tokenizer, *pair) for pair in zip(q.contexts, q.continuations)] for q in questions]
  questions, encoded, num_left_out = _scorable(questions, encoded, model.config.seq_length)
  names = [f"{q.where or 'question'}, answer {i}" for q in questions for i in range(len(q.contexts))]
  requests = [request for row in encoded for request in row]
  scores = iter(log_likelihoods(model, requests, tokenizer.vocab_size, progress=progress, name=lambda i: names[i]))
  scored = [[next(scores) for _ in row] for row in encoded]
  if all(len(row) == 1 for row in scored):
    metrics = _single_answers([score for (score,) in scored])
  else:
    metrics = _choices(questions, [np.array([score.log_likelihood for score in row]) for row in scored])
  metrics["questions"] = len(questions)
  return metrics | ({"left_out": num_left_out} if num_left_out else {})


def _scorable(questions: Sequence[Question], encoded: Sequence[Sequence[Request]], length: int):
  """(questions, their requests, how many were left out), without those that cannot be scored."""
  sizes = [[len(request.continuation) for request in row] for row in encoded]
  kept = [i for i, row in enumerate(sizes) if min(row) > 0 and max(row) <= length]
  left_out = sorted(set(range(len(questions))) - set(kept))
  if left_out:
    first = left_out[0]
    reason = (
      "an answer that has no tokens of its own: the tokenizer merges it into the last token of its context"
      if min(sizes[first]) == 0
      else f"an answer of {max(sizes[first])} tokens, more than the model's seq_length={length}"
    )
    message = f"{questions[first].where or 'question'}: {reason}"
    if not kept:
      raise ValueError(f"no question can be scored; {message}; use another tokenizer or a longer model.")
    shown = "; ".join(questions[i].where or f"question {i}" for i in left_out[:20])
    logging.warning(
      "%d of %d questions are left out of the metrics. %s. They are: %s%s.",
      len(left_out),
      len(questions),
      message,
      shown,
      "; …" if len(left_out) > 20 else "",
    )
  return [questions[i] for i in kept], [encoded[i] for i in kept], len(left_out)


def _choices(questions: Sequence[Question], values: Sequence[np.ndarray]) -> Metrics:
  """Metrics of questions with several answers, whose log-likelihoods are `values`, [answers] each."""
  right = np.array([v.argmax() == q.gold for v, q in zip(values, questions)], float)
  right_norm = np.array([(v / np.array(q.lengths)).argmax() == q.gold for v, q in zip(values, questions)], float)
  metrics = _mean("acc", right) | _mean("acc_norm", right_norm)
  groups = np.array([question.group for question in questions])
  return metrics | {
    f"acc/{group}": float(right[groups == group].mean()) for group in sorted(set(groups.tolist()) - {""})
  }


def _single_answers(scores: Sequence[Score]) -> Metrics:
  metrics = _mean("acc", np.array([score.greedy for score in scores], float))
  metrics |= _mean("log_perplexity", -np.array([score.log_likelihood for score in scores]))
  perplexity = exp(metrics["log_perplexity"])
  # The delta method gives the standard error of exp(x) as exp(x) times that of x.
  return metrics | {"perplexity": perplexity, "perplexity_stderr": perplexity * metrics["log_perplexity_stderr"]}


def _mean(name: str, values: np.ndarray) -> Metrics:
  error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return {name: float(values.mean()), f"{name}_stderr": float(error)}
