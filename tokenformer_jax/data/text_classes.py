"""Texts with classes as batches: single texts and pairs, tokenized as BERT's fine-tuning has them."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from tokenformer_jax.config import DataConfig
from tokenformer_jax.config.data import MAIN_HELD_OUT
from tokenformer_jax.data import loader
from tokenformer_jax.data.batches import ClassBatch
from tokenformer_jax.data.glue import TASKS, GlueSplit, read_glue
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.data.tokenizer_files import open_tokenizer

_BEGINNINGS = ("[CLS]", "<s>", "<cls>", "<0xFE>")
_SEPARATORS = ("[SEP]", "</s>", "<sep>")


class TextPairs:
  """Rows `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, and padding; a packer of the loader.

  Where a row is too long the longer of its two texts is cut, from its end. A tokenizer without such tokens takes its
  end of document in their place.

  Args:
    split: the examples.
    tokenizer: the tokenizer of the texts.
    seq_length: T, the number of ids in one row.
  """

  def __init__(self, split: GlueSplit, tokenizer: Tokenizer, seq_length: int):
    self._seq_length, self._end = seq_length, tokenizer.end_of_document
    texts = [example.texts for example in split.examples]
    columns = [tokenizer.encode_documents(column) for column in zip(*texts)]
    if seq_length < 2 * len(columns) + 1:
      raise ValueError(f"model.seq_length={seq_length}: too short for {len(columns)} texts and their separators.")
    self._ids = list(zip(*columns))
    is_number = not TASKS[split.task].classes
    self.labels = np.array([example.label for example in split.examples], np.float32 if is_number else np.int32)
    self._beginning, self._separator = (
      next((i for name in names if (i := tokenizer.token_id(name)) is not None), self._end)
      for names in (_BEGINNINGS, _SEPARATORS)
    )

  def __len__(self) -> int:
    return len(self._ids)

  def row(self, index: int) -> ClassBatch:
    """Example `index`; of weight 0 where there is none, so that such rows fill the last batch."""
    exists = index < len(self)
    index = index if exists else 0
    parts = list(self._ids[index])
    space = self._seq_length - 1 - len(parts)
    while (excess := sum(map(len, parts)) - space) > 0:
      longest = max(range(len(parts)), key=lambda i: len(parts[i]))
      others = max((len(part) for i, part in enumerate(parts) if i != longest), default=0)
      cut = min(excess, max(1, len(parts[longest]) - others))
      parts[longest] = parts[longest][: len(parts[longest]) - cut]
    inputs = np.full(self._seq_length, self._end, np.int32)
    segments, types = np.zeros((2, self._seq_length), np.int32)
    inputs[0], length = self._beginning, 1
    for number, part in enumerate(parts):
      end = length + len(part) + 1
      inputs[length : end - 1], inputs[end - 1], types[length:end] = part, self._separator, number
      length = end
    segments[:length] = 1
    return ClassBatch(inputs, self.labels[index], segments, np.asarray(exists, np.float32), types)


class TextClasses:
  """A task with its held-out splits, as `data.run_data.RunData` describes it.

  Args:
    config: names the source; the held-out examples are by default those of the task's `dev` split, of MNLI
      `dev_matched`, with `dev_mismatched` as a set called `mismatched`.
    seq_length: T, the number of ids in one row.
    num_classes: of the model, 1 for a regression.
    process_index, process_count: which share of every batch is this process's.

  Raises:
    ValueError: a field of the config or a line of a file cannot be used, or the model has other classes than the task.
  """

  def __init__(
    self, config: DataConfig, *, seq_length: int, num_classes: int, process_index: int = 0, process_count: int = 1
  ):
    self.tokenizer = open_tokenizer(config.tokenizer, config.special_tokens)
    train = read_glue(config.source, "train", config.bad_text)
    task = TASKS[train.task]
    if num_classes != task.num_classes:
      kind = f"{task.num_classes} classes" if task.classes else "no classes but a number"
      raise ValueError(
        f"model.classifier.num_classes={num_classes}: {task.folder} has {kind}; choose {task.num_classes}."
      )
    held_out = config.held_out_source or config.source.partition("@")[0]
    splits = {MAIN_HELD_OUT: read_glue(held_out, task.held_out[0], config.bad_text)}
    if not config.held_out_source:
      for name in task.held_out[1:]:
        splits[name.removeprefix("dev_")] = read_glue(held_out, name, config.bad_text)
    for name, source in config.named_held_out_sources().items():
      splits[name] = read_glue(source, task.held_out[0], config.bad_text)
    for split in splits.values():
      if split.task != train.task:
        raise ValueError(
          f"held-out source {split.name} is of {split.task}, {train.name} of {train.task}; give one task."
        )
    self._train = TextPairs(train, self.tokenizer, seq_length)
    self._held_out = {name: TextPairs(split, self.tokenizer, seq_length) for name, split in splits.items()}
    self._share: dict[str, Any] = dict(
      batch_size=config.batch_size, process_index=process_index, process_count=process_count
    )
    self._order = loader.endless_order([len(self._train)], [1.0], config.seed)
    self.fingerprint: dict[str, Any] = dict(
      source=train.identity,
      held_out={name: split.identity for name, split in splits.items()},
      tokenizer=self.tokenizer.fingerprint,
      seq_length=seq_length,
      batch_size=config.batch_size,
      seed=config.seed,
    )
    self.report = {
      name: [dict(source=split.name, examples=len(split.examples))]
      for name, split in {"train": train, **splits}.items()
    }

  def train_batches(self) -> loader.BatchIterator:
    """An endless iterator of this process's share of the global batches, from the beginning."""
    return loader.BatchIterator(loader.batches([self._train], self._order, **self._share))

  def named_held_out_batches(self, num_batches: int | None = None) -> dict[str, Iterator[ClassBatch]]:
    """Batches of every held-out set, in the order of the files; rows of weight 0 fill the last one."""
    return {name: in_order(packer, num_batches, **self._share) for name, packer in self._held_out.items()}


def in_order(
  packer: TextPairs, num_batches: int | None = None, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[ClassBatch]:
  """The examples of a packer once, in order; rows of weight 0 fill the last batch."""
  count = -(-len(packer) // batch_size)
  order = grain.MapDataset.range(count * batch_size).map(_of_first_packer)
  batches = loader.batches(
    [packer],
    order,
    batch_size=batch_size,
    num_batches=count if num_batches is None else min(num_batches, count),
    process_index=process_index,
    process_count=process_count,
  )
  return iter(batches.to_iter_dataset(loader.READ_AHEAD))


def _of_first_packer(row: int) -> tuple[int, int]:
  return 0, row
