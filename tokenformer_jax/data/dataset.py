"""`open_data`: from a DataConfig to batches."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import logging

from tokenformer_jax.config import DataConfig
from tokenformer_jax.config.data import MAIN_HELD_OUT
from tokenformer_jax.config.validation import nearest
from tokenformer_jax.data import loader
from tokenformer_jax.data.batches import Batch, MaskedBatch
from tokenformer_jax.data.corpus import split
from tokenformer_jax.data.masking import Masking, mask_id
from tokenformer_jax.data.mixture import Mixture, Packing, Sources
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.data.tokenizer_files import open_tokenizer


class Data:
  """A corpus, or a mixture of several, with its held-out sets; `open_data` makes it.

  Attributes:
    tokenizer: the tokenizer.
    fingerprint: JSON-able; equal for equal data and different for different data (see `check_same`).
    report: JSON-able; for `train` and for each held-out set a list with the name, the tokens, the windows and the
      dropped tokens of each source.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    train: Mixture,
    held_out: dict[str, Mixture],
    *,
    seed: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    fingerprint: dict[str, Any],
    masking: Masking | None = None,
  ):
    self.tokenizer, self.fingerprint, self._masking = tokenizer, fingerprint, masking
    self._train, self._held_out = train, held_out
    self._share = dict(batch_size=batch_size, process_index=process_index, process_count=process_count)
    self.report = {"train": train.report, **{name: mixture.report for name, mixture in held_out.items()}}
    for name, entries in self.report.items():
      for entry in entries:
        logging.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in entry.items()))
    train.require_a_batch("training text", batch_size)
    self._train_order = loader.endless_order(train.lengths, train.weights, seed)
    self._held_out_orders = {name: _held_out_order(name, mixture, batch_size) for name, mixture in held_out.items()}

  def train_batches(self) -> loader.BatchIterator:
    """An endless iterator of this process's share of the global batches, from the beginning."""
    batches = loader.batches(self._train.packers, self._train_order, finish=self._masking, **self._share)
    return loader.BatchIterator(batches)

  def held_out_batches(self, num_batches: int | None = None) -> Iterator[Batch | MaskedBatch]:
    """This process's share of the first batches of the main held-out text; the same batches at every call.

    Args:
      num_batches: how many global batches; fewer come where the text has fewer. None gives all of them.
    """
    return self._batches_of(MAIN_HELD_OUT, num_batches)

  def named_held_out_batches(self, num_batches: int | None = None) -> dict[str, Iterator[Batch | MaskedBatch]]:
    """What `held_out_batches` gives, for every held-out set by its name.

    The main held-out text comes first and is called `held_out`; the sets of `DataConfig.held_out_sets` follow under
    their names, in the order in which the config has them.

    Args:
      num_batches: how many global batches of each set; fewer come where a set has fewer. None gives all of them.
    """
    return {name: self._batches_of(name, num_batches) for name in self._held_out}

  def train_tokens(self) -> np.ndarray:
    """[n] unsigned integers, all training ids; a copy unless the text is one stretch of one source."""
    return self._train.tokens()

  def held_out_tokens(self, name: str = MAIN_HELD_OUT) -> np.ndarray:
    """[n] unsigned integers, all ids of one held-out set; a copy unless the text is one stretch of one source."""
    if name not in self._held_out:
      raise ValueError(f"held-out set {name!r} is unknown.{nearest(name, self._held_out)}")
    return self._held_out[name].tokens()

  def _batches_of(self, name: str, num_batches: int | None) -> Iterator[Batch | MaskedBatch]:
    order = self._held_out_orders[name]
    available = len(order) // self._share["batch_size"]
    count = available if num_batches is None else min(num_batches, available)
    # The masks of held-out text are the same in every evaluation and in every run.
    masking = self._masking and dataclasses.replace(self._masking, seed=name)
    batches = loader.batches(self._held_out[name].packers, order, num_batches=count, finish=masking, **self._share)
    return iter(batches.to_iter_dataset(loader.READ_AHEAD))


def open_data(
  config: DataConfig,
  *,
  seq_length: int,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer: Tokenizer | None = None,
  masks: bool = False,
) -> Data:
  """Opens the sources and the tokenizer that a config names.

  Args:
    config: what to read.
    seq_length: T, the number of ids in one row.
    process_index: which share of every batch is this process's.
    process_count: the number of shares.
    tokenizer: the tokenizer to use instead of the one that the config names, e.g. a work folder's.
    masks: whether batches are `MaskedBatch`es for masked language modelling instead of `Batch`es.

  Raises:
    ValueError: a field of the config or a piece of the text cannot be used.
  """
  if config.batch_size % process_count:
    raise ValueError(
      f"batch_size={config.batch_size} cannot be shared by {process_count} processes: make it a multiple."
    )
  tokenizer = tokenizer or open_tokenizer(config.tokenizer, config.special_tokens)
  packing = Packing(config.packing, seq_length, tokenizer.end_of_document)
  train = Sources(config.source, tokenizer, config.bad_text)
  if config.held_out_source:
    held_out = Sources(config.held_out_source, tokenizer, config.bad_text)
    mixtures = {MAIN_HELD_OUT: held_out.mixture(packing)}
    train_mixture = train.mixture(packing)
    held_out_identity: Any = held_out.identities
  else:
    train_parts, held_out_parts = zip(*(split(corpus, config.held_out_fraction) for corpus in train.corpora))
    mixtures = {MAIN_HELD_OUT: Mixture(held_out_parts, train.weights, packing)}
    train_mixture = Mixture(train_parts, train.weights, packing)
    held_out_identity = {"fraction": config.held_out_fraction}
  fingerprint: dict[str, Any] = dict(
    source=train.identities,
    held_out=held_out_identity,
    tokenizer=tokenizer.fingerprint,
    packing=config.packing,
    seq_length=seq_length,
    batch_size=config.batch_size,
    seed=config.seed,
  )
  for name, spec in config.named_held_out_sources().items():
    named = Sources(spec, tokenizer, config.bad_text)
    mixtures[name] = named.mixture(packing)
    # The key is there only if there are sets, so that the fingerprints of runs without any stay what they were.
    fingerprint.setdefault("held_out_sets", {})[name] = named.identities
  masking = None
  if masks:
    masking = Masking(
      config.mask_rate, mask_id(tokenizer, config.mask_token, config.tokenizer), tokenizer.vocab_size, config.seed
    )
    if not masking.num_places(seq_length):
      raise ValueError(f"data.mask_rate={config.mask_rate}: it masks none of {seq_length} tokens; raise it.")
    fingerprint["masking"] = {"rate": masking.rate, "id": masking.mask_id}
  return Data(
    tokenizer,
    train_mixture,
    mixtures,
    seed=config.seed,
    batch_size=config.batch_size,
    process_index=process_index,
    process_count=process_count,
    fingerprint=fingerprint,
    masking=masking,
  )


def _held_out_order(name: str, mixture: Mixture, batch_size: int) -> grain.MapDataset:
  """The order of a held-out set's rows; ValueError if they do not fill a batch."""
  is_main = name == MAIN_HELD_OUT
  what = "held-out text" if is_main else f"text of the held-out set {name!r}"
  mixture.require_a_batch(what, batch_size, ", or set held_out_source or held_out_fraction" if is_main else "")
  order = loader.held_out_order(mixture.lengths, mixture.weights)
  if len(order) < batch_size:
    raise ValueError(
      f"the mixture of the {what} ends after {len(order)} windows, where its first source is used up, before one "
      f"batch of {batch_size}: give more text, or other weights."
    )
  return order
