"""The compiled programs of generation: one reads all prompts, one reads a token for each row and is run for every token."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from tokenformer_jax.distributed.axes import constrain, mesh_of, platform, traced_on
from tokenformer_jax.distributed.processes import whole
from tokenformer_jax.inference.sampling import NO_TOKEN, Sampling, log_probs, sample
from tokenformer_jax.nn.parameters import split

_LENGTHS = (16, 32, 64, 128)
# A cache with fewer slots would be read in little less time than the parameters are.
_LEAST_SLOTS = 256


def decode(
  model, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, return_log_probs: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (tokens [B], their log-probabilities [B]) of each step, while the device works on the next step."""
  tokens_BxT, start_B = left_padded(prompts)
  length = tokens_BxT.shape[1]
  most = bucket(length + max_new_tokens)
  num_slots = slots(length + 1, most)
  read_BxS = np.full((len(prompts), most), NO_TOKEN, np.int32)
  real_BxT = np.arange(length)[None] >= start_B[:, None]
  read_BxS[:, :length][real_BxT] = tokens_BxT[real_BxT]

  graphdef, *leaves = split(model.for_decoding())
  prefill, decode_step = decoding_programs(graphdef, mesh_of(leaves))
  logits_BxV, cache = prefill(leaves, tokens_BxT, start_B, num_slots=num_slots)
  finite_B = are_finite(logits_BxV, sampling.vocab_size)
  for index in range(max_new_tokens):
    tokens_B = draw(logits_BxV, sampling, np.int32(index), read_BxS)
    log_probs_B = _log_probs(logits_BxV, tokens_B, sampling.vocab_size) if return_log_probs else None
    if index + 1 < max_new_tokens:
      if length + index == num_slots:
        num_slots = slots(num_slots + 1, most)
        cache = cache.with_slots(num_slots)
      logits_BxV, cache = decode_step(leaves, tokens_B, cache)
    if index == 0:
      check_finite(whole(finite_B))
    tokens_B = whole(tokens_B)
    yield tokens_B, np.full(len(prompts), np.nan) if log_probs_B is None else whole(log_probs_B)
    # The draw that reads this array has ended, since its tokens are here.
    read_BxS[:, length + index] = tokens_B


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """(prompts [B, T] that end together, padded on their left to a `bucket`; the position of each one's first token [B])."""
  length = bucket(max(map(len, prompts)))
  tokens_BxT = np.zeros((len(prompts), length), np.int32)
  for row, ids in enumerate(prompts):
    tokens_BxT[row, length - len(ids) :] = ids
  return tokens_BxT, np.array([length - len(ids) for ids in prompts], np.int32)


def check_finite(finite_B: np.ndarray) -> None:
  """Raises ValueError unless the logits after every prompt are finite."""
  if not finite_B.all():
    raise ValueError(
      f"the model's logits after prompt {int(np.argmin(finite_B))} are not finite: its parameters are NaN or infinite, "
      "or too large for its dtype; load an earlier checkpoint."
    )


# Programs of their own, compiled once for the logits of prompts and of steps.
draw = jax.jit(sample)
_log_probs = jax.jit(log_probs)


@jax.jit
def are_finite(logits_BxV, vocab_size):
  """Whether the logits of the ids that may be drawn are finite, [B]."""
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
    return next_logits(model, hidden_BxTxD), cache

  @functools.partial(jax.jit, donate_argnames="cache", compiler_options=compiler_options(platform))
  @traced
  def decode_step(leaves, tokens_B, cache):
    model = nnx.merge(graphdef, *leaves)
    hidden_Bx1xD, cache = model.extend(tokens_B[:, None], cache)
    return next_logits(model, hidden_Bx1xD), cache

  return prefill, decode_step


def compiler_options(platform: str) -> dict[str, bool] | None:
  """Options for programs that write into a donated cache."""
  # By default XLA:CPU copies a donated buffer that is read before it is written, without analysing the order.
  return {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else None


def next_logits(model, hidden_BxTxD):
  """The logits [B, V] after the last token."""
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
