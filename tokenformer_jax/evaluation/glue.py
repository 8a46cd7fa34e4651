"""GLUE (arXiv 1804.07461): the metrics of a classifier of texts on the tasks' held-out examples, and the mean score."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from tokenformer_jax.config.validation import require
from tokenformer_jax.data import Tokenizer
from tokenformer_jax.data.glue import TASKS, GlueSplit, read_glue, task_name
from tokenformer_jax.data.text_classes import TextPairs, in_order
from tokenformer_jax.evaluation.report import Metrics, Results
from tokenformer_jax.models.text_encoder import TextClassifier
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.objective import class_logits

# The metrics of each task; the first is the one whose mean over all tasks is the score.
METRICS = {
  "cola": ("mcc",),
  "sst2": ("acc",),
  "mrpc": ("f1", "acc"),
  "stsb": ("pearson", "spearman"),
  "qqp": ("f1", "acc"),
  "mnli": ("acc", "acc_mismatched"),
  "qnli": ("acc",),
  "rte": ("acc",),
  "wnli": ("acc",),
}
# The nine numbers of the score; WNLI is left out, as by arXiv 2212.14034.
_SCORED = [(task, METRICS[task][0]) for task in METRICS if task != "wnli"] + [("mnli", "acc_mismatched")]


def glue_metrics(task: str, outputs: np.ndarray, labels: np.ndarray) -> Metrics:
  """The metrics of one task from the outputs of a model.

  A correlation of outputs that are all equal is 0, as scikit-learn has Matthews' coefficient.

  Args:
    task: a key of `METRICS`.
    outputs: [n, classes], logits; of a regression [n, 1].
    labels: [n].
  """
  try:
    import scipy.stats
    import sklearn.metrics
  except ImportError as error:
    raise ValueError(f"the metrics of GLUE: {error}; pip install 'tokenformer_jax[eval]'.") from None
  if not TASKS[task].classes:
    numbers = outputs[:, 0].astype(np.float64)
    if np.ptp(numbers) == 0:
      return {"pearson": 0.0, "spearman": 0.0}
    return {
      "pearson": float(scipy.stats.pearsonr(numbers, labels).statistic),
      "spearman": float(scipy.stats.spearmanr(numbers, labels).statistic),
    }
  classes = outputs.argmax(axis=1)
  functions = {
    "acc": sklearn.metrics.accuracy_score,
    "f1": lambda labels, classes: sklearn.metrics.f1_score(labels, classes, zero_division=0.0),
    "mcc": sklearn.metrics.matthews_corrcoef,
  }
  return {name: float(functions[name](labels, classes)) for name in METRICS[task] if name in functions}


def glue_score(results: Results) -> float | None:
  """The mean of the nine numbers of GLUE, None unless all are there."""
  numbers = [results.get(task, {}).get(metric, math.nan) for task, metric in _SCORED]
  return None if np.isnan(numbers).any() else float(np.mean(numbers))


def glue_splits(
  tasks: Sequence[str], folder: str | os.PathLike, limit: int | None = None
) -> dict[str, dict[str, GlueSplit]]:
  """The held-out examples of tasks, by the name of the task and of the split.

  Args:
    tasks: names such as `rte` or `SST-2`.
    folder: the folder with a folder of each task, or with a folder `glue` of such folders.
    limit: the number of examples to read of each split; None reads all.

  Raises:
    ValueError: an unknown task, or a file that cannot be used.
  """
  root = user_path(folder, "data_folder")
  root = root / "glue" if (root / "glue").is_dir() else root
  splits: dict[str, dict[str, GlueSplit]] = {}
  for task in map(task_name, tasks):
    part = TASKS[task]
    read = {name: read_glue(f"glue:{root / part.folder}", name) for name in part.held_out}
    splits[task] = {name: split._replace(examples=split.examples[:limit]) for name, split in read.items()}
  return splits


def measure_glue(
  model: TextClassifier, tokenizer: Tokenizer, splits: dict[str, GlueSplit], batch_size: int = 32
) -> Metrics:
  """The metrics of a `TextClassifier` on the held-out splits of one task.

  Raises:
    ValueError: the model has other classes than the task.
  """
  config = model.config
  (task,) = {split.task for split in splits.values()}
  expected, classes = TASKS[task].num_classes, config.classifier.num_classes
  require(classes == expected, "classifier.num_classes", classes, f"{task} needs {expected}; give a run of that task.")
  graphdef, *leaves = split(model)

  @jax.jit
  def outputs(leaves, batch):
    return class_logits(nnx.merge(graphdef, *leaves), batch, training=False)[0]

  metrics: Metrics = {}
  for name, of_split in splits.items():
    packer = TextPairs(of_split, tokenizer, config.seq_length)
    found = [np.asarray(outputs(leaves, batch)) for batch in in_order(packer, batch_size=batch_size)]
    measured = glue_metrics(task, np.concatenate(found)[: len(packer)], packer.labels)
    ending = "_mismatched" if name == "dev_mismatched" else ""
    metrics |= {metric + ending: value for metric, value in measured.items()}
    metrics[f"examples{ending}"] = len(packer)
  return metrics


def runs_of_tasks(workdir: str | None, tasks: Sequence[str]) -> list[tuple[str | None, list[str]]]:
  """(work folder, its tasks): the folder itself, or where it holds no run but one for each task, WORKDIR/TASK of each."""
  if workdir is None or (user_path(workdir, "workdir") / "config.json").exists():
    return [(workdir, list(tasks))]
  folders = [(user_path(workdir, "workdir") / task, task) for task in tasks]
  if not any(folder.is_dir() for folder, _ in folders):
    return [(workdir, list(tasks))]
  return [(os.fspath(folder), [task]) for folder, task in folders]
