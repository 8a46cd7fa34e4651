"""Pattention beside an MLP of equal products, and implementations of attention, forward and backward."""

import functools
import itertools

import jax
import jax.numpy as jnp

from experiments.benchmarks.accelerator.timing import normal, seconds
from tokenformer_jax.distributed.axes import platform
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.nn.token_attention import causal_attention
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention


def run_pattention(results, clock, tiny):
  """`[rows, d] -> N = 4 d tokens or hidden channels -> [rows, d]` in bfloat16 with float32 parameters."""
  rows = 256 if tiny else 16384
  for width in [64] if tiny else [1024, 768, 1536]:
    x, d_y = normal(0, (rows, width)), normal(1, (rows, width))
    a, b = normal(2, (4 * width, width), "float32"), normal(3, (4 * width, width), "float32") / width
    product_seconds = 6 * 2 * rows * 4 * width * width / results.rates.get("product", float("nan"))
    dense = None
    for name, function in _variants(width).items():
      if clock.left < 0:
        return
      label = {"d": width, "N": 4 * width, "rows": rows, "layer": name}
      try:
        forward = seconds(jax.jit(function), x, a, b)
        both = seconds(_gradients(function), x, a, b, d_y)
      except Exception as error:
        results.add("pattention", "Pattention and an MLP", **label, note=f"{type(error).__name__}: {str(error)[:200]}")
        continue
      dense = dense or both
      cells = {"forward ms": 1e3 * forward, "forward and backward ms": 1e3 * both, "beside the MLP": both / dense}
      cells["share of the product rate, %"] = 100 * product_seconds / both
      results.add("pattention", "Pattention and an MLP", **label, **cells)


def _variants(width):
  def mlp(x, a, b):
    return jax.nn.gelu(x @ a.astype(x.dtype).T, approximate=False) @ b.astype(x.dtype)

  def tokens(a, b, theta):
    return ParameterTokens(a, b, jnp.float32(initial_tau(theta, 4 * width)))

  def fused(x, a, b):
    from tokenformer_jax.kernels.fused_pattention import fused_pattention

    return fused_pattention(x, tokens(a, b, "l2_norm_gelu"))

  variants = {
    "MLP, exact GELU": mlp,
    "l2_norm_gelu": lambda x, a, b: pattention(x, tokens(a, b, "l2_norm_gelu")),
    "l2_norm_gelu, tanh": lambda x, a, b: pattention(x, tokens(a, b, "l2_norm_gelu"), gelu="tanh"),
    "gelu_l2_norm": lambda x, a, b: pattention(x, tokens(a, b, "gelu_l2_norm"), "gelu_l2_norm"),
    "softmax": lambda x, a, b: pattention(x, tokens(a, b, "softmax"), "softmax"),
  }
  return variants | ({"fused l2_norm_gelu": fused} if platform() == "tpu" else {})


def _gradients(function):
  def objective(x, a, b, d_y):
    return jnp.sum((function(x, a, b) * d_y).astype(jnp.float32))

  return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))


def run_attention(results, clock, tiny):
  """Causal attention of one document, and of several in a row; first each result's error, then its time."""
  implementations = {"gpu": ["cudnn", "xla"], "tpu": ["splash", "xla"]}.get(platform(), ["xla"])
  shapes = [(2, 128, 2, 16)] if tiny else [(8, 2048, 16, 64), (16, 1024, 12, 64), (8, 2048, 16, 96)]
  # All shapes with the first implementation, before XLA's, whose many products take long to compile on a GPU.
  for implementation, shape, documents in itertools.product(implementations, shapes, (1, 4)):
    if clock.left < 0:
      return
    label = {"B×T×H×C": "×".join(map(str, shape)), "documents": documents, "implementation": implementation}
    try:
      results.add("attention", "Causal attention", **label, **_attention(implementation, shape, documents))
    except Exception as error:
      results.add("attention", "Causal attention", **label, note=f"{type(error).__name__}: {str(error)[:200]}")


def _attention(implementation, shape, documents):
  rows, length, heads, channels = shape
  arrays = [normal(seed, shape) for seed in range(4)]
  segments = jnp.broadcast_to(jnp.arange(length) // (length // documents), (rows, length)) if documents > 1 else None
  both, forward = _attention_gradients(implementation), jax.jit(functools.partial(_attend, implementation))
  got = jax.tree.map(lambda a: a[:1], both(arrays, segments))
  errors = [_relative_error(a, b) for a, b in zip(jax.tree.leaves(got), _expected(arrays, segments))]
  seconds_forward, seconds_both = seconds(forward, segments, *arrays[:3]), seconds(both, arrays, segments)
  pairs = 4 * rows * heads * channels * length * length / 2  # FLOPs of both products for the causal half.
  return {
    "forward ms": 1e3 * seconds_forward,
    "forward and backward ms": 1e3 * seconds_both,
    "forward TFLOP/s": 1e-12 * pairs / seconds_forward,
    "forward and backward TFLOP/s": 1e-12 * 3.5 * pairs / seconds_both,
    "error of y": errors[0],
    "largest error of a gradient": max(errors[1:]),
  }


def _attend(implementation, segments, q, k, v):
  return causal_attention(q, k, v, segments, implementation=implementation)


def _attention_gradients(implementation):
  """Jitted `([q, k, v, d_y], segments) -> (y, the gradients of q, k and v)`."""

  def apply(arrays, segments):
    *qkv, d_y = arrays
    y, pull_back = jax.vjp(functools.partial(_attend, implementation, segments), *qkv)
    return y, pull_back(d_y)

  return jax.jit(apply)


def _expected(arrays, segments):
  """y and gradients of the first row, in float32."""
  arrays, segments = jax.tree.map(lambda a: a[:1], (arrays, segments))
  with jax.default_matmul_precision("highest"):
    lowered = _attention_gradients("xla").lower([a.astype(jnp.float32) for a in arrays], segments)
  # XLA:GPU's search for the fastest of each product would take longer than all that is measured here.
  compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
  return jax.tree.leaves(compiled([a.astype(jnp.float32) for a in arrays], segments))


def _relative_error(a, b):
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
