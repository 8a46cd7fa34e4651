"""Pattention against a dense MLP of equal FLOPs, x W₁ → erf-GELU → W₂: time of forward and backward, as a ratio.

    python experiments/benchmarks/pattention_mlp.py --rounds=15

Both map [B·T, d] to N = 4 d tokens or hidden channels and back, and compute the gradients of the input and of both arrays.
Rounds are interleaved; the figures are medians. The table is in README.md beside this file.
"""

import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Interleaved rounds.")
_ROWS = flags.DEFINE_integer("rows", 2048, "B·T, rows of the input.")
_WIDTHS = flags.DEFINE_multi_integer("width", [256, 768, 1536], "Channels d.")


def mlp(x, first, second):
  return jax.nn.gelu(x @ first.T, approximate=False) @ second


def layer(x, keys, values):
  return pattention(x, ParameterTokens(keys, values, jnp.float32(initial_tau("l2_norm_gelu", len(keys)))))


def gradients(function):
  """Returns (x, a, b, aim) -> the gradients of Σ aim · function(x, a, b) with respect to x, a and b."""
  return jax.jit(jax.grad(lambda x, a, b, aim: jnp.sum(aim * function(x, a, b)), argnums=(0, 1, 2)))


def seconds(function, arguments) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - begin


def main(argv):
  del argv
  print(
    f"load average {os.getloadavg()[0]:.1f}, jax {jax.__version__}, {jax.devices()[0].device_kind}\n\n"
    "| d | N | rows | MLP, ms | pattention, ms | ratio (quartiles) |\n|---|---|---|---|---|---|"
  )
  for width in _WIDTHS.value:
    rng = np.random.default_rng(0)
    shapes = [(_ROWS.value, width), (4 * width, width), (4 * width, width), (_ROWS.value, width)]
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    functions = [gradients(mlp), gradients(layer)]
    for function in functions:
      seconds(function, arguments)
    times = [[seconds(function, arguments) for function in functions] for _ in range(_ROUNDS.value)]
    dense, ours = (1e3 * statistics.median(column) for column in zip(*times))
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    print(f"| {width} | {4 * width} | {_ROWS.value} | {dense:.1f} | {ours:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) |")


if __name__ == "__main__":
  app.run(main)
