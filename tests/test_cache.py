"""Decoding with the cache gives the numbers of the full forward pass, however the tokens arrive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.inference.int8 import int8_tokens
from tokenformer_jax.interop.export import export
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.parameters import split

LENGTHS = (9, 4, 1)
# A batch of one row has a path of its own through the cache.
rows = pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]], ids=["three rows", "one row"])


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(
    vocab_size=61,
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    qkv_tokens=24,
    proj_tokens=20,
    ffn_tokens=40,
    seq_length=32,
    rotary_fraction=0.5,
  )
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  # At their initial size the values hardly change the residual stream.
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if "values" in path:
      variable[...] = 10.0 * variable[...]
  return model


@pytest.fixture(scope="module")
def decoding(model):
  return model.for_decoding()


@pytest.fixture(scope="module")
def extend(decoding):
  return jax.jit(lambda tokens, cache: decoding.extend(tokens, cache))


@pytest.fixture(scope="module", params=["prefill", "extend"])
def read(request, model, decoding, extend):
  """`(tokens, start) -> (hidden, cache)` with 20 slots, by either method."""
  if request.param == "prefill":
    return jax.jit(lambda tokens, start: decoding.prefill(tokens, start, 20))
  return lambda tokens, start: extend(tokens, KVCache.empty(model.config, start, 20))


@pytest.fixture(scope="module")
def sequences():
  return [np.random.default_rng(n).integers(0, 61, n + 6) for n in LENGTHS]


def left_padded(sequences, lengths):
  longest = max(lengths)
  tokens = np.zeros((len(lengths), longest), np.int32)
  for row, (ids, length) in enumerate(zip(sequences, lengths)):
    tokens[row, longest - length :] = ids[:length]
  return jnp.asarray(tokens), jnp.asarray([longest - length for length in lengths])


@rows
def test_prompts_and_steps_equal_the_full_forward(model, decoding, read, extend, sequences, lengths):
  tokens, start = left_padded(sequences, lengths)
  hidden, cache = read(tokens, start)
  logits = [decoding.logits(hidden)]
  for index in range(6):
    step = jnp.asarray([ids[length + index] for ids, length in zip(sequences, lengths)])[:, None]
    hidden, cache = extend(step, cache)
    logits.append(decoding.logits(hidden))
  logits = np.concatenate(logits, axis=1)
  assert int(cache.length) == max(lengths) + 6
  # Padding on the right is seen by no token before it.
  whole = np.asarray(jax.jit(model)(jnp.asarray([np.resize(ids, 15) for ids in sequences])))
  for row, ids in enumerate(sequences[: len(lengths)]):
    expected = whole[row, : len(ids)]
    error = np.abs(logits[row, start[row] :] - expected).max()
    assert error <= 1e-5 * np.abs(expected).max(), (row, error)


def test_a_chunk_of_tokens_is_causal_within_itself(model, extend, sequences):
  ids = jnp.asarray(sequences[0])[None]
  cache = KVCache.empty(model.config, jnp.zeros(1, jnp.int32), 15)
  pieces = []
  for piece in jnp.split(ids, 3, axis=1):
    hidden, cache = extend(piece, cache)
    pieces.append(hidden)
  expected = np.asarray(jax.jit(model.hidden)(ids)[0])
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5 * np.abs(expected).max())


@rows
def test_neither_padding_nor_empty_slots_are_seen(model, read, extend, sequences, lengths):
  tokens, start = left_padded(sequences, lengths)
  start, tokens = start + 2, jnp.pad(tokens, ((0, 0), (2, 0)))
  hidden, cache = read(tokens, start)
  padding = jnp.arange(tokens.shape[1])[None] < start[:, None]
  other_hidden, _ = read(jnp.where(padding, 7, tokens), start)
  np.testing.assert_array_equal(other_hidden[:, -1], hidden[:, -1])

  step = jnp.full((len(lengths), 1), 5)
  expected, _ = extend(step, cache)
  empty = jnp.arange(20) >= cache.length
  empty = empty[None, None, :, None]
  rubbish = jax.tree.map(lambda buffer: jnp.where(empty, 1e3, buffer), cache.layers)
  seen, _ = extend(step, KVCache(rubbish, cache.start, cache.length))
  np.testing.assert_array_equal(seen, expected)


def test_a_decoding_model_has_the_dtype_of_products_and_leaves_the_model_as_it_was(model):
  config = dataclasses.replace(model.config, compute_dtype="bfloat16")
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  decoding = model.for_decoding()
  assert decoding.for_decoding() is decoding and decoding.config is config
  assert {leaf.dtype for leaf in jax.tree.leaves(split(model))} == {jnp.dtype("float32")}
  # Only the final norm stays in float32.
  wide = [leaf.shape for leaf in jax.tree.leaves(split(decoding)[1]) if leaf.dtype != jnp.bfloat16]
  assert wide == [(config.hidden_size,)] * 2


@pytest.mark.parametrize(
  "use, error",
  [
    (lambda decoding, folder: decoding(jnp.ones((1, 2), jnp.int32)), TypeError),
    (lambda decoding, folder: tf.grow(decoding, ffn_tokens=50), ValueError),
    (lambda decoding, folder: tf.shrink(decoding, [], ffn_tokens=30), ValueError),
    (lambda decoding, folder: export(decoding, folder), ValueError),
    (lambda decoding, folder: int8_tokens(decoding), ValueError),
  ],
  ids=["called", "grown", "shrunk", "exported", "rounded"],
)
def test_a_decoding_model_only_decodes_and_says_so(decoding, tmp_path, use, error):
  with pytest.raises(error, match="DecodingModel .*the LanguageModel (whose for_decoding|that it was made from)"):
    use(decoding, tmp_path)


def test_positions_count_from_the_first_real_token():
  config = ModelConfig.named("tiny", vocab_size=32)
  cache = KVCache.empty(config, jnp.array([0, 2]), 8)
  assert cache.positions(3).tolist() == [[0, 1, 2], [0, 0, 0]]
  assert cache.advanced(3).positions(2).tolist() == [[3, 4], [1, 2]]


def test_the_cache_has_the_compute_dtype():
  config = ModelConfig.named("tiny", vocab_size=32, compute_dtype="bfloat16")
  decoding = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).for_decoding())
  cache = jax.eval_shape(lambda: KVCache.empty(config, jnp.zeros(2, jnp.int32), 8))
  graphdef, *leaves = split(decoding)
  hidden, cache = jax.eval_shape(
    lambda leaves, cache: nnx.merge(graphdef, *leaves).extend(jnp.ones((2, 3), jnp.int32), cache), leaves, cache
  )
  assert hidden.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}


def test_a_full_cache_is_refused_and_left_as_it_was(model, decoding):
  cache = KVCache.empty(model.config, jnp.zeros(1, jnp.int32), 4).advanced(3)
  before = np.asarray(cache.layers[0].keys)
  with pytest.raises(ValueError, match="cache has 4 slots, of which 3 are filled, and 2 more tokens do not fit"):
    decoding.extend(jnp.ones((1, 2), jnp.int32), cache)
  np.testing.assert_array_equal(cache.layers[0].keys, before)
  with pytest.raises(ValueError, match="5 more tokens do not fit"):
    jax.eval_shape(lambda cache: decoding.extend(jnp.ones((1, 5), jnp.int32), cache), cache)
  with pytest.raises(ValueError, match="5 more tokens do not fit"):
    decoding.prefill(jnp.ones((1, 5), jnp.int32), jnp.zeros(1, jnp.int32), 4)
