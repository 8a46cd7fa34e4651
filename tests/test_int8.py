"""int8 parameter tokens are the nearest possible ones, and the rest of the model is unchanged."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.inference.int8 import int8_tokens
from tokenformer_jax.interop.export import export
from tokenformer_jax.kernels.fused_pattention import fused_pattention
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

CONFIG = ModelConfig(
  vocab_size=61,
  num_layers=2,
  hidden_size=32,
  num_heads=4,
  qkv_tokens=24,
  proj_tokens=20,
  ffn_tokens=40,
  seq_length=16,
  kernel="fused",
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))


@pytest.fixture(scope="module")
def model():
  return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rounded(model):
  return int8_tokens(model)


def pattentions(model):
  return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, Pattention)]


def dequantised(model):
  """A copy of an int8 model whose tokens are the float32 numbers that the int8 ones represent."""
  model = nnx.merge(*split(model))
  for layer in pattentions(model):
    layer.keys = nnx.Param(layer.keys[...] * layer.key_scales[...][..., None], axes=layer.keys.axes)
    layer.values = nnx.Param(layer.values[...] * layer.value_scales[...][..., None, :], axes=layer.values.axes)
    del layer.key_scales, layer.value_scales
  return model


def test_tokens_are_the_nearest_of_255_levels(model, rounded):
  for before, after, back in zip(*map(pattentions, (model, rounded, dequantised(rounded))), strict=True):
    assert after.keys.dtype == after.values.dtype == jnp.int8 and before.keys.dtype == jnp.float32
    for name, scales in (("keys", after.key_scales[...][..., None]), ("values", after.value_scales[...][..., None, :])):
      error = np.abs(getattr(back, name)[...] - getattr(before, name)[...])
      assert np.all(error <= 0.5001 * scales), name
      assert np.max(np.abs(getattr(after, name)[...])) == 127


def test_the_model_is_the_one_with_rounded_tokens(model, rounded):
  expected = np.asarray(jax.jit(dequantised(rounded))(TOKENS))
  size = np.abs(expected).max()
  np.testing.assert_allclose(jax.jit(rounded)(TOKENS), expected, atol=1e-5 * size)
  # It differs from the model before rounding, but not by much.
  before = LanguageModel(ModelConfig(**{**CONFIG.__dict__, "kernel": "reference"}), rngs=nnx.Rngs(0))
  difference = np.abs(np.asarray(jax.jit(before)(TOKENS)) - expected).max()
  assert 1e-4 * size < difference < 0.05 * size


def test_no_rows_give_no_rows(rounded):
  layer = next(layer for layer in pattentions(rounded.for_decoding()))
  assert layer(jnp.zeros((2, 0, 32))).shape == (2, 0, 32)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_int8_model_decodes(rounded, rows):
  decoding = rounded.for_decoding()
  assert {leaf.dtype for leaf in jax.tree.leaves(split(decoding)[1])} == {jnp.dtype("int8"), jnp.dtype("float32")}
  expected = np.asarray(jax.jit(rounded)(TOKENS[:rows]))
  cache = KVCache.empty(CONFIG, jnp.zeros(rows, jnp.int32), 16)
  extend = jax.jit(lambda tokens, cache: decoding.extend(tokens, cache))
  hidden, cache = extend(TOKENS[:rows, :8], cache)
  last, _ = extend(TOKENS[:rows, 8:], cache)
  logits = np.concatenate([decoding.logits(hidden), decoding.logits(last)], axis=1)
  np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
  "action, use",
  [
    ("rounded to int8", lambda model, folder: int8_tokens(model)),
    ("grown", lambda model, folder: tf.grow(model, ffn_tokens=50)),
    ("shrunk", lambda model, folder: tf.shrink(model, [], ffn_tokens=30)),
    ("exported", lambda model, folder: export(model, folder)),
  ],
)
def test_an_int8_model_is_refused_where_float_tokens_are_needed(rounded, tmp_path, action, use):
  with pytest.raises(ValueError, match=f"parameter tokens are int8.* cannot be {action}; .*model with float tokens"):
    use(rounded, tmp_path)


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(key_scales=jnp.ones(1)), r"key_scales \(1,\): expected \(128,\), one for each token"),
    (dict(value_scales=jnp.ones((1, 256))), r"value_scales \(1, 256\): expected \(256,\), one for each output channel"),
  ],
)
def test_scales_of_a_wrong_shape_are_named(changed, message):
  tokens = dict(keys=jnp.ones((128, 128), jnp.int8), values=jnp.ones((128, 256), jnp.int8), tau=jnp.float32(1))
  with pytest.raises(ValueError, match=message):
    pattention(jnp.ones((2, 128)), ParameterTokens(**tokens, **changed))
  with pytest.raises(ValueError, match="int8 tokens with scales are not supported"):
    fused_pattention(jnp.ones((2, 128)), ParameterTokens(**tokens, **changed), interpret=True)


def test_a_missing_qwix_is_named(model, monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ValueError, match=r"int8 needs qwix: pip install 'tokenformer_jax\[int8\]'"):
    int8_tokens(model)


def test_a_model_without_parameter_tokens_is_refused():
  config = ModelConfig.named("tiny", "gpt2", vocab_size=16, num_layers=1)
  with pytest.raises(ValueError, match="int8 rounds parameter tokens, and this model has none: its matrices are dense"):
    int8_tokens(LanguageModel(config, rngs=nnx.Rngs(0)))
