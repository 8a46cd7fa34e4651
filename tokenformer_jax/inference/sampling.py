"""Choosing the next token from logits: greedy, temperature, top-k, top-p and repetition penalty, as pure functions.

Every setting is an array and none is a shape, so that one compiled program serves all settings.
"""

import dataclasses
import functools
import math
import operator
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# At this temperature the highest logit always wins, and dividing by a lower one would leave float32's range.
_SMALLEST_TEMPERATURE = 1e-6
# The number of ids in a block; a draw chooses a block first and then an id in it.
_BLOCK = 256
# Where a row of `read_BxS` has no token: an id that no vocabulary has.
NO_TOKEN = 2**31 - 1


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=[],
  data_fields=["key", "temperature", "top_k", "top_p", "repetition_penalty", "vocab_size"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn. `Sampling.checked` makes it; every field is a scalar array.

  The settings apply in the order of this list.

  Attributes:
    key: random key. Token t of row b is drawn with this key folded with b and t, so that it depends neither on the
      other rows nor on padding.
    vocab_size: only ids below it are drawn; the rest of a row of logits is padding.
    repetition_penalty: the logits of ids that the row has read or drawn before are divided by it where they are
      positive and multiplied by it where they are negative (CTRL, arXiv 1909.05858, section 4.1). 1 changes nothing,
      more makes repetitions less likely.
    temperature: logits are divided by it; 0 takes the highest (greedy).
    top_k: only the k highest logits are kept; 0 keeps all.
    top_p: of those, only the fewest are kept whose probabilities sum to top_p; 1 keeps all.
  """

  key: Array
  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]
  repetition_penalty: Float[Array, ""]
  vocab_size: Int[Array, ""]

  @classmethod
  def checked(
    cls,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
  ) -> "Sampling":
    """The settings as arrays.

    Args:
      vocab_size: the number of ids that may be drawn.
      temperature: 0 (greedy) or positive.
      top_k: 0 (all) or positive.
      top_p: above 0 and at most 1 (all).
      repetition_penalty: positive; 1 changes nothing.
      seed: any whole number from 0 on. Below 2**32 it is JAX's seed; the further 32-bit words of a larger seed are
        folded into the key one after the other, so that every seed has a key of its own.

    Raises:
      ValueError: a value out of range, which the message names.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
      raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number.")
    if not 0 < top_p <= 1:
      raise ValueError(f"top_p={top_p}: must be above 0 and at most 1 (1 keeps all tokens).")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
      raise ValueError(f"repetition_penalty={repetition_penalty}: must be a positive number (1 changes nothing).")
    top_k = checked_int("top_k", top_k, 0, "0 keeps all tokens")
    seed = checked_int("seed", seed, 0, "each seed gives its own text")
    vocab_size = checked_int("vocab_size", vocab_size, 1, "the number of ids that may be drawn")
    # No row of logits is this long, so keeping this many ids is keeping all.
    top_k = min(top_k, 2**31 - 1)
    return cls(
      key=_key(seed),
      temperature=jnp.float32(temperature),
      top_k=jnp.int32(top_k),
      top_p=jnp.float32(max(top_p, 1e-30)),  # In float32 a smaller one could be 0, which would keep no token.
      repetition_penalty=jnp.float32(repetition_penalty),
      vocab_size=jnp.int32(vocab_size),
    )


def _key(seed):
  key = jax.random.key(seed % 2**32)
  while seed := seed >> 32:
    key = jax.random.fold_in(key, seed % 2**32)
  return key


def sample(
  logits_BxV: Float[Array, "batch vocab"],
  sampling: Sampling,
  index: Int[Array, ""],
  read_BxS: Int[Array, "batch slot"] | None = None,
) -> Int[Array, "batch"]:
  """Draws the next token of each row.

  Args:
    logits_BxV: the logits of the next token, [B, V].
    sampling: the settings.
    index: the number of the token in its row's continuation, [].
    read_BxS: the ids that the repetition penalty concerns, [B, S]: those of the prompt and of the tokens drawn before,
      in any order, with `NO_TOKEN` in the slots that are left. By default there are none.

  Returns:
    One id for each row, [B].
  """
  if read_BxS is None:
    read_BxS = jnp.full((logits_BxV.shape[0], 1), NO_TOKEN, jnp.int32)
  key = jax.random.fold_in(sampling.key, index)
  keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits_BxV.shape[0]))
  return jax.vmap(_sample_row, in_axes=(0, None, 0, 0))(logits_BxV, sampling, keys_B, read_BxS)


def _sample_row(logits_V, sampling, key, read_S):
  # Padding is cut off inside each branch; before both of them, XLA would write out all logits once more.
  def draw_any(logits_V):
    return draw(kept(logits_V, sampling), key)

  def take_highest(logits_V):
    return greedy(within_vocabulary(logits_V, sampling.vocab_size))

  def penalised(logits_V):
    seen_V = jnp.zeros(logits_V.shape, bool).at[read_S].set(True, mode="drop")
    return penalise(logits_V, seen_V, sampling.repetition_penalty)

  logits_V = jax.lax.cond(sampling.repetition_penalty != 1, penalised, lambda logits_V: logits_V, logits_V)
  return jax.lax.cond(sampling.temperature > 0, draw_any, take_highest, logits_V)


def kept(logits_V: Float[Array, "vocab"], sampling: Sampling) -> Float[Array, "vocab"]:
  """The logits divided by the temperature, with −∞ for ids that top_k, top_p or the vocabulary leave out."""
  logits_V = within_vocabulary(logits_V, sampling.vocab_size)
  return truncate(logits_V / jnp.maximum(sampling.temperature, _SMALLEST_TEMPERATURE), sampling.top_k, sampling.top_p)


def log_probs(
  logits_BxV: Float[Array, "batch vocab"], tokens_B: Int[Array, "batch"], vocab_size: Int[Array, ""]
) -> Float[Array, "batch"]:
  """The log-probability (nats) that the logits give to each row's token, among the ids below `vocab_size`; [B]."""
  logits_BxV = jax.vmap(within_vocabulary, in_axes=(0, None))(logits_BxV, vocab_size)
  return jnp.take_along_axis(jax.nn.log_softmax(logits_BxV), tokens_B[:, None], axis=1)[:, 0]


def penalise(
  logits_V: Float[Array, "vocab"], seen_V: Bool[Array, "vocab"], penalty: Float[Array, ""]
) -> Float[Array, "vocab"]:
  """The logits with those of seen ids divided by the penalty where positive and multiplied by it where negative."""
  return jnp.where(seen_V, jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def greedy(logits_V: Float[Array, "vocab"]) -> Int[Array, ""]:
  """The id of the highest logit; the lowest id if several are equal."""
  # On CPUs argmax takes three times as long.
  return jnp.min(jnp.where(logits_V < jnp.max(logits_V), logits_V.size, jnp.arange(logits_V.size))).astype(jnp.int32)


def draw(logits_V: Float[Array, "vocab"], key: Array) -> Int[Array, ""]:
  """Draws an id with the probabilities that the logits give: first a block of ids, then an id of that block."""
  # `categorical` takes a random number for each choice; drawing from all ids at once would take a hundred times more.
  block_key, id_key = jax.random.split(key)
  logits_KxI = jnp.pad(logits_V, (0, -logits_V.size % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
  block = jax.random.categorical(block_key, jax.nn.logsumexp(logits_KxI, axis=1))
  return (block * _BLOCK + jax.random.categorical(id_key, logits_KxI[block])).astype(jnp.int32)


def within_vocabulary(logits_V: Float[Array, "vocab"], vocab_size: Int[Array, ""]) -> Float[Array, "vocab"]:
  """The logits, with −∞ for the ids from `vocab_size` on, which only pad the vocabulary."""
  return jnp.where(jnp.arange(logits_V.size) < vocab_size, logits_V, -jnp.inf)


def truncate(logits_V: Float[Array, "vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "vocab"]:
  """The logits, with −∞ for all but the top-k (0: all), and then for all but the nucleus of those.

  The nucleus is the smallest set of the likeliest tokens whose probabilities, renormalised over the top-k, sum to at
  least `top_p`. Both cuts also keep every token that is exactly as likely as the last one kept.
  """

  def highest(logits_V, weights_V, mass):
    bits_V = jax.lax.bitcast_convert_type(logits_V.astype(jnp.float32), jnp.uint32)
    # Unsigned integers that have the order of the logits.
    ranks_V = jnp.where(bits_V >> 31, ~bits_V, bits_V | jnp.uint32(1 << 31))
    return jnp.where(ranks_V >= _threshold(ranks_V, weights_V, mass), logits_V, -jnp.inf)

  def first_k(logits_V):
    return highest(logits_V, jnp.ones_like(logits_V, jnp.float32), top_k)

  def nucleus(logits_V):
    return highest(logits_V, jax.nn.softmax(logits_V).astype(jnp.float32), top_p)

  # Each cut takes longer than the draw, so it is skipped where it is not wanted.
  logits_V = jax.lax.cond(top_k > 0, first_k, lambda logits_V: logits_V, logits_V)
  return jax.lax.cond(top_p < 1, nucleus, lambda logits_V: logits_V, logits_V)


def _threshold(ranks_V, weights_V, mass):
  """The highest rank [] for which the weights of this rank and above sum to at least `mass`; 0 if there is none.

  It is found bit by bit, in 32 sums over all ids; a sort takes 25 times as long on a CPU.
  """

  def with_bit(index, rank):
    higher = rank | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    return jnp.where(jnp.sum(jnp.where(ranks_V >= higher, weights_V, 0.0)) >= mass, higher, rank)

  return jax.lax.fori_loop(0, 32, with_bit, jnp.uint32(0))


def checked_int(name: str, value: SupportsIndex, least: int, meaning: str) -> int:
  """`value` as an int of at least `least`. Raises ValueError with the name, the value and its meaning otherwise."""
  try:
    value = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}={value!r}: must be a whole number ({meaning}).") from None
  if value < least:
    raise ValueError(f"{name}={value}: must be at least {least} ({meaning}).")
  return value
