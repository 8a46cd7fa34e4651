"""Where a run's metrics and samples are shown: TensorBoard, and Weights & Biases where the configuration names it."""

import html
import types
import uuid

from etils import epath
from tensorboardX import SummaryWriter, record_writer

from tokenformer_jax.config import Config
from tokenformer_jax.paths import is_uri, replace_text
from tokenformer_jax.training.log_file import LogFile

_RUN_ID = "wandb_run_id.txt"


class TensorBoard:
  """Writes TensorBoard events into `folder`."""

  def __init__(self, folder: epath.Path, start_step: int):
    """Args: `start_step` hides events of an earlier start of the run that come after it."""
    if is_uri(folder):
      # tensorboardX has clients of its own for some stores; this one uses what the rest of the run uses.
      record_writer.register_writer_factory(str(folder).split("://")[0], _ObjectWriters())
    self._events = SummaryWriter(str(folder), purge_step=start_step + 1)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)

  def write_sample(self, step: int, text: str) -> None:
    self._events.add_text("sample", text, step)

  def close(self) -> None:
    self._events.close()


class _ObjectWriters:
  """tensorboardX's factory for event files in an object store; tensorboardX flushes them every two minutes."""

  def directory_check(self, path: str) -> None:
    """Object stores have no folders to make."""

  def open(self, path: str) -> LogFile:
    return LogFile(epath.Path(path), upload_seconds=float("inf"))


class WandB:
  """Writes to the project `training.wandb_project` of Weights & Biases; a resumed run continues the same record."""

  def __init__(self, folder: epath.Path, config: Config):
    wandb = import_wandb(config.training.wandb_project)
    path = folder / _RUN_ID
    if not path.exists():
      replace_text(path, uuid.uuid4().hex)
    self._html = wandb.Html
    self._run = wandb.init(
      project=config.training.wandb_project,
      id=path.read_text().strip(),
      name=folder.name,
      resume="allow",
      config=config.to_dict(),
      dir=None if is_uri(folder) else str(folder),
    )
    # Its own count only rises, but a resumed run repeats the steps since its last checkpoint.
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, metrics: dict[str, float]) -> None:
    self._run.log({"step": step, **metrics})

  def write_sample(self, step: int, text: str) -> None:
    self._run.log({"step": step, "sample": self._html(f"<pre>{html.escape(text)}</pre>")})

  def close(self) -> None:
    self._run.finish()


def import_wandb(project: str) -> types.ModuleType:
  """Returns the package. Raises ValueError where it is not installed."""
  try:
    import wandb
  except ImportError:
    raise ValueError(
      f"training.wandb_project={project!r}: the package wandb is not installed; pip install "
      "'tokenformer_jax[wandb]', or leave the field empty."
    ) from None
  return wandb
