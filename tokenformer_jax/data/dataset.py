"""`open_data`: from a DataConfig to batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import loader
from tokenformer_jax.data.corpus import Part, split
from tokenformer_jax.data.packing import Batch, ContiguousWindows, PackedDocuments
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.data.tokenizer import Tokenizer, open_tokenizer


class Data:
  """An open corpus, or a mixture of several; made by `open_data`.

  Attributes:
    tokenizer: the tokenizer.
    fingerprint: JSON-able; tells this data from any other (see `check_same`).
    report: JSON-able; documents, tokens, windows and dropped tokens of each source's two parts.
  """

  def __init__(
    self,
    config: DataConfig,
    tokenizer: Tokenizer,
    train: list[Part],
    held_out: list[Part],
    weights: list[float],
    held_out_weights: list[float],
    *,
    seq_length: int,
    process_index: int,
    process_count: int,
    fingerprint: dict[str, Any],
  ):
    self.tokenizer, self.fingerprint = tokenizer, fingerprint
    self._config, self._train, self._held_out = config, train, held_out
    self._share = dict(batch_size=config.batch_size, process_index=process_index, process_count=process_count)
    self._train_packers = [_pack(part, config, tokenizer, seq_length) for part in train]
    self._held_out_packers = [_pack(part, config, tokenizer, seq_length) for part in held_out]
    self.report = {
      "train": [_report(*pair) for pair in zip(train, self._train_packers)],
      "held_out": [_report(*pair) for pair in zip(held_out, self._held_out_packers)],
    }
    for kind, entries in self.report.items():
      for entry in entries:
        logging.info("%s: %s", kind, ", ".join(f"{key} {value}" for key, value in entry.items()))
    for name, packers in (("training", self._train_packers), ("held-out", self._held_out_packers)):
      _require_a_batch(name, packers, config.batch_size, seq_length)
    self._train_order = loader.endless_order([len(p) for p in self._train_packers], weights, config.seed)
    self._held_out_order = loader.held_out_order([len(p) for p in self._held_out_packers], held_out_weights)
    if len(self._held_out_order) < config.batch_size:
      raise ValueError(
        f"the held-out mixture ends after {len(self._held_out_order)} windows, where its first "
        f"source is used up, before one batch of {config.batch_size}: give more held-out text, "
        "or other weights."
      )

  def train_batches(self) -> loader.BatchIterator:
    """An endless iterator of this process's share of the global batches, from the beginning."""
    return loader.BatchIterator(loader.batches(self._train_packers, self._train_order, **self._share))

  def held_out_batches(self, num_batches: int | None = None) -> Iterator[Batch]:
    """The first `num_batches` held-out batches, fewer where the text has fewer; the same at every call."""
    available = len(self._held_out_order) // self._config.batch_size
    count = available if num_batches is None else min(num_batches, available)
    batches = loader.batches(self._held_out_packers, self._held_out_order, num_batches=count, **self._share)
    return iter(batches.to_iter_dataset(loader.READ_AHEAD))

  def train_tokens(self) -> np.ndarray:
    """[n] unsigned integers, all training ids; a copy unless the text is one stretch of one source."""
    return _tokens(self._train)

  def held_out_tokens(self) -> np.ndarray:
    """[n] unsigned integers, all held-out ids; a copy unless the text is one stretch of one source."""
    return _tokens(self._held_out)


def open_data(
  config: DataConfig,
  *,
  seq_length: int,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer: Tokenizer | None = None,
) -> Data:
  """Opens the sources and the tokenizer that a config names.

  Args:
    config: what to read.
    seq_length: T, the ids in one row.
    process_index: which share of every batch is this process's.
    process_count: the number of shares.
    tokenizer: taken instead of the one that the config names, e.g. a work folder's.

  Raises ValueError for whatever in the config or in the text does not do.
  """
  if config.batch_size % process_count:
    raise ValueError(
      f"batch_size={config.batch_size} cannot be shared by {process_count} processes: make it a multiple."
    )
  tokenizer = tokenizer or open_tokenizer(config.tokenizer)
  specs = parse_sources(config.source)
  corpora = [open_corpus(spec, tokenizer, config.bad_text) for spec in specs]
  weights = [spec.weight for spec in specs]
  if config.held_out_source:
    held_out_specs = parse_sources(config.held_out_source)
    train = [Part(corpus) for corpus in corpora]
    held_out_corpora = [open_corpus(spec, tokenizer, config.bad_text) for spec in held_out_specs]
    held_out = [Part(corpus) for corpus in held_out_corpora]
    held_out_weights = [spec.weight for spec in held_out_specs]
    held_out_identity = _identities(held_out_specs, held_out_corpora)
  else:
    train, held_out = map(list, zip(*(split(corpus, config.held_out_fraction) for corpus in corpora)))
    held_out_weights, held_out_identity = weights, {"fraction": config.held_out_fraction}
  fingerprint = dict(
    source=_identities(specs, corpora),
    held_out=held_out_identity,
    tokenizer=tokenizer.fingerprint,
    packing=config.packing,
    seq_length=seq_length,
    batch_size=config.batch_size,
    seed=config.seed,
  )
  return Data(
    config,
    tokenizer,
    train,
    held_out,
    weights,
    held_out_weights,
    seq_length=seq_length,
    process_index=process_index,
    process_count=process_count,
    fingerprint=fingerprint,
  )


def _identities(specs, corpora) -> list[dict[str, Any]]:
  return [dict(kind=spec.kind, weight=spec.weight, **corpus.identity) for spec, corpus in zip(specs, corpora)]


def _pack(part: Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int):
  if config.packing == "documents":
    return PackedDocuments(part, seq_length, padding_id=tokenizer.end_of_document)
  return ContiguousWindows(part, seq_length)


def _report(part: Part, packer) -> dict[str, Any]:
  return dict(source=part.corpus.name, tokens=len(part), **packer.report)


def _require_a_batch(name: str, packers, batch_size: int, seq_length: int) -> None:
  windows = sum(len(packer) for packer in packers)
  if windows < batch_size or not all(len(packer) for packer in packers):
    raise ValueError(
      f"the {name} text fills {windows} windows of {seq_length} tokens, less than one batch "
      f"of {batch_size} (or one source of the mixture fills none): give more text, or a "
      "smaller seq_length or batch_size; for held-out text also held_out_source or "
      "held_out_fraction."
    )


def _tokens(parts: list[Part]) -> np.ndarray:
  arrays = [part.read(0, len(part)) for part in parts]
  return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
