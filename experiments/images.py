"""Images from scratch: ViT, TokenFormer with as many parameters, and TokenFormer that gets half of its tokens half-way.

    TOKENFORMER_DATA=… python -m experiments.images --workdir=runs/images
    TOKENFORMER_DATA=… python -m experiments.images --workdir=runs/images --datasets=mnist --models=vit --seeds=1
    python -m experiments.images --workdir=runs/images --report

`TOKENFORMER_DATA` names the folder with `mnist` (the four files of MNIST) and `clothing_small_64` (`train.npz`,
`validation.npz` and `test.npz`: 3,068, 341 and 372 photographs of ten kinds of clothes, 64 × 64). A run that was stopped
resumes, one that is done is not repeated, and `--report` prints what is done. No run has been taken to its end yet. One run
is also a configuration of the CLI:

    python -m tokenformer_jax.cli.train --config=experiments/images.py:mnist,grown --workdir=runs/mnist
"""

import json
import os
import pathlib
import time

import numpy as np
from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config import (
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  ImagesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics

MODELS = {"vit": "ViT", "tokenformer": "TokenFormer", "grown": "TokenFormer, grown half-way"}
SEEDS = 3
# Layers, channels, heads, patch, then batch, epochs and rate.
SIZES = {"mnist": (4, 64, 4, 7, 128, 20, 2e-3), "clothing": (4, 96, 4, 8, 64, 60, 1e-3)}
TRAIN_IMAGES = {"mnist": 60_000, "clothing": 3_068}


def data_config(dataset: str, batch_size: int, seed: int) -> DataConfig:
  """MNIST with shifts of up to 2 pixels; clothes with random crops and mirrored."""
  folder = os.environ.get("TOKENFORMER_DATA") or command.fail(
    "TOKENFORMER_DATA is not set: name the folder of the data."
  )
  if dataset == "mnist":
    sources = f"idx:{folder}/mnist", f"idx:{folder}/mnist@test"
    images = ImagesConfig(mean=(0.13,), std=(0.31,), shift=2)
  else:
    sources = f"npz:{folder}/clothing_small_64/train.npz", f"npz:{folder}/clothing_small_64/test.npz"
    images = ImagesConfig(smallest_crop=0.4, flip=True)
  return DataConfig(source=sources[0], held_out_source=sources[1], batch_size=batch_size, seed=seed, images=images)


def run(dataset: str, name: str, seed: int = 0) -> Config:
  """One run. Three quarters as many tokens as channels make as many parameters as ViT's matrices have."""
  layers, size, heads, patch, batch_size, epochs, rate = SIZES[dataset]
  vision = dict(image_size=28 if dataset == "mnist" else 64, patch_size=patch, num_classes=10, pool="mean")
  vision["channels"] = 1 if dataset == "mnist" else 3
  sizes = dict(
    num_layers=layers, hidden_size=size, num_heads=heads, vision=vision, attention=dict(positions="sinusoidal")
  )
  steps = epochs * TRAIN_IMAGES[dataset] // batch_size
  growth = GrowthConfig()
  if name == "vit":
    model = ModelConfig.named("tiny", "vit", ffn_tokens=4 * size, **sizes)
  else:
    tokens = 3 * size // 4
    model = ModelConfig.named(
      "tiny", "tokenformer-vit", qkv_tokens=tokens, proj_tokens=tokens, ffn_tokens=4 * tokens, **sizes
    )
    if name == "grown":
      growth = GrowthConfig(
        stages=(GrowthStage(steps // 2, tokens, tokens, 4 * tokens),), tau_steps=max(steps // 10, 1)
      )
      model = model.grown(qkv_tokens=tokens // 2, proj_tokens=tokens // 2, ffn_tokens=2 * tokens)
  return Config(
    model=model,
    data=data_config(dataset, batch_size, seed),
    optimizer=OptimizerConfig(
      learning_rate=rate, min_learning_rate=0.0, warmup_steps=steps // 20, decay_steps=2 * steps // 5,
      weight_decay=0.05, beta2=0.99,
    ),
    growth=growth,
    training=TrainingConfig(
      num_steps=steps, seed=seed, log_every=50, eval_every=max(steps // 20, 1), eval_batches=1000,
      checkpoint_every=max(steps // 20, 1), sample_tokens=0,
    ),
  )  # fmt: skip


def get_config(names: str = "mnist,vit"):
  return run(*names.split(",")).to_config_dict()


def result(config: Config, folder: pathlib.Path) -> dict:
  """Trains a run unless it is done: its accuracies by step, and the CPU time of the process that finished it."""
  done = folder / "done.json"
  if not done.exists():
    started = time.process_time()
    train(config, str(folder))
    rows = [row for row in read_metrics(str(folder)) if "held_out/accuracy" in row]
    curve = {row["step"]: [row["held_out/accuracy"], row["held_out/loss"]] for row in rows}
    done.write_text(json.dumps(dict(curve=curve, minutes=(time.process_time() - started) / 60)))
  return json.loads(done.read_text())


def report(results: dict[tuple[str, str], list[dict]]) -> None:
  """Prints the mean and the range over seeds of the accuracy on the test images after the last update."""
  print("\n| images | model | parameters | test accuracy, % | of each seed | CPU minutes |\n|---|---|---|---|---|---|")
  for (dataset, name), of_seeds in results.items():
    last = [100 * list(one["curve"].values())[-1][0] for one in of_seeds]
    config = run(dataset, name)
    print(
      f"| {dataset} | {MODELS[name]} | {config.model_at(config.training.num_steps).num_parameters:,} | "
      f"{np.mean(last):.2f} | {', '.join(f'{value:.2f}' for value in last)} | "
      f"{np.mean([one['minutes'] for one in of_seeds]):.0f} |"
    )
  for (dataset, name), of_seeds in results.items():
    if name == "grown":
      (stage,) = run(dataset, name).growth.stages
      for seed, one in enumerate(of_seeds):
        near = [(int(step), accuracy) for step, (accuracy, _) in one["curve"].items()]
        before = [f"{100 * a:.2f}" for step, a in near if step <= stage.step][-2:]
        after = [f"{100 * a:.2f}" for step, a in near if step > stage.step][:2]
        print(f"{dataset}, seed {seed}, growth at step {stage.step}: {', '.join(before)} | {', '.join(after)} %")


def main(argv):
  del argv
  given = flags.FLAGS
  workdir, results = pathlib.Path(given.workdir).absolute(), {}
  for seed in range(given.seeds):
    for dataset in given.datasets:
      for name in given.models:
        folder = workdir / dataset / name / f"seed_{seed}"
        if (folder / "done.json").exists() or not given.report:
          results.setdefault((dataset, name), []).append(result(run(dataset, name, seed), folder))
  report(results)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/images", "Folder of the results; run again to resume.")
  flags.DEFINE_list("datasets", list(SIZES), "Which of mnist and clothing.")
  flags.DEFINE_list("models", list(MODELS), f"Which of {', '.join(MODELS)}.")
  flags.DEFINE_integer("seeds", SEEDS, "How many seeds.", lower_bound=1)
  flags.DEFINE_boolean("report", False, "Only report what is done.")
  command.run(main)
