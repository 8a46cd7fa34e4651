"""Tokenizes a source once, into a folder that `tokens:FOLDER` reads; stopped, it goes on where it was."""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from tokenformer_jax.data import byte_level_bpe
from tokenformer_jax.data.corpus import encoded_batches, key_hash, update_digest
from tokenformer_jax.data.documents import BadText, Document, DocumentSource
from tokenformer_jax.data.fingerprint import hash_file
from tokenformer_jax.data.megatron_index import write_index
from tokenformer_jax.data.token_files import INDEX, KEYS, MANIFEST, TOKENIZER, TOKENS, read_manifest
from tokenformer_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from tokenformer_jax.data.tokenizer_files import load_tokenizer, save_tokenizer

LENGTHS = "lengths.bin"  # Of the documents so far; the index replaces it in the end.


def prepare(
  source: DocumentSource,
  tokenizer: Tokenizer,
  folder: str | os.PathLike,
  *,
  bad_text: str = "error",
  progress: Callable[[int], None] = lambda size: None,
) -> dict:
  """Writes the source's token ids, document bounds and keys, the tokenizer and a manifest into a folder.

  The ids are a Megatron pair (tokens.bin and tokens.idx), readable by other programs too. A folder
  that an earlier call left unfinished is gone on with; a finished one is left as it is.

  Args:
    source: documents of text.
    tokenizer: the tokenizer.
    folder: where to write; made if it is not there.
    bad_text: see `BadText`.
    progress: called with the size of the text in bytes each time that some more of it is done.

  Returns:
    The manifest: source, counts of documents, tokens and bytes, hashes of text, tokenizer and files.
  """
  folder = pathlib.Path(folder)
  # Megatron's index knows no uint32.
  dtype = np.dtype(np.uint16 if tokenizer.dtype == np.uint16 else np.int32)
  manifest = _begin(folder, source, tokenizer)
  if manifest["complete"]:
    return manifest
  for name, size in (
    (TOKENS, manifest["tokens"] * dtype.itemsize),
    (KEYS, manifest["documents"] * 8),
    (LENGTHS, manifest["documents"] * 8),
  ):
    with open(folder / name, "ab") as file:
      file.truncate(size)
  bad, digest = BadText(bad_text), hashlib.sha256()
  documents = source.read(bad)
  progress(_skip(documents, manifest, digest, folder))
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
  return _finish(folder, manifest, dtype, bad, source)


def train_or_load_bpe(
  source: DocumentSource,
  vocab_size: int,
  folder: str | os.PathLike,
  *,
  bad_text: str = "error",
  progress: Callable[[int], None] = lambda size: None,
) -> Tokenizer:
  """The byte-level BPE in the folder, learnt first from the whole source if it is not there."""
  folder = pathlib.Path(folder)
  if not (folder / TOKENIZER).is_file():

    def texts() -> Iterator[str]:
      for document in source.read(BadText(bad_text)):
        progress(len(document.text.encode("utf-8")))
        yield document.text

    description = byte_level_bpe.train(texts(), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(HuggingFaceTokenizer(description, byte_level_bpe.END_OF_DOCUMENT), folder / TOKENIZER)
  return load_tokenizer(folder / TOKENIZER)


def _begin(folder: pathlib.Path, source: DocumentSource, tokenizer: Tokenizer) -> dict:
  """The manifest of what is in the folder, or a new one in a new folder."""
  if (folder / MANIFEST).is_file():
    manifest = read_manifest(folder)
    for key, now in (("source", source.name), ("tokenizer", tokenizer.fingerprint)):
      if manifest.get(key) != now:
        raise ValueError(
          f"{folder} holds {key} {manifest.get(key)!r}, this is {now!r}: name another folder, or remove that one."
        )
    return manifest
  if folder.is_dir() and set(os.listdir(folder)) - {TOKENIZER}:
    raise ValueError(f"{folder} holds other files: name a new or empty folder.")
  folder.mkdir(parents=True, exist_ok=True)
  save_tokenizer(tokenizer, folder / TOKENIZER)
  manifest = dict(
    complete=False,
    source=source.name,
    tokenizer=tokenizer.fingerprint,
    documents=0,
    tokens=0,
    bytes=0,
    sha256=hashlib.sha256().hexdigest(),
  )
  _commit(folder, manifest, ())
  return manifest


def _skip(documents: Iterator[Document], manifest: dict, digest, folder: pathlib.Path) -> int:
  """Passes over what is written already; returns its size in bytes."""
  done = itertools.islice(documents, manifest["documents"])
  size = sum(update_digest(digest, document) for document in done)
  if digest.hexdigest() != manifest["sha256"]:
    raise ValueError(
      f"{manifest['source']} has changed since its first {manifest['documents']} documents "
      f"were prepared: remove {folder} and begin again."
    )
  return size


def _commit(folder: pathlib.Path, manifest: dict, files) -> None:
  for file in files:
    file.flush()
    os.fsync(file.fileno())
  unfinished = folder / (MANIFEST + ".unfinished")
  unfinished.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  unfinished.replace(folder / MANIFEST)


def _finish(folder: pathlib.Path, manifest: dict, dtype: np.dtype, bad: BadText, source: DocumentSource) -> dict:
  if not manifest["documents"]:
    raise ValueError(f"source {source.name} holds no text: check what it names.")
  write_index(folder / INDEX, dtype, np.fromfile(folder / LENGTHS, np.int64))
  bad.report(source.name)
  manifest.update(
    complete=True,
    replaced=bad.replaced,
    skipped=bad.skipped,
    files={name: hash_file(folder / name) for name in (TOKENS, INDEX, KEYS)},
  )
  _commit(folder, manifest, ())
  (folder / LENGTHS).unlink()
  return manifest
