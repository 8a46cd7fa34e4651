"""Every named architecture on English novels, at equal numbers of parameters and at equal training FLOPs.

    export TOKENFORMER_DATA=FOLDER
    python -m experiments.architectures --workdir=runs/architectures            # all of them, 2 seeds; resumes
    python -m experiments.architectures --workdir=runs/architectures --report   # the table of the runs that are done
    python -m tokenformer_jax.cli.train --config=experiments/architectures.py:sas-p --workdir=runs/sas_p

FOLDER holds `english_novels/{train,valid}.txt.gz`, books separated by lines that are <|endoftext|>. A preset may be
followed by the kind of its projections: `sas-p/pattention`.

All models have four layers of 96 channels. The rows of their feed-forwards are chosen so that their matrices have as many
parameters as TokenFormer's. They are trained on the same bytes in the same order, with the same learning rate. A second
run at equal FLOPs is made only where the first one differs from TokenFormer's by more than 2 %.

The table has not been filled at full length yet. 19 presets × 2 seeds, six of them again at equal FLOPs, are 129,000
updates, which may take five hours of two CPU cores.
"""

import os
import pathlib
import time

import jax
import matplotlib.figure
import numpy as np
import tqdm
from absl import flags

from experiments.runs import held_out_losses, training_flops
from tokenformer_jax.cli import command
from tokenformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenformer_jax.config.presets import GROUPS, LANGUAGE_MODELS
from tokenformer_jax.data import Batch
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.training.program import make_program

MARKER = "<|endoftext|>"
SIZE = dict(vocab_size=384, num_layers=4, hidden_size=96, num_heads=4, seq_length=128)
TOKENS = dict(qkv_tokens=96, proj_tokens=96, ffn_tokens=384)
NUM_STEPS, BATCH, SEEDS = 2000, 16, (0, 1)
# Runs whose FLOPs are this near to TokenFormer's are runs at equal FLOPs already.
NEAR = 0.02


def model_of(name: str) -> ModelConfig:
  """The model of a preset, with as many parameters in its matrices as TokenFormer of `TOKENS`.

  Args:
    name: a preset, or a preset and a kind of projection: `sas-p/pattention`.
  """
  preset, _, projection = name.partition("/")
  wanted = ModelConfig.named("tiny", **SIZE, **TOKENS).num_non_embedding_parameters
  changes = dict(SIZE)
  part = ModelConfig.named("tiny", preset, projection).attention
  if part.projection == "pattention":
    changes |= dict(qkv_tokens=TOKENS["qkv_tokens"])
    changes |= dict(proj_tokens=0 if part.values == "identity" else TOKENS["proj_tokens"])
  few, more = (
    ModelConfig.named("tiny", preset, projection, **changes, ffn_tokens=rows).num_non_embedding_parameters
    for rows in (64, 128)
  )
  rows = 64 + round(64 * (wanted - few) / (more - few))
  rows -= rows % GROUPS.get(preset, (1, 1))[0]
  return ModelConfig.named("tiny", preset, projection, **changes, ffn_tokens=rows)


def run_config(name: str, seed: int, num_steps: int = NUM_STEPS) -> Config:
  folder = os.environ.get("TOKENFORMER_DATA")
  if not folder:
    raise ValueError("TOKENFORMER_DATA is not set: name the folder that holds english_novels.")
  return Config(
    model=model_of(name),
    data=DataConfig(
      source=f"text:{folder}/english_novels/train.txt.gz#{MARKER}",
      held_out_source=f"text:{folder}/english_novels/valid.txt.gz#{MARKER}",
      batch_size=BATCH,
      seed=seed,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=num_steps // 20, decay_steps=num_steps * 19 // 20
    ),
    training=TrainingConfig(
      num_steps=num_steps,
      seed=seed,
      log_every=100,
      eval_every=max(num_steps // 20, 1),
      eval_batches=40,
      checkpoint_every=500,
      sample_tokens=0,
    ),
  )


def get_config(name: str = "tokenformer"):
  return run_config(name, seed=0).to_config_dict()


def steps_at_equal_flops(name: str) -> int:
  """The number of updates after which a preset has taken TokenFormer's training FLOPs."""
  reference, own = (model_of(one).forward_flops_per_token for one in ("tokenformer", name))
  return NUM_STEPS if abs(own / reference - 1) < NEAR else round(NUM_STEPS * reference / own)


def results(name: str, folder: pathlib.Path, seeds, num_steps: int, only_done: bool) -> list[dict[int, float]]:
  """The held-out losses by step of each seed; the runs that are not done are trained, or left out."""
  losses = []
  for seed in seeds:
    run = folder / f"{name.replace('/', '_')}_{num_steps}" / f"seed_{seed}"
    if not only_done or (run / "done.json").exists():
      losses.append(held_out_losses(run_config(name, seed, num_steps), run))
  return losses


def milliseconds(names: list[str], rounds: int = 5, steps: int = 3) -> dict[str, float]:
  """The median time of a training step of each preset, in turns, on random tokens."""
  prepared = {}
  for name in tqdm.tqdm(names, "compiling", disable=None):
    config = run_config(name, 0)
    program = make_program(config, config.model, make_mesh(config.mesh, devices=jax.devices()[:1]))
    ids = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE["seq_length"] + 1))
    state = program.initial_state()
    batch = Batch(ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32))
    state, metrics = program.train_step(state, batch)
    jax.block_until_ready(metrics)
    prepared[name] = [program, state, batch, []]
  for _ in range(rounds):
    for one in prepared.values():
      begin = time.perf_counter()
      for _ in range(steps):
        one[1], metrics = one[0].train_step(one[1], one[2])
      jax.block_until_ready(metrics)
      one[3].append(1e3 * (time.perf_counter() - begin) / steps)
  return {name: float(np.median(one[3])) for name, one in prepared.items()}


def main(argv):
  del argv
  args = flags.FLAGS
  folder = pathlib.Path(args.workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  names = args.presets or list(LANGUAGE_MODELS)
  seeds = range(args.seeds)
  for name in names:
    model_of(name)  # An unknown preset is refused before anything is trained.
  times = milliseconds(names) if args.time else {}
  equal_parameters, equal_flops = {}, {}
  for name in names:
    equal_parameters[name] = results(name, folder, seeds, args.steps, args.report)
  for name in names:
    steps = round(steps_at_equal_flops(name) * args.steps / NUM_STEPS)
    same = steps == args.steps
    equal_flops[name] = equal_parameters[name] if same else results(name, folder, seeds, steps, args.report)
  print(
    "\n| preset | parameters | in matrices | MFLOPs a token, forward | held-out loss, equal parameters (by seed) "
    "| at equal FLOPs (by seed) | ms a step |\n|---|---|---|---|---|---|---|"
  )
  for name in names:
    model = model_of(name)
    print(
      f"| {name} | {model.num_parameters:,} | {model.num_non_embedding_parameters:,} "
      f"| {model.forward_flops_per_token / 1e6:.3f} | {shown(equal_parameters[name])} | {shown(equal_flops[name])} "
      f"| {f'{times[name]:.1f}' if name in times else 'not measured'} |"
    )
  if any(equal_parameters.values()):
    print(f"\n{plot(equal_parameters, folder / 'architectures.png')}")


def shown(losses: list[dict[int, float]]) -> str:
  ends = [run[max(run)] for run in losses]
  return f"{np.mean(ends):.4f} ({', '.join(f'{end:.4f}' for end in ends)})" if ends else "not run"


def plot(runs: dict[str, list[dict[int, float]]], path: pathlib.Path) -> pathlib.Path:
  """Plots held-out loss over training FLOPs, the first seed of each preset."""
  figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  for index, (name, losses) in enumerate((name, losses) for name, losses in runs.items() if losses):
    config = run_config(name, 0)
    per_step = training_flops(config, 0, 1) / 1e12
    points = [(step * per_step, loss) for step, loss in sorted(losses[0].items()) if step]
    axes.plot(*zip(*points), color=f"C{index % 10}", linestyle="--" if index >= 10 else "-", label=name)
  axes.set_xlabel("training TFLOPs")
  axes.set_ylabel("held-out loss (nats a byte)")
  axes.set_yscale("log")
  axes.legend(fontsize=8, ncols=2)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
  return path


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/architectures", "Folder of the runs; the same command resumes them.")
  flags.DEFINE_list("presets", [], "Presets to run, each with or without '/pattention' or '/dense'; by default all.")
  flags.DEFINE_integer("seeds", len(SEEDS), "Number of seeds.", lower_bound=1)
  flags.DEFINE_integer("steps", NUM_STEPS, "Length of a run in updates.", lower_bound=1)
  flags.DEFINE_bool("report", False, "Print the table of the runs that are done, and train nothing.")
  flags.DEFINE_bool("time", False, "Measure a training step of each preset, in turns.")
  command.run(main)
