"""Published figures of TPU chips and GPUs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one TPU chip, from its page in the Cloud TPU documentation, or of one GPU, from its data sheet.

  Attributes:
    kinds: what JAX's `device_kind` of such a chip begins with.
    peak_flops: dense bfloat16 FLOP/s.
    memory: bytes of high-bandwidth memory.
    memory_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that a chip can send over all its links to other chips of the slice, and a GPU over NVLink.
    torus_axes: number of physical axes of a slice, which share `ici_bandwidth` evenly; 1 for GPUs behind a switch.
    platform: the platform that JAX compiles for: tpu or cuda.
  """

  kinds: tuple[str, ...]
  peak_flops: float
  memory: int
  memory_bandwidth: float
  ici_bandwidth: float
  torus_axes: int
  platform: str = "tpu"

  @property
  def axis_bandwidth(self) -> float:
    """Bytes/s that a chip can send along one physical axis, in both directions together."""
    return self.ici_bandwidth / self.torus_axes


CHIPS = {
  "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1200e9, 269e9, 3),
  "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, 2),
  "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * 2**30, 2765e9, 600e9, 3),
  "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1600e9, 400e9, 2),
  # The SXM modules with 80, 80 and 141 GB.
  "a100": Chip(("NVIDIA A100",), 312e12, 80 * 2**30, 2039e9, 300e9, 1, "cuda"),
  "h100": Chip(("NVIDIA H100",), 989e12, 80 * 2**30, 3352e9, 450e9, 1, "cuda"),
  "h200": Chip(("NVIDIA H200",), 989e12, 140 * 2**30, 4800e9, 450e9, 1, "cuda"),
}
