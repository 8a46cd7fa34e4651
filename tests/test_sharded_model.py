"""The language model on a mesh: the same loss and gradients, and what the compiled program sends."""

import re

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding, replicated, tree_shardings
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import logical_axes, split

CONFIG = ModelConfig(vocab_size=64, num_layers=2, hidden_size=32, num_heads=4, qkv_tokens=24, proj_tokens=16,
                     ffn_tokens=40, seq_length=16)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


@pytest.fixture(scope="module")
def model():
  """(step, parameters, τ, axes, batch) with step(parameters, τ, batch) -> (loss, gradients)."""
  module = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
  graphdef, parameters, tau = split(module)
  parameters = jax.tree_util.tree_map_with_path(
      lambda path, a: 2.0 * a if path[-1].key == "values" else a, parameters)

  def loss(parameters, tau, batch):
    tokens, labels = batch
    logits = nnx.merge(graphdef, parameters, tau)(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  batch = tuple(np.random.default_rng(0).integers(0, 64, (2, 8, 12)).astype(np.int32))
  return jax.jit(jax.value_and_grad(loss)), parameters, tau, logical_axes(module), batch


def placed(mesh, parameters, tau, axes, batch):
  return (jax.device_put(parameters, tree_shardings(mesh, axes[0], parameters)),
          jax.device_put(tau, tree_shardings(mesh, axes[1], tau)),
          jax.device_put(batch, batch_sharding(mesh, batch[0].shape)))


@pytest.fixture(scope="module")
def one_device(model):
  step, parameters, tau, _, batch = model
  return step(parameters, tau, batch)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_are_one_device_s(model, one_device, sizes):
  step, *arguments = model
  mesh = make_mesh(MeshConfig(*sizes))
  arguments = placed(mesh, *arguments)
  results = step(*arguments)
  assert results[0].sharding.is_equivalent_to(replicated(mesh), 0)
  for (path, ours), alone in zip(jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(one_device)):
    error = np.max(np.abs(np.asarray(ours) - np.asarray(alone))) / np.max(np.abs(np.asarray(alone)))
    assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_what_the_token_axis_sends(model):
  """Parameter tokens stay where they are: sums over them are added up, and no key or value is gathered."""
  step, *arguments = model
  mesh = make_mesh(MeshConfig(data=1, token=8))
  program = step.lower(*placed(mesh, *arguments)).compile().as_text()
  sent = set(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", program))
  assert sent == {"all-reduce"}
