"""A chain of three sizes, each grown from the one before, and each size from scratch (the paper's figure 3, very small).

    export TOKENFORMER_DATA=FOLDER
    python -m experiments.progressive_scaling --workdir=runs/progressive_scaling

FOLDER holds `english_novels/{train,valid}.txt.gz`, books separated by lines that are <|endoftext|>.

Two CPU cores that were also busy with other work, about 20 minutes of CPU time, November 2026, Python 3.11.7, jax 0.10.2, float32
(docs/progressive_scaling.png):

| parameters | last loss, grown (by seed) | from scratch (by seed) | TFLOPs, from the size before | with all before it | from scratch |
|---|---|---|---|---|---|
| 155,776 | 1.7442 (1.7392, 1.7492) | 1.7442 (1.7392, 1.7492) | 1.51 | 1.51 | 1.51 |
| 286,848 | 1.6594 (1.6519, 1.6669) | 1.6402 (1.6444, 1.6360) | 1.99 | 3.20 | 4.17 |
| 548,992 | 1.6135 (1.6036, 1.6233) | 1.6018 (1.6116, 1.5919) | 3.76 | 6.42 | 10.61 |

All three models: 7.27 TFLOPs as a chain, 16.29 from scratch (45 %). The largest costs 61 % of its run from scratch, and its
mean loss is 0.7 % higher: with one seed it is 0.5 % lower, with the other 2 % higher. For equal arithmetic the chain's loss
is far lower (1.61 compared with 1.80 at 6.4 TFLOPs, where the rate of the run from scratch has not fallen yet). Two seeds
are few. These growths were by `exact`, the default of the time.
"""

import dataclasses
import os
import pathlib

import matplotlib.figure
import numpy as np
from absl import flags

from experiments.runs import every_seed, held_out_losses, training_flops
from tokenformer_jax.cli import command
from tokenformer_jax.config import (
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)

MARKER = "<|endoftext|>"
SEEDS = (0, 1)
SIZES = (64, 128, 256)  # Tokens in each of q, k, v and proj; four times as many in the feed-forward.
GROWN_AT = (1200, 2000)  # Steps at which the chain grows to the next size.
STAGE_ENDS = (1200, 2000, 2800)
DECAY = 300  # Every model's rate falls to 0 in this many steps after its stage; the chain itself grows without it.


def tokens(size: int) -> dict[str, int]:
  return dict(qkv_tokens=size, proj_tokens=size, ffn_tokens=4 * size)


def base(seed: int) -> Config:
  folder = os.environ.get("TOKENFORMER_DATA")
  if not folder:
    command.fail("TOKENFORMER_DATA is not set: name the folder that holds english_novels.")
  return Config(
    model=ModelConfig(vocab_size=384, num_layers=2, hidden_size=64, num_heads=4, seq_length=64, **tokens(SIZES[0])),
    data=DataConfig(
      source=f"text:{folder}/english_novels/train.txt.gz#{MARKER}",
      held_out_source=f"text:{folder}/english_novels/valid.txt.gz#{MARKER}",
      batch_size=16,
      seed=seed,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=DECAY),
    training=TrainingConfig(
      num_steps=STAGE_ENDS[0] + DECAY,
      seed=seed,
      log_every=100,
      eval_every=100,
      eval_batches=40,
      checkpoint_every=500,
      sample_tokens=0,
    ),
  )


def chained(seed: int, index: int) -> Config:
  """Returns the chain up to size `index`, with the decay of that size."""
  config = base(seed)
  stages = tuple(GrowthStage(step, **tokens(size)) for step, size in zip(GROWN_AT[:index], SIZES[1:]))
  return dataclasses.replace(
    config,
    growth=GrowthConfig(stages=stages),
    training=dataclasses.replace(config.training, num_steps=STAGE_ENDS[index] + DECAY),
  )


def from_scratch(seed: int, index: int) -> Config:
  """Returns size `index` from scratch, for as many steps on the same data in the same order."""
  config = chained(seed, index)
  return dataclasses.replace(config, growth=GrowthConfig(), model=config.model.grown(**tokens(SIZES[index])))


def run_seed(seed: int, folder: pathlib.Path) -> list[dict[str, dict[int, float]]]:
  """Returns the held-out losses by step, of the chain and of the run from scratch, for each size."""
  results = []
  for index, size in enumerate(SIZES):
    scratch = held_out_losses(from_scratch(seed, index), folder / f"scratch_{size}")
    chain = held_out_losses(chained(seed, index), folder / f"chain_{size}") if index else scratch
    results.append({"chain": chain, "scratch": scratch})
  return results


def chain_flops(index: int) -> float:
  """Returns the FLOPs of size `index` when the sizes before it exist: its stage and its decay."""
  config = chained(0, index)
  return training_flops(config, STAGE_ENDS[index - 1] if index else 0, config.training.num_steps)


def main(argv):
  del argv
  folder, seeds = every_seed(run_seed, SEEDS, flags.FLAGS.workdir)

  print(
    "\n| parameters | last loss, grown (by seed) | from scratch (by seed) | TFLOPs, from the size before "
    "| with all before it | from scratch |\n|---|---|---|---|---|---|"
  )
  for index, _size in enumerate(SIZES):
    config = chained(0, index)
    steps = config.training.num_steps
    grown, scratch = ([losses[index][name][steps] for losses in seeds] for name in ("chain", "scratch"))
    costs = [chain_flops(index), training_flops(config, 0, steps), training_flops(from_scratch(0, index), 0, steps)]
    print(
      f"| {from_scratch(0, index).model.num_parameters:,} | {shown(grown)} | {shown(scratch)} | "
      + " | ".join(f"{cost / 1e12:.2f}" for cost in costs)
      + " |"
    )
  total = sum(map(chain_flops, range(len(SIZES))))
  alone = sum(training_flops(from_scratch(0, i), 0, chained(0, i).training.num_steps) for i in range(len(SIZES)))
  print(
    f"\nAll three models: {total / 1e12:.2f} TFLOPs as a chain, {alone / 1e12:.2f} from scratch "
    f"({total / alone:.0%}).\n{plot(seeds, folder / 'progressive_scaling.png')}"
  )


def shown(losses: list[float]) -> str:
  return f"{np.mean(losses):.4f} ({', '.join(f'{loss:.4f}' for loss in losses)})"


def plot(seeds, path: pathlib.Path) -> pathlib.Path:
  """Plots held-out loss over training FLOPs for the first seed: the chain, and each size from scratch."""
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  for index, _size in enumerate(SIZES):
    for name, config in (("scratch", from_scratch(0, index)), ("chain", chained(0, index))):
      if name == "chain" and index == 0:
        continue
      points = [(training_flops(config, 0, step) / 1e12, loss) for step, loss in sorted(seeds[0][index][name].items())]
      parameters = f"{config.model_at(config.training.num_steps).num_parameters:,} parameters"
      axes.plot(
        *zip(*points),
        "-" if name == "chain" else "--",
        color=f"C{index}",
        label=f"{parameters}, {'grown' if name == 'chain' else 'from scratch'}",
      )
  axes.set_xlabel("training TFLOPs, all stages")
  axes.set_ylabel("held-out loss (nats a byte)")
  axes.set_ylim(top=np.percentile([loss for sizes in seeds for runs in sizes for loss in runs["scratch"].values()], 90))
  axes.legend()
  figure.savefig(path, dpi=120)
  return path


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/progressive_scaling", "Folder of the runs; the same command resumes them.")
  command.run(main)
