"""The train step on a mesh computes what one device computes, and sends what the design says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import communication, small_run
from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.collectives import Collective, collectives
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.training.program import Program, make_program

ROWS, ACCUMULATION, STEPS = 8, 2, 3
# All arrays that are sent differ in size, so that they can be told apart.
CONFIG = small_run.replace(
  small_run.config(),
  model=dict(
    vocab_size=64,
    num_layers=3,
    hidden_size=64,
    num_heads=8,
    qkv_tokens=24,
    proj_tokens=16,
    ffn_tokens=40,
    seq_length=48,
  ),
  data=dict(batch_size=ROWS * ACCUMULATION),
  optimizer=dict(learning_rate=1e-3),
  training=dict(gradient_accumulation=ACCUMULATION),
)
MESHES = [
  dict(data=8),
  dict(fsdp=8),
  dict(token=8),
  dict(data=2, fsdp=2, token=2),
  dict(sequence=8),
  dict(fsdp=2, sequence=2, token=2),
]


def batch() -> data.Batch:
  rng = np.random.default_rng(0)
  inputs, labels = rng.integers(0, 64, (2, ROWS * ACCUMULATION, CONFIG.model.seq_length), np.int32)
  return data.Batch(inputs, labels, weights=rng.exponential(size=inputs.shape).astype(np.float32))


def run(program: Program, step, start, mesh):
  """(the state after each of a few steps as NumPy arrays, the losses, the last state as it is)."""
  state, states, losses = jax.device_put(start, program.shardings), [], []
  for _ in range(STEPS):
    state, metrics = step(state, small_run.placed(batch(), mesh))
    states.append(jax.tree.map(np.array, state))
    losses.append(float(metrics["loss"]))
  return states, losses, state


@pytest.fixture(scope="module")
def one_device():
  """(the state at the start, the states and the losses of a run on one device)."""
  mesh = small_run.mesh()
  program = make_program(CONFIG, CONFIG.model, mesh)
  start = jax.tree.map(np.array, program.initial_state())
  # The values are larger than at the start of a run, so that the layers contribute to the loss.
  params = jax.tree_util.tree_map_with_path(lambda path, a: 2 * a if path[-1].key == "values" else a, start.params)
  start = dataclasses.replace(start, params=params)
  return start, *run(program, program.train_step, start, mesh)[:2]


@functools.cache
def compiled_on(index: int):
  """(program, compiled train step, mesh) on a mesh of `MESHES`."""
  mesh = make_mesh(MeshConfig(**{"data": 1, **MESHES[index]}))
  program = make_program(CONFIG, CONFIG.model, mesh)
  return program, program.train_step.lower(program.shapes, small_run.placed(batch(), mesh)).compile(), mesh


@pytest.mark.parametrize(
  "index",
  [
    pytest.param(index, id=str(sizes), marks=[] if len(sizes) == 3 else pytest.mark.every_combination)
    for index, sizes in enumerate(MESHES)
  ],
)
def test_every_mesh_trains_like_one_device(one_device, index):
  start, expected, expected_losses = one_device
  program, step, mesh = compiled_on(index)
  # The compiled step accepts its own output: every leaf keeps its sharding.
  states, losses, last = run(program, step, start, mesh)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  small_run.assert_close(states[0], expected[0], 1e-5)
  small_run.assert_close([state.params for state in states], [state.params for state in expected], 1e-5)
  assert jax.tree.map(lambda leaf: leaf.sharding, last) == program.shardings


@pytest.mark.parametrize("index", range(len(MESHES)), ids=map(str, MESHES))
def test_a_layer_sends_what_the_design_says(index):
  _, step, mesh = compiled_on(index)
  check_sent(collectives(step.as_text(), mesh), CONFIG.model, ACCUMULATION, MESHES[index])


def check_sent(found: list[Collective], model: ModelConfig, accumulation: int, sizes: dict[str, int]) -> None:
  """Checks what a train step sends, layer by layer, and that parameters are gathered along fsdp only."""
  sent = communication.of_layers(found, model.num_layers * accumulation)
  assert sent == communication.on_paper(model, ROWS, **sizes)
  gathered = {c.axes for c in found if c.kind == "all-gather" and c.argument}
  assert gathered == ({("fsdp",)} if "fsdp" in sizes else set())
  # Outside the layers the embedding is gathered once, and its gradient is summed once for each of its two uses.
  largest = model.vocab_size * model.hidden_size // sizes.get("token", 1)
  whole = [(c.kind, c.argument) for c in found if np.prod(c.shape) == largest and c.trips <= accumulation]
  assert whole.count(("all-gather", "state.params['embedding']")) == (1 if "fsdp" in sizes else 0)
  assert len(whole) <= 1 + 2 * sum(axis in sizes for axis in ("data", "fsdp", "sequence"))


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat, sizes",
  [
    ("none", MESHES[5]),
    ("full", MESHES[3]),
    *(
      pytest.param(*case, marks=pytest.mark.every_combination)
      for case in (("dots", MESHES[3]), ("full", dict(token=4, data=2)))
    ),
  ],
  ids=str,
)
def test_train_step_of_150m(remat, sizes):
  model = dataclasses.replace(ModelConfig.named("150m"), seq_length=136, remat=remat)
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
  program = make_program(Config(model=model, data=DataConfig(batch_size=ROWS)), model, mesh)
  shape = (ROWS, model.seq_length)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))
  compiled = program.train_step.lower(program.shapes, data.Batch(ids, ids)).compile()
  check_sent(collectives(compiled.as_text(), mesh), model, 1, sizes)
