"""Runs that change their mesh: a checkpoint of any mesh resumes on any other, with growth in between."""

import jax
import numpy as np
import pytest

from tests import small_run
from tokenformer_jax.distributed.axes import whole_heads
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics

MESHES = [dict(), dict(data=8), dict(fsdp=8), dict(token=8), dict(data=2, fsdp=2, token=2), dict(data=2, sequence=4)]


@pytest.fixture(scope="module")
def shapes():
  return [make_program(small_run.config(), small_run.MODEL, small_run.mesh(**sizes)).shapes for sizes in MESHES]


@pytest.mark.parametrize(
  "saved_on",
  [
    pytest.param(index, id=str(sizes), marks=pytest.mark.every_combination if sizes in MESHES[1:4] else [])
    for index, sizes in enumerate(MESHES)
  ],
)
def test_a_checkpoint_of_any_mesh_is_the_same_on_any_other(shapes, saved_on, tmp_path):
  state = small_run.noise(shapes[saved_on], seed=saved_on)
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(1, state, {})
  checkpoints.close()
  for target in shapes:
    restored = Checkpoints(str(tmp_path)).restore(1, target)
    small_run.assert_same(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, target)


def test_heads_that_do_not_divide_are_reported():
  assert whole_heads(small_run.mesh(token=8), 12) == (
    "12 heads cannot be split over the 8 devices along mesh axis token: q, k and v are whole on each, and each does "
    "all of the attention between tokens."
  )
  assert whole_heads(small_run.mesh(token=8), 16) == whole_heads(small_run.mesh(data=8), 12) == ""


@pytest.mark.slow
def test_a_run_that_moves_from_mesh_to_mesh_and_grows_is_the_run_that_stays(tmp_path, capsys):
  """It is saved with its channels split, grown on a wider `token` axis, and ended with its positions split."""
  text = tmp_path / "text.txt"
  text.write_text(small_run.TEXT)

  def run(name, num_steps, **sizes):
    stages = [small_run.stage(3)] if num_steps > 3 else []
    config = small_run.config(
      f"text:{text}", stages, num_steps=num_steps, log_every=1, eval_every=100, checkpoint_every=2
    )
    # New keys of `live` growth amplify differences of the old ones by the condition number of the keys.
    config = small_run.replace(config, growth=dict(method="exact"), mesh={"data": 1, **sizes})
    train(config, str(tmp_path / name))
    return capsys.readouterr()

  run("stays", 6, data=8)
  assert "heads" not in "".join(run("moves", 2, fsdp=8))
  assert "2 heads cannot be split over the 8 devices" in "".join(run("moves", 4, token=8))
  run("moves", 6, data=2, sequence=4)
  stays, moves = (
    [row["train/loss"] for row in read_metrics(str(tmp_path / name)) if "train/loss" in row]
    for name in ("stays", "moves")
  )
  assert len(stays) == 6
  np.testing.assert_allclose(moves, stays, rtol=1e-5)
  target = make_program(small_run.config(), small_run.GROWN, small_run.mesh()).shapes
  states = [Checkpoints(str(tmp_path / name)).restore(6, target) for name in ("stays", "moves")]
  small_run.assert_close(*[state.params for state in states], 2e-5)
  small_run.assert_same(*[state.born for state in states])
