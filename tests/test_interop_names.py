"""The released names and the leaves of our tree correspond one to one."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from tests.golden_files import GOLDEN, golden, under
from tests.parity_tokenformer import model_config
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.names import (
  check_fit,
  from_released,
  pattention_names,
  released_names,
  released_shapes,
  to_released,
)
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

CONFIG = ModelConfig(
  vocab_size=9, num_layers=3, hidden_size=8, num_heads=2, qkv_tokens=3, proj_tokens=4, ffn_tokens=5, rotary_fraction=0.5
)


def state_dict(config):
  """A released state dict in which every array differs from every other."""
  return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(released_shapes(config).items())}


def test_names_and_shapes_of_the_released_150m():
  listed = json.loads((GOLDEN / "150M_state_dict_keys.json").read_text())
  shapes = {entry["key"]: tuple(entry["shape"]) for entry in listed}
  assert released_shapes(ModelConfig.named("150m")) == shapes
  assert len(listed) == 123


def test_every_leaf_of_our_tree_has_one_name():
  _, parameters, _ = split(nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0))))
  places = {
    (jax.tree_util.keystr(path, simple=True, separator="/"), layer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
    for layer in (range(CONFIG.num_layers) if "blocks" in str(path[0]) else [None])
  }
  names = released_names(CONFIG.num_layers)
  assert set(names.values()) == places
  assert len(names) == len(places)


def test_conversion_to_our_tree_and_back_is_exact():
  arrays = state_dict(CONFIG)
  back = to_released(from_released(arrays, CONFIG))
  assert back.keys() == arrays.keys()
  for name in arrays:
    np.testing.assert_array_equal(back[name], arrays[name])


def test_layers_keep_their_order():
  arrays = state_dict(CONFIG)
  keys = from_released(arrays, CONFIG)["blocks"]["ffn"]["keys"]
  released = [arrays[f"sequential.{i}.mlp.key_param_tokens"] for i in (2, 3, 4)]
  np.testing.assert_array_equal(keys, released)


def test_the_tree_has_the_model_s_shapes_and_types():
  _, arrays, meta = golden("lm_A")
  config = model_config(meta["config"])
  _, parameters, _ = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
  kinds = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
  assert kinds(from_released(under(arrays, "param/"), config)) == kinds(parameters)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      {"sequential.2.mlp.key_param_token": np.zeros(1)},
      "unexpected 1: 'sequential.2.mlp.key_param_token' .Did you mean 'sequential.2.mlp.key_param_tokens'",
    ),
    ({"sequential.6.norm.bias": None}, "missing 1: sequential.6.norm.bias"),
    (
      {"sequential.3.mlp.key_param_tokens": np.zeros((6, 8))},
      r"of another shape 1: sequential.3.mlp.key_param_tokens is \(6, 8\), not \(5, 8\)",
    ),
  ],
)
def test_a_name_or_shape_that_does_not_fit_is_reported(change, message):
  arrays = {name: array for name, array in {**state_dict(CONFIG), **change}.items() if array is not None}
  with pytest.raises(ValueError, match=message):
    from_released(arrays, CONFIG)


def test_one_message_reports_everything_that_does_not_fit():
  shapes = released_shapes(CONFIG)
  missing = [name for name in shapes if ".4." in name]
  others = [name for name in shapes if ".3." in name]
  found = {name: shape for name, shape in shapes.items() if name not in missing}
  found |= {name: shapes[name][::-1] for name in others}
  found |= {f"gpt.{i}": (1,) for i in range(30)}
  with pytest.raises(ValueError) as caught:
    check_fit(found, CONFIG, "there.bin")
  message = str(caught.value)
  assert message.startswith("there.bin does not fit a TokenFormer of 3 layers with 3, 4 and 5 parameter tok")
  assert "\n" not in message
  assert all(message.count(name) == 1 for name in missing + others)
  assert "missing 10: " in message and "unexpected 30: " in message and "of another shape 10: " in message
  assert all(f"'gpt.{i}'" in message for i in range(30))


def test_every_tau_has_the_name_of_its_layer():
  _, _, tau = split(nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0))))
  places = {
    (jax.tree_util.keystr(path, simple=True, separator="/"), layer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tau)
    for layer in range(leaf.shape[0])
  }
  names = pattention_names(CONFIG.num_layers)
  assert {(f"{place}/tau", layer) for place, layer in names.values()} == places
  assert {f"{name}.{array}" for name in names for array in ("key_param_tokens", "value_param_tokens")} == {
    name for name in released_names(CONFIG.num_layers) if "param_tokens" in name
  }
