"""Log-likelihood of continuations: what perplexity and multiple choice are made of."""

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from tokenformer_jax.inference.generate import bucket
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

# Float32 logits of one batch stay below this.
_LOGIT_BYTES = 2**28


class Request(NamedTuple):
  """Token ids: score `continuation` after `context`. Neither is empty."""

  context: Sequence[int]
  continuation: Sequence[int]


class Score(NamedTuple):
  """Of a continuation: Σ log p in nats, and whether each of its tokens was the likeliest."""

  log_likelihood: float
  greedy: bool


def encode_pair(tokenizer, context: str, continuation: str) -> Request:
  """The ids of a pair of texts, split as EleutherAI's harness does.

  Both are encoded as one text, and the continuation is what the context's ids leave over; spaces that
  end the context count to the continuation. An empty context is the end-of-document token.
  """
  if not context:
    ids = tokenizer.encode(continuation)
    if ids and ids[0] == tokenizer.end_of_document:
      return Request(ids[:1], ids[1:])
    return Request([tokenizer.end_of_document], ids)
  stripped = context.rstrip()
  continuation = context[len(stripped) :] + continuation
  context_ids = tokenizer.encode(stripped)
  return Request(context_ids, tokenizer.encode(stripped + continuation)[len(context_ids) :])


def log_likelihoods(
  model: LanguageModel, requests: Sequence[Request], vocab_size: int, *, progress: str | None = None
) -> list[Score]:
  """Scores of many requests, in their order.

  Probabilities are over the first `vocab_size` ids: those that only pad the vocabulary, which no text
  holds, take no part. The released code's adapter (eval_tasks/eval_adapter.py) leaves them in, 50,304
  ids for a tokenizer of 50,277; see docs/released_models.md. A request longer than the
  model's `seq_length` loses the beginning of its context. Requests are batched by length; one program is
  compiled for each rounded length.

  Args:
    vocab_size: the tokenizer's ids.
    progress: what the progress bar says; None shows none.

  Raises:
    ValueError: an empty context or continuation, an id outside the vocabulary, or a continuation that
      does not fit into the model's `seq_length`.
  """
  length = model.config.seq_length
  for number, request in enumerate(requests):
    _check(request, number, vocab_size, length)
  graphdef, params, tau = split(model)
  # Longest first: if memory does not do, that shows at once.
  order = sorted(range(len(requests)), key=lambda i: -_inputs(requests[i], length))
  scores: list[Score | None] = [None] * len(requests)
  with tqdm.tqdm(
    total=len(requests), desc=progress, disable=progress is None, dynamic_ncols=True, file=sys.stderr
  ) as bar:
    while order:
      width = min(bucket(_inputs(requests[order[0]], length)), length)
      rows = max(1, _LOGIT_BYTES // (4 * width * model.config.vocab_size))
      rows = min(rows, 128)
      chosen = [i for i in order[:rows] if min(bucket(_inputs(requests[i], length)), length) == width]
      order = order[len(chosen) :]
      batch = _batch([requests[i] for i in chosen], rows, width)
      sums, greedy = jax.device_get(_score(graphdef, params, tau, *batch, vocab_size=vocab_size))
      for row, i in enumerate(chosen):
        scores[i] = Score(float(sums[row]), bool(greedy[row]))
      bar.update(len(chosen))
  return scores


def _check(request: Request, number: int, vocab_size: int, length: int) -> None:
  if not len(request.context) or not len(request.continuation):
    raise ValueError(
      f"request {number}: context of {len(request.context)} ids and continuation of "
      f"{len(request.continuation)}; both need one at least (an empty text: the end-of-document id)."
    )
  ids = np.concatenate([request.context, request.continuation])
  if ids.min() < 0 or ids.max() >= vocab_size:
    at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    raise ValueError(
      f"request {number}: id {ids[at]} at position {at} is outside the {vocab_size} ids of the "
      "vocabulary; use the model's own tokenizer."
    )
  if len(request.continuation) > length:
    raise ValueError(
      f"request {number}: a continuation of {len(request.continuation)} ids does not fit into the "
      f"model's seq_length={length}; score it in windows (see evaluation.perplexity)."
    )


def _inputs(request: Request, length: int) -> int:
  """Ids that the model reads: all but the last."""
  return min(len(request.context) + len(request.continuation) - 1, length)


def _batch(requests: Sequence[Request], rows: int, width: int):
  """(inputs, labels, mask), [rows, width] each; short rows are filled up on their right."""
  inputs = np.zeros((rows, width), np.int32)
  labels = np.zeros((rows, width), np.int32)
  mask = np.zeros((rows, width), bool)
  for row, request in enumerate(requests):
    ids = np.concatenate([request.context, request.continuation]).astype(np.int32)[-(width + 1) :]
    end = len(ids) - 1
    inputs[row, :end], labels[row, :end] = ids[:-1], ids[1:]
    mask[row, end - len(request.continuation) : end] = True
  return inputs, labels, mask


@functools.partial(jax.jit, static_argnums=0, static_argnames="vocab_size")
def _score(graphdef, params, tau, inputs, labels, mask, vocab_size):
  logits = nnx.merge(graphdef, params, tau)(inputs)[..., :vocab_size]
  log_p = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  greedy = jnp.all((jnp.argmax(logits, axis=-1) == labels) | ~mask, axis=-1)
  return jnp.sum(jnp.where(mask, log_p, 0.0), axis=-1), greedy
