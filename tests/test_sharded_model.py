"""The language model on a mesh computes the same loss and gradients, and sends what the design says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import communication
from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding, replicated, traced_on, tree_shardings
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.training.program import make_program

# All arrays that are sent differ in size, so that they can be told apart.
CONFIG = ModelConfig(
  vocab_size=64, num_layers=3, hidden_size=64, num_heads=8, qkv_tokens=24, proj_tokens=16, ffn_tokens=40, seq_length=48
)
ROWS = 8
MESHES = [
  dict(data=8),
  dict(fsdp=8),
  dict(token=8),
  dict(data=2, fsdp=2, token=2),
  dict(sequence=8),
  dict(fsdp=2, sequence=2, token=2),
]


def mesh_of(sizes):
  return make_mesh(MeshConfig(**{"data": 1, **sizes}))


class Case:
  """Loss and gradients of a small model, on one device and compiled for meshes."""

  def __init__(self, config: ModelConfig = CONFIG):
    self.module = LanguageModel(config, rngs=nnx.Rngs(0))
    self.graphdef, parameters, tau = split(self.module)
    parameters = jax.tree_util.tree_map_with_path(
      lambda path, a: 2.0 * a if path[-1].key == "values" else a, parameters
    )
    rng = np.random.default_rng(0)
    self.arguments = parameters, tau, rng.integers(0, 64, (2, ROWS, config.seq_length)).astype(np.int32)
    self.alone = jax.jit(jax.value_and_grad(self.loss))(*self.arguments)
    self.compiled = {}

  def loss(self, parameters, tau, batch):
    logits = nnx.merge(self.graphdef, parameters, tau)(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

  def on(self, sizes):
    """(the compiled function, its arguments, the mesh)."""
    mesh = mesh_of(sizes)
    parameters, tau, batch = self.arguments
    axes = logical_axes(self.module)
    where = [
      tree_shardings(mesh, axes[0], parameters),
      tree_shardings(mesh, axes[1], tau),
      (batch_sharding(mesh, batch[0].shape),) * 2,
    ]
    arguments = jax.device_put((parameters, tau, tuple(batch)), tuple(where))
    key = str(sizes)
    if key not in self.compiled:
      step = jax.jit(traced_on(mesh, jax.value_and_grad(self.loss)), out_shardings=(replicated(mesh), where[0]))
      self.compiled[key] = step.lower(*arguments).compile()
    return self.compiled[key], arguments, mesh


@pytest.fixture(scope="module")
def case():
  return Case()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(case, sizes):
  step, arguments, _ = case.on(sizes)
  for (path, ours), alone in zip(jax.tree_util.tree_leaves_with_path(step(*arguments)), jax.tree.leaves(case.alone)):
    error = np.max(np.abs(np.asarray(ours) - np.asarray(alone))) / np.max(np.abs(np.asarray(alone)))
    assert error < 1e-5, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_layer_sends_what_the_design_says(case, sizes):
  step, _, mesh = case.on(sizes)
  found = collectives(step.as_text(), mesh)
  assert communication.of_layers(found, CONFIG.num_layers) == communication.on_paper(CONFIG, ROWS, **sizes)
  assert {c.kind for c in found} <= {"all-gather", "all-reduce"}
  assert not [c for c in found if c.kind == "all-gather" and c.argument and c.axes != ("fsdp",)]


def train_step_sends(model, sizes):
  """The collectives of a train step on abstract arrays [8, T]."""
  mesh = mesh_of(sizes)
  program = make_program(Config(model=model, data=DataConfig(batch_size=ROWS)), model, mesh)
  shape = (ROWS, model.seq_length)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))
  return collectives(program.train_step.lower(program.shapes, data.Batch(ids, ids)).compile().as_text(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat, sizes",
  [*(("none", sizes) for sizes in MESHES), ("dots", MESHES[3]), ("full", MESHES[3]), ("full", dict(token=4, data=2))],
  ids=str,
)
def test_train_step_of_150m(remat, sizes):
  """Layer by layer it sends what the design says, and parameter tokens are gathered along fsdp only."""
  model = dataclasses.replace(ModelConfig.named("150m"), seq_length=136, remat=remat)
  found = train_step_sends(model, sizes)
  assert communication.of_layers(found, model.num_layers) == communication.on_paper(model, ROWS, **sizes)
  gathered = [c for c in found if c.kind == "all-gather" and c.argument]
  assert {c.axes for c in gathered} <= {("fsdp",)}
  if set(sizes) <= {"data", "token", "sequence"}:
    assert not gathered
  # Outside the layers the embedding is gathered once, and its gradient is summed once for each of its two uses.
  largest = model.vocab_size * model.hidden_size // sizes.get("token", 1)
  whole = [(c.kind, c.argument) for c in found if np.prod(c.shape) == largest]
  assert whole.count(("all-gather", "state.params['embedding']")) == (1 if "fsdp" in sizes else 0)
  assert len(whole) <= 1 + 2 * sum(axis in sizes for axis in ("data", "fsdp", "sequence"))
