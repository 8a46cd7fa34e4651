"""What experiments of several runs share: a run that is done is not run again, and its losses."""

import json
import pathlib

from tokenformer_jax.config import Config
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics


def held_out_losses(config: Config, workdir: pathlib.Path) -> dict[int, float]:
  """Held-out loss, nats a token, by step, of the run of `config` in `workdir`, trained now unless it is done."""
  done = workdir / "done.json"
  if not done.exists():
    train(config, str(workdir))
    done.write_text(json.dumps({row["step"]: row["held_out/loss"] for row in read_metrics(str(workdir))
                                if "held_out/loss" in row}))
  return {int(step): loss for step, loss in json.loads(done.read_text()).items()}


def training_flops(config: Config, start: int, stop: int) -> float:
  """FLOPs of the updates `start` to `stop` of a run: three forward passes a token, growths counted from their step."""
  tokens = config.data.batch_size * config.model.seq_length
  return sum(3.0 * tokens * config.model_at(step).forward_flops_per_token for step in range(start, stop))
