"""Shared by experiments of several runs: a run that is done is not repeated, and its losses are stored."""

import json
import pathlib

import jax

from tokenformer_jax.config import Config
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics


def every_seed(run_seed, seeds, workdir: str) -> tuple[pathlib.Path, list]:
  """Returns (the folder `workdir`, the results of `run_seed(seed, its folder)`), and writes them to losses.json."""
  folder = pathlib.Path(workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  results = [run_seed(seed, folder / f"seed_{seed}") for seed in seeds]
  (folder / "losses.json").write_text(json.dumps(results))
  return folder, results


def held_out_losses(config: Config, workdir: pathlib.Path) -> dict[int, float]:
  """Returns the held-out loss in nats a token by step of `config`, which is trained in `workdir` unless it is done."""
  done = workdir / "done.json"
  if not done.exists():
    train(config, str(workdir))
    done.write_text(
      json.dumps({row["step"]: row["held_out/loss"] for row in read_metrics(str(workdir)) if "held_out/loss" in row})
    )
  return {int(step): loss for step, loss in json.loads(done.read_text()).items()}


def training_flops(config: Config, start: int, stop: int) -> float:
  """Returns the FLOPs of updates `start` to `stop`: three forward passes a token, with each growth from its step on."""
  tokens = config.data.batch_size * config.model.seq_length
  return sum(3.0 * tokens * config.model_at(step).forward_flops_per_token for step in range(start, stop))
