"""F16: updates with bad numbers are skipped and counted, too many of them end the run, and no bad state is saved."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import small_run
from tests.commands import call
from tests.small_run import MODEL, OPTIMIZER
from tokenformer_jax.config import TrainingConfig
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.objective import NEXT_TOKEN
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics
from tokenformer_jax.training.skips import Diverged, Skips
from tokenformer_jax.training.step import make_train_step

BAD_UPDATE = 3  # The step at which the optimizer of `one_step` gives an infinite update.
BAD_GRADIENT = 7  # The first id of a batch whose gradient is NaN and whose loss is finite.


@pytest.fixture(scope="module")
def one_step():
  """(state after two good updates, the jitted step, the next batch)."""
  program = make_program(small_run.config(), MODEL, small_run.mesh())

  def break_update(updates, state, params=None, *, step, **_):
    del params
    return jax.tree.map(lambda u: jnp.where(step == BAD_UPDATE, jnp.inf, u), updates), state

  breaking = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), break_update)
  optimizer = optax.chain(program.optimizer, breaking)

  def breakable(model, batch, z_loss, training):
    nats, sums, said = NEXT_TOKEN.loss(model, batch, z_loss, training)
    zero = 0.0 * model.embedding[0, 0]
    # The square root of 0 is 0, and its derivative, infinity times 0 here, is NaN.
    return nats + jax.lax.cond(batch.inputs[0, 0] == BAD_GRADIENT, jnp.sqrt, lambda x: x, zero), sums, said

  objective = NEXT_TOKEN._replace(loss=breakable)
  schedule = optax.constant_schedule(0.1)
  step = jax.jit(make_train_step(program.graphdef, optimizer, program.tau_rule, schedule, 0.0, 1, objective=objective))
  state = program.initial_state()
  state = dataclasses.replace(state, opt_state=(state.opt_state, optax.EmptyState()))
  for seed in range(2):
    state, metrics = step(state, batch(seed), np.float32(math.inf))
    assert metrics["skipped"] == 0
  return state, step, batch(2)


def batch(seed):
  given = small_run.batch(seed, weights=True)
  given.inputs[0, 0] = 1
  return given


def assert_skipped(state, step, batch, most_loss=math.inf):
  new, metrics = step(state, batch, np.float32(most_loss))
  assert metrics["skipped"] == 1
  clocks = dataclasses.replace(new, step=state.step)
  counts = [leaf for leaf in jax.tree.leaves(clocks.opt_state) if leaf.ndim == 0]
  # The schedule counts this update too, so that the rate stays that of the step.
  assert int(new.step) == int(state.step) + 1 and int(new.step) in map(int, counts)
  small_run.assert_same(
    dataclasses.replace(clocks, opt_state=without_clock(clocks)),
    dataclasses.replace(state, opt_state=without_clock(state)),
  )
  return metrics


def without_clock(state):
  is_clock = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(lambda node: () if is_clock(node) else node, state.opt_state, is_leaf=is_clock)


def test_f16_a_loss_that_is_not_finite_is_skipped(one_step):
  state, step, good = one_step
  for bad in (math.nan, math.inf):
    weights = good.weights.copy()
    weights[3, 3] = bad
    assert not np.isfinite(assert_skipped(state, step, good._replace(weights=weights))["loss"])


def test_f16_a_gradient_that_is_not_finite_is_skipped(one_step):
  state, step, good = one_step
  inputs = good.inputs.copy()
  inputs[0, 0] = BAD_GRADIENT
  metrics = assert_skipped(state, step, good._replace(inputs=inputs))
  assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])


def test_f16_an_update_that_is_not_finite_is_skipped(one_step):
  state, step, good = one_step
  state = dataclasses.replace(state, step=jnp.int32(BAD_UPDATE))
  clock = lambda node: node._replace(count=state.step) if isinstance(node, optax.ScaleByScheduleState) else node  # noqa: E731
  state = dataclasses.replace(
    state,
    opt_state=jax.tree.map(clock, state.opt_state, is_leaf=lambda n: isinstance(n, optax.ScaleByScheduleState)),
  )
  metrics = assert_skipped(state, step, good)
  assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])


def test_f16_a_spike_is_skipped_and_a_good_update_is_done(one_step):
  state, step, good = one_step
  loss = float(step(state, good, np.float32(math.inf))[1]["loss"])
  assert_skipped(state, step, good, most_loss=0.99 * loss)
  new, metrics = step(state, good, np.float32(1.01 * loss))
  assert metrics["skipped"] == 0 and not np.array_equal(new.params["embedding"], state.params["embedding"])


def test_f16_a_tau_that_moves_with_the_step_moves_in_a_skipped_update_too(one_step):
  state, step, good = one_step
  state = dataclasses.replace(
    state,
    tau=jax.tree.map(lambda tau: 0.5 * tau, state.tau),
    born=jax.tree.map(jnp.ones_like, state.born),  # All rows were added by a growth after the first update.
  )
  done, skipped = step(state, good, np.float32(math.inf))[0], step(state, good, np.float32(0.0))[0]
  small_run.assert_same(skipped.tau, done.tau)
  small_run.assert_same(skipped.params, state.params)
  assert all(np.all(new > old) for new, old in zip(jax.tree.leaves(skipped.tau), jax.tree.leaves(state.tau)))


def observe(skips, step, loss, skipped=0):
  return skips.observe(step, {"loss": np.float32(loss), "grad_norm": np.float32(1), "skipped": np.float32(skipped)})


def test_f16_spikes_are_measured_by_the_mean_of_good_losses_that_are_known_in_time():
  skips = Skips(TrainingConfig(spike_factor=2.0, max_skips_in_a_row=2))
  assert skips.most_loss(1) == skips.most_loss(2) == math.inf
  observe(skips, 1, 4.0)
  observe(skips, 2, 2.0)
  # The loss of update 2 is not known yet when update 3 is dispatched, even if it was looked at for the log.
  assert skips.most_loss(3) == 8.0 and skips.most_loss(4) == 6.0
  resumed = Skips(TrainingConfig(spike_factor=2.0), skips.losses())
  assert resumed.most_loss(3) == 8.0 and resumed.most_loss(4) == 6.0
  assert observe(skips, 3, 9.0, skipped=1).startswith("step 3: update skipped, number 1 in a row: loss 9")
  assert skips.most_loss(5) == 6.0 and not skips.are_too_many()
  observe(skips, 4, math.nan, skipped=1)
  assert skips.are_too_many() and skips.first_step == 3 and skips.take_count() == 2 and skips.take_count() == 0
  observe(skips, 5, 2.0)
  assert not skips.are_too_many() and skips.in_a_row == 0
  skips.forget_losses()
  assert skips.most_loss(9) == math.inf
  assert Skips(TrainingConfig()).most_loss(9) == math.inf


def steps_of(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_f16_skips_in_a_run_are_logged_and_put_a_save_off_and_the_last_one_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(Skips, "most_loss", lambda self, step: np.float32(0 if step in (4, 5, 8) else math.inf))
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(
    f"text:{tmp_path}/text.txt", num_steps=8, log_every=2, eval_every=8, checkpoint_every=4, max_skips_in_a_row=3
  )
  with pytest.raises(Diverged, match="^the last update was skipped, .* the newest checkpoint is of step 6.") as error:
    train(config, str(tmp_path / "run"))
  assert "remove that checkpoint" not in str(error.value)
  # The save of step 4 waited for the next good update, and so did that of step 8, which never came.
  assert steps_of(tmp_path / "run") == [6]
  skipped = {
    row["step"]: row.get("train/skipped") for row in read_metrics(str(tmp_path / "run")) if "train/loss" in row
  }
  assert skipped == {2: None, 4: 1, 6: 1, 8: 1}


@pytest.mark.slow
def test_f16_a_run_with_an_impossible_rate_ends_with_code_3_and_saves_no_bad_state(tmp_path):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(f"text:{tmp_path}/text.txt", num_steps=9, checkpoint_every=1, max_skips_in_a_row=4)
  (tmp_path / "config.py").write_text(
    f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({config.to_dict()!r})\n"
  )
  command = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", "--config.optimizer.learning_rate=1e38"]
  code, _, errors = call("train", *command)
  (line,) = [line for line in errors if line.startswith("error: ")]
  assert code == 3 and "4 updates in a row were skipped" in line and "remove that checkpoint" in line
  program = make_program(small_run.replace(config, optimizer=dataclasses.asdict(OPTIMIZER)), MODEL, small_run.mesh())
  for step in steps_of(tmp_path / "run"):
    state = Checkpoints(str(tmp_path / "run")).restore(step, program.shapes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if leaf.dtype.kind == "f")
