"""Mixtures: the corpora of one spec string with their weights, packed into rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.data.corpus import Corpus, Part
from tokenformer_jax.data.packing import ContiguousWindows, PackedDocuments
from tokenformer_jax.data.sources import open_corpus
from tokenformer_jax.data.spec import parse_sources
from tokenformer_jax.data.tokenizer import Tokenizer


class Packing(NamedTuple):
  """How parts of corpora become rows.

  Attributes:
    choice: `contiguous` or `documents`, as in `DataConfig.packing`.
    seq_length: T, the number of ids in one row.
    padding_id: the id that fills the rest of a row of documents.
  """

  choice: str
  seq_length: int
  padding_id: int

  def pack(self, part: Part) -> ContiguousWindows | PackedDocuments:
    """The rows of `part`."""
    if self.choice == "documents":
      return PackedDocuments(part, self.seq_length, self.padding_id)
    return ContiguousWindows(part, self.seq_length)


class Mixture:
  """Parts of corpora with their weights, packed into rows.

  Attributes:
    weights: the share of each part, not normalised.
    packers: the rows of each part.
    lengths: the number of rows of each part.
  """

  def __init__(self, parts: Sequence[Part], weights: list[float], packing: Packing):
    self._parts, self.weights, self._packing = parts, weights, packing
    self.packers = [packing.pack(part) for part in parts]
    self.lengths = [len(packer) for packer in self.packers]

  @property
  def report(self) -> list[dict[str, Any]]:
    """JSON-able; the name, the tokens, the windows and the dropped tokens of each part."""
    return [
      dict(source=part.corpus.name, tokens=len(part), **packer.report)
      for part, packer in zip(self._parts, self.packers)
    ]

  def tokens(self) -> np.ndarray:
    """[n] unsigned integers, all ids; a copy unless the text is one stretch of one source."""
    arrays = [part.read(0, len(part)) for part in self._parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

  def require_a_batch(self, what: str, batch_size: int, more: str = "") -> None:
    """Raises ValueError unless there are rows for a batch and every part has a row.

    Args:
      what: names the mixture in the message.
      batch_size: the rows of one global batch.
      more: further ways out, to end the message.
    """
    if sum(self.lengths) < batch_size or not all(self.lengths):
      raise ValueError(
        f"the {what} fills {sum(self.lengths)} windows of {self._packing.seq_length} tokens, less than one batch of "
        f"{batch_size} (or one source of the mixture fills none): give more text, or a smaller seq_length or "
        f"batch_size{more}."
      )


class Sources:
  """The opened corpora of one spec string.

  Args:
    spec: see `tokenformer_jax.data.spec.parse_sources`.
    tokenizer: the tokenizer of the text.
    bad_text: see `tokenformer_jax.data.documents.BadText`.

  Attributes:
    corpora: one corpus a source.
    weights: the share of each corpus in a mixture, not normalised.
    identities: what each corpus is, JSON-able, for fingerprints.
  """

  def __init__(self, spec: str, tokenizer: Tokenizer, bad_text: str):
    specs = parse_sources(spec)
    self.corpora: list[Corpus] = [open_corpus(source, tokenizer, bad_text) for source in specs]
    self.weights = [source.weight for source in specs]
    self.identities: list[dict[str, Any]] = [
      dict(kind=source.kind, weight=source.weight, **corpus.identity) for source, corpus in zip(specs, self.corpora)
    ]

  def mixture(self, packing: Packing) -> Mixture:
    """All documents of all corpora."""
    return Mixture([Part(corpus) for corpus in self.corpora], self.weights, packing)
