"""Choosing the next token from logits: greedy, temperature, top-k and top-p, as pure functions.

Every setting is an array and none is a shape, so one compiled program serves them all.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Below this the highest logit wins anyway, and dividing by less would leave float32's range.
_SMALLEST_TEMPERATURE = 1e-6
# Ids that a draw takes together first.
_BLOCK = 256


@functools.partial(
  jax.tree_util.register_dataclass, meta_fields=[], data_fields=["key", "temperature", "top_k", "top_p", "vocab_size"]
)
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn. Made by `Sampling.checked`; every field is a scalar array.

  Attributes:
    key: random key. Row b's token t is drawn with this key folded with b and t, so that it depends
      neither on the other rows nor on padding.
    temperature: logits are divided by it; 0 takes the highest (greedy).
    top_k: only the k highest logits, 0 for all.
    top_p: of those, only the fewest whose probabilities reach top_p together, 1 for all.
    vocab_size: only ids below it; the rest of a logit row is padding.
  """

  key: Array
  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]
  vocab_size: Int[Array, ""]

  @classmethod
  def checked(
    cls, *, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
  ) -> "Sampling":
    """The settings as arrays.

    Raises:
      ValueError: a value out of range, naming it.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
      raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number.")
    if not 0 < top_p <= 1:
      raise ValueError(f"top_p={top_p}: must be above 0 and at most 1 (1 keeps all tokens).")
    top_k = checked_int("top_k", top_k, 0, "0 keeps all tokens")
    seed = checked_int("seed", seed, 0, "each seed gives its own text")
    if seed >= 2**32:
      raise ValueError(f"seed={seed}: must be below 2**32.")
    vocab_size = checked_int("vocab_size", vocab_size, 1, "the number of ids that may be drawn")
    # No row of logits is that long: keeping so many is keeping all.
    top_k = min(top_k, 2**31 - 1)
    return cls(
      jax.random.key(seed), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(vocab_size)
    )


def sample(logits_BxV: Float[Array, "batch vocab"], sampling: Sampling, index: Int[Array, ""]) -> Int[Array, "batch"]:
  """Token number `index` of each row's continuation, [B], drawn from its logits [B, V]."""
  key = jax.random.fold_in(sampling.key, index)
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits_BxV.shape[0]))
  return jax.vmap(_sample_row, in_axes=(0, None, 0))(logits_BxV, sampling, keys_B)


def _sample_row(logits_V, sampling, key):
  # Padding is cut off in each branch: before both, XLA would write all logits out again.
  def drawn(logits_V):
    logits_V = within_vocabulary(logits_V, sampling.vocab_size)
    logits_V = logits_V / jnp.maximum(sampling.temperature, _SMALLEST_TEMPERATURE)
    return draw(truncate(logits_V, sampling.top_k, sampling.top_p), key)

  def likeliest(logits_V):
    return greedy(within_vocabulary(logits_V, sampling.vocab_size))

  return jax.lax.cond(sampling.temperature > 0, drawn, likeliest, logits_V)


def greedy(logits_V: Float[Array, "vocab"]) -> Int[Array, ""]:
  """The id of the highest logit, the first of equals."""
  # On CPUs argmax takes three times as long.
  return jnp.min(jnp.where(logits_V < jnp.max(logits_V), logits_V.size, jnp.arange(logits_V.size))).astype(jnp.int32)


def draw(logits_V: Float[Array, "vocab"], key: Array) -> Int[Array, ""]:
  """An id, each with the probability that its logit gives it: first a block of ids, then one of its."""
  # A draw takes a random number for each choice: among all ids at once, a hundred times as many.
  of_block, of_id = jax.random.split(key)
  logits_KxI = jnp.pad(logits_V, (0, -logits_V.size % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
  block = jax.random.categorical(of_block, jax.nn.logsumexp(logits_KxI, axis=1))
  return (block * _BLOCK + jax.random.categorical(of_id, logits_KxI[block])).astype(jnp.int32)


def within_vocabulary(logits_V: Float[Array, "vocab"], vocab_size: Int[Array, ""]) -> Float[Array, "vocab"]:
  """The logits, with −∞ for the ids from `vocab_size` on, which only pad the vocabulary."""
  return jnp.where(jnp.arange(logits_V.size) < vocab_size, logits_V, -jnp.inf)


def truncate(logits_V: Float[Array, "vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "vocab"]:
  """The logits, with −∞ for all but the top-k (0: all), and of those for all but the top-p nucleus.

  The nucleus is the fewest tokens, the likeliest first, whose probabilities, renormalised over the
  top-k, sum to at least `top_p`. Tokens as likely as the last one kept are kept too, by either.
  """

  def highest(logits_V, weights_V, mass):
    bits_V = jax.lax.bitcast_convert_type(logits_V.astype(jnp.float32), jnp.uint32)
    # Integers in the order of the logits.
    ranks_V = jnp.where(bits_V >> 31, ~bits_V, bits_V | jnp.uint32(1 << 31))
    return jnp.where(ranks_V >= _threshold(ranks_V, weights_V, mass), logits_V, -jnp.inf)

  def first_k(logits_V):
    return highest(logits_V, jnp.ones_like(logits_V, jnp.float32), top_k)

  def nucleus(logits_V):
    return highest(logits_V, jax.nn.softmax(logits_V).astype(jnp.float32), top_p)

  # Conditions, for each cut takes longer than the draw.
  logits_V = jax.lax.cond(top_k > 0, first_k, lambda logits_V: logits_V, logits_V)
  return jax.lax.cond(top_p < 1, nucleus, lambda logits_V: logits_V, logits_V)


def _threshold(ranks_V, weights_V, mass):
  """The highest rank [] at and above which the weights sum to `mass` or more, 0 where none does.

  Found bit by bit, in 32 sums over all: a sort takes 25 times as long on a CPU.
  """

  def with_bit(index, rank):
    higher = rank | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    return jnp.where(jnp.sum(jnp.where(ranks_V >= higher, weights_V, 0.0)) >= mass, higher, rank)

  return jax.lax.fori_loop(0, 32, with_bit, jnp.uint32(0))


def checked_int(name: str, value, least: int, meaning: str) -> int:
  """`value` as an int of at least `least`, or a ValueError that says what it means."""
  try:
    value = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}={value!r}: must be a whole number ({meaning}).") from None
  if value < least:
    raise ValueError(f"{name}={value}: must be at least {least} ({meaning}).")
  return value
