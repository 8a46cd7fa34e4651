"""The cost of Adam's moments in bfloat16: the same run with both in bfloat16, with the first, and with none.

    python -m experiments.bfloat16_moments --workdir=runs/bfloat16_moments

Two CPU cores that were also busy with other work, about 40 minutes, November 2026, Python 3.11.7, jax 0.10.2, float32 products.
The run is that of growth_recipes.py without growth. The table has the held-out loss in nats a byte, as the mean of 10 seeds ±
their standard deviation, and its difference from float32's with the same seed, in per cent ± the standard error:

| step | float32 | first in bfloat16 | per cent | both in bfloat16 | per cent |
|---|---|---|---|---|---|
| 1000 | 1.8996 ± 0.0349 | 1.8963 ± 0.0299 | -0.17 ± 0.38 | 1.8950 ± 0.0296 | -0.23 ± 0.43 |
| 2000 | 1.6754 ± 0.0213 | 1.6733 ± 0.0174 | -0.12 ± 0.36 | 1.6716 ± 0.0160 | -0.22 ± 0.27 |
| 3000 | 1.5066 ± 0.0159 | 1.5058 ± 0.0112 | -0.05 ± 0.29 | 1.5047 ± 0.0111 | -0.12 ± 0.26 |

No difference is seen. A difference of a third of a per cent would not be seen.
"""

import dataclasses

import numpy as np
from absl import flags

from experiments.growth_recipes import STEPS, small_run
from experiments.runs import every_seed, held_out_losses
from tokenformer_jax.cli import command

SEEDS = tuple(range(10))
MOMENTS = {
  "float32": {},
  "bfloat16": dict(first_moment_dtype="bfloat16"),
  "both": dict(first_moment_dtype="bfloat16", second_moment_dtype="bfloat16"),
}


def run_seed(seed: int, folder) -> dict[str, dict[int, float]]:
  """Returns the held-out losses by step, for each kind of moments."""
  base = small_run(seed)
  configs = {
    name: dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, **dtypes))
    for name, dtypes in MOMENTS.items()
  }
  return {name: held_out_losses(config, folder / name) for name, config in configs.items()}


def main(argv):
  del argv
  _, seeds = every_seed(run_seed, SEEDS, flags.FLAGS.workdir)
  print(
    f"\nHeld-out loss in nats a byte, mean of {len(SEEDS)} seeds ± their standard deviation, and its difference from "
    "float32's with the same seed, per cent ± the standard error:\n\n| step | float32 | first in bfloat16 | per cent "
    "| both in bfloat16 | per cent |\n" + "|---" * 6 + "|"
  )
  for step in (STEPS // 3, 2 * STEPS // 3, STEPS):
    losses = {name: np.array([losses_of[name][step] for losses_of in seeds]) for name in MOMENTS}
    cells = [f"{losses['float32'].mean():.4f} ± {losses['float32'].std(ddof=1):.4f}"]
    for name in list(MOMENTS)[1:]:
      over = 100 * (losses[name] / losses["float32"] - 1)
      cells += [
        f"{losses[name].mean():.4f} ± {losses[name].std(ddof=1):.4f}",
        f"{over.mean():+.2f} ± {over.std(ddof=1) / len(SEEDS) ** 0.5:.2f}",
      ]
    print(f"| {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/bfloat16_moments", "Folder of the runs; the same command resumes them.")
  command.run(main)
