"""Checkpoints give back exactly what was saved, on any mesh, and an incomplete one is never read."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import tokenformer_jax as tf
from tests import small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax import data
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program


def shapes(model=MODEL, **mesh):
  return make_program(small_run.config(), model, small_run.mesh(**mesh)).shapes


RECORD = {"model": dataclasses.asdict(MODEL), "data": {"next_batch": 3}, "nested": [1, None, "é", 0.5]}


def write(workdir, states, kept=None):
  checkpoints = Checkpoints(str(workdir), kept)
  for step, state in states.items():
    checkpoints.save(step, state, RECORD | {"step": step})
  checkpoints.close()


@pytest.fixture(scope="module")
def states():
  return {step: small_run.noise(shapes(), step) for step in (2, 4)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, states):
  """A work folder with checkpoints of steps 2 and 4; tests must not change it."""
  workdir = tmp_path_factory.mktemp("saved")
  write(workdir, states)
  data.save_tokenizer(data.open_tokenizer("bytes"), workdir / "tokenizer.json")
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it that a test may damage."""
  return shutil.copytree(saved, tmp_path / "run")


def test_a_state_comes_back_bit_by_bit(saved, states):
  checkpoints = Checkpoints(str(saved))
  assert checkpoints.latest_step() == 4
  for step in (2, 4):
    assert checkpoints.record(step) == RECORD | {"step": step}
    small_run.assert_same(checkpoints.restore(step, shapes()), states[step])


@pytest.mark.parametrize("sizes", [dict(token=8), dict(data=2, fsdp=2, token=2)], ids=str)
def test_a_state_comes_back_onto_another_mesh(saved, states, sizes):
  target = shapes(**sizes)
  restored = Checkpoints(str(saved)).restore(4, target)
  small_run.assert_same(restored, states[4])
  assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, target)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda state: shapes(GROWN), r"attention/key/keys is float32 \(2, 8, 16\), and float32 \(2, 16, 16\) in this run"),
    (
      lambda state: dataclasses.replace(state, step=state.params["embedding"]),
      r"checkpoints/4: step is int32 \(\), and float32 \(264, 16\) in this run",
    ),
    (
      lambda state: dataclasses.replace(state, step=jax.ShapeDtypeStruct((), "float32")),
      r"step is int32 \(\), and float32 \(\) in this run",
    ),
    (lambda state: dataclasses.replace(state, tau={}), r"tau/blocks/attention/key/tau is .*, and nothing in this run"),
    (
      lambda state: dataclasses.replace(state, tau={**state.tau, "new": state.step}),
      r"tau/new is not there, and int32 \(\) in this run",
    ),
  ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_first_leaf(saved, change, message):
  with pytest.raises(ValueError, match=message):
    Checkpoints(str(saved)).restore(4, change(shapes()))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
  # The state is large enough that the save is still pending when the buffers are donated.
  large = shapes(dataclasses.replace(MODEL, vocab_size=2**15, hidden_size=64))
  state = small_run.noise(large)
  expected = small_run.digest(state)
  update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(1, state, RECORD)
  for _ in range(5):
    given = state
    state = update(given)
  assert given.params["embedding"].is_deleted()
  checkpoints.close()
  assert small_run.digest(Checkpoints(str(tmp_path)).restore(1, large)) == expected


def test_only_the_newest_are_kept(tmp_path, states):
  write(tmp_path, {1: states[2], 2: states[4], 5: states[2]}, kept=2)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


def test_nothing_is_written_before_the_first_save(tmp_path):
  checkpoints = Checkpoints(str(tmp_path / "run"))
  assert checkpoints.latest_step() is None
  checkpoints.close()
  assert not (tmp_path / "run").exists()


# Incomplete checkpoints.


def test_an_interrupted_save_is_not_offered(workdir, states):
  folder = workdir / "checkpoints"
  shutil.move(folder / "4", folder / "4.orbax-checkpoint-tmp")
  assert Checkpoints(str(workdir)).latest_step() == 2
  with pytest.raises(ValueError, match="no checkpoint of step 4; there are 2"):
    tf.load(str(workdir), step=4)
  # It does not prevent the next save of the same step.
  write(workdir, {4: states[4]})
  small_run.assert_same(Checkpoints(str(workdir)).restore(4, shapes()), states[4])


@pytest.mark.parametrize("part", ["model", "optimizer", "record"])
def test_a_half_deleted_step_is_not_offered(workdir, part):
  shutil.rmtree(workdir / "checkpoints" / "2" / part)
  assert Checkpoints(str(workdir)).latest_step() == 4
  with pytest.raises(ValueError, match="no checkpoint of step 2; there are 4"):
    tf.load(str(workdir), step=2)


# Loading models and tokenizers.


def test_load_gives_the_model_of_a_step(saved, states):
  for given, step in ((None, 4), (2, 2)):
    model = tf.load(str(saved), step=given)
    assert model.config == MODEL
    _, *weights = split(model)
    small_run.assert_same(weights, [states[step].params, states[step].tau])
  assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, MODEL.vocab_size)


def test_load_onto_a_mesh(saved, states):
  _, params, _ = split(tf.load(str(saved), mesh=small_run.mesh(token=8)))
  small_run.assert_same(params, states[4].params)
  expected = leaves_by_path(shapes(token=8).params)
  assert all(leaf.sharding == expected[path].sharding for path, leaf in leaves_by_path(params).items())


def test_load_without_a_checkpoint_is_refused(tmp_path):
  for workdir in (tmp_path, tmp_path / "missing"):
    with pytest.raises(ValueError, match=f"{workdir}: no checkpoint there; train first"):
      tf.load(str(workdir))
  assert not list(tmp_path.iterdir())


def test_load_tokenizer(saved, tmp_path):
  tokenizer = tf.load_tokenizer(str(saved))
  assert tokenizer.fingerprint == data.open_tokenizer("bytes").fingerprint
  assert tokenizer.decode(tokenizer.encode("é")) == "é"
  with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
    tf.load_tokenizer(str(tmp_path))
