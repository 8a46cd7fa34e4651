"""Cross entropy and z-loss against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tokenformer_jax.training.loss import LossSums, loss_sums

LABELS = np.random.default_rng(1).integers(0, 11, (3, 5))
WEIGHTS = np.random.default_rng(2).exponential(size=(3, 5)) * (np.arange(15).reshape(3, 5) % 4 != 0)


def logits(scale):
  return (np.random.default_rng(0).normal(size=(3, 5, 11)) * scale).astype(np.float32)


def sums(scale, weights):
  """nats, z, weight."""
  wide = logits(scale).astype(np.float64)
  log_z = special.logsumexp(wide, axis=-1)
  nats = log_z - np.take_along_axis(wide, LABELS[..., None], axis=-1)[..., 0]
  return np.array([(weights * nats).sum(), (weights * log_z**2).sum(), weights.sum()])


@pytest.mark.parametrize("scale", [1.0, 1e4])  # At 1e4 every exp overflows float32.
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["all tokens", "weights"])
def test_sums_are_those_of_float64(scale, weights):
  given = None if weights is None else jnp.asarray(weights, jnp.float32)
  got = loss_sums(jnp.asarray(logits(scale)), jnp.asarray(LABELS), given)
  np.testing.assert_allclose(np.array(got), sums(scale, np.ones((3, 5)) if weights is None else weights), rtol=1e-6)


def test_batches_add_up_to_their_whole():
  whole = loss_sums(jnp.asarray(logits(3.0)), jnp.asarray(LABELS), jnp.asarray(WEIGHTS, jnp.float32))
  parts = [loss_sums(jnp.asarray(logits(3.0)[rows]), jnp.asarray(LABELS[rows]), jnp.asarray(WEIGHTS[rows], jnp.float32))
           for rows in (slice(0, 1), slice(1, 3))]
  np.testing.assert_allclose(np.array(LossSums(*map(sum, zip(*parts)))), np.array(whole), rtol=1e-6)


def test_gradient_is_softmax_minus_label():
  wide = logits(3.0).astype(np.float64)
  expected = WEIGHTS[..., None] * (special.softmax(wide, axis=-1) - np.eye(11)[LABELS])
  weights = jnp.asarray(WEIGHTS, jnp.float32)
  got = jax.grad(lambda x: loss_sums(x, jnp.asarray(LABELS), weights).nats)(jnp.asarray(logits(3.0)))
  np.testing.assert_allclose(got, expected, atol=1e-6)
