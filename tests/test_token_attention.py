"""Attention by kernel gives the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_run
from tokenformer_jax.distributed.axes import replicated, traced_on
from tokenformer_jax.nn import token_attention
from tokenformer_jax.nn.token_attention import causal_attention, kernel_for

SHAPE = (2, 256, 2, 8)  # Two tiles of 128.
SEGMENTS = np.stack([np.sort(np.random.default_rng(i).integers(0, 4, 256)) for i in range(2)]).astype(np.int32)


def in_float64(q, k, v, segments):
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  scores = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(SHAPE[-1])
  seen = np.tril(np.ones(scores.shape[-2:], bool))[None] & (segments[:, :, None] == segments[:, None, :])
  weights = np.where(seen[:, None], np.exp(scores), 0.0)
  return np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture
def splash(monkeypatch):
  kernel = token_attention._splash
  monkeypatch.setattr(token_attention, "_splash", lambda *args: kernel(*args, interpret=True))


@pytest.mark.parametrize("mesh", [{}, dict(data=2, token=2)], ids=str)
def test_splash_is_xla_is_float64(splash, mesh):
  mesh = small_run.mesh(**mesh)
  arrays = tuple(np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32))
  q, k, v, by_output = jax.device_put(arrays, replicated(mesh))

  def both(implementation):
    def run(q, k, v, segments):
      y, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, segments, implementation), q, k, v)
      return y, *pull(by_output)

    return run

  xla = jax.jit(traced_on(mesh, both("xla")))(q, k, v, SEGMENTS)
  ours = jax.jit(traced_on(mesh, both("splash")))(q, k, v, SEGMENTS)
  np.testing.assert_allclose(ours[0], in_float64(q, k, v, SEGMENTS), atol=1e-6)
  small_run.assert_close(dict(enumerate(ours)), dict(enumerate(xla)), 1e-5)


@pytest.mark.parametrize("time", [1, 66, 128, 200, 256])
def test_blocks_of_queries_are_the_whole(time):
  """Also where the queries cannot be split; and for the gradient no scores are kept."""
  rng = np.random.default_rng(1)
  q, k, v = rng.normal(size=(3, 2, time, 2, 8)).astype(np.float32)
  y, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, implementation="xla"), q, k, v)
  np.testing.assert_allclose(y, in_float64(q, k, v, np.zeros((2, time), np.int32)), atol=1e-6)
  assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {q.shape}


def test_each_device_has_its_kernel():
  train, bf16 = (8, 2048, 12, 64), jnp.bfloat16
  assert [kernel_for(platform, bf16, train) for platform in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
  # What they cannot: float32 and wide heads; rows that are no tiles; positions on several devices.
  assert kernel_for("gpu", jnp.float32, train) == kernel_for("gpu", bf16, (8, 2048, 2, 256)) == "xla"
  assert kernel_for("tpu", bf16, (8, 100, 12, 64)) == "xla"
  with jax.sharding.use_abstract_mesh(small_run.mesh(sequence=2).abstract_mesh):
    assert kernel_for("tpu", bf16, train) == "xla"
