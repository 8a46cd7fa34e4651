"""Pattention beside an MLP of equal products, and implementations of attention, forward and backward."""

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

    if platform() == "cpu":
      raise ValueError("there is no fused kernel for CPUs.")
    return fused_pattention(x, tokens(a, b, "l2_norm_gelu"))

  variants = {
    "MLP, exact GELU": mlp,
    "l2_norm_gelu": lambda x, a, b: pattention(x, tokens(a, b, "l2_norm_gelu")),
    "l2_norm_gelu, tanh": lambda x, a, b: pattention(x, tokens(a, b, "l2_norm_gelu"), gelu="tanh"),
    "gelu_l2_norm": lambda x, a, b: pattention(x, tokens(a, b, "gelu_l2_norm"), "gelu_l2_norm"),
    "softmax": lambda x, a, b: pattention(x, tokens(a, b, "softmax"), "softmax"),
  }
  return variants | ({"fused l2_norm_gelu": fused} if platform() != "cpu" else {})


def _gradients(function):
  def objective(x, a, b, d_y):
    return jnp.sum((function(x, a, b) * d_y).astype(jnp.float32))

  return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))


def run_attention(results, clock, tiny):
  """Causal attention of one document, and of several in a row; first each result's error, then its time."""
  implementations = {"gpu": ["cudnn", "xla"], "tpu": ["splash", "xla"]}.get(platform(), ["xla"])
  for rows, length, heads, channels in (
    [(2, 128, 2, 16)] if tiny else [(8, 2048, 16, 64), (16, 1024, 12, 64), (8, 2048, 16, 96)]
  ):
    shape = (rows, length, heads, channels)
    arrays = [normal(seed, shape) for seed in range(4)]
    documents = jnp.broadcast_to(jnp.arange(length) // (length // 4), (rows, length))
    pairs = 4 * rows * heads * channels * length * length / 2  # FLOPs of both products for the causal half.
    for segments in (None, documents):
      expected = _attention_gradients("xla", True)(arrays, segments)
      for implementation in implementations:
        if clock.left < 0:
          return
        label = {"B×T×H×C": "×".join(map(str, shape)), "documents": 1 if segments is None else 4}
        try:
          function = _attention_gradients(implementation, False)
          got = function(arrays, segments)
          errors = [_relative_error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected))]
          forward = seconds(
            jax.jit(lambda q, k, v, segments: causal_attention(q, k, v, segments, implementation=implementation)),
            *arrays[:3],
            segments,
          )
          both = seconds(function, arrays, segments)
        except Exception as error:
          note = f"{type(error).__name__}: {str(error)[:200]}"
          results.add("attention", "Causal attention", **label, implementation=implementation, note=note)
          continue
        results.add(
          "attention",
          "Causal attention",
          **label,
          implementation=implementation,
          **{
            "forward ms": 1e3 * forward,
            "forward and backward ms": 1e3 * both,
            "forward TFLOP/s": 1e-12 * pairs / forward,
            "forward and backward TFLOP/s": 1e-12 * 3.5 * pairs / both,
            "error of y": errors[0],
            "largest error of a gradient": max(errors[1:]),
          },
        )


def _attention_gradients(implementation, wide):
  """Jitted `([q, k, v, d_y], segments) -> (y, the gradients of q, k and v)`, in float32 where `wide`."""

  def apply(arrays, segments):
    q, k, v, d_y = (a.astype(jnp.float32) if wide else a for a in arrays)
    y, pull_back = jax.vjp(lambda *qkv: causal_attention(*qkv, segments, implementation=implementation), q, k, v)
    return y, pull_back(d_y)

  if not wide:
    return jax.jit(apply)

  def precise(arrays, segments):
    with jax.default_matmul_precision("highest"):
      return jax.jit(apply)(arrays, segments)

  return precise


def _relative_error(a, b):
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
