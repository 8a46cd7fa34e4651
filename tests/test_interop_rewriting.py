"""A grown model rewritten for τ = √N is the same function to float64 accuracy."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests import oracle
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.export import released_arrays
from tokenformer_jax.interop.names import from_released, pattention_names, released_shapes
from tokenformer_jax.interop.rewriting import rewritten_keys, rewritten_values, rows_needed

THETAS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize(
  "num_tokens, hidden_size, tau",
  [
    (24, 8, 3.0),  # grown from 9
    (24, 8, math.sqrt(24.0)),
    (5, 8, 2.0),  # fewer tokens than channels
    (24, 8, 9.0),  # τ² exceeds even the count with the added rows: rows of zeros are added, too
  ],
)
def test_one_pattention(theta, num_tokens, hidden_size, tau):
  draw = np.random.default_rng(0).normal
  x, keys = draw(size=(50, hidden_size)), draw(size=(num_tokens, hidden_size))
  values = draw(size=(num_tokens, 6))
  keys[-3:] = 0  # new rows, as growth makes them
  count = rows_needed(num_tokens, hidden_size, [tau], theta)
  new_keys = rewritten_keys(keys, tau, theta, count)
  new_values = rewritten_values(values, tau, theta, count)
  assert new_keys.shape == (count, hidden_size) and new_values.shape == (count, 6)
  expected = oracle.pattention(x, keys, values, theta, tau)
  # Without an argument, the oracle's τ is √N, or N for softmax.
  np.testing.assert_allclose(
    oracle.pattention(x, new_keys, new_values, theta), expected, rtol=0, atol=1e-10 * np.abs(expected).max()
  )
  # The old keys stay in front, and the values of the added rows are zero.
  np.testing.assert_array_equal(new_keys[:num_tokens], keys)
  assert not new_values[num_tokens:].any()


def test_rows_needed():
  assert rows_needed(24, 8, [math.sqrt(24.0)] * 3, "l2_norm_gelu") == 24
  assert rows_needed(24, 8, [3.0, math.sqrt(24.0)], "l2_norm_gelu") == 32
  assert rows_needed(5, 8, [2.0], "l2_norm_gelu") == 10
  assert rows_needed(24, 8, [9.0], "l2_norm_gelu") == 81
  assert rows_needed(24, 8, [3.0], "gelu_l2_norm") == rows_needed(24, 8, [3.0], "softmax") == 24
  # τ is stored in float32: the float32 root of N counts as the released τ.
  assert rows_needed(768, 8, [np.float32(math.sqrt(768.0))], "l2_norm_gelu") == 768


def random_model(config, seed=0):
  """Released names -> float64 arrays, and our trees of them with another τ in every pattention."""
  rng = np.random.default_rng(seed)
  arrays = {name: rng.normal(size=shape) for name, shape in released_shapes(config).items()}
  parameters = from_released(arrays, config)
  tau = {"blocks": {}}
  for place, _ in pattention_names(config.num_layers).values():
    node = tau
    for part in place.split("/"):
      node = node.setdefault(part, {})
    node["tau"] = rng.uniform(1.0, 4.0, config.num_layers).astype(np.float32)
  return arrays, parameters, tau


@pytest.mark.parametrize("theta", THETAS)
def test_a_whole_model_gives_the_same_logits(theta, monkeypatch):
  config = ModelConfig(
    vocab_size=19,
    num_layers=2,
    hidden_size=12,
    num_heads=3,
    qkv_tokens=7,
    proj_tokens=20,
    ffn_tokens=30,
    theta=theta,
    rotary_fraction=0.5,
  )
  arrays, parameters, tau = random_model(config)
  tokens = np.random.default_rng(1).integers(0, 19, (2, 9))

  taus = {}
  for name, (place, layer) in pattention_names(2).items():
    node = tau
    for part in place.split("/"):
      node = node[part]
    taus[id(arrays[f"{name}.key_param_tokens"])] = float(node["tau"][layer])
  plain = oracle.pattention
  with monkeypatch.context() as patch:
    patch.setattr(
      oracle, "pattention", lambda x, keys, values, theta, kind: plain(x, keys, values, theta, taus[id(keys)], kind)
    )
    expected = oracle.language_model(arrays, tokens, config)

  target, rewritten = released_arrays(parameters, tau, config, rewrite=True)
  rewritten = {name: array.read() for name, array in rewritten.items()}
  assert {name: array.shape for name, array in rewritten.items()} == released_shapes(target)
  logits = oracle.language_model(rewritten, tokens, target)
  assert np.abs(logits - expected).max() <= 1e-10 * np.abs(expected).max()
  # Without the rewriting it is another model.
  other = oracle.language_model(arrays, tokens, config)
  assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()
  grown = dict(qkv_tokens=14, proj_tokens=32, ffn_tokens=42)
  assert target == (dataclasses.replace(config, **grown) if theta == "l2_norm_gelu" else config)


def test_shapes_are_known_before_anything_is_computed():
  config = ModelConfig.named("tiny", vocab_size=16, num_layers=1)
  _arrays, parameters, tau = random_model(config)
  _, computed = released_arrays(parameters, tau, config, rewrite=True)
  for name, array in computed.items():
    assert array.read().shape == array.shape, name
  _, computed = released_arrays(jax.tree.map(np.float32, parameters), tau, config, rewrite=True)
  assert {array.read().dtype for array in computed.values()} == {np.dtype(np.float32)}


def test_the_released_code_has_no_tanh():
  config = ModelConfig.named("tiny", vocab_size=16, num_layers=1, gelu="tanh")
  _, parameters, tau = random_model(config)
  with pytest.raises(ValueError, match="gelu='tanh': the released code has only erf"):
    released_arrays(parameters, tau, config, rewrite=True)
