"""Growth in the middle of a run, beside no growth, growth as released, and the big model from scratch.

    python -m experiments.growth_seam --workdir=runs/growth_seam

Two CPU cores busy with other work, about 26 minutes of CPU time, November 2026, Python 3.11.7, jax 0.10.2, float32.
Held-out loss over that of the run without growth at the same step, mean of 3 seeds, per cent (docs/growth_seam.png):

| factor | run | +50 | +100 | +200 | +400 | +600 | +1000 | largest | last loss (by seed) |
|---|---|---|---|---|---|---|---|---|---|
| 1 | no growth | +0.00 | +0.00 | +0.00 | +0.00 | +0.00 | +0.00 | +0.00 | 1.4978 (1.5057, 1.4952, 1.4926) |
| 1 | no growth, half the rate | -2.84 | -2.61 | -2.93 | -2.91 | -2.30 | +0.42 | +0.42 | 1.5042 (1.5112, 1.5002, 1.5011) |
| 2 | exact growth (default) | -2.20 | -2.01 | -2.28 | -2.46 | -2.35 | -1.13 | -1.13 | 1.4809 (1.4882, 1.4757, 1.4789) |
| 2 | released growth, restarted | +2.23 | +2.93 | +1.00 | -1.77 | -4.59 | -1.58 | +2.93 | 1.4741 (1.4791, 1.4707, 1.4724) |
| 2 | from scratch | -2.45 | -2.78 | -2.77 | -2.64 | -2.80 | -3.57 | -2.19 | 1.4444 (1.4406, 1.4605, 1.4321) |
| 4 | exact growth (default) | -1.53 | -0.66 | -1.32 | -1.59 | -1.77 | -2.18 | -0.66 | 1.4651 (1.4745, 1.4595, 1.4614) |
| 4 | released growth, restarted | +12.27 | +9.00 | +3.93 | -0.83 | -5.00 | -3.23 | +12.27 | 1.4494 (1.4555, 1.4470, 1.4458) |
| 4 | from scratch | -6.04 | -6.05 | -6.27 | -6.22 | -5.99 | -7.58 | -5.97 | 1.3842 (1.3759, 1.3773, 1.3995) |

The default is above the run without growth at no evaluation and ends below it. It does not end below the other two.
Released growth, whose cosine falls over all 1,000 steps, ends 0.5 % (2 ×) and 1.1 % (4 ×) lower, after up to 300 steps
above the run without growth. The big model from scratch is trained at its size for all 3,000 steps, which takes 1.4 and
1.8 times the arithmetic of the grown one. It ends 2.5 % and 5.5 % lower here, where 32 tokens in each projection are
what limits the small model. `growth_recipes.py` has methods that end lower. The table is from commit 7005107, in which
the first update of a run had rate 0.
"""

import dataclasses
import pathlib
import shutil

import matplotlib.figure
import numpy as np
from absl import flags

from experiments.runs import every_seed, held_out_losses
from tokenformer_jax.cli import command
from tokenformer_jax.config import TOKEN_COUNTS, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.training.resize import grow_run

SEAM, STEPS, DECAY, EVERY = 2000, 3000, 400, 50
SEEDS = (0, 1, 2)
FACTORS = (2, 4)
CONTROLS = {"control": "no growth", "slower": "no growth, half the rate"}
RUNS = {"exact": "exact growth (default)", "released": "released growth, restarted", "scratch": "from scratch"}


def small_run(seed: int) -> Config:
  """The run without growth: 90,240 parameters, 64 bytes of Python a row."""
  return Config(
    model=ModelConfig(
      vocab_size=384,
      num_layers=2,
      hidden_size=64,
      num_heads=4,
      qkv_tokens=32,
      proj_tokens=32,
      ffn_tokens=128,
      seq_length=64,
    ),
    data=DataConfig(batch_size=16, seed=seed),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=DECAY),
    training=TrainingConfig(
      num_steps=STEPS,
      seed=seed,
      log_every=EVERY,
      eval_every=EVERY,
      eval_batches=20,
      checkpoint_every=SEAM,
      checkpoints_kept=3,
      sample_tokens=0,
    ),
  )


def run_seed(seed: int, folder: pathlib.Path) -> dict[str, dict[int, float]]:
  """Held-out losses by step of all runs of a seed; steps count from the small model's first."""
  base = small_run(seed)
  losses = {"control": held_out_losses(base, folder / "control")}

  slower = folder / "slower"
  if not slower.exists():
    shutil.copytree(folder / "control", slower, ignore=shutil.ignore_patterns(str(STEPS), "done.json"))
  losses["slower"] = held_out_losses(
    dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3)), slower
  )

  for factor in FACTORS:
    tokens = {name: factor * getattr(base.model, name) for name in TOKEN_COUNTS}
    big = dataclasses.replace(base, model=base.model.grown(**tokens))

    grown = folder / f"exact_{factor}"
    if not grown.exists():
      grow_run(str(folder / "control"), str(grown), step=SEAM, **tokens)
    losses[f"exact_{factor}"] = held_out_losses(big, grown)

    weights = folder / f"released_{factor}_weights"
    if not weights.exists():
      grow_run(str(folder / "control"), str(weights), step=SEAM, method="released", **tokens)
    # The released configuration: the weights alone, and a schedule from its beginning.
    restarted = dataclasses.replace(
      big,
      init_from=str(weights),
      data=dataclasses.replace(big.data, seed=seed + 100),
      optimizer=dataclasses.replace(big.optimizer, schedule="warmup_cosine"),
      training=dataclasses.replace(big.training, num_steps=STEPS - SEAM),
    )
    after = held_out_losses(restarted, folder / f"released_{factor}")
    losses[f"released_{factor}"] = {SEAM + step: loss for step, loss in after.items()}

    losses[f"scratch_{factor}"] = held_out_losses(big, folder / f"scratch_{factor}")
  return losses


def main(argv):
  del argv
  folder, seeds = every_seed(run_seed, SEEDS, flags.FLAGS.workdir)

  steps = sorted(step for step in seeds[0]["control"] if step > SEAM)
  print(
    f"\nHeld-out loss over that of the run without growth at the same step, mean of {len(SEEDS)} seeds, per cent:\n\n"
    "| factor | run | +50 | +100 | +200 | +400 | +600 | +1000 | largest | last loss (by seed) |\n" + "|---" * 10 + "|"
  )
  control = mean([losses["control"] for losses in seeds], steps)
  rows = [(1, title, name) for name, title in CONTROLS.items()]
  rows += [(factor, title, f"{name}_{factor}") for factor in FACTORS for name, title in RUNS.items()]
  for factor, title, name in rows:
    curve = mean([losses[name] for losses in seeds], steps)
    over = 100 * (curve / control - 1)
    shown = " | ".join(f"{over[steps.index(SEAM + k)]:+.2f}" for k in (50, 100, 200, 400, 600, 1000))
    print(f"| {factor} | {title} | {shown} | {over.max():+.2f} | {curve[-1]:.4f} ({by_seed(seeds, name)}) |")
  print(f"\n{plot(seeds, folder / 'growth_seam.png')}")


def mean(curves: list[dict[int, float]], steps: list[int]) -> np.ndarray:
  return np.mean([[curve[step] for step in steps] for curve in curves], axis=0)


def by_seed(seeds, name: str) -> str:
  return ", ".join(f"{losses[name][STEPS]:.4f}" for losses in seeds)


def plot(seeds, path: pathlib.Path) -> pathlib.Path:
  """Mean curves from the seam on, a panel for each factor."""
  figure = matplotlib.figure.Figure(figsize=(12, 4.5), layout="constrained")
  for axes, factor in zip(figure.subplots(1, len(FACTORS), sharey=True), FACTORS):
    for name, title in (CONTROLS | {f"{name}_{factor}": title for name, title in RUNS.items()}).items():
      steps = sorted(step for step in seeds[0][name] if step > SEAM)
      axes.plot(steps, mean([losses[name] for losses in seeds], steps), label=title)
    axes.axvline(SEAM, color="grey", linestyle="--")
    axes.set_title(f"{factor} × the parameter tokens at step {SEAM}")
    axes.set_xlabel("step")
    axes.legend()
  figure.axes[0].set_ylabel("held-out loss (nats a byte)")
  figure.savefig(path, dpi=120)
  return path


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/growth_seam", "Folder of the runs; run again to resume them.")
  command.run(main)
