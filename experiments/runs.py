"""What experiments of several runs share: a run that is done is not run again, and its losses."""

import json
import pathlib

import jax

from tokenformer_jax.config import Config
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics


def every_seed(run_seed, seeds, workdir: str) -> tuple[pathlib.Path, list]:
  """(the folder `workdir`, `run_seed(seed, its folder)` of each seed), the results also in losses.json."""
  folder = pathlib.Path(workdir).absolute()
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  results = [run_seed(seed, folder / f"seed_{seed}") for seed in seeds]
  (folder / "losses.json").write_text(json.dumps(results))
  return folder, results


def held_out_losses(config: Config, workdir: pathlib.Path) -> dict[int, float]:
  """Held-out loss, nats a token, by step, of the run of `config` in `workdir`, trained now unless it is done."""
  done = workdir / "done.json"
  if not done.exists():
    train(config, str(workdir))
    done.write_text(
      json.dumps({row["step"]: row["held_out/loss"] for row in read_metrics(str(workdir)) if "held_out/loss" in row})
    )
  return {int(step): loss for step, loss in json.loads(done.read_text()).items()}


def training_flops(config: Config, start: int, stop: int) -> float:
  """FLOPs of the updates `start` to `stop` of a run: three forward passes a token, growths counted from their step."""
  tokens = config.data.batch_size * config.model.seq_length
  return sum(3.0 * tokens * config.model_at(step).forward_flops_per_token for step in range(start, stop))
