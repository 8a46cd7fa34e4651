"""One token for every row of a batch, beside the time to read the weights and the filled cache once."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.accelerator.timing import seconds
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.inference.decoding import decoding_programs
from tokenformer_jax.inference.int8 import int8_tokens
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.parameters import split

# Named size, rows and form of the parameter tokens, most important first.
_CASES = [
  ("150m", 1, "bfloat16"),
  ("150m", 32, "bfloat16"),
  ("150m", 8, "bfloat16"),
  ("450m", 1, "bfloat16"),
  ("450m", 32, "bfloat16"),
  ("150m", 1, "int8"),
  ("450m", 1, "int8"),
  ("450m", 8, "bfloat16"),
  ("450m", 32, "int8"),
  ("450m", 8, "int8"),
]
_TINY_CASES = [("tiny", 2, "bfloat16")]
_SLOTS, _FILLED = 384, 128


def run(results, clock, tiny):
  took = 0.0
  for case in _TINY_CASES if tiny else _CASES:
    label = dict(zip(("size", "rows", "parameter tokens"), case))
    if clock.left < took:
      results.add("decode", "Decode steps", **label, note="skipped: no time was left")
      continue
    begin = time.perf_counter()
    try:
      results.add("decode", "Decode steps", **label, **_measured(results, *case, steps=8 if tiny else 100))
    except Exception as error:
      results.add("decode", "Decode steps", **label, note=f"failed: {type(error).__name__}: {str(error)[:300]}")
    took = time.perf_counter() - begin


def _measured(results, name, rows, form, steps):
  begin = time.perf_counter()
  config, graphdef, leaves = _model(name, form)
  jax.block_until_ready(leaves)
  drawn = time.perf_counter() - begin
  _, decode_step = decoding_programs(graphdef)
  cache = KVCache.empty(config, jnp.zeros(rows, jnp.int32), _SLOTS)
  cache = dataclasses.replace(cache, length=jnp.int32(_FILLED))
  tokens = jnp.zeros(rows, jnp.int32)
  compiled = decode_step.lower(leaves, tokens, cache).compile()
  draw = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
  draw(compiled(leaves, tokens, cache)[0]).block_until_ready()
  compiled_in = time.perf_counter() - begin - drawn

  def run(wait):
    """Returns the seconds of a step, with or without a wait for each token, as `generate` waits to show it."""
    cache = dataclasses.replace(KVCache.empty(config, jnp.zeros(rows, jnp.int32), _SLOTS), length=jnp.int32(_FILLED))
    tokens = jnp.zeros(rows, jnp.int32)
    jax.block_until_ready(cache)
    begin = time.perf_counter()
    for _ in range(steps):
      previous = tokens
      logits, cache = compiled(leaves, tokens, cache)
      tokens = draw(logits)
      if wait:  # The device works on the next step meanwhile.
        jax.device_get(previous)
    jax.block_until_ready(tokens)
    return (time.perf_counter() - begin) / steps

  run(False)
  shown, queued = (statistics.median(run(wait) for _ in range(5)) for wait in (True, False))
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))
  cached = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) * (_FILLED + steps // 2) // _SLOTS
  cells = {
    "ms a step": 1e3 * shown,
    "ms a step without waiting for tokens": 1e3 * queued,
    "tokens/s": rows / shown,
    "weights MB": weights / 1e6,
    "filled cache MB": cached / 1e6,
  }
  if "read" in results.rates:
    rate = max(results.rates["read"], results.rates["copy"])
    limit = (weights + cached) / rate
    cells |= {"limit ms": 1e3 * limit, "share of the memory limit, %": 100 * limit / shown}
    cells["the same without waiting, %"] = 100 * limit / queued
  read = jax.jit(lambda leaves: sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(leaves)))
  cells["ms to sum all weights"] = 1e3 * seconds(read, leaves, budget=0.2)
  return cells | {"weights drawn in s": drawn, "compiled in s": compiled_in}


@functools.lru_cache(maxsize=1)
def _model(name, form):
  """(configuration, graph definition and leaves of a random model's form for decoding)."""
  config = ModelConfig.named(name, compute_dtype="bfloat16")

  def for_decoding(model):
    return (int8_tokens(model) if form == "int8" else model).for_decoding()

  stacked, *_ = split(abstract_model(config))
  # Drawing and unstacking are two programs; in one, XLA would draw each layer's numbers in a kernel of its own.
  drawn = jax.jit(lambda: split(LanguageModel(config, rngs=nnx.Rngs(0)))[1:])()
  graphdef, *_ = split(nnx.eval_shape(lambda: for_decoding(LanguageModel(config, rngs=nnx.Rngs(0)))))
  return config, graphdef, jax.jit(lambda leaves: split(for_decoding(nnx.merge(stacked, *leaves)))[1:])(drawn)
