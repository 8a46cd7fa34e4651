"""Corpora: the token ids of many documents, in memory or in files, split into training and held-out parts."""

import collections
import concurrent.futures
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from tokenformer_jax.data.documents import BadText, Document, DocumentSource
from tokenformer_jax.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4_000_000  # Of text that the tokenizer gets at once; this bounds its memory to some 100 MB.


class Corpus:
  """Documents as token ids, one after the other, each followed by the end-of-document id.

  Attributes:
    tokens: [n] unsigned integers, in memory or read from files when asked for.
    ends: [documents] int64, where each document ends in `tokens`; increasing, the last one is n.
    keys: [documents] uint64, a hash of each document, which decides whether it is held out.
    identity: JSON-able; what was read, equal for equal text in whatever folder it is.
    name: the name in errors and reports.
  """

  def __init__(self, tokens: np.ndarray, ends: np.ndarray, keys: np.ndarray, identity: dict, name: str):
    self.tokens, self.ends, self.keys, self.identity, self.name = tokens, ends, keys, identity, name

  def read(self, start: int, end: int) -> np.ndarray:
    """[end − start] unsigned integers, `tokens[start:end]`; subclasses for files check them."""
    return self.tokens[start:end]


def key_hash(key: str | bytes) -> int:
  """A hash of a document's key, from 0 to 2⁶⁴ − 1."""
  raw = key if isinstance(key, bytes) else key.encode("utf-8", errors="surrogateescape")
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def batches_of_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Lists of documents with about BATCH_CHARACTERS characters in each."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def encoded_batches(
  documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
  """(documents, the ids [n] of each) in order; two batches are encoded at once, so that no core waits for another."""

  def encode(batch: list[Document]) -> tuple[list[Document], list[np.ndarray]]:
    return batch, tokenizer.encode_documents([document.text for document in batch])

  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="tokenize") as pool:
    for batch in batches_of_documents(documents):
      waiting.append(pool.submit(encode, batch))
      if len(waiting) == 3:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def tokenize(source: DocumentSource, tokenizer: Tokenizer, bad_text: str = "error") -> Corpus:
  """Reads and tokenizes a whole source into memory.

  Args:
    source: the documents.
    tokenizer: the tokenizer.
    bad_text: what happens to text that cannot be read, see `BadText`.

  Raises:
    ValueError: the source has no text, or text that cannot be read.
  """
  bad, digest = BadText(bad_text), hashlib.sha256()
  pieces, lengths, keys, size = [], [], [], 0
  end = np.array([tokenizer.end_of_document], tokenizer.dtype)
  bar = tqdm.tqdm(
    desc=f"tokenizing {source.name}", total=source.size(), unit="B", unit_scale=True, disable=None, delay=2, leave=False
  )
  for documents, encoded in encoded_batches(source.read(bad), tokenizer):
    before = size
    pieces.append(np.concatenate([piece for ids in encoded for piece in (ids, end)]))
    lengths += [len(ids) + 1 for ids in encoded]
    keys += [key_hash(document.key) for document in documents]
    size += sum(update_digest(digest, document) for document in documents)
    bar.update(size - before)
  bar.close()
  if not lengths:
    raise ValueError(f"source {source.name} holds no text: check the files or the data set that it names.")
  bad.report(source.name)
  identity = dict(
    documents=len(lengths), bytes=size, sha256=digest.hexdigest(), replaced=bad.replaced, skipped=bad.skipped
  )
  return Corpus(np.concatenate(pieces), np.cumsum(lengths), np.array(keys, np.uint64), identity, source.name)


def update_digest(digest: "hashlib._Hash", document: Document) -> int:
  """Adds a document to a hash of the corpus; returns its size in bytes."""
  raw = document.text.encode("utf-8")
  if document.key is not document.text:
    digest.update(document.key.encode("utf-8", errors="surrogateescape") + b"\0")
  digest.update(len(raw).to_bytes(8, "little") + raw)
  return len(raw)


def split(corpus: Corpus, fraction: float) -> tuple["Part", "Part"]:
  """Splits a corpus into a training part and a held-out part.

  A document is held out if its hash is in the lowest `fraction` of all possible hashes. A document therefore stays in
  its part when others join the corpus, and equal texts are in the same part. If no hash is that low, the document with
  the lowest one is held out; if all are, the document with the highest one is trained on. A corpus of a single document
  is cut, and its tail is held out.

  Args:
    corpus: the corpus.
    fraction: the expected fraction of the documents that is held out, between 0 and 1.

  Returns:
    (training part, held-out part).
  """
  if len(corpus.ends) == 1:
    cut = int(len(corpus.tokens) * (1 - fraction))
    corpus = Corpus(
      corpus.tokens, np.array([cut, len(corpus.tokens)]), np.array([1, 0], np.uint64), corpus.identity, corpus.name
    )
    fraction = 0.0
  held_out = corpus.keys < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
  if not held_out.any():
    held_out[np.argmin(corpus.keys)] = True
  if held_out.all():
    held_out[np.argmax(corpus.keys)] = False
  return Part(corpus, ~held_out), Part(corpus, held_out)


class Part:
  """Some documents of a corpus, readable as if they were one array.

  Args:
    corpus: the corpus.
    chosen: [documents] bool, which documents; None takes all of them, without finding out where they end.

  Attributes:
    corpus: the corpus.
  """

  def __init__(self, corpus: Corpus, chosen: np.ndarray | None = None):
    self.corpus, self._chosen = corpus, chosen
    if chosen is None:
      self._spans = np.array([[0, len(corpus.tokens)]])
    else:
      runs = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
      self._spans = np.stack([_starts(corpus)[runs[:, 0]], corpus.ends[runs[:, 1] - 1]], axis=1)
    self._ends = np.cumsum(self._spans[:, 1] - self._spans[:, 0])

  def __len__(self) -> int:
    """The number of ids."""
    return int(self._ends[-1]) if len(self._ends) else 0

  @property
  def documents(self) -> np.ndarray:
    """[k, 2] int64, where each document starts and ends in `corpus.tokens`."""
    bounds = np.stack([_starts(self.corpus), self.corpus.ends], axis=1)
    return bounds if self._chosen is None else bounds[self._chosen]

  def read(self, start: int, length: int) -> np.ndarray:
    """[length] unsigned integers, the ids from `start` on of the chosen documents laid end to end."""
    span = int(np.searchsorted(self._ends, start, side="right"))
    pieces = []
    while length:
      first = int(self._spans[span, 1] - (self._ends[span] - start))
      last = min(int(self._spans[span, 1]), first + length)
      pieces.append(self.corpus.read(first, last))
      start, length, span = start + last - first, length - (last - first), span + 1
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _starts(corpus: Corpus) -> np.ndarray:
  return np.concatenate([[0], corpus.ends[:-1]])
