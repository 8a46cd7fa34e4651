"""Text generation: one prefill over all prompts, then a draw and one compiled decode step for every token."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from tokenformer_jax.distributed.axes import constrain, mesh_of, platform, traced_on
from tokenformer_jax.distributed.processes import whole
from tokenformer_jax.inference.continuation import Continuation
from tokenformer_jax.inference.sampling import NO_TOKEN, Sampling, checked_int, log_probs, sample
from tokenformer_jax.models.decoding_model import DecodingModel
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

Prompts = str | Sequence[str | Sequence[int]]
_LENGTHS = (16, 32, 64, 128)
# A cache with fewer slots would be read in little less time than the parameters are.
_LEAST_SLOTS = 256


@dataclasses.dataclass(frozen=True)
class Generated:
  """A continuation with its tokens.

  Attributes:
    text: what `generate` returns without `return_log_probs`.
    ids: the tokens that were drawn until the continuation ended, among them an end of document and the tokens of a
      stop string, which the text leaves out.
    log_probs: the log-probability of each token, in nats, given the prompt and the tokens before it. It is the
      model's own, at temperature 1 and over all ids of the tokenizer, before penalty, top_k and top_p.
  """

  text: str
  ids: tuple[int, ...]
  log_probs: tuple[float, ...]


@overload
def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = ...,
  top_k: int = ...,
  top_p: float = ...,
  repetition_penalty: float = ...,
  seed: int = ...,
  stop: str | Sequence[str] = ...,
  stream: Callable[[int, str], None] | None = ...,
  return_log_probs: Literal[False] = ...,
) -> list[str]: ...


@overload
def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = ...,
  top_k: int = ...,
  top_p: float = ...,
  repetition_penalty: float = ...,
  seed: int = ...,
  stop: str | Sequence[str] = ...,
  stream: Callable[[int, str], None] | None = ...,
  return_log_probs: Literal[True],
) -> list[Generated]: ...


def generate(
  model: LanguageModel | DecodingModel,
  tokenizer,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  repetition_penalty: float = 1.0,
  seed: int = 0,
  stop: str | Sequence[str] = (),
  stream: Callable[[int, str], None] | None = None,
  return_log_probs: bool = False,
) -> list[str] | list[Generated]:
  """Continues all prompts together and returns the continuations without their prompts.

  A continuation ends before the first stop string, at an end of document, or after `max_new_tokens`. Prompt +
  continuation is the text as it reads, also for tokenizers that write no space before the first word of a text. Each
  call begins with `model.for_decoding()`; a program that calls often makes that copy once and passes it as the model.
  Programs are compiled for each number of prompts, and for lengths rounded up to 16, 32, 64 or a multiple of 128, so
  that most calls compile nothing. From 256 tokens on the cache doubles when it is full, and one decode step is compiled
  for each size.

  Args:
    model: a language model, or its `for_decoding()`.
    tokenizer: has `encode(text) -> ids`, `decode(ids) -> text`, `vocab_size` and `end_of_document`. Only ids below its
      `vocab_size` are drawn; the model's other ids are padding.
    prompts: texts, or lists of token ids; a single text is a list of one. Lengths may differ. An empty text begins a
      document.
    max_new_tokens: the most tokens to generate for each prompt, at least 1.
    temperature: 0 takes the likeliest token; higher temperatures are freer.
    top_k: draws from the k likeliest tokens; 0 draws from all.
    top_p: draws from the fewest likeliest tokens whose probabilities sum to this; 1 draws from all.
    repetition_penalty: divides the positive logits of ids that the prompt or the continuation has, and multiplies the
      negative ones, as in Hugging Face's library; 1 changes nothing.
    seed: a whole number from 0 on. The same seed gives the same text, and the text of a row does not depend on the
      other rows.
    stop: a string or strings that end a continuation.
    stream: called as `stream(row, piece)` whenever more of a row's text is final. The joined pieces of a row are its
      continuation, and none ends inside a character or inside a stop string.
    return_log_probs: return the tokens and their log-probabilities too.

  Returns:
    The text of each continuation; with `return_log_probs` a `Generated` for each.

  Raises:
    ValueError: an empty list of ids, an id outside the vocabulary, a prompt that is longer than the model's
      `seq_length` together with the new tokens, a setting out of range, another model's tokenizer, an encoder, or a
      model whose logits are not finite.
  """
  if not hasattr(model, "for_decoding"):
    raise ValueError(
      f"model is a {type(model).__name__}: an encoder reads what stands behind a token and generates no text; give a "
      "LanguageModel (task='next_token')."
    )
  config = model.config
  if not 1 <= tokenizer.vocab_size <= config.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids and the model vocab_size={config.vocab_size}: this is another "
      "model's tokenizer; load the one saved with the model."
    )
  max_new_tokens = checked_int("max_new_tokens", max_new_tokens, 1, "the most tokens to generate")
  sampling = Sampling.checked(
    vocab_size=tokenizer.vocab_size,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    repetition_penalty=repetition_penalty,
    seed=seed,
  )
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  if "" in stop:
    raise ValueError("stop='': an empty string would end every text at once; leave it out.")
  ids_of_prompts = _checked_ids(tokenizer, prompts, config.seq_length, max_new_tokens)
  rows = [Continuation(tokenizer, stop, ids) for ids in ids_of_prompts]
  drawn: list[list[tuple[int, float]]] = [[] for _ in rows]

  steps = _decode(model, ids_of_prompts, max_new_tokens, sampling, return_log_probs)
  for index, (tokens_B, log_probs_B) in enumerate(steps, start=1):
    for row, (token, log_prob) in enumerate(zip(tokens_B.tolist(), log_probs_B.tolist())):
      if not rows[row].done:
        drawn[row].append((token, log_prob))
      rows[row].read(token)
      piece = rows[row].piece(last=index == max_new_tokens)
      if stream is not None and piece:
        stream(row, piece)
    if all(row.done for row in rows):
      break
  if not return_log_probs:
    return [row.text for row in rows]
  return [Generated(row.text, *map(tuple, zip(*of_row))) for row, of_row in zip(rows, drawn)]


def _decode(
  model, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, return_log_probs: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (tokens [B], their log-probabilities [B]) of each step, while the device works on the next step."""
  length = bucket(max(map(len, prompts)))
  most = bucket(length + max_new_tokens)
  num_slots = slots(length + 1, most)
  tokens_BxT = np.zeros((len(prompts), length), np.int32)
  read_BxS = np.full((len(prompts), most), NO_TOKEN, np.int32)
  for row, ids in enumerate(prompts):
    tokens_BxT[row, length - len(ids) :] = read_BxS[row, length - len(ids) : length] = ids
  start_B = np.array([length - len(ids) for ids in prompts], np.int32)

  graphdef, *leaves = split(model.for_decoding())
  prefill, decode_step = decoding_programs(graphdef, mesh_of(leaves))
  logits_BxV, cache = prefill(leaves, tokens_BxT, start_B, num_slots=num_slots)
  finite_B = _are_finite(logits_BxV, sampling.vocab_size)
  for index in range(max_new_tokens):
    tokens_B = _draw(logits_BxV, sampling, np.int32(index), read_BxS)
    log_probs_B = _log_probs(logits_BxV, tokens_B, sampling.vocab_size) if return_log_probs else None
    if index + 1 < max_new_tokens:
      if length + index == num_slots:
        num_slots = slots(num_slots + 1, most)
        cache = cache.with_slots(num_slots)
      logits_BxV, cache = decode_step(leaves, tokens_B, cache)
    if index == 0:
      _check_finite(whole(finite_B))
    tokens_B = whole(tokens_B)
    yield tokens_B, np.full(len(prompts), np.nan) if log_probs_B is None else whole(log_probs_B)
    # The draw that reads this array has ended, since its tokens are here.
    read_BxS[:, length + index] = tokens_B


def _check_finite(finite_B):
  if not finite_B.all():
    raise ValueError(
      f"the model's logits after prompt {int(np.argmin(finite_B))} are not finite: its parameters are NaN or infinite, "
      "or too large for its dtype; load an earlier checkpoint."
    )


# Programs of their own, compiled once for the logits of prompts and of steps.
_draw = jax.jit(sample)
_log_probs = jax.jit(log_probs)


@jax.jit
def _are_finite(logits_BxV, vocab_size):
  drawable_V = jnp.arange(logits_BxV.shape[1]) < vocab_size
  return jnp.all(jnp.isfinite(logits_BxV) | ~drawable_V[None], axis=1)


def decoding_programs(graphdef: nnx.GraphDef, mesh: Mesh | AbstractMesh | None = None) -> tuple[Callable, Callable]:
  """(prefill, decode_step), jitted; both take the leaves of `model.for_decoding()` first.

  `prefill(leaves, tokens_BxT, start_B, num_slots=…)` reads left-padded prompts, and
  `decode_step(leaves, tokens_B, cache)` reads one token for each row; the cache is donated. Both return the logits
  [B, V] of the next token, and the cache.

  Args:
    graphdef: the graph definition of the `DecodingModel`.
    mesh: the devices that share its parameters. The cache is split by rows and heads. A decode step sends activations
      and no parameters: their channels stay split along fsdp (docs/sharding.md). None is one device.
  """
  return _programs(graphdef, mesh, platform(mesh))


@functools.lru_cache
def _programs(graphdef, mesh, platform):
  # The graph definition is not a static argument of a jitted function, because hashing it at each step would take a
  # millisecond.
  traced = functools.partial(traced_on, mesh) if mesh is not None else lambda function: function

  @functools.partial(jax.jit, static_argnames="num_slots")
  @traced
  def prefill(leaves, tokens_BxT, start_B, *, num_slots):
    model = nnx.merge(graphdef, *leaves)
    hidden_BxTxD, cache = model.prefill(tokens_BxT, start_B, num_slots)
    return _next_logits(model, hidden_BxTxD), cache

  # By default XLA:CPU copies a donated buffer that is read before it is written, without analysing the order.
  options = {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else None

  @functools.partial(jax.jit, donate_argnames="cache", compiler_options=options)
  @traced
  def decode_step(leaves, tokens_B, cache):
    model = nnx.merge(graphdef, *leaves)
    hidden_Bx1xD, cache = model.extend(tokens_B[:, None], cache)
    return _next_logits(model, hidden_Bx1xD), cache

  return prefill, decode_step


def _next_logits(model, hidden_BxTxD):
  # The table stays where it is, and each device draws the tokens of its rows.
  return constrain(model.logits(constrain(hidden_BxTxD[:, -1], "step", "embed")), "batch", None)


def bucket(length: int) -> int:
  """The compiled length for `length`: 16, 32, 64, or the next multiple of 128."""
  return next((size for size in _LENGTHS if length <= size), -(-length // 128) * 128)


def slots(filled: int, most: int) -> int:
  """The slots of a cache of which `filled` are in use: a power of two from 256 on, but at most `most`.

  A decode step reads every slot, so that they are added when they are needed. One step is compiled for each number.
  """
  return min(max(_LEAST_SLOTS, 1 << (filled - 1).bit_length()), most)


def _checked_ids(tokenizer, prompts, seq_length, max_new_tokens) -> list[list[int]]:
  """Each prompt's token ids. Every mistake is a ValueError that names the prompt by its number."""
  prompts = [prompts] if isinstance(prompts, str) else list(prompts)
  if not prompts:
    raise ValueError("prompts=[]: give at least one prompt.")
  rows = []
  for number, prompt in enumerate(prompts):
    ids = _ids(tokenizer, prompt, number)
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


def _ids(tokenizer, prompt, number) -> list[int]:
  if not isinstance(prompt, (str, Sequence, np.ndarray)):
    raise ValueError(f"prompt {number} is {prompt!r}: expected a text or a list of token ids.")
  if isinstance(prompt, str) and not prompt:
    return [tokenizer.end_of_document]
  try:
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
  except ValueError as error:
    raise ValueError(f"prompt {number}: {error}") from None
  if not ids:
    raise ValueError(
      f"prompt {number} has no ids: give at least one; [tokenizer.end_of_document] or an empty text begins a document."
    )
  return ids
