"""Model FLOP utilisation: what the model needs, as a share of what the devices can."""

import time

import jax
import jax.numpy as jnp

# Published dense bfloat16 peaks, FLOP/s a chip, by the beginning of `device_kind`.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
  """Matrix-product FLOP/s of all devices of the mesh: published, or measured on a CPU; None if unknown."""
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return _measured_cpu_peak() * jax.process_count()
  for kind, peak in _PEAKS.items():
    if device.device_kind.startswith(kind):
      return peak * mesh.devices.size
  return None


def _measured_cpu_peak(size: int = 1024, rounds: int = 5) -> float:
  """The best of a few float32 products of two [size, size] matrices; simulated devices share one CPU."""
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(matrix, matrix).block_until_ready()
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
