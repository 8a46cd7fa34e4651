"""Runs tasks of EleutherAI's lm-evaluation-harness on a model."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.evaluation.harness_model import HarnessModel
from tokenformer_jax.evaluation.report import Metrics, Results
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.paths import is_uri, user_path

_BOOTSTRAP_DRAWS = 1000


def run_harness(
  model: LanguageModel,
  tokenizer,
  tasks: Sequence[str],
  *,
  limit: int | None = None,
  task_files: str | os.PathLike | None = None,
  progress: bool = True,
) -> Iterator[Results]:
  """Loads all tasks, and returns an iterator that runs one of them at each step.

  Args:
    model: the model.
    tokenizer: the model's tokenizer.
    tasks: names of tasks, groups or tags that the harness knows, or paths of task files.
    limit: the number of questions per task; None asks all.
    task_files: a local folder with further task files (YAML).
    progress: whether to show the model's progress on stderr; the harness shows its own in any case.

  Returns:
    An iterator over results: metrics by name, of the task or of the group and its members. A metric of a task with
    several filters keeps the filter in its name, as in `exact_match,strict-match`; its standard error is
    `exact_match_stderr,strict-match`. A perplexity beyond the range of floats is infinite.

  Raises:
    ValueError: an unknown task, a missing folder, or data of a task that cannot be downloaded.
  """
  manager, loaded = _load(list(dict.fromkeys(tasks)), task_files)
  harness_model = HarnessModel(model, tokenizer, progress=progress)
  return (_run(harness_model, manager, roots, limit) for roots in loaded)


def _load(tasks: list[str], task_files: str | os.PathLike | None) -> tuple[TaskManager, list[list]]:
  """The manager of the tasks, and the harness's task and group objects for each name of `tasks`."""
  folder = None
  if task_files is not None:
    folder = None if is_uri(task_files) else user_path(task_files, "task_files")
    if folder is None or not folder.is_dir():
      raise ValueError(f"task_files={os.fspath(task_files)!r} is no local folder; name the one with the task files.")
  tasks = [os.path.expanduser(task) if os.path.isfile(os.path.expanduser(task)) else task for task in tasks]
  manager = _task_manager(tasks, folder)
  for task in tasks:
    if task not in manager.all_tasks and not os.path.isfile(task):
      way_out = nearest(task, manager.all_tasks) or " Name the folder of its task file (task_files, --task_files)."
      raise ValueError(f"task {task!r} is unknown to lm_eval {lm_eval.__version__}.{way_out}")
  try:
    return manager, [_roots(manager.load([task])) for task in tasks]
  except ConnectionError as error:
    raise ValueError(
      f"tasks={','.join(tasks)}: {error}. The harness downloads the data of its tasks; without a network, evaluate the "
      "local tasks (no harness, a data folder), or name a folder of your own task files (task_files, --task_files)."
    ) from None


def _task_manager(tasks: list[str], folder) -> TaskManager:
  # Reading the harness's own 14,000 task files takes seconds, so it is done only for a task that is not in the folder.
  if folder is None:
    return _default_task_manager()
  manager = TaskManager(include_path=str(folder), include_defaults=False)
  if set(tasks) <= set(manager.all_tasks):
    return manager
  return TaskManager(include_path=str(folder))


@functools.cache
def _default_task_manager() -> TaskManager:
  return TaskManager()


def _roots(loaded: dict) -> list:
  """The tasks and groups that no other group holds; the harness finds the others through them."""
  members = {name for group in loaded["groups"].values() for name in group.child_names}
  for task in loaded["tasks"].values():
    _make_finite(task)
  return [item for kind in ("groups", "tasks") for name, item in loaded[kind].items() if name not in members]


def _make_finite(task) -> None:
  """Makes the task's perplexities infinite where the harness's `math.exp` overflows and loses all results."""
  aggregation = task.aggregation
  task.aggregation = lambda: {name: _OrInfinity(function) for name, function in aggregation().items()}


class _OrInfinity:
  """An aggregation function of the harness that returns infinity instead of raising OverflowError.

  It is equal to the function, because the harness looks up how to estimate a standard error by the function.
  """

  def __init__(self, function: Callable):
    functools.update_wrapper(self, function)
    self._function = function

  def __call__(self, items) -> float:
    try:
      return self._function(items)
    except OverflowError:
      return float("inf")

  def __eq__(self, other) -> bool:
    return self._function == (other._function if isinstance(other, _OrInfinity) else other)

  def __hash__(self) -> int:
    return hash(self._function)


def _run(model: HarnessModel, manager: TaskManager, roots: list, limit: int | None) -> Results:
  # The harness would fork processes for some standard errors, and a forked process with JAX's threads can deadlock.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  results = lm_eval.simple_evaluate(
    model, tasks=roots, limit=limit, task_manager=manager, bootstrap_iters=_BOOTSTRAP_DRAWS
  )
  return {task: metrics_of(values) for task, values in results["results"].items()}


def metrics_of(values: dict) -> Metrics:
  """The numbers among a task's results, whose keys are METRIC,FILTER and METRIC_stderr,FILTER.

  The filter is left out of the names if the task has only one.
  """
  numbers = {
    key: int(value) if isinstance(value, (int, np.integer)) else float(value)
    for key, value in values.items()
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
  }
  filters = {key.partition(",")[2] for key in numbers if "," in key}
  if len(filters) > 1:
    return numbers
  return {key.partition(",")[0]: value for key, value in numbers.items()}
