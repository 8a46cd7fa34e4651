"""What limits a train step on 256 and 4,096 chips, on paper.

    python experiments/benchmarks/slices_on_paper.py

Full remat, bfloat16, rows of 2048, published peaks (`tokenformer_jax/distributed/chips.py`). For one chip, with m positions,
P parameters, L layers and d channels:

    products   as traced (`training/flops.py` counts them from the program; here by the same formula)
    fsdp       9.6 bytes × P / token: the layers' parameters gathered forward and backward, gradients scattered, as
               compile_check counts for 1.5b on v5e:2x2 (three passes of 2 bytes would be the least)
    data       2 × 4 bytes × P / (fsdp × token): the gradients' all-reduce
    token      L × (2 × 14 + 5) × m × d × 2 bytes: 14 all-reduces and 5 all-gathers of activations a layer
               (`tests/communication.py`)

each times (n − 1)/n for n chips along the axis. Each mesh axis is assumed to have a physical axis of the slice to itself.
"""

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.chips import CHIPS

_FSDP_BYTES, _GRADIENT_BYTES, _ACTIVATION_BYTES = 9.6, 8, 2
_TABLE = [  # model, chip, data, fsdp, token, rows of the whole batch
  ("150m", "v5e", 256, 1, 1, 1024),
  ("450m", "v5e", 256, 1, 1, 512),
  ("1.5b", "v5e", 64, 4, 1, 512),
  ("7b", "v5e", 16, 16, 1, 256),
  ("7b", "v5e", 16, 16, 1, 512),
  ("7b", "v5e", 4, 16, 4, 128),
  ("7b", "v5p", 16, 16, 1, 512),
  ("150m", "v5p", 4096, 1, 1, 4096),
  ("1.5b", "v5p", 1024, 4, 1, 4096),
  ("7b", "v5p", 256, 16, 1, 4096),
  ("7b", "v5p", 256, 16, 1, 8192),
  ("7b", "v5p", 64, 16, 4, 2048),
  ("7b", "v5p", 64, 8, 8, 2048),
]


def seconds(model: ModelConfig, chip: str, data: int, fsdp: int, token: int, rows: int) -> dict[str, float]:
  """Returns the seconds of each kind of work of a chip in one step."""
  chip = CHIPS[chip]
  positions = rows * model.seq_length / (data * fsdp)
  vocab = 2 * model.vocab_size * model.hidden_size
  # The masked half of attention is computed too, and each layer's forward pass twice except for its last product.
  last = 2 * model.num_layers * model.ffn_tokens * model.hidden_size
  layers = model.forward_flops_per_token - vocab + 2 * model.num_layers * model.seq_length * model.hidden_size
  activations = model.num_layers * (2 * 14 + 5) * positions * model.hidden_size * _ACTIVATION_BYTES

  def sent(size: float, n: int) -> float:
    return size * (n - 1) / n / chip.axis_bandwidth

  return {
    "products": (4 * layers - last + 3 * vocab) * positions / token / chip.peak_flops,
    "fsdp": sent(_FSDP_BYTES * model.num_parameters / token, fsdp),
    "data": sent(_GRADIENT_BYTES * model.num_parameters / (fsdp * token), data),
    "token": sent(activations, token),
  }


def main():
  print(
    "| model | chip | data × fsdp × token | tokens a step | state, GB | products | fsdp | data | token | "
    "utilisation, all hidden – none | limit |\n|---|---|---|---|---|---|---|---|---|---|---|"
  )
  for name, chip, data, fsdp, token, rows in _TABLE:
    model = ModelConfig.named(name, seq_length=2048)
    took = seconds(model, chip, data, fsdp, token, rows)
    needed = 3 * model.forward_flops_per_token * rows * model.seq_length / (data * fsdp * token)
    ideal = needed / CHIPS[chip].peak_flops
    state = 12 * model.num_parameters / (fsdp * token) / 1e9
    times = " | ".join(f"{1e3 * value:.0f} ms" if value else "" for value in took.values())
    print(
      f"| {name} | {data * fsdp * token} {chip} | {data} × {fsdp} × {token} | {rows * 2048 / 1e6:.2f} M | {state:.1f} "
      f"| {times} | {ideal / max(took.values()):.0%} – {ideal / sum(took.values()):.0%} "
      f"| {max(took, key=took.get)} |"
    )


if __name__ == "__main__":
  main()
