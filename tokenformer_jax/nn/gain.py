"""Gains: one number that multiplies a term of a block's sum."""

import functools
import operator

import jax
from flax import nnx

from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.projection import weighted


class Gain(nnx.Module):
  """gain · x. A gain of 0 is an absent term and gives None; a constant gain of 1 is no operation.

  Args:
    initial: the gain, at first or for ever.
    trained: whether it is a parameter, without decay. A gain of 0 never is.
    rngs: as for every layer.
  """

  gain: nnx.Param | None = None

  def __init__(self, initial: float, trained: bool, *, rngs: nnx.Rngs):
    self.constant = initial
    if trained and initial != 0.0:
      self.gain = parameter(rngs, (), (), nnx.initializers.constant(initial), decayed=False)

  def __call__(self, x: jax.Array) -> jax.Array | None:
    if self.constant == 0.0:
      return None
    if self.gain is not None:
      return weighted(self.gain[...], x)
    return x if self.constant == 1.0 else x * self.constant


def total(*terms: jax.Array | None) -> jax.Array:
  """The sum of the terms that are not absent; at least one is there."""
  return functools.reduce(operator.add, [term for term in terms if term is not None])
