"""All implementations of attention, causal or not, give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_run
from tokenformer_jax.distributed.axes import replicated, traced_on
from tokenformer_jax.nn.token_attention import (
  _splash,
  bidirectional_attention,
  causal_attention,
  default_implementation,
)

SHAPE = (2, 256, 2, 8)  # Two tiles of 128.
SEGMENTS = np.stack([np.sort(np.random.default_rng(i).integers(0, 4, 256)) for i in range(2)]).astype(np.int32)


def in_float64(q, k, v, segments, key_segments=None):
  """Causal attention, or with `key_segments` bidirectional attention."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  scores = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(SHAPE[-1])
  visible = segments[:, :, None] == (segments if key_segments is None else key_segments)[:, None, :]
  if key_segments is None:
    visible &= np.tril(np.ones(scores.shape[-2:], bool))[None]
  weights = np.where(visible[:, None], np.exp(scores), 0.0)
  return np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
  "mesh, causal", [({}, False), (dict(data=2, token=2), True), (dict(sequence=2), True)], ids=str
)
def test_splash_equals_xla_and_float64(mesh, causal):
  mesh = small_run.mesh(**mesh)
  arrays = tuple(np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32))
  q, k, v, d_output = jax.device_put(arrays, replicated(mesh))

  # In the bidirectional case some tokens are padding, which nobody sees.
  segments = (SEGMENTS,) if causal else (SEGMENTS, np.where(np.arange(256) % 5 == 3, -1, SEGMENTS).astype(np.int32))

  def value_and_gradients(attention):
    def run(q, k, v, segments):
      y, pull = jax.vjp(lambda *qkv: attention(*qkv, *segments), q, k, v)
      return y, *pull(d_output)

    return jax.jit(traced_on(mesh, run))(q, k, v, segments)

  xla = value_and_gradients(
    functools.partial(causal_attention if causal else bidirectional_attention, implementation="xla")
  )

  def interpreted(q, k, v, segments, key_segments=None):
    return _splash(q, k, v, segments, segments if key_segments is None else key_segments, causal, interpret=True)

  splash = value_and_gradients(interpreted)
  np.testing.assert_allclose(splash[0], in_float64(q, k, v, *segments), atol=1e-6)
  small_run.assert_close(dict(enumerate(splash)), dict(enumerate(xla)), 1e-5)


@pytest.mark.parametrize("time", [1, 66, 128, 200, 256])
def test_blocks_of_queries_equal_the_whole(time):
  """This holds also where the queries cannot be split, and the backward pass keeps no scores."""
  rng = np.random.default_rng(1)
  q, k, v = rng.normal(size=(3, 2, time, 2, 8)).astype(np.float32)
  y, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, implementation="xla"), q, k, v)
  np.testing.assert_allclose(y, in_float64(q, k, v, np.zeros((2, time), np.int32)), atol=1e-6)
  assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {q.shape}


def test_each_device_has_its_implementation():
  train, bf16 = (8, 2048, 12, 64), jnp.bfloat16
  assert [default_implementation(platform, bf16, train) for platform in ("cpu", "gpu", "tpu")] == [
    "xla",
    "cudnn",
    "splash",
  ]
  # cuDNN supports neither float32 nor wide heads; splash needs whole tiles of positions on each device.
  assert (
    default_implementation("gpu", jnp.float32, train) == default_implementation("gpu", bf16, (8, 2048, 2, 256)) == "xla"
  )
  assert default_implementation("tpu", bf16, (8, 100, 12, 64)) == "xla"
  with jax.sharding.use_abstract_mesh(small_run.mesh(sequence=2).abstract_mesh):
    assert default_implementation("tpu", bf16, train) == "splash"
    assert default_implementation("tpu", bf16, (8, 128, 12, 64)) == "xla"


@pytest.mark.parametrize(
  "implementation, platform, time, message",
  [
    ("cudnnn", "cpu", 128, "implementation='cudnnn': choose one of xla, cudnn, splash. Did you mean 'cudnn'?"),
    ("cudnn", "cpu", 128, "implementation='cudnn' runs on a GPU, and this is cpu; choose 'xla'"),
    ("splash", "cpu", 128, "implementation='splash' runs on a TPU, and this is cpu; choose 'xla'"),
    (
      "splash",
      "tpu",
      100,
      "implementation='splash' takes a multiple of 128 positions on each device, and there are 100 on 1; choose 'xla'",
    ),
  ],
)
def test_an_implementation_that_does_not_apply_is_refused(monkeypatch, implementation, platform, time, message):
  monkeypatch.setattr("tokenformer_jax.nn.token_attention.platform", lambda: platform)
  q = jnp.ones((1, time, 1, 8))
  with pytest.raises(ValueError, match=message):
    causal_attention(q, q, q, implementation=implementation)
