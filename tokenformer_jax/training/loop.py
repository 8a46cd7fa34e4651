"""The training loop: reads data, updates the model, grows it, and writes checkpoints and metrics."""

import contextlib
import dataclasses
import json
import math
import sys
from typing import Any, NoReturn

import jax
import numpy as np

from tokenformer_jax import data
from tokenformer_jax.config import Config
from tokenformer_jax.config.data import MAIN_HELD_OUT
from tokenformer_jax.distributed.axes import batch_sharding, whole_heads
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.distributed.processes import (
  STOPPED_EXIT_CODE,
  check_agree,
  must_stop,
  on_first_process,
  share_of_rows,
)
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.paths import replace_text, user_path
from tokenformer_jax.progress import Progress, say
from tokenformer_jax.training.checkpoints import TOKENIZER, Checkpoints
from tokenformer_jax.training.first_state import first_state
from tokenformer_jax.training.flops import peak_flops, update_flops_per_token
from tokenformer_jax.training.held_out import held_out_measures, write_sample
from tokenformer_jax.training.loss_curve import plot_losses
from tokenformer_jax.training.program import Program, check_run, make_program
from tokenformer_jax.training.resume import (
  CONFIG,
  changed_rate,
  check_position,
  check_same_model,
  check_same_optimizer,
  check_same_run,
  check_same_tokenizer,
)
from tokenformer_jax.training.run_checks import (
  check_growths,
  check_samples,
  check_trackers,
  check_vocabulary,
)
from tokenformer_jax.training.run_log import RunLog
from tokenformer_jax.training.skips import Skips
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.timing import Clock, Trace
from tokenformer_jax.training.watchdog import Watchdog


def train(config: Config, workdir: str, *, profile: bool = False, allow_data_change: bool = False) -> float:
  """Trains `config` in `workdir`, resuming bit by bit from the newest checkpoint there if there is one.

  Writes config.json, tokenizer.json, checkpoints/, metrics.jsonl, tensorboard/, samples.txt, loss.png and, with
  `profile`, a trace of a few steps in profile/.

  Args:
    config: the run.
    workdir: a local folder, or gs://BUCKET/FOLDER.
    profile: whether to write the trace.
    allow_data_change: resume with other data than the run began with.

  Returns:
    The last loss on the main held-out set: nats a token, a masked token or an example, or the squared error.

  Raises:
    ValueError: data, vocabulary, mesh, growth or work folder do not fit the config; nothing is written then.
    OSError: checkpoints could not be saved; the message names the newest one.
    Diverged: `training.max_skips_in_a_row` updates in a row were skipped, or the last update was. What is saved is from
      before. It is a FloatingPointError.
    SystemExit: with code 143 after SIGTERM, SIGINT or SIGHUP, where the CLI handles these signals; the state is saved
      then.
  """
  return _Run(config, workdir, allow_data_change).run(profile)


class _Run:
  """One call of `train`: its open data, checkpoints and logs, and its state."""

  def __init__(self, config: Config, workdir: str, allow_data_change: bool):
    user_path(workdir, "workdir")  # Refuses a path that means nothing before anything else is done.
    self.config, self.workdir = config, workdir
    self.mesh = make_mesh(config.mesh)
    check_same_run(config, workdir, allow_data_change)
    on_first_process(lambda: check_trackers(config))
    check_run(config, self.mesh)
    check_growths(config, self.mesh)
    index, count = share_of_rows(batch_sharding(self.mesh, (config.data.batch_size,)), (config.data.batch_size,))
    self.data = data.open_run_data(config, process_index=index, process_count=count)
    check_vocabulary(config, self.data.tokenizer)
    check_samples(config, self.data.tokenizer)
    self.batches = self.data.train_batches()
    self.held_out = {
      name: [self._put(batch) for batch in batches]
      for name, batches in self.data.named_held_out_batches(config.training.eval_batches).items()
    }
    self.checkpoints = Checkpoints(workdir, config.training.checkpoints_kept)
    self.notes: list[str] = []
    self.peak = peak_flops(self.mesh)
    self.skips = Skips(self.config.training)
    self.unseen: dict[str, jax.Array] | None = None  # The metrics of the newest update, unless they were looked at.
    self.owes_evaluation = self.owes_save = False
    try:
      self.checkpoints.claim()
      self._start(allow_data_change)
    except BaseException:
      self.checkpoints.close()
      raise

  def _start(self, allow_data_change: bool) -> None:
    """Makes or restores the state, and opens the logs."""
    latest = self.checkpoints.latest_step()
    check_agree(configuration=self.config.to_dict(), data=self.data.fingerprint, latest_checkpoint=latest)
    self.saved_step = latest
    if latest is None:
      self.program, self.state = first_state(self.config, self.workdir, self.mesh, self.data.tokenizer)
    else:
      self.program, self.state = self._resume(latest, allow_data_change)
    on_first_process(lambda: self._open_folder(latest or 0))
    if jax.process_index() != 0:
      self.log = RunLog(self.workdir, latest or 0)

  def _open_folder(self, step: int) -> None:
    """Writes what the work folder holds beside checkpoints, and opens its logs."""
    folder = user_path(self.workdir, "workdir")
    folder.mkdir(parents=True, exist_ok=True)
    if self.data.tokenizer:  # This comes first, because it refuses to overwrite files of others.
      data.save_tokenizer(self.data.tokenizer, folder / TOKENIZER)
    replace_text(folder / CONFIG, json.dumps(self.config.to_dict(), indent=2))
    self.log = RunLog(self.workdir, step, self.config)

  def _resume(self, step: int, allow_data_change: bool) -> tuple[Program, TrainState]:
    record = self.checkpoints.record(step)
    model = check_same_model(record["model"], self.config, step, self.workdir)
    if self.data.tokenizer:
      check_same_tokenizer(record["tokenizer"], self.data.tokenizer, self.workdir)
    if not allow_data_change:
      data.check_same(record["fingerprint"], self.data.fingerprint, self.data.tokenizer)
    check_same_optimizer(record["config"], self.config, self.workdir)
    self.notes.append(changed_rate(record["config"], self.config, step))
    program = make_program(self.config, model, self.mesh)
    state = self.checkpoints.restore(step, program.shapes)
    check_position(record, int(state.step), step, self.workdir)
    self.batches.set_state(record["data"])
    self.skips = Skips(self.config.training, () if allow_data_change else record.get("losses", ()))
    self.owes_evaluation = record.get("owes_evaluation", False)
    return program, state

  def run(self, profile: bool) -> float:
    training = self.config.training
    step = int(self.state.step)
    clock = loss = None
    with (
      contextlib.closing(self.checkpoints),
      contextlib.closing(self.log),
      Trace(self.workdir, profile) as trace,
      Progress(training.num_steps, "step", initial=step, shown=jax.process_index() == 0) as progress,
    ):
      self._introduce(step)
      if self.owes_evaluation:
        loss = self._evaluate(step)
      while step < training.num_steps:
        grows = any(stage.step == step for stage in self.config.growth.stages)
        if grows and self.config.model_at(step) != self.program.model:
          self._grow(step)
          clock = None
        with Watchdog(training.step_timeout if clock else 0):
          batch, most_loss = self._put(next(self.batches)), self.skips.most_loss(step + 1)
          self.state, metrics = self.program.train_step(self.state, batch, most_loss)
          self._look(step)  # At the update before, while the devices compute this one.
          step, self.unseen = step + 1, metrics
          self.checkpoints.check()
          trace.step(self.state)
          if clock is None:  # The step that compiles is neither timed, traced nor watched.
            jax.block_until_ready(metrics)
            clock = Clock(step)
            trace.start()

          last = step == training.num_steps
          stop = must_stop(step) and not last
          log, evaluate, save = (
            last or step % every == 0 for every in (training.log_every, training.eval_every, training.checkpoint_every)
          )
          save = save or stop or self.owes_save
          if log or evaluate or save:
            metrics = self._look(step) or metrics
        progress.update()
        if log or stop:
          self._log(step, metrics, clock, progress)
        if evaluate and not stop:
          loss = self._evaluate(step)
          clock.restart(step)
        # A state that the loss was just not finite for is not saved: the next good update shows that it is good.
        self.owes_save = save and bool(self.skips.in_a_row)
        if save and not self.owes_save:
          self._save(step, owes_evaluation=evaluate and stop)
        if stop:
          self._stop(step)
      if self.skips.in_a_row:
        raise self.skips.diverged("the last update was skipped", self.saved_step)
    if loss is None:
      loss = self._held_out_loss()
      _say(
        f"The run was complete: training.num_steps={training.num_steps:,} updates are done, and none was added. To train "
        f"on, raise it, e.g. --config.training.num_steps={2 * step}."
      )
    if jax.process_index() == 0:
      unit = self.program.objective.unit
      say(f"step {step}, held-out loss {loss:.4f} {unit}, loss curve {plot_losses(self.workdir, unit)}")
    return loss

  def _look(self, step: int) -> dict[str, np.ndarray] | None:
    """Returns the metrics of update number `step`, None if they were looked at before.

    Raises:
      Diverged: too many updates in a row were skipped.
    """
    if self.unseen is None:
      return None
    metrics, self.unseen = jax.device_get(self.unseen), None
    if skipped := self.skips.observe(step, metrics):
      _say(skipped)
      if self.skips.are_too_many():
        raise self.skips.diverged(
          f"{self.skips.in_a_row} updates in a row were skipped, the last at step {step}", self.saved_step
        )
    return metrics

  def _stop(self, step: int) -> NoReturn:
    kept = f"not saved, because its last {self.skips.in_a_row} updates were skipped" if self.owes_save else "and saved"
    _say(f"step {step}: stopped by a signal, {kept}; run the same command again to resume.")
    sys.exit(STOPPED_EXIT_CODE)

  def _introduce(self, step: int) -> None:
    """Prints what the run is, and what its user should know before it takes time."""
    _say(
      f"{self.workdir}: {self.program.model.num_parameters:,} parameters, "
      + (f"resumed at step {step}." if step else "from the beginning.")
    )
    for note in (whole_heads(self.mesh, self.config.model.num_heads), *self.notes):
      if note:
        _say(note)
    for entry in self.data.report["train"]:
      if "examples" in entry:
        _say(f"{entry['source']}: {entry['examples']:,} examples to train on.")
      else:
        _say(
          f"{entry['source']}: {entry['tokens']:,} tokens to train on, {entry['windows']:,} windows, "
          f"{entry['dropped_tokens']:,} tokens in no window."
        )

  def _grow(self, step: int) -> None:
    self._look(step)  # The losses of the smaller model are forgotten below, that of its last update too.
    before = self._held_out_loss()
    model = self.config.model_at(step)
    program = make_program(self.config, model, self.mesh)
    # Donating frees each old leaf once its successor exists, so that old and new state are never held together.
    self.state, _, report = grow_state(
      self.state,
      self.program.model,
      model,
      self.config.growth,
      seed=self.config.training.seed,
      out_shardings=program.shardings,
      donate=True,
    )
    self.program = program
    self.skips.forget_losses()
    after = self._held_out_loss()
    old, new = report.num_parameters
    _say(
      f"step {step}: grown from {old:,} to {new:,} parameters; held-out loss {before:.6f} before, {after:.6f} after."
    )
    self.log.write(step, **{"growth/parameters": new, "growth/loss_before": before, "growth/loss_after": after})

  def _log(self, step: int, metrics: dict[str, np.ndarray], clock: Clock, progress: Progress) -> None:
    row = _finite({f"train/{name}": float(value) for name, value in metrics.items()})
    del row["train/skipped"]
    if skipped := self.skips.take_count():
      row["train/skipped"] = skipped
    shown = {"loss": f"{metrics['loss']:.4f}"}
    steps_per_second = clock.steps_per_second(step)
    if steps_per_second:
      examples_per_second = steps_per_second * self.config.data.batch_size
      tokens_per_second = examples_per_second * self.config.model.seq_length
      if self.config.model.task == "classify":
        row["train/examples_per_second"] = examples_per_second
        shown["examples/s"] = f"{examples_per_second:,.0f}"
      else:
        row["train/tokens_per_second"] = tokens_per_second
        shown["tok/s"] = f"{tokens_per_second:,.0f}"
      if self.peak:
        flops = update_flops_per_token(self.program.model, self.config.data.mask_rate) * tokens_per_second
        row["train/utilisation"] = flops / self.peak
        shown["mfu"] = f"{row['train/utilisation']:.0%}"
    progress.report(**shown)
    self.log.write(step, **row)

  def _evaluate(self, step: int) -> float:
    measured = held_out_measures(self.program, self.state, self.held_out)
    main = measured.pop(MAIN_HELD_OUT)
    row = {f"held_out/{name}": value for name, value in main.items()}
    for of_set, values in measured.items():
      row |= {f"held_out/{of_set}/{name}": value for name, value in values.items() if name != "perplexity"}
    self.log.write(step, **_finite(row))
    said = [f"{name} {values['loss']:.4f}" for name, values in measured.items()]
    if "loss_as_trained" in main:
      said.insert(0, f"routed as in training {main['loss_as_trained']:.4f}")
    if "accuracy" in main:
      said.insert(0, f"accuracy {main['accuracy']:.2%}")
    _say(f"step {step}: " + ", ".join([f"held-out loss {main['loss']:.4f}", *said]))
    if self.config.training.sample_tokens and self.config.model.task == "next_token" and self.data.tokenizer:
      text = write_sample(self.program, self.state, self.data.tokenizer, self.config.training, step)
      self.log.write_sample(step, text)
    return main["loss"]

  def _held_out_loss(self) -> float:
    main = {MAIN_HELD_OUT: self.held_out[MAIN_HELD_OUT]}
    return held_out_measures(self.program, self.state, main)[MAIN_HELD_OUT]["loss"]

  def _save(self, step: int, owes_evaluation: bool) -> None:
    self.log.flush()  # A run that resumes from this checkpoint writes only the rows after it.
    self.checkpoints.save(
      step,
      self.state,
      {
        "model": dataclasses.asdict(self.program.model),
        "config": self.config.to_dict(),
        "data": self.batches.get_state(),
        "fingerprint": self.data.fingerprint,
        "tokenizer": self.data.tokenizer and self.data.tokenizer.fingerprint,
        "losses": self.skips.losses(),
        "owes_evaluation": owes_evaluation,
      },
    )
    self.saved_step = step

  def _put(self, batch: Any) -> Any:
    """Places this process's rows on its devices, as its part of the global batch."""

    def place(local: np.ndarray) -> jax.Array:
      shape = (self.config.data.batch_size, *local.shape[1:])
      sharding = batch_sharding(self.mesh, shape, length=self.config.model.seq_length)
      return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(place, batch)


def _finite(row: dict[str, float]) -> dict[str, float]:
  """Leaves out what JSON cannot represent: the numbers of skipped updates may be NaN or infinite."""
  return {name: value for name, value in row.items() if math.isfinite(value)}


def _say(text: str) -> None:
  if jax.process_index() == 0:
    say(text)
