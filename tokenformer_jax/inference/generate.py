"""Writing text: one prefill over all prompts, then a draw and one compiled step for every token."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from tokenformer_jax.distributed.axes import platform
from tokenformer_jax.distributed.processes import whole
from tokenformer_jax.inference.continuation import Continuation
from tokenformer_jax.inference.sampling import Sampling, checked_int, sample
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

_LENGTHS = (16, 32, 64, 128)


def generate(
  model: LanguageModel,
  tokenizer,
  prompts: str | Sequence[str | Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stop: str | Sequence[str] = (),
  stream: Callable[[int, str], None] | None = None,
) -> list[str]:
  """Continues each prompt, all at once, and returns the continuations without their prompts.

  A continuation ends before the first stop string, at an end of document, or after
  `max_new_tokens`. Each call begins with `model.for_decoding()`; whoever calls often makes that once and gives it in the
  place of the model. Programs are compiled per number of prompts and per length rounded up to 16, 32,
  64 or a multiple of 128, so that most calls compile nothing.

  Args:
    tokenizer: `encode(text) -> ids`, `decode(ids) -> text`, `vocab_size`, `end_of_document`. Only ids
      below its `vocab_size` are drawn; the model's further ids are padding.
    prompts: texts, or lists of token ids; a single text is a list of one. Lengths may differ.
    max_new_tokens: the most tokens to write, at least 1.
    temperature: 0 takes the likeliest token; higher is freer.
    top_k: draws from the k likeliest tokens, 0 from all.
    top_p: draws from the fewest likeliest tokens whose probabilities sum to this, 1 from all.
    seed: the same seed gives the same text; a row's text does not depend on the other rows.
    stop: a string or strings that end a continuation.
    stream: called as `stream(row, piece)` whenever more of a row's text is final; the pieces of a row
      joined are its continuation, and none ends inside a character or inside a stop string.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, prompt and new tokens longer together
      than the model's `seq_length`, a setting out of range, or another model's tokenizer.
  """
  config = model.config
  if not 1 <= tokenizer.vocab_size <= config.vocab_size:
    raise ValueError(
      f"tokenizer with {tokenizer.vocab_size} ids, model with vocab_size={config.vocab_size}: "
      "this is another model's tokenizer; load the one saved with the model."
    )
  max_new_tokens = checked_int("max_new_tokens", max_new_tokens, 1, "the most tokens to write")
  sampling = Sampling.checked(
    vocab_size=tokenizer.vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
  )
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  if "" in stop:
    raise ValueError("stop='': an empty string would end every text at once; leave it out.")
  prompts = _checked_ids(tokenizer, prompts, config.seq_length, max_new_tokens)
  rows = [Continuation(tokenizer, stop) for _ in prompts]

  for index, tokens_B in enumerate(_decode(model, prompts, max_new_tokens, sampling), start=1):
    for row, token in enumerate(tokens_B):
      rows[row].read(int(token))
      piece = rows[row].piece(last=index == max_new_tokens)
      if stream is not None and piece:
        stream(row, piece)
    if all(row.done for row in rows):
      break
  return [row.text for row in rows]


def _decode(model, prompts, max_new_tokens, sampling):
  """Yields the tokens of step 0, 1, … for all rows, [B] each, while the device works on the next."""
  length = bucket(max(map(len, prompts)))
  tokens_BxT = np.zeros((len(prompts), length), np.int32)
  for row, ids in enumerate(prompts):
    tokens_BxT[row, length - len(ids) :] = ids
  start_B = np.array([length - len(ids) for ids in prompts], np.int32)

  graphdef, *leaves = split(model.for_decoding())
  prefill, decode_step = decoding_programs(graphdef)
  num_slots = bucket(length + max_new_tokens)
  logits_BxV, cache = prefill(leaves, tokens_BxT, start_B, num_slots=num_slots)
  for index in range(max_new_tokens):
    tokens_B = _draw(logits_BxV, sampling, np.int32(index))
    if index + 1 < max_new_tokens:
      logits_BxV, cache = decode_step(leaves, tokens_B, cache)
    yield whole(tokens_B)


# A program of its own, compiled once for the logits of prompts and of steps.
_draw = jax.jit(sample)


def decoding_programs(graphdef: nnx.GraphDef) -> tuple[Callable, Callable]:
  """(prefill, decode_step), jitted; both take the leaves of `model.for_decoding()` first.

  `prefill(leaves, tokens_BxT, start_B, num_slots=…)` reads left-padded prompts and `decode_step(leaves, tokens_B, cache)`
  one token a row; the cache is donated. They return the logits [B, V] of what follows and the cache.
  """
  return _programs(graphdef, platform())


@functools.lru_cache
def _programs(graphdef, platform):
  # Not static arguments of a jitted function: to hash a graph definition at each step would take a millisecond.
  @functools.partial(jax.jit, static_argnames="num_slots")
  def prefill(leaves, tokens_BxT, start_B, *, num_slots):
    model = nnx.merge(graphdef, *leaves)
    hidden_BxTxD, cache = model.prefill(tokens_BxT, start_B, num_slots)
    return model.logits(hidden_BxTxD[:, -1]), cache

  # XLA:CPU copies donated buffers that are read before they are written, unless asked to look when that is.
  options = {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else None

  @functools.partial(jax.jit, donate_argnames="cache", compiler_options=options)
  def decode_step(leaves, tokens_B, cache):
    model = nnx.merge(graphdef, *leaves)
    hidden_Bx1xD, cache = model.extend(tokens_B[:, None], cache)
    return model.logits(hidden_Bx1xD[:, 0]), cache

  return prefill, decode_step


def bucket(length: int) -> int:
  """The compiled length for `length`: 16, 32, 64, or the next multiple of 128."""
  return next((size for size in _LENGTHS if length <= size), -(-length // 128) * 128)


def _checked_ids(tokenizer, prompts, seq_length, max_new_tokens) -> list[Sequence[int]]:
  """Each prompt's token ids, every fault a ValueError that names the prompt by its number."""
  prompts = [prompts] if isinstance(prompts, str) else list(prompts)
  if not prompts:
    raise ValueError("prompts=[]: give at least one.")
  rows = []
  for number, prompt in enumerate(prompts):
    if not isinstance(prompt, (str, Sequence, np.ndarray)):
      raise ValueError(f"prompt {number} is {prompt!r}: expected a text or a list of token ids.")
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
      raise ValueError(
        f"prompt {number} is empty: give at least one token; [tokenizer.end_of_document] begins a new document."
      )
    for position, token in enumerate(ids):
      if not isinstance(token, (int, np.integer)) or not 0 <= token < tokenizer.vocab_size:
        raise ValueError(
          f"prompt {number}: id {token!r} at position {position} is outside the vocabulary; "
          f"ids are 0 to {tokenizer.vocab_size - 1}."
        )
    if len(ids) + max_new_tokens > seq_length:
      raise ValueError(
        f"prompt {number} has {len(ids)} tokens and max_new_tokens={max_new_tokens}: together "
        f"they may be {seq_length} (seq_length); shorten the prompt or ask for fewer."
      )
    rows.append(ids)
  return rows
