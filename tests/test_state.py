"""The training state on a mesh: every leaf that can be split is split, and one that cannot is refused by name."""

import jax
import numpy as np
import pytest

from tests import small_run
from tokenformer_jax.config import Config, MeshConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.training.program import make_program

MESHES = [dict(data=8), dict(fsdp=8), dict(token=8), dict(data=2, fsdp=2, token=2), dict(data=2, sequence=4)]


def program(model=small_run.MODEL, **sizes):
  return make_program(small_run.config(), model, small_run.mesh(**sizes))


def part(path: str, shape: tuple[int, ...], data=1, fsdp=1, token=1, sequence=1) -> tuple[int, ...]:
  """The shape of a device's part of a leaf: `token` splits parameter tokens and words, `fsdp` splits channels."""
  _owner, _, name = path.rpartition("/")
  if path.startswith("born/") and shape:
    return (shape[0] // token,)
  if name in ("keys", "values"):
    return shape[0], shape[1] // token, shape[2] // fsdp
  return (shape[0] // token, shape[1] // fsdp) if name == "embedding" and shape else shape


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_leaf_that_can_be_split_is_split(sizes):
  leaves = leaves_by_path(program(**sizes).shapes)
  held = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves.items()}
  assert held == {path: part(path, leaf.shape, **sizes) for path, leaf in leaves.items()}
  # Parameters and their two moments: 10 keys and values and an embedding each. The rest are norms, τ and counters.
  assert sum(len(leaf.shape) > 1 for leaf in leaves.values()) == 3 * 11
  assert sum(path.startswith("born/") and len(leaf.shape) == 1 for path, leaf in leaves.items()) == 10


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_batches_are_split_by_rows_and_positions(sizes):
  mesh = small_run.mesh(**sizes)
  placed = small_run.placed(small_run.batch(weights=True), mesh)
  rows, positions = 8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 16 // mesh.shape["sequence"]
  for array in jax.tree.leaves(placed):
    assert {shard.data.shape for shard in array.addressable_shards} == {(rows, positions)}


@pytest.mark.slow
def test_an_initial_state_is_made_in_parts():
  sizes = dict(data=2, fsdp=2, token=2)
  split, whole = program(**sizes), program()
  for path, leaf in leaves_by_path(split.initial_state()).items():
    assert {shard.data.shape for shard in leaf.addressable_shards} == {part(path, leaf.shape, **sizes)}
  # They are not made whole and then split either, because the temporary memory is split like the result.
  temporary, on_one_device = (
    p.initial_state.lower().compile().memory_analysis().temp_size_in_bytes for p in (split, whole)
  )
  assert temporary < on_one_device / 3


@pytest.mark.parametrize(
  "name, token, message",
  [
    (
      "354m",
      8,
      "blocks/attention/key/keys: param_token=2140 cannot be split over the 8 devices along mesh "
      "axis token of mesh {'data': 1, 'fsdp': 1, 'sequence': 1, 'token': 8}; the nearest sizes that can: "
      "2136 or 2144.",
    ),
    ("757m", 4, "param_token=4850 cannot be split over the 4 devices along mesh axis token"),
    ("1.3b", 8, "param_token=8620 cannot be split over the 8 devices"),
    ("354m", 4, ""),
    ("757m", 2, ""),
    ("1.3b", 4, ""),
  ],
)
def test_token_counts_of_the_paper(name, token, message):
  """Counts that do not divide are refused when the program is made, before anything is compiled."""
  model = ModelConfig.named(name)
  mesh = make_mesh(MeshConfig(token=token, data=1), jax.devices()[:token])
  if not message:
    keys = make_program(Config(model=model), model, mesh).shapes.params["blocks"]["attention"]["key"]["keys"]
    assert keys.sharding.shard_shape(keys.shape)[1] == model.qkv_tokens // token
    return
  with pytest.raises(ValueError) as error:
    make_program(Config(model=model), model, mesh)
  assert message in str(error.value)


def test_a_batch_that_does_not_divide_is_refused():
  batch = jax.tree.map(lambda x: x[:, :15], small_run.batch())
  with pytest.raises(
    ValueError, match="time=15 cannot be split over the 4 devices along mesh axis sequence .*12 or 16"
  ):
    small_run.placed(batch, small_run.mesh(sequence=4))
  batch = jax.tree.map(lambda x: np.tile(x, (3, 1))[:12], small_run.batch())
  with pytest.raises(
    ValueError, match="batch=12 cannot be split over the 8 devices along mesh axis data × fsdp .*8 or 16"
  ):
    small_run.placed(batch, small_run.mesh(data=2, fsdp=4))
