"""Shaped attention equals a float64 oracle with the whole matrix α I + β A − γ C, however its tokens are presented."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import oracle
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.attention import Attention
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import split

BATCH, TIME, HEADS, SIZE = 2, 9, 4, 16
KINDS = ("centred", "skip")
TOLERANCE = dict(rtol=0, atol=1e-5)


def attention_config(kind, **part):
  part = {"values": "projected", "positions": "learned", "shaped": kind, **part}
  return ModelConfig.named(
    "tiny", "sas", vocab_size=8, num_layers=2, hidden_size=SIZE, num_heads=HEADS, ffn_tokens=4, attention=part
  )


def random_attention(kind, **part):
  """(configuration, a layer whose output projection is absent and whose every parameter is random)."""
  config = attention_config(kind, **part)
  layer = Attention(config, rngs=nnx.Rngs(0))
  layer.proj = None
  rng = np.random.default_rng(0)
  graphdef, parameters, tau = split(layer)
  parameters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.6, jnp.float32), parameters)
  return config, nnx.merge(graphdef, parameters, tau)


def random_inputs(batch=BATCH):
  return np.random.default_rng(1).normal(size=(batch, TIME, SIZE)).astype(np.float32)


def causal(segments):
  """visible[b, t, s]: whether t sees s."""
  return np.tril(np.ones((TIME, TIME), bool)) & (segments[:, :, None] == segments[:, None, :])


def expected(layer, x, visible):
  """The product of the whole matrix with the values, [B, T, d]."""
  x = np.asarray(x, np.float64)

  def heads(projection):
    w = oracle.wide({"w": projection.weight[...], **({} if projection.bias is None else {"b": projection.bias[...]})})
    h = (x @ w["w"] + w.get("b", 0.0)).reshape(*x.shape[:2], -1, layer.head_dim)
    return np.repeat(h, HEADS // h.shape[2], axis=2)

  q, k, v = heads(layer.query), heads(layer.key), heads(layer.value)
  scores = np.where(visible[:, None], np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(layer.head_dim), -np.inf)
  # Padding sees nothing; its rows are compared nowhere.
  scores = np.where(visible.any(-1)[:, None, :, None], scores, 0.0)
  a = np.exp(scores - scores.max(axis=-1, keepdims=True))
  a = a / a.sum(axis=-1, keepdims=True)
  c = visible / np.maximum(visible.sum(-1, keepdims=True), 1)
  gains = oracle.wide({name: g[...] for name, g in vars(layer.shaping).items() if isinstance(g, nnx.Param)})
  alpha, beta = gains["alpha"][:, None, None], gains["beta"][:, None, None]
  matrix = alpha * np.eye(x.shape[1]) + beta * a - gains.get("gamma", np.zeros(HEADS))[:, None, None] * c[:, None]
  return np.einsum("bhts,bshc->bthc", matrix, v).reshape(*x.shape[:2], -1)


@jax.jit
def full(layer, x, segments):
  context = Context(jnp.arange(TIME)[None], segments=segments)
  return layer.mix(*layer.project(x, context), context)[0]


@pytest.mark.parametrize("kind, num_kv_heads", [("centred", 2), ("skip", 0)])
def test_packed_documents_and_shared_heads(kind, num_kv_heads):
  _, layer = random_attention(kind, num_kv_heads=num_kv_heads)
  segments = np.array([[1] * 4 + [2] * 1 + [3] * 4, [1] * 7 + [2] * 2])
  x = random_inputs()
  y = full(layer, x, jnp.asarray(segments))
  np.testing.assert_allclose(y, expected(layer, x, causal(segments)), **TOLERANCE)


@pytest.mark.parametrize("batch", [2, 1])
def test_cached_decoding_of_a_padded_prompt_a_chunk_and_a_single_token(batch):
  """Prompts are padded on their left; a single row decodes by operations of its own."""
  config, layer = random_attention("centred", num_kv_heads=2)
  start = np.array([3, 0])[:batch]
  x = random_inputs(batch)
  real = np.arange(TIME)[None] >= start[:, None]

  @jax.jit
  def decoded(layer, x):
    cache = KVCache.empty(config, jnp.asarray(start), TIME + 2)
    outputs = []
    for first, last in ((0, 5), (5, 7), (7, 8), (8, 9)):
      positions = cache.positions(last - first)
      if first == 0:
        prompt = jnp.asarray(real[:, :last])
        context = Context(positions, segments=prompt.astype(jnp.int32), real=prompt, filled=cache.length)
      else:
        context = Context(positions, visible=cache.mask(last - first), filled=cache.length)
      y, one = layer.mix(*layer.project(x[:, first:last], context), context, cache.layers[0])
      cache = dataclasses.replace(cache, layers=(one,)).advanced(last - first)
      outputs.append(y)
    return jnp.concatenate(outputs, axis=1)

  y, oracles = decoded(layer, x), expected(layer, x, causal(real.astype(int)))
  np.testing.assert_allclose(np.asarray(y)[real], oracles[real], **TOLERANCE)


def test_gains_receive_the_gradients_of_the_matrix():
  """⟨d_y, V⟩, ⟨d_y, A V⟩ and −⟨d_y, C V⟩ of each head, by differences in gains in which the output is linear."""
  _, layer = random_attention("centred")
  x, d_y = random_inputs(), np.random.default_rng(2).normal(size=(BATCH, TIME, SIZE))
  segments = np.zeros((BATCH, TIME), int)
  graphdef, parameters, tau = split(layer)
  loss = lambda p: jnp.sum(full(nnx.merge(graphdef, p, tau), x, None) * d_y)  # noqa: E731
  grads = jax.jit(jax.grad(loss))(parameters)["shaping"]
  for name in ("alpha", "beta", "gamma"):
    for head in range(HEADS):
      gain = getattr(layer.shaping, name)
      with_one, without = (gain[...].at[head].set(value) for value in (1.0, 0.0))
      slopes = []
      for value in (with_one, without):
        gain[...] = value
        slopes.append(np.sum(expected(layer, x, causal(segments)) * d_y))
      gain[...] = parameters["shaping"][name]
      np.testing.assert_allclose(grads[name][head], slopes[0] - slopes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_is_the_identity_of_its_values(kind):
  """Up to rounding: A V and the mean of V are sums in two orders."""
  layer = Attention(attention_config(kind, values="identity"), rngs=nnx.Rngs(0))
  x = random_inputs()
  np.testing.assert_allclose(full(layer, x, None), x, rtol=0, atol=5e-7)
