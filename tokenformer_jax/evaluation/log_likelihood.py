"""Log-likelihoods of continuations, from which perplexity and multiple choice are computed."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.distributed.axes import constrain, mesh_of, parts_of, traced_on
from tokenformer_jax.distributed.processes import whole
from tokenformer_jax.inference.decoding import bucket
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.progress import Progress

# The float32 logits of one batch take at most this many bytes.
_LOGIT_BYTES = 2**28
_MAX_ROWS = 128


class Request(NamedTuple):
  """A continuation to score after a context.

  Attributes:
    context: token ids, at least one.
    continuation: token ids, at least one.
  """

  context: Sequence[int]
  continuation: Sequence[int]


class Score(NamedTuple):
  """The score of one continuation.

  Attributes:
    log_likelihood: Σ log p of its tokens, in nats.
    greedy: whether each of its tokens is the most likely one.
  """

  log_likelihood: float
  greedy: bool


def encode_pair(tokenizer, context: str, continuation: str) -> Request:
  """Encodes a context and its continuation, and splits the ids where EleutherAI's harness splits them.

  Both texts are encoded as one, and the ids beyond the number of the context's own ids are the continuation. Spaces
  at the end of the context are moved to the continuation. The end-of-document id stands for an empty context.

  Args:
    tokenizer: `encode(text) -> ids` and `end_of_document`.
    context: any text.
    continuation: any text.

  Returns:
    The request. Its continuation is empty if the text of the continuation is, or if it merges into the last token of
    the context; such a request cannot be scored.
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
  model: LanguageModel,
  requests: Sequence[Request],
  vocab_size: int,
  *,
  progress: str | None = None,
  name: Callable[[int], str] = "request {}".format,
  as_trained: bool = False,
) -> list[Score]:
  """Scores many continuations.

  Probabilities are normalised over the first `vocab_size` ids. The ids beyond them only pad the vocabulary and occur
  in no text. The adapter of the released code (eval_tasks/eval_adapter.py) includes them: 50,304 ids for a tokenizer
  of 50,277; see docs/released_models.md.

  A request longer than the model's `seq_length` loses the beginning of its context, as in EleutherAI's harness.
  Requests are batched by length, and one program is compiled for each rounded length.

  Args:
    model: the model; its float or int8 parameters are used as they are.
    requests: the continuations and their contexts.
    vocab_size: the number of ids of the tokenizer.
    progress: the description of the progress bar; None shows none.
    name: describes request number i in error messages.
    as_trained: whether routers choose as in training, which looks into the future: a routed block then takes its share of
      the rounded length of each request.

  Returns:
    The scores, in the order of the requests.

  Raises:
    ValueError: an empty context or continuation, an id outside the vocabulary, a continuation that does not fit into
      the model's `seq_length`, or a model whose log-likelihoods are NaN or infinite.
  """
  length = model.config.seq_length
  for number, request in enumerate(requests):
    _check(request, name, number, vocab_size, length)
  graphdef, *leaves = split(model)
  mesh = mesh_of(leaves)
  score, parts = _program(graphdef, mesh), 1 if mesh is None else parts_of(mesh, "batch")
  # The longest requests come first, so that a batch that exceeds the memory fails at once.
  order = sorted(range(len(requests)), key=lambda i: -_num_inputs(requests[i], length))
  scores: dict[int, Score] = {}
  with Progress(len(requests), "requests", title=progress or "", shown=progress is not None, seconds=60) as bar:
    while order:
      width = min(bucket(_num_inputs(requests[order[0]], length)), length)
      rows = min(max(1, _LOGIT_BYTES // (4 * width * model.config.vocab_size)), _MAX_ROWS)
      rows = -(-rows // parts) * parts
      chosen = [i for i in order[:rows] if min(bucket(_num_inputs(requests[i], length)), length) == width]
      order = order[len(chosen) :]
      batch = _batch([requests[i] for i in chosen], rows, width)
      sums, greedy = map(whole, score(leaves, *batch, vocab_size=vocab_size, as_trained=as_trained))
      for row, i in enumerate(chosen):
        if not np.isfinite(sums[row]):
          raise ValueError(
            f"{name(i)}: its log-likelihood is {sums[row]}, so the model is broken: its parameters or logits are NaN "
            "or infinite; evaluate an earlier checkpoint."
          )
        scores[i] = Score(float(sums[row]), bool(greedy[row]))
      bar.update(len(chosen))
  return [scores[i] for i in range(len(requests))]


def _check(request: Request, name: Callable[[int], str], number: int, vocab_size: int, length: int) -> None:
  if not len(request.context):
    raise ValueError(f"{name(number)}: its context has no ids; give the end-of-document id for an empty text.")
  if not len(request.continuation):
    raise ValueError(
      f"{name(number)}: its continuation has no ids of its own: the text is empty, or the tokenizer merges it into the "
      "last token of the context; leave the request out."
    )
  ids = np.concatenate([request.context, request.continuation])
  if ids.min() < 0 or ids.max() >= vocab_size:
    position = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    raise ValueError(
      f"{name(number)}: id {ids[position]} at position {position} is outside the {vocab_size} ids of the vocabulary; "
      "use the model's own tokenizer."
    )
  if len(request.continuation) > length:
    raise ValueError(
      f"{name(number)}: a continuation of {len(request.continuation)} ids does not fit into the model's "
      f"seq_length={length}; score it in windows (evaluation.perplexity)."
    )


def _num_inputs(request: Request, length: int) -> int:
  """The number of ids that the model reads: all but the last one."""
  return min(len(request.context) + len(request.continuation) - 1, length)


def _batch(requests: Sequence[Request], rows: int, width: int):
  """(inputs, labels, mask, real), each [rows, width]; short rows are padded on their right."""
  inputs = np.zeros((rows, width), np.int32)
  labels = np.zeros((rows, width), np.int32)
  mask, real = np.zeros((rows, width), bool), np.zeros((rows, width), bool)
  for row, request in enumerate(requests):
    ids = np.concatenate([request.context, request.continuation]).astype(np.int32)[-(width + 1) :]
    end = len(ids) - 1
    inputs[row, :end], labels[row, :end] = ids[:-1], ids[1:]
    mask[row, end - len(request.continuation) : end] = real[row, :end] = True
  return inputs, labels, mask, real


@functools.lru_cache
def _program(graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh | None) -> Callable:
  """The jitted function of a batch: (Σ log p [rows], whether each row is greedy [rows]) over the positions of `mask`."""

  def score(leaves, inputs, labels, mask, real, vocab_size, as_trained):
    inputs, labels, mask, real = (constrain(a, "batch", "time") for a in (inputs, labels, mask, real))
    model = nnx.merge(graphdef, *leaves)
    logits = model.logits(model.hidden(inputs, real=real, training=True)[0]) if as_trained else model(inputs)
    logits = logits[..., :vocab_size]
    log_p = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    greedy = jnp.all((jnp.argmax(logits, axis=-1) == labels) | ~mask, axis=-1)
    return jnp.sum(jnp.where(mask, log_p, 0.0), axis=-1), greedy

  return jax.jit(score if mesh is None else traced_on(mesh, score), static_argnames=("vocab_size", "as_trained"))
