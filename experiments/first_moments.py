"""What Adam's first moments in bfloat16 cost: the same run with them and with float32's.

    python -m experiments.first_moments --workdir=runs/first_moments
"""

import dataclasses

import numpy as np
from absl import flags

from experiments.growth_seam import STEPS, small_run
from experiments.runs import every_seed, held_out_losses
from tokenformer_jax.cli import door

SEEDS = tuple(range(10))
DTYPES = ("float32", "bfloat16")


def run_seed(seed: int, folder) -> dict[str, dict[int, float]]:
  """Held-out losses by step, of either dtype."""
  base = small_run(seed)
  configs = {dtype: dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, first_moment_dtype=dtype))
             for dtype in DTYPES}
  return {dtype: held_out_losses(config, folder / dtype) for dtype, config in configs.items()}


def main(argv):
  del argv
  _, seeds = every_seed(run_seed, SEEDS, flags.FLAGS.workdir)
  print(f"\nHeld-out loss, nats a byte, mean of {len(SEEDS)} seeds ± the deviation between them; and by how much bfloat16's "
        "is higher, ± its standard error:\n\n| step | float32 | bfloat16 | per cent |\n" + "|---" * 4 + "|")
  for step in (STEPS // 3, 2 * STEPS // 3, STEPS):
    wide, narrow = (np.array([losses[dtype][step] for losses in seeds]) for dtype in DTYPES)
    higher = 100 * (narrow / wide - 1)
    shown = " | ".join(f"{losses.mean():.4f} ± {losses.std(ddof=1):.4f}" for losses in (wide, narrow))
    print(f"| {step} | {shown} | {higher.mean():+.2f} ± {higher.std(ddof=1) / len(SEEDS)**0.5:.2f} |")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/first_moments", "Folder of the runs.")
  door.run(main)
