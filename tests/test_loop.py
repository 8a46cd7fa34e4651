"""Whole runs: what they write, growth inside them, and that a stopped run gives what the run without a stop gives."""

import dataclasses
import math
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers

import tokenformer_jax as tf
from tests import small_run
from tests.commands import CONTEXT
from tests.small_run import GROWN, MODEL
from tokenformer_jax import data
from tokenformer_jax.atlas.births import births
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training import held_out, loop
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics, read_samples

GROWTH_STEP, STEPS = 6, 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text(small_run.TEXT)
  return path


def config(text, **training):
  """A run with a growth in its middle."""
  return small_run.config(
    f"text:{text}",
    [small_run.stage(GROWTH_STEP)],
    **{"num_steps": STEPS, "log_every": 1, "eval_every": 3, "checkpoint_every": 2, "checkpoints_kept": 3, **training},
  )


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
  """The work folder of a whole run, and what `train` returned; tests must not change it."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  return workdir, train(config(text), str(workdir))


@pytest.fixture
def workdir(run, tmp_path):
  """A copy of the same folder, to resume in."""
  return shutil.copytree(run[0], tmp_path / "run")


def last_state(workdir):
  """The newest checkpoint's state on one device, whatever mesh it was saved from."""
  checkpoints = Checkpoints(str(workdir))
  step = checkpoints.latest_step()
  model = MODEL if step <= GROWTH_STEP else GROWN
  return checkpoints.restore(step, make_program(small_run.config(), model, small_run.mesh()).shapes)


def losses(workdir):
  """What a run measured, without its speed."""
  rows = read_metrics(str(workdir))
  return [
    {name: value for name, value in row.items() if name not in ("train/tokens_per_second", "train/utilisation")}
    for row in rows
  ]


def test_a_run_learns_and_writes_every_file_that_train_names(run):
  workdir, loss = run
  assert {path.name for path in workdir.iterdir()} == {
    "checkpoints",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "tensorboard",
    "loss.png",
  }
  rows = read_metrics(str(workdir))
  assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
  held_out = {row["step"]: row["held_out/loss"] for row in rows if "held_out/loss" in row}
  assert list(held_out) == [3, 6, 9, 12] and held_out[12] == loss
  assert held_out[12] < held_out[6] < held_out[3] < math.log(MODEL.vocab_size)
  assert all(row["train/tokens_per_second"] > 0 for row in rows if "train/utilisation" in row)


def test_held_out_loss_is_that_of_the_saved_model(run, text):
  workdir, loss = run
  model = tf.load(str(workdir))
  batches = data.open_data(config(text).data, seq_length=MODEL.seq_length).held_out_batches(2)
  nats = [
    -np.take_along_axis(np.asarray(jax.nn.log_softmax(model(batch.inputs))), batch.labels[..., None], -1)
    for batch in batches
  ]
  assert len(nats) == 2
  np.testing.assert_allclose(np.mean(nats), loss, rtol=1e-5)


def test_growth_inside_a_run_keeps_the_held_out_loss(run):
  workdir, _ = run
  rows = read_metrics(str(workdir))
  (seam,) = [row for row in rows if "growth/parameters" in row]
  assert seam["step"] == GROWTH_STEP and seam["growth/parameters"] == GROWN.num_parameters
  assert seam["growth/loss_before"] == next(
    row["held_out/loss"] for row in rows if row["step"] == GROWTH_STEP and "held_out/loss" in row
  )
  assert abs(seam["growth/loss_before"] - seam["growth/loss_after"]) <= 1e-5
  assert tf.load(str(workdir)).config == GROWN
  born = births(str(workdir))["blocks/ffn"]
  assert born.tolist() == [0] * MODEL.ffn_tokens + [GROWTH_STEP] * (GROWN.ffn_tokens - MODEL.ffn_tokens)


def test_the_same_command_again_changes_nothing_and_a_longer_run_continues(run, workdir, text):
  before = losses(workdir)
  assert train(config(text), str(workdir)) == run[1]
  assert losses(workdir) == before
  train(config(text, num_steps=STEPS + 2, log_every=2, eval_every=100), str(workdir), profile=True)
  rows = losses(workdir)
  assert rows[: len(before)] == before
  assert [(row["step"], "train/loss" in row) for row in rows[len(before) :]] == [(14, True), (14, False)]
  # The trace is written although the run is shorter than it.
  assert list((workdir / "profile").rglob("*.xplane.pb"))


# A second run, of one update, with all that is optional.


class Wandb:
  """In the place of the package: keeps what it is given."""

  def __init__(self):
    self.opened, self.rows, self.metrics, self.finished = [], [], [], 0

  def init(self, **options):
    self.opened.append(options)
    return self

  def define_metric(self, *names, **options):
    self.metrics.append((names, options))

  def log(self, row):
    self.rows.append(row)

  def finish(self):
    self.finished += 1

  Html = staticmethod(lambda text: text)


@pytest.fixture(scope="module")
def second(run, text, tmp_path_factory):
  """(config, work folder, what Weights & Biases was given, bytes on the devices before and after the sample)."""
  workdir = tmp_path_factory.mktemp("second") / "run"
  other = text.with_name("other.txt")
  other.write_text(small_run.TEXT.replace("return", "yields"))
  config = dataclasses.replace(
    small_run.replace(
      small_run.config(f"text:{text}", num_steps=1, sample_tokens=4, seed=2**32 - 1, wandb_project="project"),
      data=dict(held_out_sets=f"other=text:{other}"),
      optimizer=dict(ema_decay=0.9),
    ),
    model=GROWN,
    init_from=str(run[0]),
  )
  held = []

  def measured(*args):
    held.append(sum(array.nbytes for array in jax.live_arrays()))
    text = held_out.write_sample(*args)
    held.append(sum(array.nbytes for array in jax.live_arrays()))
    return text

  with pytest.MonkeyPatch.context() as patch:
    fake = Wandb()
    patch.setitem(sys.modules, "wandb", fake)
    patch.setattr(loop, "write_sample", measured)
    train(config, str(workdir))
    train(config, str(workdir))  # There is nothing left to do, but the record is opened again.
  return config, workdir, fake, held


def test_a_run_from_anothers_weights_has_a_fresh_optimizer(run, second):
  config, workdir, *_ = second
  (first,) = [row for row in losses(workdir) if "train/loss" in row]
  program = make_program(config, GROWN, small_run.mesh(data=8))
  _, params, tau = split(tf.load(str(run[0]), mesh=small_run.mesh(data=8)))
  batch = next(data.open_data(config.data, seq_length=MODEL.seq_length).train_batches())
  sums = program.eval_step(params, tau, small_run.placed(batch, small_run.mesh(data=8)))
  np.testing.assert_allclose(first["train/loss"], sums.nats / sums.weight, rtol=1e-5)
  state = Checkpoints(str(workdir)).restore(1, program.shapes)
  small_run.assert_same(state.tau, tau)
  assert int(state.step) == int(state.opt_state[1].count) == 1
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.born))
  # Adam's first moment after one update is a tenth of the clipped gradient, and no more.
  moment = math.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(state.opt_state[1].mu)))
  np.testing.assert_allclose(moment, 0.1 * min(first["train/grad_norm"], 1.0), rtol=1e-5)


def test_held_out_losses_are_those_of_the_averaged_weights_on_every_set(second):
  config, workdir, *_ = second
  (row,) = [row for row in losses(workdir) if "held_out/loss" in row]
  program = make_program(config, GROWN, small_run.mesh(data=8))
  state = Checkpoints(str(workdir)).restore(1, program.shapes)
  averaged = jax.tree.map(lambda weight, lag: weight - lag, state.params, state.opt_state[-1].lag)
  for name, batches in data.open_data(config.data, seq_length=MODEL.seq_length).named_held_out_batches(2).items():
    nats, plain = (
      np.mean([sums.nats / sums.weight for sums in of_all])
      for of_all in zip(
        *(
          [
            program.eval_step(params, state.tau, small_run.placed(b, small_run.mesh(data=8)))
            for params in (averaged, state.params)
          ]
          for b in batches
        )
      )
    )
    logged = row["held_out/loss" if name == "held_out" else f"held_out/{name}/loss"]
    np.testing.assert_allclose(logged, nats, rtol=1e-6)
    assert abs(logged - plain) > 1e-4


def test_sixty_batches_are_evaluated_on_eight_devices(second):
  # XLA on several CPU devices blocks for ever where more than 32 programs wait.
  config, workdir, *_ = second
  mesh = small_run.mesh(data=8)
  program = make_program(config, GROWN, mesh)
  state = Checkpoints(str(workdir)).restore(1, program.shapes)
  batch = small_run.placed(small_run.batch(), mesh)
  one, sixty = (held_out.held_out_measures(program, state, {"a": [batch] * count})["a"]["loss"] for count in (1, 60))
  np.testing.assert_allclose(sixty, one, rtol=1e-12)


def test_a_loaded_model_has_the_averaged_weights_unless_the_weights_are_asked_for(second):
  config, workdir, *_ = second
  state = Checkpoints(str(workdir)).restore(1, make_program(config, GROWN, small_run.mesh(data=8)).shapes)
  small_run.assert_same(split(tf.load(str(workdir), average=False))[1], state.params)
  averaged = jax.tree.map(lambda weight, lag: weight - lag, state.params, state.opt_state[-1].lag)
  small_run.assert_close(split(tf.load(str(workdir)))[1], averaged, 1e-6)
  mesh = small_run.mesh(token=8)
  sharded = tf.load(str(workdir), mesh=mesh)
  assert sharded.blocks.ffn.keys[...].sharding.mesh == mesh
  small_run.assert_close(split(sharded)[1], averaged, 1e-6)


def test_a_sample_begins_with_its_prompt_and_leaves_nothing_on_the_devices(second):
  _, workdir, _, held = second
  ((step, sample),) = read_samples(str(workdir))
  assert step == 1 and sample.startswith("def ")
  assert held[0] == held[1]


def test_weights_and_biases_gets_every_row_and_a_record_that_is_opened_again(second):
  config, workdir, fake, _ = second
  assert fake.finished == 2 and fake.metrics == [(("*",), {"step_metric": "step"})] * 2
  first, again = fake.opened
  assert first == again and first["id"] == (workdir / "wandb_run_id.txt").read_text() and first["resume"] == "allow"
  assert (first["project"], first["name"], first["config"]) == ("project", "run", config.to_dict())
  assert [row for row in fake.rows if "sample" not in row] == read_metrics(str(workdir))
  assert [row["step"] for row in fake.rows if "sample" in row] == [1]


# Refusals.


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda c: small_run.replace(c, mesh=dict(data=1, token=3)), "takes 3 devices, but there are 8"),
    (
      lambda c: small_run.replace(
        c, mesh=dict(data=1, token=8), growth=dict(stages=(small_run.stage(5, MODEL.grown(ffn_tokens=20)),))
      ),
      "ffn/keys: param_token=20 cannot be split over the 8",
    ),
    (lambda c: small_run.replace(c, model=dict(theta="softmax")), "theta='softmax': new rows"),
    (lambda c: small_run.replace(c, model=dict(vocab_size=256)), "model.vocab_size=256: the tokenizer 'bytes' has 257"),
    (lambda c: small_run.replace(c, training=dict(sample_tokens=13)), "training.sample_tokens=13: with the prompt's 4"),
    (lambda c: small_run.replace(c, data=dict(batch_size=4096)), "less than one batch of 4096"),
    (lambda c: dataclasses.replace(c, init_from="nowhere"), "nowhere: no checkpoint there"),
    (lambda c: small_run.replace(c, training=dict(wandb_project="x")), "wandb_project='x': the package wandb is not"),
  ],
)
def test_an_impossible_run_is_refused_before_anything_is_written(text, tmp_path, monkeypatch, change, message):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=message):
    train(change(config(text)), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A tokenizer of words, in a file."""
  path = tmp_path_factory.mktemp("tokenizer") / "words.json"
  vocab = {"<|endoftext|>": 0, "?": 1, "def": 2, "return": 3, "x": 4}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(path))
  return path


def test_weights_of_another_model_or_tokenizer_are_refused(run, text, words, tmp_path):
  new = dataclasses.replace(small_run.replace(config(text), growth=dict(stages=())), init_from=str(run[0]))
  with pytest.raises(ValueError, match="init_from=.*its model has qkv_tokens=16, this run's 8"):
    train(new, str(tmp_path / "new"))
  new = dataclasses.replace(small_run.replace(new, data=dict(tokenizer=str(words))), model=GROWN)
  with pytest.raises(ValueError, match="init_from=.*trained with the tokenizer .* ids would mean other text"):
    train(new, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_another_text_of_the_same_name_is_refused_unless_allowed(workdir, text, words):
  before = small_run.folder_digest(workdir)
  original = text.read_text()
  longer = config(text, num_steps=STEPS + 1)
  try:
    text.write_text(original.replace("return", "retain"))
    with pytest.raises(ValueError, match="data.source.*sha256 was .*--allow_data_change"):
      train(longer, str(workdir))
    assert small_run.folder_digest(workdir) == before
    train(longer, str(workdir), allow_data_change=True)
  finally:
    text.write_text(original)
  assert Checkpoints(str(workdir)).latest_step() == STEPS + 1
  with pytest.raises(ValueError, match="trained with the tokenizer"):
    train(small_run.replace(longer, data=dict(tokenizer=str(words))), str(workdir), allow_data_change=True)


# Stopped and resumed.


class Stopped(Exception):
  pass


def stop_before_batch(monkeypatch, number):
  """Makes the run fail when it asks for this batch, counted from 0."""
  take = data.BatchIterator.__next__

  def take_or_stop(batches):
    if batches.get_state()["next_batch"] == number:
      raise Stopped
    return take(batches)

  monkeypatch.setattr(data.BatchIterator, "__next__", take_or_stop)


@pytest.mark.slow
def test_a_run_stopped_at_and_after_its_growth_resumes_bit_by_bit(run, text, tmp_path, monkeypatch):
  workdir, loss = run
  for step in (GROWTH_STEP, GROWTH_STEP + 1):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
      stop_before_batch(patch, step)
      train(config(text, checkpoint_every=step), str(tmp_path))
    # The save that was pending when the run failed is complete.
    assert Checkpoints(str(tmp_path)).latest_step() == step
  assert train(config(text), str(tmp_path)) == loss
  assert losses(tmp_path) == losses(workdir)
  assert small_run.digest(last_state(tmp_path)) == small_run.digest(last_state(workdir))


def train_elsewhere(config, workdir):
  """`train` in a process of its own, under the settings of `conftest`."""
  from tests import conftest  # noqa: F401

  train(config, workdir)


def kill_when(config, workdir, condition):
  """Begins or resumes a run in another process, and ends that with SIGKILL as soon as `condition()` holds."""
  process = CONTEXT.Process(target=train_elsewhere, args=(config, str(workdir)))
  process.start()
  while not condition():
    assert process.exitcode is None
    time.sleep(0.002)
  process.kill()
  process.join()
  assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_before_its_growth_and_while_saving_after_it_resumes_bit_by_bit(run, text, tmp_path):
  workdir = tmp_path / "run"

  def at_step(step):
    return any(row["step"] >= step for row in losses(workdir))

  def saving():
    return at_step(GROWTH_STEP + 1) and any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())

  kill_when(config(text), workdir, lambda: at_step(GROWTH_STEP - 3))
  kill_when(config(text), workdir, saving)
  assert 0 < Checkpoints(str(workdir)).latest_step() < STEPS
  train(config(text), str(workdir))
  assert losses(workdir) == losses(run[0])
  assert small_run.digest(last_state(workdir)) == small_run.digest(last_state(run[0]))


def test_a_run_that_is_no_longer_finite_ends_and_saves_nothing_of_it(run, text, tmp_path, monkeypatch):
  source = shutil.copytree(run[0], tmp_path / "source")
  state = last_state(source)
  state.params["embedding"] = state.params["embedding"].at[5, 5].set(np.nan)
  checkpoints = Checkpoints(str(source))
  with monkeypatch.context() as patch:
    patch.setattr("tokenformer_jax.training.checkpoints.check_leaves", lambda *_: None)  # It would refuse this state.
    checkpoints.save(STEPS + 1, state, checkpoints.record(STEPS))
    checkpoints.close()
  new = dataclasses.replace(small_run.replace(config(text), growth=dict(stages=())), model=GROWN, init_from=str(source))
  new = small_run.replace(new, training=dict(max_skips_in_a_row=3))
  with pytest.raises(FloatingPointError, match="^3 updates in a row were skipped, the last at step 3.*no checkpoint"):
    train(new, str(tmp_path / "run"))
  assert Checkpoints(str(tmp_path / "run")).latest_step() is None
