"""The tasks of GLUE (arXiv 1804.07461): their files, their columns and their classes, read as examples."""

import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.data.catalogues import tfds_builder, tfds_records
from tokenformer_jax.data.documents import BadText
from tokenformer_jax.data.fingerprint import hash_file
from tokenformer_jax.paths import user_path


class GlueTask(NamedTuple):
  """One task.

  Attributes:
    folder: what its folder is called.
    texts: the columns of its one or two texts.
    label: the column of the label.
    classes: the labels in the files, in the order of their numbers; () for a regression.
    most: of a regression, the largest label; the smallest is 0.
    tfds_texts: the features of the texts in tensorflow-datasets.
    held_out: the splits that models are compared on.
    columns: the columns of files without a line of names.
  """

  folder: str
  texts: tuple[str, ...]
  label: str
  classes: tuple[str, ...]
  most: float = 0.0
  tfds_texts: tuple[str, ...] = ("sentence1", "sentence2")
  held_out: tuple[str, ...] = ("dev",)
  columns: tuple[str, ...] = ()

  @property
  def num_classes(self) -> int:
    """The outputs of a model for the task: its classes, or 1 for a regression."""
    return len(self.classes) or 1


_PAIR, _TRUE, _ENTAILMENT = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")
TASKS = {
  "cola": GlueTask(
    "CoLA", ("sentence",), "label", _TRUE, tfds_texts=("sentence",), columns=("source", "label", "star", "sentence")
  ),
  "sst2": GlueTask("SST-2", ("sentence",), "label", _TRUE, tfds_texts=("sentence",)),
  "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _TRUE),
  "stsb": GlueTask("STS-B", _PAIR, "score", (), most=5.0),
  "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", _TRUE, tfds_texts=("question1", "question2")),
  "mnli": GlueTask(
    "MNLI",
    _PAIR,
    "gold_label",
    ("entailment", "neutral", "contradiction"),
    tfds_texts=("premise", "hypothesis"),
    held_out=("dev_matched", "dev_mismatched"),
  ),
  "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, tfds_texts=("question", "sentence")),
  "rte": GlueTask("RTE", _PAIR, "label", _ENTAILMENT),
  "wnli": GlueTask("WNLI", _PAIR, "label", _TRUE),
}


class Example(NamedTuple):
  """One or two texts and the number of their class, or of a regression their label."""

  texts: tuple[str, ...]
  label: float


class GlueSplit(NamedTuple):
  """The examples of one split.

  Attributes:
    task: a key of `TASKS`.
    name: the source, for messages.
    examples: in the order of the file.
    identity: JSON-able; what decides about the examples.
  """

  task: str
  name: str
  examples: list[Example]
  identity: dict


def task_name(text: str) -> str:
  """The key of `TASKS` that a name such as `SST-2` or `sst2` means.

  Raises:
    ValueError: there is no such task.
  """
  name = re.sub("[-_]", "", text).lower()
  if name not in TASKS:
    raise ValueError(f"GLUE has no task {text!r}: choose one of {', '.join(TASKS)}.{nearest(name, TASKS)}")
  return name


def is_glue(source: str) -> bool:
  """Whether a source is one of GLUE's tasks."""
  return source.startswith(("glue:", "tfds:glue/"))


def read_glue(source: str, split: str = "train", bad_text: str = "error") -> GlueSplit:
  """Reads `glue:FOLDER/TASK[@SPLIT]`, the tasks' own tab-separated files, or `tfds:glue/TASK[@SPLIT]`.

  Args:
    source: the source.
    split: the split where the source names none: `train` or `dev`, of MNLI `dev_matched` or `dev_mismatched`.
    bad_text: `skip` leaves out lines without a needed column or with a bad label; otherwise they are errors.

  Raises:
    ValueError: another kind of source, an unknown task, a missing file, or a line that cannot be used, by path and
      number.
  """
  if not is_glue(source):
    raise ValueError(
      f"source {source!r}: a classifier of texts reads glue:FOLDER/TASK or tfds:glue/TASK, where TASK is one of "
      f"{', '.join(TASKS)}."
    )
  where, _, given = source.partition("@")
  split = given or split
  task = task_name(pathlib.PurePath(where.partition(":")[2]).name)
  bad = BadText(bad_text)
  if where.startswith("tfds:"):
    examples, identity = list(_of_tfds(task, where, split, bad)), {"split": split}
  else:
    path = user_path(where.removeprefix("glue:"), "data.source") / f"{split}.tsv"
    if not path.is_file():
      raise ValueError(f"source {source}: there is no file {path}.")
    examples, identity = list(_of_file(task, path, bad)), {"sha256": hash_file(path)}
  bad.report(f"{where}@{split}")
  if not examples:
    raise ValueError(f"source {where}@{split} holds no examples.")
  return GlueSplit(task, f"{where}@{split}", examples, {"task": task, "examples": len(examples), **identity})


def _of_file(task: str, path: epath.Path, bad: BadText) -> Iterator[Example]:
  """The examples of a file of tab-separated values, in which quotation marks are text."""
  part = TASKS[task]
  lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
  lines = [line.removesuffix("\r") for line in lines]
  columns, first = (part.columns, 1) if part.columns else (tuple(lines[0].split("\t")), 2)
  needed = (*part.texts, part.label)
  if missing := [name for name in needed if name not in columns]:
    raise ValueError(
      f"{path}, line 1: {part.folder} needs a column {missing[0]!r}; there are {', '.join(map(repr, columns))}."
    )
  places = [columns.index(name) for name in needed]
  for number, line in enumerate(lines[first - 1 :], start=first):
    if not line:
      continue
    cells = line.split("\t")
    where = f"{path}, line {number}"
    if len(cells) <= max(places):
      bad.refuse(f"{where}: {len(cells)} columns, of the {len(columns)} that are needed for {', '.join(needed)}.")
      continue
    *texts, label = (cells[place] for place in places)
    value = _label(part, label)
    if value is None:
      bad.refuse(f"{where}: {part.label}={label!r} is no label of {part.folder}: {_labels(part)}.")
    else:
      yield Example(tuple(texts), value)


def _of_tfds(task: str, source: str, split: str, bad: BadText) -> Iterator[Example]:
  part = TASKS[task]
  _, builder = tfds_builder(f"glue/{task}", source)
  records = tfds_records(builder, split.replace("dev", "validation"), source)
  for index in range(len(records)):
    record = records[index]
    texts = tuple(bytes(record[name]).decode("utf-8") for name in part.tfds_texts)
    label = float(record["label"])
    if not 0 <= label <= (part.most if not part.classes else len(part.classes) - 1):
      bad.refuse(
        f"source {source}@{split}, record {index}: label={label} is no label of {part.folder}: {_labels(part)}."
      )
    else:
      yield Example(texts, label)


def _label(part: GlueTask, text: str) -> float | None:
  """The number of a label in a file, None if it is none."""
  if part.classes:
    return float(part.classes.index(text)) if text in part.classes else None
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) and 0 <= value <= part.most else None


def _labels(part: GlueTask) -> str:
  return f"expected one of {', '.join(part.classes)}" if part.classes else f"expected a number from 0 to {part.most}"
