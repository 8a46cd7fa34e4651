"""Work folders made from another run's checkpoint with other counts of parameter tokens, leaf by leaf.

The new folder is written beside its place and moved there when it is complete: after a kill it is absent, and the
run's own folder is never written to.
"""

import dataclasses
import itertools
import json
import shutil
import typing
from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import AbstractMesh

from tokenformer_jax import data
from tokenformer_jax.allocator import return_freed_memory
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.distributed.axes import tree_shardings
from tokenformer_jax.distributed.mesh import MESH_AXES, make_mesh
from tokenformer_jax.growth.plan import counts_of, layers_of, path_name, plan_growth
from tokenformer_jax.growth.report import GrowthReport
from tokenformer_jax.growth.shrink import ShrinkReport, check_shrink, least_used
from tokenformer_jax.growth.stream import LeafStream, grown, shrunk
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.paths import is_uri, user_path
from tokenformer_jax.progress import Progress
from tokenformer_jax.training.checkpoint_streams import CheckpointStreams
from tokenformer_jax.training.checkpoints import TOKENIZER, load, load_tokenizer
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resume import CONFIG, check_same_model, check_same_tokenizer, stored_config
from tokenformer_jax.training.state import TrainState

# Where no terminal is, seconds between two lines about the leaves that are written.
_SECONDS_BETWEEN_LINES = 30.0


def grow_run(
  workdir: str,
  output: str,
  *,
  step: int | None = None,
  method: str | None = None,
  token_axis: int | None = None,
  **tokens: int | None,
) -> GrowthReport:
  """Makes a new work folder with a grown checkpoint, in which `train` resumes.

  The checkpoint is what growth at that step inside the run would have made, with the run's data position, tokenizer
  and configuration. Memory is that of the largest leaf's layer, old and new, and a constant.

  Args:
    workdir: the run's work folder, local or gs://BUCKET/FOLDER.
    output: the new folder, on a local disk.
    step: which checkpoint; by default the newest.
    method: see `GrowthConfig`; by default the method in the run's configuration.
    token_axis: size of the mesh axis `token` in the grown run; by default the run's.
    tokens: new counts by name (`config.TOKEN_COUNTS`); None for those that stay.

  Returns:
    What happened to each leaf.

  Raises:
    ValueError: there is no whole checkpoint, `output` exists, the model cannot grow to these counts or the mesh does
      not divide them, or the checkpoint's model is not that of the configuration beside it; nothing is written then.
  """
  source = Source(workdir, step)
  config, model = source.config, source.resized(tokens)
  growth = dataclasses.replace(config.growth, stages=source.stages_to_come(), method=method or config.growth.method)
  plan = plan_growth(source.leaves, source.model, model, growth)
  mesh = config.mesh if token_axis is None else dataclasses.replace(config.mesh, token=token_axis)
  config = dataclasses.replace(config, model=model, growth=growth, mesh=mesh)
  source.write(output, config, lambda path, leaf: grown(leaf, plan[path], config.training.seed, source.step))
  return GrowthReport(tuple(plan.values()))


def shrink_run(
  workdir: str, output: str, *, step: int | None = None, token_axis: int | None = None, **tokens: int | None
) -> ShrinkReport:
  """Makes a new work folder with a checkpoint of fewer parameter tokens, without the least used; see `growth.shrink`.

  Use is measured on `training.eval_batches` batches of the run's training data, the loss on as many of its held-out
  data. The parameters must fit into memory for that; the optimizer's moments need not.

  Args and raises: as for `grow_run`, with counts at most the model's. A ValueError also says that the run's data cannot
  be read.
  """
  source = Source(workdir, step)
  config, model = source.config, source.resized(tokens)
  check_shrink(source.model, model)
  mesh = config.mesh if token_axis is None else dataclasses.replace(config.mesh, token=token_axis)
  config = dataclasses.replace(
    config, model=model, mesh=mesh, growth=dataclasses.replace(config.growth, stages=source.stages_to_come())
  )
  check_target(output, workdir)
  text = data.open_data(config.data, seq_length=model.seq_length)
  count = config.training.eval_batches
  usage_on, loss_on = itertools.islice(text.train_batches(), count), text.held_out_batches(count)
  counts = counts_of(layers_of(source.model), model)
  rows, report = least_used(load(workdir, source.step, average=False), counts, usage_on, loss_on)
  source.write(output, config, lambda path, leaf: shrunk(path, leaf, rows))
  return report


class Source:
  """An open checkpoint of a run that was checked against the configuration beside it.

  Attributes:
    step: the checkpoint's step.
    record: the checkpoint's record.
    config: the run's configuration, as last given.
    model: the model's configuration at `step`.
    leaves: the state, still on disk.
  """

  def __init__(self, workdir: str, step: int | None):
    return_freed_memory()
    self._workdir = workdir
    self._streams = CheckpointStreams(workdir)
    self.step, self.record = self._streams.record(step)
    self.config = stored_config(workdir)
    self.model = check_same_model(self.record["model"], self.config, self.step, workdir)
    self._tokenizer = load_tokenizer(workdir) if self.record["tokenizer"] else None  # A model of images has none.
    if self._tokenizer:
      check_same_tokenizer(self.record["tokenizer"], self._tokenizer, workdir)
    self.leaves: TrainState = self._streams.open(self.step, _shapes(self.config, self.model))

  def resized(self, tokens: dict[str, int | None]) -> ModelConfig:
    """Returns the model's configuration with these counts; None stands for a count that stays."""
    return self.model.grown(**{name: count for name, count in tokens.items() if count is not None})

  def stages_to_come(self) -> tuple:
    """Returns the growth stages of the run's configuration that are not done at `step`."""
    return tuple(stage for stage in self.config.growth.stages if stage.step >= self.step)

  def write(self, output: str, config: Config, change: Callable[[str, LeafStream], LeafStream]) -> None:
    """Makes the work folder `output` for a run of `config` whose state is `change(path, leaf)` of every leaf."""
    _check_divides(config)
    folder = check_target(output, self._workdir)
    unfinished = folder.with_name(folder.name + ".unfinished")
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: change(path_name(path), leaf), self.leaves)
    if unfinished.exists():  # An earlier call was killed and left this.
      unfinished.rmtree()
    try:
      unfinished.mkdir(parents=True)
      (unfinished / CONFIG).write_text(json.dumps(config.to_dict(), indent=2))
      if self._tokenizer:
        data.save_tokenizer(self._tokenizer, unfinished / TOKENIZER)
      with Progress(len(jax.tree.leaves(state)), "leaf", seconds=_SECONDS_BETWEEN_LINES) as progress:
        target = CheckpointStreams(str(unfinished), lambda name: progress.update())
        target.save(
          self.step,
          state,
          # Losses of a model of another size do not say what a loss of this one should be.
          self.record | {"model": dataclasses.asdict(config.model), "config": config.to_dict(), "losses": []},
        )
        # Orbax would commit a checkpoint that lacks leaves.
        target.open(self.step, _shapes(config, config.model))
        target.close()
      unfinished.rename(folder)
    except BaseException:
      shutil.rmtree(unfinished, ignore_errors=True)
      raise


def _shapes(config: Config, model: ModelConfig) -> TrainState:
  return make_program(config, model, make_mesh(devices=jax.devices()[:1])).shapes


def _check_divides(config: Config) -> None:
  """Raises ValueError if the mesh of `config` does not divide the parameters; its devices need not be here."""
  sizes = [max(getattr(config.mesh, axis), 1) for axis in MESH_AXES]  # The size of an axis of −1 is known in training.
  abstract = abstract_model(config.model)
  mesh = typing.cast(jax.sharding.Mesh, AbstractMesh(tuple(sizes), MESH_AXES))
  tree_shardings(mesh, logical_axes(abstract)[0], split(abstract)[1])


def check_target(output: str, workdir: str) -> epath.Path:
  """Returns the new folder. Raises ValueError where it cannot be made."""
  if is_uri(output):
    raise ValueError(
      f"output={output}: the new folder must appear as a whole, which object stores cannot do; give one on a local disk."
    )
  folder, source = user_path(output, "output"), user_path(workdir, "workdir")
  if folder.exists():
    raise ValueError(f"output={output}: already there; choose another.")
  if source in folder.parents:
    raise ValueError(f"output={output}: lies in the run's own folder {workdir}; choose one outside.")
  return folder
