"""What attention over a sequence that devices share sends and holds, on paper: keys and values gathered, or in a ring.

    python experiments/benchmarks/long_sequences_on_paper.py

One row of T positions of 450m (d channels, H heads) on n devices of 4,096 positions each, for one layer's forward pass in
bfloat16, with the published figures of `tokenformer_jax/distributed/chips.py`:

    gathered     2 × T × d × 2 bytes of keys and values on each device at once; (n − 1) / n of them are received
    in a ring    2 × 2 × T/n × d × 2 bytes at once, the block in use and the next one; the same bytes are received
    attention    4 × T/n × T × d FLOPs on the last device, whose queries see all keys; the mean is half of that
    scores       H × T/n × T × 4 bytes, if they are written out, as plain attention does and splash attention does not

A train step with remat receives three times the bytes either way: keys and values again for the gradient, and their
gradients.
"""

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.chips import CHIPS

POSITIONS = {2**15: 8, 2**17: 32, 2**20: 256}  # T and the number of devices.
LINKS = ("v5e", "v5p", "h100")


def layer(model: ModelConfig, positions: int, devices: int) -> dict[str, float]:
  """Returns the bytes and FLOPs of one device for one layer's forward pass."""
  queries, both = positions / devices, 2 * positions * model.hidden_size * 2
  return {
    "gathered": both,
    "ring": 2 * both / devices,
    "received": both * (devices - 1) / devices,
    "scores": model.num_heads * queries * positions * 4,
    "flops": 4 * queries * positions * model.hidden_size,
  }


def main():
  model = ModelConfig.named("450m")
  chips = [column for name in LINKS for column in (f"{name}: received, ms", "attention, ms")]
  print("| positions | devices | gathered, MB | in a ring, MB | scores, GB | " + " | ".join(chips) + " |")
  print("|---" * (5 + len(chips)) + "|")
  for positions, devices in POSITIONS.items():
    one = layer(model, positions, devices)
    times = [
      f"{1e3 * time:,.1f}"
      for name in LINKS
      for time in (one["received"] / CHIPS[name].axis_bandwidth, one["flops"] / CHIPS[name].peak_flops)
    ]
    print(
      f"| {positions:,} | {devices} | {one['gathered'] / 1e6:,.0f} | {one['ring'] / 1e6:,.0f} | "
      f"{one['scores'] / 1e9:,.1f} | {' | '.join(times)} |"
    )


if __name__ == "__main__":
  main()
