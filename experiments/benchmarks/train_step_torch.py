"""A train step compared with that of a plain PyTorch model, in float32 on this machine's CPU cores.

    python experiments/benchmarks/train_step_torch.py --shape=l4-d256 --rounds=5 --steps=3

Needs PyTorch, and a C++ compiler for `torch.compile`. Both sides start with the same weights and see the same batches; first
their losses must agree over 20 steps. Then rounds of both alternate, with a large matrix product of each library in
each round. The *share* is the rate of the model's FLOPs (3 × forward) divided by the rate of the library's own product. On a
shared machine processor times are more reliable than wall-clock times.
"""

import os

# Otherwise PyTorch's threads spin while they wait, and slow all work on the same cores, including their own.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from tokenformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from tokenformer_jax.data import Batch
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.interop.names import to_released
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.schedules import learning_rate_schedule

# Layers, channels, heads, tokens in each of q, k, v and proj, feed-forward tokens, T, B, vocabulary.
_SHAPES = {
  "tiny": (2, 64, 4, 64, 256, 64, 2, 512),
  "l4-d256": (4, 256, 4, 256, 1024, 256, 8, 5120),
  "l6-d384": (6, 384, 6, 384, 1536, 256, 8, 5120),
}
_SHAPE = flags.DEFINE_enum("shape", "l4-d256", list(_SHAPES), "Shape of the model and its batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; medians are reported.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of each side in a round.")

_STEPS_THAT_AGREE, _TOLERANCE = 20, 1e-4
_PRODUCT = 2048  # Rows, depth and columns of the product that measures the machine.


class Ours:
  """The package's own train step."""

  def __init__(self, config, batches):
    self._program = make_program(config, config.model, make_mesh())
    self._state = self._program.initial_state()
    self._batches = [Batch(jnp.asarray(inputs), jnp.asarray(labels)) for inputs, labels in batches]
    self.weights = {name: np.array(array) for name, array in to_released(self._state.params).items()}

  def run(self, steps):
    """Runs these steps and returns their losses."""
    losses = []
    for step in steps:
      self._state, metrics = self._program.train_step(self._state, self._batches[step % len(self._batches)])
      losses.append(metrics["loss"])
    jax.block_until_ready(self._state)
    return [float(loss) for loss in losses]


class Torch:
  """The same train step as PyTorch users write it: autograd, `clip_grad_norm_` and the fused AdamW.

  Args:
    weights: those of the start, by their released names.
  """

  def __init__(self, config, batches, weights, compiled):
    import torch

    self._torch, self._clip_norm = torch, config.optimizer.clip_norm
    self._weights = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in weights.items()}
    decays = {True: [], False: []}
    for name, weight in self._weights.items():
      decays["norm" not in name].append(weight)
    settings = config.optimizer
    self._optimizer = torch.optim.AdamW(
      [dict(params=decays[True], weight_decay=settings.weight_decay), dict(params=decays[False], weight_decay=0.0)],
      betas=(settings.beta1, settings.beta2),
      eps=settings.eps,
      fused=True,
    )
    self._rate = learning_rate_schedule(settings, config.training.num_steps)
    self._batches = [tuple(torch.from_numpy(ids.astype(np.int64)) for ids in batch) for batch in batches]
    loss = _torch_loss(config.model)
    self._loss = torch.compile(loss, dynamic=False) if compiled else loss

  def run(self, steps):
    losses = []
    for step in steps:
      for group in self._optimizer.param_groups:
        group["lr"] = float(self._rate(step))
      loss = self._loss(self._weights, *self._batches[step % len(self._batches)])
      self._optimizer.zero_grad()
      loss.backward()
      self._torch.nn.utils.clip_grad_norm_(self._weights.values(), self._clip_norm)
      self._optimizer.step()
      losses.append(loss.detach())
    return [float(loss) for loss in losses]


def _torch_loss(model: ModelConfig):
  """Returns `(weights, inputs, labels) -> nats a token`, the released model written from its formulas."""
  import torch
  from torch.nn import functional

  half = model.rotary_dims // 2
  angles = torch.arange(model.seq_length)[:, None] * model.rotary_base ** (-torch.arange(half) / half)
  cos, sin = torch.cos(angles), torch.sin(angles)

  def pattention(x_MxD, weights, name):
    keys, values = weights[f"{name}.key_param_tokens"], weights[f"{name}.value_param_tokens"]
    scores_MxN = x_MxD @ keys.T
    unit_MxN = scores_MxN / scores_MxN.norm(dim=-1, keepdim=True)
    return functional.gelu(unit_MxN * math.sqrt(keys.shape[0])) @ values

  def rotate(x_BxHxTxC):
    first, second, rest = x_BxHxTxC.split([half, half, model.head_dim - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

  def loss(weights, inputs, labels):
    batch, time = inputs.shape
    width = (model.hidden_size,)
    embedding = weights["sequential.0.word_embeddings.weight"]
    x_MxD = functional.embedding(inputs.reshape(-1), embedding)
    for index in range(model.num_layers):
      layer = f"sequential.{index + 2}"
      normed_MxD = functional.layer_norm(x_MxD, width)
      q, k, v = (
        pattention(normed_MxD, weights, f"{layer}.attention.{name}")
        .view(batch, time, model.num_heads, -1)
        .transpose(1, 2)
        for name in ("query", "key", "value")
      )
      y_BxHxTxC = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
      y_MxD = y_BxHxTxC.transpose(1, 2).reshape(batch * time, -1)
      x_MxD = x_MxD + pattention(y_MxD, weights, f"{layer}.attention.proj")
      x_MxD = x_MxD + pattention(functional.layer_norm(x_MxD, width), weights, f"{layer}.mlp")
    norm = f"sequential.{model.num_layers + 3}.norm"
    x_MxD = functional.layer_norm(x_MxD, width, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
    return functional.cross_entropy(x_MxD @ embedding.T, labels.reshape(-1))

  return loss


def _products():
  """Returns a product of two large float32 matrices in each library, (JAX, PyTorch)."""
  import torch

  numbers = np.random.default_rng(0).normal(size=(_PRODUCT, _PRODUCT)).astype(np.float32)
  ours, theirs, product = jnp.asarray(numbers), torch.from_numpy(numbers), jax.jit(jnp.matmul)
  return lambda: product(ours, ours).block_until_ready(), lambda: theirs @ theirs


def _seconds(work):
  """Returns the (wall-clock, processor) seconds of `work()`."""
  begin = time.perf_counter(), time.process_time()
  work()
  return time.perf_counter() - begin[0], time.process_time() - begin[1]


def main(argv):
  del argv
  import torch

  layers, channels, heads, tokens, ffn_tokens, length, rows, vocabulary = _SHAPES[_SHAPE.value]
  model = ModelConfig(
    vocab_size=vocabulary,
    num_layers=layers,
    hidden_size=channels,
    num_heads=heads,
    qkv_tokens=tokens,
    proj_tokens=tokens,
    ffn_tokens=ffn_tokens,
    seq_length=length,
  )
  config = Config(
    model=model, data=DataConfig(batch_size=rows), optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=100)
  )
  rng = np.random.default_rng(0)
  likely = 1.0 / np.arange(
    1, vocabulary + 1
  )  # Some ids are more frequent than others, so that the models can learn something.
  likely /= likely.sum()
  ids = rng.choice(vocabulary, size=(_STEPS_THAT_AGREE, rows, length + 1), p=likely).astype(np.int32)
  batches = [(window[:, :-1], window[:, 1:]) for window in ids]

  print(
    f"{_SHAPE.value}, {rows} × {length} tokens, {vocabulary} entries; {os.cpu_count()} cores; "
    f"jax {jax.__version__}, torch {torch.__version__}; load {_load()}",
    flush=True,
  )
  ours = Ours(config, batches)
  sides = {
    "ours": ours,
    "torch eager": Torch(config, batches, ours.weights, False),
    "torch.compile": Torch(config, batches, ours.weights, True),
  }
  losses = {}
  for name, side in sides.items():
    seconds = _seconds(lambda: losses.update({name: side.run(range(_STEPS_THAT_AGREE))}))
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses[name]))
    print(
      f"{name}: losses {losses[name][0]:.4f} … {losses[name][-1]:.4f}"
      + (f", at most {apart:.1e} from ours" if name != "ours" else "")
      + "; "
      f"compiled and trained in {seconds[0]:.0f} s, of the processor {seconds[1]:.0f} s",
      flush=True,
    )
    if not apart <= _TOLERANCE:
      raise SystemExit(
        f"{name}: losses {apart:.1e} apart, more than {_TOLERANCE}; times of unequal work would mean nothing."
      )

  products = dict(zip(("product, jax", "product, torch"), _products()))
  for product in products.values():
    product()
  taken = {name: [] for name in (*sides, *products)}
  print(f"load before the rounds: {_load()}", flush=True)
  for round_ in range(_ROUNDS.value):
    first = _STEPS_THAT_AGREE + round_ * _STEPS.value
    turn = round_ % len(sides)
    for name in [*list(sides)[turn:], *list(sides)[:turn]]:
      seconds = _seconds(lambda: sides[name].run(range(first, first + _STEPS.value)))
      taken[name].append([s / _STEPS.value for s in seconds])
    for name, product in products.items():
      taken[name].append(_seconds(product))
  print(f"load after the rounds: {_load()}\n")
  _print_table(model, rows * length, taken)


def _print_table(model, num_tokens, taken):
  median = {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in taken.items()}
  print(
    "| | clock ms, median (least – most) | processor ms | ours is faster: clock | processor "
    "| share of the product's rate: clock | processor |\n|---|---|---|---|---|---|---|"
  )
  work, product_work = 3 * model.forward_flops_per_token * num_tokens, 2 * _PRODUCT**3
  for name, seconds in median.items():
    clocks = [clock for clock, _ in taken[name]]
    cells = [f"{1e3 * seconds[0]:.0f} ({1e3 * min(clocks):.0f} – {1e3 * max(clocks):.0f})", f"{1e3 * seconds[1]:.0f}"]
    if name.startswith("product"):
      cells += ["", "", *(f"{product_work / s / 1e9:.0f} GFLOP/s" for s in seconds)]
    else:
      product = median["product, jax" if name == "ours" else "product, torch"]
      cells += [f"{s / o:.2f}" for s, o in zip(seconds, median["ours"])]
      cells += [f"{100 * (work / s) / (product_work / p):.0f} %" for s, p in zip(seconds, product)]
    print(f"| {name} | {' | '.join(cells)} |")


def _load():
  return " ".join(f"{load:.1f}" for load in os.getloadavg())


if __name__ == "__main__":
  app.run(main)
