"""The zero-shot sets of the paper's table, and BLiMP, as questions with scored answers.

Prompts are those of EleutherAI's harness. The files are looked for in a folder with
`eval_zero_shot/*.jsonl` and `blimp/BLiMP.zip`; nothing is downloaded.
"""

import json
import pathlib
import zipfile
from typing import NamedTuple

from tokenformer_jax.config.validation import nearest


class Question(NamedTuple):
  """Answers to choose from: answer i is `continuations[i]` after `contexts[i]`.

  Attributes:
    gold: the right one. A single answer has nothing to choose: it counts if it is the likeliest text.
    lengths: characters of each answer, for the length-normalised choice.
    group: what the question belongs to within its task.
  """

  contexts: tuple[str, ...]
  continuations: tuple[str, ...]
  gold: int
  lengths: tuple[int, ...]
  group: str = ""


def _choices(context: str, choices: list[str], gold: int, group: str = "") -> Question:
  return Question(
    (context,) * len(choices), tuple(" " + choice for choice in choices), gold, tuple(map(len, choices)), group
  )


def _arc(row) -> Question:
  return _choices(f"Question: {row['query']}\nAnswer:", row["choices"], row["gold"])


def _piqa(row) -> Question:
  return _choices(row["query"].rstrip("\n") + "\nAnswer:", row["choices"], row["gold"])


def _hellaswag(row) -> Question:
  return _choices(row["query"], row["choices"], row["gold"])


def _winogrande(row) -> Question:
  options, ending = row["context_options"], row["continuation"]
  return Question(tuple(options), (" " + ending,) * len(options), row["gold"], (len(ending),) * len(options))


def _lambada(row) -> Question:
  return Question((row["context"],), (" " + row["continuation"],), 0, (len(row["continuation"]),))


def _blimp(row) -> Question:
  return _choices("", [row["sentence_good"], row["sentence_bad"]], 0, row["UID"])


# Task -> its file, and the question in a row of it.
TASKS = {
  "lambada_openai": ("eval_zero_shot/lambada_openai.jsonl", _lambada),
  "hellaswag": ("eval_zero_shot/hellaswag_val.jsonl", _hellaswag),
  "piqa": ("eval_zero_shot/piqa.jsonl", _piqa),
  "arc_easy": ("eval_zero_shot/arc_easy_test.jsonl", _arc),
  "arc_challenge": ("eval_zero_shot/arc_challenge_test.jsonl", _arc),
  "winogrande": ("eval_zero_shot/winogrande.jsonl", _winogrande),
  "blimp": ("blimp/BLiMP.zip", _blimp),
}


def read_task(name: str, folder: str | pathlib.Path, limit: int | None = None) -> list[Question]:
  """The questions of a task, the first `limit` of each file.

  Raises:
    ValueError: an unknown task, no such file in `folder`, or a row that is not such a task's.
  """
  questions = []
  for part, number, line in read_rows(name, folder, limit):
    try:
      questions.append(TASKS[name][1](json.loads(line)))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{part}, line {number}: not a row of {name} ({type(error).__name__}: {error}).") from None
  return questions


def read_rows(name: str, folder: str | pathlib.Path, limit: int | None = None) -> list[tuple[str, int, str]]:
  """(file, line number, JSON text) of a task's rows, the first `limit` of each file."""
  if name not in TASKS:
    raise ValueError(f"task {name!r} is unknown: choose from {', '.join(TASKS)}.{nearest(name, TASKS)}")
  place, _ = TASKS[name]
  path = pathlib.Path(folder) / place
  if not path.is_file():
    raise ValueError(f"task {name}: no file {path}; give the folder that holds {place} (--data, or TOKENFORMER_DATA).")
  rows = [(part, number, line) for part, lines in _files(path) for number, line in enumerate(lines[:limit], start=1)]
  if not rows:
    raise ValueError(f"task {name}: {path} holds no questions.")
  return rows


def _files(path: pathlib.Path):
  """[(name, lines)] of a file, or of the jsonl files in an archive."""
  try:
    if path.suffix != ".zip":
      return [(path, path.read_text(encoding="utf-8").splitlines())]
    with zipfile.ZipFile(path) as archive:
      members = sorted(
        name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX/")
      )
      return [(f"{path}/{name}", archive.read(name).decode("utf-8").splitlines()) for name in members]
  except (zipfile.BadZipFile, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged ({error}); get it again.") from None
