"""The zero-shot tasks of the paper's table, and BLiMP, as questions with answers to score.

The prompts are those of EleutherAI's harness. The files are read from a folder that holds `eval_zero_shot/*.jsonl` and
`blimp/BLiMP.zip`; nothing is downloaded.
"""

import os
import reprlib
from collections.abc import Callable
from typing import NamedTuple

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.evaluation.task_rows import Row, read_rows
from tokenformer_jax.paths import user_path


class Question(NamedTuple):
  """A question with its possible answers; answer i is `continuations[i]` after `contexts[i]`.

  Attributes:
    contexts: one text per answer.
    continuations: one text per answer.
    gold: the index of the right answer. A single answer is right if it is the most likely continuation.
    lengths: the number of characters of each answer, for the length-normalised choice.
    group: the part of the task to which the question belongs, e.g. a paradigm of BLiMP.
    where: the file and line of the question, for messages.
  """

  contexts: tuple[str, ...]
  continuations: tuple[str, ...]
  gold: int
  lengths: tuple[int, ...]
  group: str = ""
  where: str = ""


class Task(NamedTuple):
  """One task.

  Attributes:
    file: the path of its file below the data folder.
    question: makes the question of a row, or raises a ValueError that names the field and the value.
  """

  file: str
  question: Callable[[dict], Question]


def _choices(context: str, choices: list[str], gold: int, group: str = "") -> Question:
  continuations = tuple(" " + choice for choice in choices)
  return Question((context,) * len(choices), continuations, gold, tuple(map(len, choices)), group)


def _arc(row) -> Question:
  choices = _texts(row, "choices")
  return _choices(f"Question: {_text(row, 'query', least=0)}\nAnswer:", choices, _gold(row, len(choices)))


def _piqa(row) -> Question:
  choices = _texts(row, "choices")
  return _choices(_text(row, "query", least=0).rstrip("\n") + "\nAnswer:", choices, _gold(row, len(choices)))


def _hellaswag(row) -> Question:
  choices = _texts(row, "choices")
  return _choices(_text(row, "query", least=0), choices, _gold(row, len(choices)))


def _winogrande(row) -> Question:
  contexts, ending = _texts(row, "context_options"), _text(row, "continuation")
  count = len(contexts)
  return Question(tuple(contexts), (" " + ending,) * count, _gold(row, count), (len(ending),) * count)


def _lambada(row) -> Question:
  word = _text(row, "continuation")
  return Question((_text(row, "context", least=0),), (" " + word,), 0, (len(word),))


def _blimp(row) -> Question:
  return _choices("", [_text(row, "sentence_good"), _text(row, "sentence_bad")], 0, _text(row, "UID"))


TASKS = {
  "lambada_openai": Task("eval_zero_shot/lambada_openai.jsonl", _lambada),
  "hellaswag": Task("eval_zero_shot/hellaswag_val.jsonl", _hellaswag),
  "piqa": Task("eval_zero_shot/piqa.jsonl", _piqa),
  "arc_easy": Task("eval_zero_shot/arc_easy_test.jsonl", _arc),
  "arc_challenge": Task("eval_zero_shot/arc_challenge_test.jsonl", _arc),
  "winogrande": Task("eval_zero_shot/winogrande.jsonl", _winogrande),
  "blimp": Task("blimp/BLiMP.zip", _blimp),
}


def read_task(name: str, folder: str | os.PathLike, limit: int | None = None) -> list[Question]:
  """Reads the questions of a task.

  Args:
    name: a key of `TASKS`.
    folder: the folder that holds the tasks' files, local or a URI.
    limit: the number of questions to read from each file; None reads all.

  Raises:
    ValueError: an unknown task, a missing file, or a row that is no question of the task; the message names the
      file, the line, the field and the value.
  """
  return [_question(name, row) for row in task_rows(name, folder, limit)]


def task_rows(name: str, folder: str | os.PathLike, limit: int | None = None) -> list[Row]:
  """The rows from which `read_task` makes its questions."""
  if name not in TASKS:
    raise ValueError(f"task {name!r} is unknown: choose from {', '.join(TASKS)}.{nearest(name, TASKS)}")
  file = TASKS[name].file
  path = user_path(folder, "data_folder") / file
  if not path.is_file():
    raise ValueError(
      f"task {name}: there is no file {path}; name the folder that holds {file} (data_folder, --data or the environment "
      "variable TOKENFORMER_DATA)."
    )
  rows = read_rows(path, limit)
  if not rows:
    raise ValueError(f"task {name}: {path} holds no questions.")
  return rows


def _question(name: str, row: Row) -> Question:
  fields = row.parse()
  try:
    return TASKS[name].question(fields)._replace(where=row.where)
  except ValueError as error:
    raise ValueError(f"{row.where} is not a row of {name}: {error}") from None


def _field(row: dict, field: str):
  if field not in row:
    raise ValueError(f"it has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}.")
  return row[field]


def _text(row: dict, field: str, least: int = 1) -> str:
  """A text of at least `least` characters."""
  text = _field(row, field)
  _require(isinstance(text, str) and len(text) >= least, field, text, "expected a text" + " with characters" * least)
  return _unicode(field, text)


def _texts(row: dict, field: str) -> list[str]:
  texts = _field(row, field)
  _require(
    isinstance(texts, list) and len(texts) >= 2 and all(isinstance(text, str) and text for text in texts),
    field,
    texts,
    "expected a list of two or more texts, none of them empty",
  )
  return [_unicode(field, text) for text in texts]


def _gold(row: dict, count: int) -> int:
  gold = _field(row, "gold")
  _require(type(gold) is int and 0 <= gold < count, "gold", gold, f"expected an index into the {count} choices, from 0")
  return gold


def _unicode(field: str, text: str) -> str:
  """The text itself; an escape such as \\ud800 makes half a surrogate pair, which no tokenizer can encode."""
  _require(_encodes(text), field, text, "the text holds half of a surrogate pair")
  return text


def _encodes(text: str) -> bool:
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def _require(condition: bool, field: str, value, expected: str) -> None:
  if not condition:
    raise ValueError(f"{field}={reprlib.repr(value)}: {expected}.")
