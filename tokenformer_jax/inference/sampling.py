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


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[],
                   data_fields=["key", "temperature", "top_k", "top_p", "vocab_size"])
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
  def checked(cls, *, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
              seed: int = 0) -> "Sampling":
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
    return cls(jax.random.key(seed), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p),
               jnp.int32(vocab_size))


def sample(logits_BxV: Float[Array, "batch vocab"], sampling: Sampling, index: Int[Array, ""]
           ) -> Int[Array, "batch"]:
  """Token number `index` of each row's continuation, [B], drawn from its logits [B, V]."""
  key = jax.random.fold_in(sampling.key, index)
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits_BxV.shape[0]))
  return jax.vmap(_sample_row, in_axes=(0, None, 0))(logits_BxV, sampling, keys_B)


def _sample_row(logits_V, sampling, key):
  logits_V = within_vocabulary(logits_V, sampling.vocab_size)

  def drawn(logits_V):
    scaled_V = logits_V / jnp.maximum(sampling.temperature, _SMALLEST_TEMPERATURE)
    cuts = (sampling.top_k > 0) | (sampling.top_p < 1)
    # A condition, for sorting a large vocabulary costs more than drawing from it.
    kept_V = jax.lax.cond(cuts, lambda x: truncate(x, sampling.top_k, sampling.top_p), lambda x: x, scaled_V)
    return jax.random.categorical(key, kept_V).astype(jnp.int32)

  return jax.lax.cond(sampling.temperature > 0, drawn, greedy, logits_V)


def greedy(logits_V: Float[Array, "vocab"]) -> Int[Array, ""]:
  """The id of the highest logit, the first of equals."""
  return jnp.argmax(logits_V).astype(jnp.int32)


def within_vocabulary(logits_V: Float[Array, "vocab"], vocab_size: Int[Array, ""]) -> Float[Array, "vocab"]:
  """The logits, with −∞ for the ids from `vocab_size` on, which only pad the vocabulary."""
  return jnp.where(jnp.arange(logits_V.size) < vocab_size, logits_V, -jnp.inf)


def truncate(logits_V: Float[Array, "vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
             ) -> Float[Array, "vocab"]:
  """The logits, with −∞ for all but the top-k (0: all), and of those for all but the top-p nucleus.

  The nucleus is the fewest tokens, the likeliest first, whose probabilities, renormalised over the
  top-k, sum to at least `top_p`. Tokens as likely as the last one kept are kept too.
  """
  sorted_V = -jnp.sort(-logits_V)
  within_k = (top_k == 0) | (jnp.arange(sorted_V.size) < top_k)
  probabilities_V = jax.nn.softmax(jnp.where(within_k, sorted_V, -jnp.inf))
  before_V = jnp.cumsum(probabilities_V) - probabilities_V
  # top_p = 1 keeps all, also where the rounded sum reaches 1 early.
  kept_V = within_k & ((before_V < top_p) | (top_p >= 1))
  return jnp.where(logits_V >= jnp.min(jnp.where(kept_V, sorted_V, jnp.inf)), logits_V, -jnp.inf)


def checked_int(name: str, value, least: int, meaning: str) -> int:
  """`value` as an int of at least `least`, or a ValueError that says what it means."""
  try:
    value = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}={value!r}: must be a whole number ({meaning}).") from None
  if value < least:
    raise ValueError(f"{name}={value}: must be at least {least} ({meaning}).")
  return value
