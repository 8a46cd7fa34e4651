"""Tokenizes a source once, into a folder that `tokens:FOLDER` reads; a run that was stopped is resumed."""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from absl import logging

from tokenformer_jax.data.corpus import encoded_batches, key_hash, update_digest
from tokenformer_jax.data.documents import BadText, Document, DocumentSource
from tokenformer_jax.data.fingerprint import hash_file
from tokenformer_jax.data.megatron_index import write_index
from tokenformer_jax.data.prepared_folder import (
  INPUTS,
  begin,
  is_unchanged,
  local_folder,
  stamps,
  write_json,
  write_sums,
)
from tokenformer_jax.data.token_files import INDEX, KEYS, MANIFEST, TOKENS
from tokenformer_jax.data.tokenizer import Tokenizer

LENGTHS = "lengths.bin"  # [documents] int64, their lengths so far; the index replaces it at the end.


def prepare(
  source: DocumentSource,
  tokenizer: Tokenizer,
  folder: str | os.PathLike,
  *,
  bad_text: str = "error",
  part: tuple[int, int] | None = None,
  progress: Callable[[int], None] = lambda size: None,
) -> dict:
  """Writes the source's token ids, document bounds and keys, the tokenizer and a manifest into a folder.

  The ids are a Megatron pair (tokens.bin and tokens.idx), which other programs read too. A folder that an earlier
  call left unfinished is completed. A finished one is left as it is if it was made with the same options from the same
  text. Sizes and times of the files tell that; if only times differ, or the source has no files, the text is read again
  and compared.

  Args:
    source: documents of text.
    tokenizer: the tokenizer.
    folder: the local folder to write to, which is created if it does not exist.
    bad_text: see `BadText`.
    part: (i, n) tokenizes the documents i, i + n, … (the first has number 1) into a folder of their own inside
      `folder`, so that n processes or machines share the work; `merge_parts` joins them. Every part reads the whole
      text, which takes much less time than to tokenize it.
    progress: called with the size in bytes of the text of this part that was done since the last call.

  Returns:
    The manifest: source, options, counts of documents, tokens and bytes, hashes of text, tokenizer and files.

  Raises:
    ValueError: the folder holds something else, or was made from another source, tokenizer, files or options (the
      message names the difference); the source has no text, or text that cannot be read; or `part` is not one of 1/n
      to n/n.
  """
  folder = local_folder(folder)
  number, count = part or (1, 1)
  if not 1 <= number <= count:
    hint = " Add one to an index that begins at 0." if number == 0 else ""
    raise ValueError(f"part={number}/{count}: choose one of 1/{count} to {count}/{count}.{hint}")
  if part:
    folder = part_folder(folder, number, count)
  # Megatron's index has no uint32.
  dtype = np.dtype(np.uint16 if tokenizer.dtype == np.uint16 else np.int32)
  manifest = begin(folder, source, tokenizer, bad_text, f"{number}/{count}" if part else None)
  bad, digest, whole = BadText(bad_text), hashlib.sha256(), _Whole()
  documents = source.read(bad)
  if part:
    documents = itertools.islice(map(whole.count, documents), number - 1, None, count)
  if manifest["complete"]:
    if not is_unchanged(folder, source):
      _compare(documents, manifest, digest, whole, folder, progress)
      write_json(folder / INPUTS, stamps(source))
    return manifest
  write_json(folder / INPUTS, stamps(source))
  for name, size in (
    (TOKENS, manifest["tokens"] * dtype.itemsize),
    (KEYS, manifest["documents"] * 8),
    (LENGTHS, manifest["documents"] * 8),
  ):
    with open(folder / name, "ab") as file:
      if file.tell() < size:
        raise ValueError(
          f"{folder / name} has {file.tell()} bytes where {MANIFEST} says {size}: a part of it was lost; remove the "
          "folder and prepare the text again."
        )
      file.truncate(size)  # What a stopped process wrote after its last commit.
  progress(_skip(documents, manifest, digest, folder))
  _commit(folder, manifest, ())
  _append(documents, tokenizer, dtype, folder, manifest, digest, progress)
  if part:
    manifest["whole"] = whole.summary()
  if not (whole.documents if part else manifest["documents"]):
    raise ValueError(f"source {source.name} holds no text: check the files or the data set that it names.")
  bad.report(source.name)
  lengths = np.fromfile(folder / LENGTHS, np.int64)
  return finish(folder, manifest, dtype, lengths, bad.replaced, bad.skipped)


def part_folder(folder: pathlib.Path, number: int, count: int) -> pathlib.Path:
  """The folder of part `number` of `count`."""
  return folder / f"part-{number:05}-of-{count:05}"


def finish(
  folder: pathlib.Path, manifest: dict, dtype: np.dtype, lengths: np.ndarray, replaced: int, skipped: int
) -> dict:
  """Writes the index, the sums and the complete manifest of a folder; returns the manifest.

  Args:
    folder: the folder, with its tokens and keys.
    manifest: the manifest until now.
    dtype: the type of the ids.
    lengths: [documents] the number of ids of each.
    replaced: the number of byte sequences that became U+FFFD.
    skipped: the number of documents that were left out.
  """
  write_index(folder / INDEX, dtype, lengths)
  names = (TOKENS, INDEX, KEYS)
  write_sums(folder, names)
  files = {name: hash_file(folder / name) for name in names}
  manifest.update(complete=True, replaced=replaced, skipped=skipped, files=files)
  write_json(folder / MANIFEST, manifest)
  (folder / LENGTHS).unlink(missing_ok=True)
  return manifest


class _Whole:
  """Counts and hashes all documents of a source, of which only a part is tokenized."""

  def __init__(self):
    self.documents, self._bytes, self._digest = 0, 0, hashlib.sha256()

  def count(self, document: Document) -> Document:
    self.documents += 1
    self._bytes += update_digest(self._digest, document)
    return document

  def summary(self) -> dict:
    return dict(documents=self.documents, bytes=self._bytes, sha256=self._digest.hexdigest())


def _skip(documents: Iterator[Document], manifest: dict, digest: "hashlib._Hash", folder: pathlib.Path) -> int:
  """Reads the documents that are written already and compares them; returns their size in bytes."""
  done = itertools.islice(documents, manifest["documents"])
  size = sum(update_digest(digest, document) for document in done)
  if digest.hexdigest() != manifest["sha256"]:
    raise ValueError(
      f"{manifest['source']} has changed since its first {manifest['documents']} documents "
      f"were prepared: remove {folder} and prepare it again."
    )
  return size


def _append(
  documents: Iterator[Document],
  tokenizer: Tokenizer,
  dtype: np.dtype,
  folder: pathlib.Path,
  manifest: dict,
  digest: "hashlib._Hash",
  progress: Callable[[int], None],
) -> None:
  """Tokenizes documents and appends them to the files of a folder; after each batch the manifest counts it."""
  end = np.array([tokenizer.end_of_document], dtype)
  with (
    open(folder / TOKENS, "ab") as tokens,
    open(folder / KEYS, "ab") as keys,
    open(folder / LENGTHS, "ab") as lengths,
  ):
    for batch, encoded in encoded_batches(documents, tokenizer):
      ids = np.concatenate([piece for document_ids in encoded for piece in (document_ids, end)])
      tokens.write(ids.astype(dtype).tobytes())
      keys.write(np.array([key_hash(document.key) for document in batch], np.uint64).tobytes())
      lengths.write(np.array([len(document_ids) + 1 for document_ids in encoded], np.int64).tobytes())
      size = sum(update_digest(digest, document) for document in batch)
      manifest.update(
        documents=manifest["documents"] + len(batch),
        tokens=manifest["tokens"] + len(ids),
        bytes=manifest["bytes"] + size,
        sha256=digest.hexdigest(),
      )
      _commit(folder, manifest, (tokens, keys, lengths))
      progress(size)


def _compare(
  documents: Iterator[Document],
  manifest: dict,
  digest: "hashlib._Hash",
  whole: _Whole,
  folder: pathlib.Path,
  progress: Callable[[int], None],
) -> None:
  """Reads the text of a finished folder again; raises ValueError if it is not what was prepared."""
  logging.info("%s: its files may have changed; their text is compared with the tokens' origin.", folder)
  progress(_skip(documents, manifest, digest, folder))
  if next(documents, None) is not None or manifest.get("whole", whole.summary()) != whole.summary():
    raise ValueError(
      f"{manifest['source']} holds more documents than the {manifest['documents']} in {folder}: remove the folder to "
      "prepare it again, or name another one."
    )


def _commit(folder: pathlib.Path, manifest: dict, files: Iterable[BinaryIO]) -> None:
  """Writes files and then the manifest to the disk, in this order."""
  for file in files:
    file.flush()
    os.fsync(file.fileno())
  write_json(folder / MANIFEST, manifest)
