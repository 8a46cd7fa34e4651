"""What mixture of depths saves: FLOPs, a train step and a decode step of each capacity beside the dense model, in turns.

    python experiments/benchmarks/depth_capacity.py [--hidden_size=512] [--rounds=5]

All models have the same shape; every other block is routed. A decode step reads one row after a prompt of half of the
positions. Its routed layers are skipped as often as the causal rule says, which training has not taught yet: the rule is
set to route the capacity's share at random (`choice='random'`). Figures are medians; *processor* is the time of all cores
that the process used, which other work on the machine disturbs less.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import tokenformer_jax as tf
from tokenformer_jax.config import Config, ModelConfig, TrainingConfig
from tokenformer_jax.data import Batch
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.inference.decoding import decoding_programs
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.program import make_program

_HIDDEN = flags.DEFINE_integer("hidden_size", 512, "Channels.")
_LAYERS = flags.DEFINE_integer("num_layers", 4, "Blocks, an even number.")
_TIME = flags.DEFINE_integer("seq_length", 512, "Positions.")
_BATCH = flags.DEFINE_integer("batch_size", 2, "Rows of a train step.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are reported.")
_STEPS = flags.DEFINE_integer("decode_steps", 64, "Decode steps in a round.")
CAPACITIES = (1.0, 0.5, 0.25, 0.125)


def model_config(capacity: float, choice: str) -> ModelConfig:
  depth = dict(capacity=capacity) if capacity == 1.0 else dict(capacity=capacity, choice=choice)
  return ModelConfig.named(
    "tiny",
    "mod",
    vocab_size=512,
    num_layers=_LAYERS.value,
    hidden_size=_HIDDEN.value,
    num_heads=_HIDDEN.value // 64,
    ffn_tokens=_HIDDEN.value * 8 // 3,
    seq_length=_TIME.value,
    depth=depth,
  )


class Model:
  """The compiled train step and decode step of one capacity."""

  def __init__(self, capacity: float):
    self.config = model_config(capacity, "expert")
    config = Config(model=self.config, training=TrainingConfig(num_steps=100))
    self._program = make_program(config, self.config, make_mesh(config.mesh, devices=jax.devices()[:1]))
    ids = np.random.default_rng(0).integers(0, 512, (_BATCH.value, _TIME.value + 1)).astype(np.int32)
    self._state, self._batch = self._program.initial_state(), Batch(ids[:, :-1], ids[:, 1:])
    decoding = tf.LanguageModel(model_config(capacity, "random"), rngs=nnx.Rngs(0)).for_decoding()
    graphdef, *self._leaves = split(decoding)
    prefill, self._decode = decoding_programs(graphdef)
    self._prompt = ids[:1, : _TIME.value // 2]
    self._fill = lambda: prefill(self._leaves, self._prompt, np.zeros(1, np.int32), num_slots=_TIME.value)[1]
    self.times: dict[str, list[float]] = {"train": [], "train processor": [], "decode": [], "decode processor": []}

  def round(self) -> None:
    self._measure("train", self._train)
    cache = jax.block_until_ready(self._fill())
    self._measure("decode", lambda: self._steps(cache))

  def _train(self) -> int:
    self._state, metrics = self._program.train_step(self._state, self._batch)
    jax.block_until_ready(metrics)
    return 1

  def _steps(self, cache) -> int:
    for _ in range(_STEPS.value):
      logits, cache = self._decode(self._leaves, jnp.zeros(1, jnp.int32), cache)
      jax.block_until_ready(logits)
    return _STEPS.value

  def _measure(self, name, run) -> None:
    begin, processor = time.perf_counter(), time.process_time()
    steps = run()
    self.times[name].append(1e3 * (time.perf_counter() - begin) / steps)
    self.times[f"{name} processor"].append(1e3 * (time.process_time() - processor) / steps)


def main(argv):
  del argv
  models = {capacity: Model(capacity) for capacity in CAPACITIES}
  for _ in range(_ROUNDS.value + 1):  # The first round compiles.
    for model in models.values():
      model.round()
  names = list(models[1.0].times)
  print("capacity  FLOPs a token  " + "  ".join(f"{name} ms" for name in names))
  dense = None
  for capacity, model in models.items():
    figures = [model.config.forward_flops_per_token, *(statistics.median(model.times[name][1:]) for name in names)]
    dense = dense or figures
    shown = [f"{one:12.4g} ({one / first:4.2f})" for one, first in zip(figures, dense)]
    print(f"{capacity:8.1%}" + "".join(shown), flush=True)


if __name__ == "__main__":
  app.run(main)
