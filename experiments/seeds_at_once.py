"""Many runs of several seeds at once, each by the library's own training step: for experiments that fit on one device.

A small model leaves an accelerator idle most of the time. Here a step is mapped over the seeds, a scan runs many steps
in one call, the text lies on the device, and the next programs are compiled in threads while a run is under way.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, GrowthConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import logical_axes
from tokenformer_jax.training.program import Program, make_program
from tokenformer_jax.training.state import TrainState, fresh_state, initial_state

# How many programs are compiled at the same time. Tracing holds Python's lock, so programs are traced one by one.
CORES = os.cpu_count() or 1
_COMPILER = concurrent.futures.ThreadPoolExecutor(CORES)
_TRACER = concurrent.futures.ThreadPoolExecutor(1)
_EVAL_ROWS = 128


class Text:
  """A corpus in windows of T + 1 ids on the device, and an order of them for each seed.

  Attributes:
    windows: uint16 [n, T + 1], the training text; neighbours share an id.
    held_out: uint16 [batches, 128, T + 1].
    tokens: number of training ids.
  """

  def __init__(self, config: DataConfig, seq_length: int, eval_batches: int):
    corpus = data.open_data(config, seq_length=seq_length)
    train = _windows(corpus.train_tokens(), seq_length)
    held_out = _windows(corpus.held_out_tokens(), seq_length)
    eval_batches = min(eval_batches, len(held_out) // _EVAL_ROWS)
    self.tokens = train.size
    self.windows = jnp.asarray(train)
    self.held_out = jnp.asarray(held_out[: eval_batches * _EVAL_ROWS].reshape(eval_batches, _EVAL_ROWS, -1))
    self._batch_size = config.batch_size
    self._orders: dict[int, np.ndarray] = {}

  def rows(self, seeds: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """int32 [stop − start, seed, row], which windows the updates read; each seed reads every window once an epoch."""
    return np.stack([self._rows(seed, start, stop) for seed in seeds], axis=1)

  def _rows(self, seed: int, start: int, stop: int) -> np.ndarray:
    first, last = start * self._batch_size, stop * self._batch_size
    order = self._orders.get(seed, np.zeros(0, np.int32))
    while len(order) < last:
      epoch = len(order) // len(self.windows)
      order = np.append(order, np.random.default_rng((seed, epoch)).permutation(len(self.windows)).astype(np.int32))
    self._orders[seed] = order
    return order[first:last].reshape(-1, self._batch_size)


def _windows(ids: np.ndarray, seq_length: int) -> np.ndarray:
  count = (len(ids) - 1) // seq_length
  return np.stack([ids[i : i + count * seq_length : seq_length] for i in range(seq_length + 1)], axis=1).astype(
    "uint16"
  )


class Runs:
  """Runs of one configuration at one model size, one for each seed. States have a leading axis of seeds.

  Args:
    config: the runs; its own model and seeds are not read.
    model: the model's size.
    text: what they read.
    seeds: their seeds.
    length: number of updates in one call.
  """

  def __init__(self, config: Config, model: ModelConfig, text: Text, seeds: tuple[int, ...], length: int):
    self.program: Program = make_program(config, model, make_mesh())
    self.config, self.model, self.text, self.seeds, self.length = config, model, text, seeds, length
    self._shapes = shapes = jax.eval_shape(jax.vmap(lambda _: self.program.initial_state()), np.arange(len(seeds)))
    windows = jax.eval_shape(lambda: text.windows)
    rows = jax.ShapeDtypeStruct((length, len(seeds), config.data.batch_size), jnp.int32)
    self._updates = _compiled(jax.jit(self._scan, donate_argnums=0), shapes, windows, rows)
    self._losses = _evaluation(self.program, len(seeds), text, shapes)

  def initial_states(self) -> TrainState:
    """The states before the first update."""
    initial = functools.partial(initial_state, self.model, self.program.optimizer, self.program.tau_rule)
    with jax.default_device(_cpu()):
      return _stack([jax.jit(initial)(jax.random.key(seed)) for seed in self.seeds])

  def updated(self, states: TrainState, first: int) -> TrainState:
    """The states after `length` more updates; the given ones are donated.

    Args:
      first: how many updates read text before, which decides what these read.
    """
    rows = self.text.rows(self.seeds, first, first + self.length)
    return self._updates.result().result()(states, self.text.windows, rows)

  def losses(self, states: TrainState) -> list[float]:
    """The held-out loss of each seed, in nats a token."""
    evaluate = self._losses.result().result()
    return np.asarray(evaluate(states.params, states.tau, self.text.held_out)).tolist()

  def grown(self, states: TrainState, old: ModelConfig, growth: GrowthConfig) -> TrainState:
    """States of the size `old` that have been grown to this one, on the host."""
    states = on_host(states)
    with jax.default_device(_cpu()):
      each = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), states) for i in range(len(self.seeds))]
      each = [grow_state(state, old, self.model, growth, seed=seed)[0] for state, seed in zip(each, self.seeds)]
      rule = self.program.tau_rule
      return _stack([dataclasses.replace(state, tau_opt_state=rule.init(state.tau)) for state in each])

  def prepare_growth(self, old: "Runs", growth: GrowthConfig) -> None:
    """Compiles in a thread what `grown` will need for states of the runs `old`."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), old._shapes)
    _COMPILER.submit(self.grown, zeros, old.model, growth)

  def restarted(self, states: TrainState) -> TrainState:
    """States with these weights and nothing else: step 0, and an optimizer that has seen nothing; on the host."""
    axes, _ = logical_axes(abstract_model(self.model))
    states = on_host(states)
    with jax.default_device(_cpu()):
      each = [jax.tree.map(lambda leaf, i=i: leaf[i], (states.params, states.tau)) for i in range(len(self.seeds))]
      fresh = [fresh_state(*one, axes, self.program.optimizer, self.program.tau_rule) for one in each]
      return _stack(fresh)

  def _scan(self, states, windows, rows):
    def update(states, rows):
      ids = windows[rows].astype(jnp.int32)
      states, _ = jax.vmap(self.program.train_step)(states, data.Batch(ids[..., :-1], ids[..., 1:]))
      return states, None

    return jax.lax.scan(update, states, rows)[0]


_EVALUATIONS: dict = {}


def _evaluation(program: Program, num_seeds: int, text: Text, shapes: TrainState):
  """The held-out loss of each seed; programs of one model share it."""

  def add(params_tau, sums, ids):
    ids = ids.astype(jnp.int32)
    batch = data.Batch(ids[..., :-1], ids[..., 1:])
    more = jax.vmap(program.eval_step, (0, 0, None))(*params_tau, batch)
    return (sums[0] + more.nats, sums[1] + more.weight), None

  def evaluate(params, tau, held_out):
    zeros = jnp.zeros(num_seeds), jnp.zeros(num_seeds)
    (nats, weight), _ = jax.lax.scan(functools.partial(add, (params, tau)), zeros, held_out)
    return nats / weight

  key = program.model, num_seeds, text.held_out.shape
  if key not in _EVALUATIONS:
    held_out = jax.eval_shape(lambda: text.held_out)
    _EVALUATIONS[key] = _compiled(jax.jit(evaluate), shapes.params, shapes.tau, held_out)
  return _EVALUATIONS[key]


def _compiled(function, *shapes) -> concurrent.futures.Future:
  """A future of a future of the compiled function."""
  return _TRACER.submit(lambda: _COMPILER.submit(function.lower(*shapes).compile))


def stop_compiling() -> None:
  """Drops the programs that have not been compiled, so that Python can exit."""
  for pool in (_TRACER, _COMPILER):
    pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def _cpu() -> jax.Device:
  return jax.local_devices(backend="cpu")[0]


def _stack(states: list[TrainState]) -> TrainState:
  """The states of all seeds as one, on the host."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, states))


def on_host(states):
  """A copy of the states as NumPy arrays, which no call donates."""
  return jax.tree.map(np.array, states)


def save(path: pathlib.Path, value) -> None:
  """Writes a value of NumPy arrays; a kill leaves the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(path.name + ".new")
  new.write_bytes(pickle.dumps(value))
  new.rename(path)


def load(path: pathlib.Path):
  """Reads what `save` wrote."""
  return pickle.loads(path.read_bytes())


def with_schedule(config: Config, num_steps: int, decay_steps: int, **fields) -> Config:
  """The configuration with another length and schedule."""
  return dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, decay_steps=decay_steps, **fields),
    training=dataclasses.replace(config.training, num_steps=num_steps),
  )
