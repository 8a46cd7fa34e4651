"""FLOPs for model FLOP utilisation: the peak of the devices, and the products of a traced program."""

import math
import time

import jax
import jax.numpy as jnp

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.chips import CHIPS

# Published dense bfloat16 peaks in FLOP/s per chip, by the beginning of `device_kind`.
_PEAKS = {kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.kinds}
# The number of products [T, S] × C in cuDNN's attention; its gradient computes the scores again.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
  """FLOP/s in matrix products of all devices of the mesh: the published figure, or measured on a CPU; None if unknown."""
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return _measured_cpu_peak() * jax.process_count()
  for kind, peak in _PEAKS.items():
    if device.device_kind.startswith(kind):
      return peak * mesh.devices.size
  return None


def update_flops_per_token(model: ModelConfig, mask_rate: float) -> float:
  """FLOPs in products that an update needs for each token of its batch: three forward passes at full context.

  Args:
    model: the model.
    mask_rate: of a masked language model, the share of the tokens that logits are computed for.
  """
  unread = (1.0 - mask_rate) * 2 * model.vocab_size * model.hidden_size if model.task == "masked_token" else 0.0
  return 3 * (model.forward_flops_per_token - unread)


def product_flops(jaxpr) -> int:
  """2 × rows × columns × depth of every product in a traced program, times the number of times that its scans run it.

  The body of a `jax.shard_map` counts once for each of its devices. A Pallas kernel counts the FLOPs of its cost
  estimate, or without one its body times the number of blocks. cuDNN's causal attention counts half of all pairs. A
  condition counts its most expensive branch, and a `while` that is not a scan counts once.

  Args:
    jaxpr: of `jax.make_jaxpr` or of a traced jitted function.
  """
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * depth * equation.outvars[0].aval.size
    if equation.primitive.name == "pallas_call":
      estimate, grid = equation.params["cost_estimate"], equation.params["grid_mapping"].grid
      total += estimate.flops if estimate else math.prod(grid) * product_flops(equation.params["jaxpr"])
      continue
    if products := _CUDNN_PRODUCTS.get(equation.primitive.name):
      q, k = (invar.aval for invar in equation.invars[:2])  # [B, T, H, C] and [B, S, H, C]
      total += products * 2 * q.size * k.shape[1] // (2 if "CAUSAL" in equation.params["mask_type"].name else 1)
    inner = [value for value in equation.params.values() if hasattr(value, "eqns")]
    times = equation.params.get("length", 1)
    if equation.primitive.name == "shard_map":
      times = math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    total += times * sum(map(product_flops, inner))
    total += max(map(product_flops, equation.params.get("branches", ())), default=0)
  return total


def _measured_cpu_peak(size: int = 1024, rounds: int = 5) -> float:
  """FLOP/s of the fastest of a few float32 products of [size, size] matrices; simulated devices share one CPU."""
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(matrix, matrix).block_until_ready()
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
