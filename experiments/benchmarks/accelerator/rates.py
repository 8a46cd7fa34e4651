"""The rates of the device: large products, products of a model's shapes, and memory."""

import jax
import jax.numpy as jnp

from experiments.benchmarks.accelerator.timing import normal, seconds


def run(results, clock, tiny):
  shapes = (
    [("square", 512, 512, 512)]
    if tiny
    else [
      ("square", 8192, 8192, 8192),
      ("450m: rows to feed-forward tokens", 16384, 1024, 4096),
      ("450m: feed-forward tokens to channels", 16384, 4096, 1024),
      ("450m: rows to attention tokens", 16384, 1024, 1024),
      ("150m: rows to feed-forward tokens", 16384, 768, 3072),
      ("450m: gradient of keys", 4096, 16384, 1024),
      ("450m: logits of a chunk", 1024, 1024, 50304),
    ]
  )
  for name, rows, depth, columns in shapes:
    a, b = normal(0, (rows, depth)), normal(1, (depth, columns))
    cells = {}
    for out in ("bfloat16", "float32"):
      product = jax.jit(lambda a, b, out=out: jnp.matmul(a, b, preferred_element_type=out))
      taken = seconds(product, a, b, budget=0.3)
      cells[f"TFLOP/s, {out} results"] = 2e-12 * rows * depth * columns / taken
    if name == "square":
      results.rates["product"] = 1e12 * max(cells.values())
    results.add("products", "Products of bfloat16 matrices", product=name, shape=f"{rows}×{depth}×{columns}", **cells)

  size = 2**20 if tiny else 2**29
  numbers = normal(0, (size,), "float32")
  copy = jax.jit(lambda x: x + 1.0)
  read = jax.jit(jnp.sum)
  for name, function, moved in (("copy", copy, 8 * size), ("read", read, 4 * size)):
    rate = moved / seconds(function, numbers, budget=0.3)
    results.rates[name] = rate
    results.add(
      "products", "Memory", what=f"{name} of {4 * size / 1e9:.2f} GB", **{"GB/s read and written": rate / 1e9}
    )
