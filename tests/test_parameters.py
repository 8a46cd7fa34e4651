"""How parameters are declared, stacked, and taken apart."""

import jax
import numpy as np
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import RULES
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tau, is_matrix, logical_axes, parameter, split, stack_layers

CONFIG = ModelConfig(
  vocab_size=12,
  num_layers=3,
  hidden_size=8,
  num_heads=2,
  qkv_tokens=3,
  proj_tokens=4,
  ffn_tokens=5,
  rotary_fraction=0.5,
)


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.weight = parameter(rngs, (4, 5), ("param_token", "embed"), nnx.initializers.normal(1.0))
    self.tau = Tau(np.float32(2.0), axes=())

  def __call__(self, x):
    return self.weight[...] @ x * self.tau[...]


def test_stacked_layers_are_layers_of_their_own_keys():
  """Layer i of the stack is what `make_layer` gives for the i-th key, and works alone."""
  stacked = stack_layers(Layer, 3, nnx.Rngs(0))
  keys = jax.random.split(nnx.Rngs(0).params(), 3)
  graphdef, parameters, tau = split(stacked)
  x = np.arange(5, dtype=np.float32)
  for i, key in enumerate(keys):
    alone = Layer(nnx.Rngs(key))
    np.testing.assert_array_equal(stacked.weight[...][i], alone.weight[...])
    layer = nnx.merge(graphdef, *jax.tree.map(lambda leaf: leaf[i], (parameters, tau)))
    np.testing.assert_array_equal(layer(x), alone(x))


def test_split_is_undone_by_merge():
  layers = stack_layers(Layer, 3, nnx.Rngs(0))
  graphdef, parameters, tau = split(layers)
  assert {name: type(leaf) for name, leaf in parameters.items()} == {"weight": type(layers.weight[...])}
  assert list(tau) == ["tau"]
  merged = nnx.merge(graphdef, parameters, tau)
  assert nnx.graphdef(merged) == nnx.graphdef(layers)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(layers))


def test_every_array_names_each_of_its_axes():
  """One logical axis for each array axis, all in the table, and each of the size it stands for."""
  model = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
  _, *trees = split(model)
  sizes = {"layer": {3}, "vocab": {12}, "embed": {8}, "norm": {8}, "param_token": {3, 4, 5}}
  assert set(sizes) <= set(RULES)

  def check(leaf, axes):
    assert len(axes) == leaf.ndim
    assert all(size in sizes[axis] for size, axis in zip(leaf.shape, axes))

  for tree, axes in zip(trees, logical_axes(model)):
    jax.tree.map(check, tree, axes)


def test_matrices_are_what_multiplies_activations_in_the_blocks():
  """Muon, and the counts of parameters and FLOPs, take these alone."""
  kinds = {True: set(), False: set()}
  for preset in ("tokenformer", "gpt2", "sas", "gpt-neox"):
    model = nnx.eval_shape(lambda: LanguageModel(ModelConfig.named("tiny", preset), rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
      kinds[is_matrix(variable.axes)].add(path[-1])
  assert kinds[True] == {"weight", "keys", "values"}
  assert kinds[False] >= {"embedding", "position_embedding", "head", "scale", "bias", "key_biases", "alpha", "gain"}
