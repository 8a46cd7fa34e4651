"""The training loop: data in, checkpoints and metrics out, growth on the way."""

import dataclasses
import json
import math
import sys
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import tqdm

from tokenformer_jax import data
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.training.checkpoints import TOKENIZER, Checkpoints, absolute, load
from tokenformer_jax.training.flops import peak_flops
from tokenformer_jax.training.loss import LossSums
from tokenformer_jax.training.program import Program, make_program
from tokenformer_jax.training.resume import check_same_model, check_same_run, check_same_weights
from tokenformer_jax.training.run_log import RunLog, plot_losses
from tokenformer_jax.training.state import TrainState, abstract_model, fresh_state

_PROFILED_STEPS = 5


def train(config: Config, workdir: str, *, profile: bool = False, allow_data_change: bool = False) -> float:
  """Trains `config` in `workdir`, going on from the newest checkpoint there, to the bit.

  Leaves behind: config.json, tokenizer.json, checkpoints/, metrics.jsonl, tensorboard/, samples.txt,
  loss.png and, with `profile`, a trace of a few steps in profile/.

  Args:
    workdir: a local folder or a bucket.
    allow_data_change: go on with other data than the run began with.

  Returns:
    The last held-out loss, nats a token.

  Raises:
    ValueError: data, vocabulary, mesh or work folder do not fit the config; nothing is written then.
    FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
  """
  return _Run(config, workdir, allow_data_change).run(profile)


class _Run:
  """One call of `train`: what is open, and where it stands."""

  def __init__(self, config: Config, workdir: str, allow_data_change: bool):
    self.config, self.workdir = config, workdir
    self.mesh = make_mesh(config.mesh)
    self.data = data.open_data(config.data, seq_length=config.model.seq_length,
                               process_index=jax.process_index(), process_count=jax.process_count())
    if self.data.tokenizer.vocab_size > config.model.vocab_size:
      raise ValueError(f"model.vocab_size={config.model.vocab_size}: the tokenizer {config.data.tokenizer!r} has "
                       f"{self.data.tokenizer.vocab_size} ids; set it to {self.data.tokenizer.padded_vocab_size}.")
    self.batches = self.data.train_batches()
    self.held_out = [self._put(batch) for batch in self.data.held_out_batches(config.training.eval_batches)]
    self.peak = peak_flops(self.mesh)

    prompt = self.data.tokenizer.encode(config.training.sample_prompt)
    if len(prompt) + config.training.sample_tokens > config.model.seq_length:
      raise ValueError(f"training.sample_tokens={config.training.sample_tokens}: with the prompt's {len(prompt)} they "
                       f"pass model.seq_length={config.model.seq_length}; lower it (0 writes no samples).")

    begun = absolute(workdir) / "config.json"
    if begun.exists():
      check_same_run(json.loads(begun.read_text()), config, workdir, allow_data_change)
    self.checkpoints = Checkpoints(workdir, config.training.checkpoints_kept)
    latest = self.checkpoints.latest_step()
    if latest is None:
      self.program, self.state = self._begin()
    else:
      self.program, self.state = self._resume(latest, allow_data_change)
    if jax.process_index() == 0:
      data.save_tokenizer(self.data.tokenizer, absolute(workdir) / TOKENIZER)
      begun.write_text(json.dumps(config.to_dict(), indent=2))
    self.log = RunLog(workdir, start_step=latest or 0)

  def _begin(self) -> tuple[Program, TrainState]:
    config = self.config
    program = make_program(config, config.model, self.mesh)
    if not config.init_from:
      return program, program.initial_state()
    source = load(config.init_from, mesh=self.mesh)
    check_same_weights(source.config, config.model, config.init_from)
    _, params, tau = split(source)
    axes, _ = logical_axes(abstract_model(config.model))
    fresh = jax.jit(lambda params, tau: fresh_state(params, tau, axes, program.optimizer),
                    out_shardings=program.shardings)
    return program, fresh(params, tau)

  def _resume(self, step: int, allow_data_change: bool) -> tuple[Program, TrainState]:
    record = self.checkpoints.record(step)
    model = check_same_model(record["model"], self.config, step, self.workdir)
    if not allow_data_change:
      data.check_same(record["fingerprint"], self.data.fingerprint)
    program = make_program(self.config, model, self.mesh)
    state = self.checkpoints.restore(step, program.shapes)
    self.batches.set_state(record["data"])
    return program, state

  def run(self, profile: bool) -> float:
    training = self.config.training
    step = int(self.state.step)
    clock = loss = metrics = None
    progress = tqdm.tqdm(total=training.num_steps, initial=step, unit="step", dynamic_ncols=True,
                         disable=jax.process_index() != 0, file=sys.stderr)
    progress.write(f"{self.workdir}: {self.program.model.num_parameters:,} parameters, "
                   + (f"resumed at step {step}." if step else "from the beginning."))
    profile_from = step + 2
    while step < training.num_steps:
      if self.config.model_at(step) != self.program.model:
        self._grow(step, progress)
        clock = None
      if profile and step == profile_from:
        jax.profiler.start_trace(str(absolute(self.workdir) / "profile"))
      self.state, metrics = self.program.train_step(self.state, self._put(next(self.batches)))
      step += 1
      progress.update()
      if clock is None:  # The step that compiles is not timed.
        jax.block_until_ready(metrics)
        clock = _Clock(step)
      if profile and step == profile_from + _PROFILED_STEPS:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()

      last = step == training.num_steps
      if step % training.log_every == 0 or last:
        self._log(step, metrics, clock, progress)
      if step % training.eval_every == 0 or last:
        loss = self._evaluate(step, progress)
        clock.restart(step)
      if step % training.checkpoint_every == 0 or last:
        self._save(step, metrics)
    progress.close()
    self.checkpoints.close()
    self.log.close()
    if loss is None:  # Nothing was left to do.
      loss = self._held_out_loss()
    if jax.process_index() == 0:
      print(f"step {step}, held-out loss {loss:.4f} nats a token, loss curve {plot_losses(self.workdir)}")
    return loss

  def _grow(self, step: int, progress) -> None:
    before = self._held_out_loss()
    model = self.config.model_at(step)
    program = make_program(self.config, model, self.mesh)
    self.state, _, report = grow_state(self.state, self.program.model, model, seed=self.config.training.seed,
                                       out_shardings=program.shardings)
    self.program = program
    after = self._held_out_loss()
    old, new = report.num_parameters
    progress.write(f"step {step}: grown from {old:,} to {new:,} parameters; held-out loss {before:.6f} before, "
                   f"{after:.6f} after.")
    self.log.write(step, **{"growth/parameters": new, "growth/loss_before": before, "growth/loss_after": after})

  def _log(self, step: int, metrics: dict[str, jax.Array], clock: "_Clock", progress) -> None:
    row = {f"train/{name}": float(value) for name, value in metrics.items()}
    _check_finite(row["train/loss"], step)
    shown = {"loss": f"{row['train/loss']:.4f}"}
    steps_per_second = clock.steps_per_second(step)
    if steps_per_second:
      tokens_per_second = steps_per_second * self.config.data.batch_size * self.config.model.seq_length
      row["train/tokens_per_second"] = tokens_per_second
      shown["tok/s"] = f"{tokens_per_second:,.0f}"
      if self.peak:
        row["train/utilisation"] = 3 * self.program.model.forward_flops_per_token * tokens_per_second / self.peak
        shown["mfu"] = f"{row['train/utilisation']:.0%}"
    progress.set_postfix(shown, refresh=False)
    self.log.write(step, **row)

  def _evaluate(self, step: int, progress) -> float:
    loss = self._held_out_loss()
    self.log.write(step, **{"held_out/loss": loss, "held_out/perplexity": math.exp(min(loss, 700.0))})
    progress.write(f"step {step}: held-out loss {loss:.4f}")
    training = self.config.training
    if training.sample_tokens:
      model = nnx.merge(self.program.graphdef, self.state.params, self.state.tau)
      text, = generate(model, self.data.tokenizer, [training.sample_prompt], max_new_tokens=training.sample_tokens,
                       temperature=0.8, seed=training.seed + step)
      self.log.write_sample(step, training.sample_prompt + text)
    return loss

  def _held_out_loss(self) -> float:
    sums = [self.program.eval_step(self.state.params, self.state.tau, batch) for batch in self.held_out]
    total = LossSums(*(sum(map(float, column)) for column in zip(*sums)))
    return total.nats / total.weight

  def _save(self, step: int, metrics: dict[str, jax.Array]) -> None:
    _check_finite(float(metrics["loss"]), step)
    self.checkpoints.save(step, self.state, {
        "model": dataclasses.asdict(self.program.model), "config": self.config.to_dict(),
        "data": self.batches.get_state(), "fingerprint": self.data.fingerprint,
        "tokenizer": self.data.tokenizer.fingerprint})

  def _put(self, batch: data.Batch) -> data.Batch:
    """The process's rows as its part of the global batch, on the devices."""
    def place(local: np.ndarray) -> jax.Array:
      shape = (self.config.data.batch_size, *local.shape[1:])
      return jax.make_array_from_process_local_data(batch_sharding(self.mesh, shape), local, shape)
    return jax.tree.map(place, batch)


class _Clock:
  """Steps a second since the last look or restart."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    self._step, self._start = step, time.perf_counter()

  def steps_per_second(self, step: int) -> float:
    """0 where no step was done since."""
    rate = (step - self._step) / (time.perf_counter() - self._start)
    self.restart(step)
    return rate


def _check_finite(loss: float, step: int) -> None:
  if not math.isfinite(loss):
    raise FloatingPointError(f"loss is {loss} at step {step}; the newest checkpoint is from before. Lower "
                             "optimizer.learning_rate or optimizer.clip_norm and run the same command again.")
