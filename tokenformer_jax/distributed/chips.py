"""Published figures of TPU chips."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip, from its page of the Cloud TPU documentation.

  Attributes:
    kinds: beginnings of JAX's `device_kind`.
    peak_flops: dense bfloat16 FLOP/s.
    memory: bytes of high-bandwidth memory.
    memory_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that a chip can send over all its links to other chips of the slice.
    torus_axes: physical axes of the slice, which share `ici_bandwidth` evenly.
  """

  kinds: tuple[str, ...]
  peak_flops: float
  memory: int
  memory_bandwidth: float
  ici_bandwidth: float
  torus_axes: int

  @property
  def axis_bandwidth(self) -> float:
    """Bytes/s that a chip can send along one physical axis, both ways around together."""
    return self.ici_bandwidth / self.torus_axes


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1200e9, 269e9, 3),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, 2),
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * 2**30, 2765e9, 600e9, 3),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1600e9, 400e9, 2),
}
