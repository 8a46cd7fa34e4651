"""Joins the parts that several processes or machines prepared into the folder that one would have written."""

import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tokenformer_jax.data.fingerprint import hash_file
from tokenformer_jax.data.megatron_index import read_index
from tokenformer_jax.data.prepare import finish, part_folder
from tokenformer_jax.data.prepared_folder import (
  INPUTS,
  changed_file,
  local_folder,
  read_stamps,
  require_no_other_files,
  write_json,
)
from tokenformer_jax.data.token_files import INDEX, KEYS, MANIFEST, SUMS, TOKENIZER, TOKENS, read_manifest
from tokenformer_jax.data.tokenizer_files import config_path, load_tokenizer, save_tokenizer

CHUNK = 2**24  # Tokens that are in memory at once.
_NAMES = {"whole": "a source that held"}


def merge_parts(folder: str | os.PathLike, *, progress: Callable[[int], None] = lambda tokens: None) -> dict:
  """Writes the folder that `prepare` without `part` would have written, from its parts.

  The files are the same to the byte: the documents in the order of the source, with the keys that decide which are
  held out. The parts are left where they are.

  Args:
    folder: the folder that was given to `prepare` with `part=(1, n)` to `(n, n)`.
    progress: called with the number of tokens that were written since the last call.

  Returns:
    The manifest.

  Raises:
    ValueError: a part is missing, unfinished, damaged or of another text or tokenizer than the others; or the folder
      holds something else.
  """
  folder = local_folder(folder)
  parts = _parts(folder)
  manifests = [_part_manifest(part) for part in parts]
  first = manifests[0]
  for part, manifest in zip(parts, manifests):
    for key in ("source", "tokenizer", "bad_text", "whole", "replaced", "skipped"):
      if manifest[key] != first[key]:
        raise ValueError(
          f"{part} was prepared with {_NAMES.get(key, key)} {manifest[key]!r}, and {parts[0]} with {first[key]!r}: "
          "remove the one that is wrong and prepare it again."
        )
  whole, identity = first["whole"], {key: first[key] for key in ("source", "tokenizer", "bad_text")}
  lengths = [_lengths(part, manifest) for part, manifest in zip(parts, manifests)]
  if [len(each) for each in lengths] != [len(range(i, whole["documents"], len(parts))) for i in range(len(parts))]:
    raise ValueError(f"{folder}: its parts do not make up the {whole['documents']} documents of their source.")
  identity |= dict(documents=whole["documents"], tokens=int(sum(map(np.sum, lengths))))
  identity |= dict(bytes=whole["bytes"], sha256=whole["sha256"])
  if (folder / MANIFEST).is_file():
    merged = read_manifest(folder)
    if merged["complete"] and all(merged.get(key) == value for key, value in identity.items()):
      return merged
    raise ValueError(f"{folder} holds other tokens than its parts: remove {folder / MANIFEST}, or the parts.")
  own = {TOKENS, INDEX, KEYS, INPUTS, MANIFEST, SUMS, TOKENIZER, config_path(folder / TOKENIZER).name}
  require_no_other_files(folder, own | {part.name for part in parts})

  save_tokenizer(load_tokenizer(parts[0] / TOKENIZER), folder / TOKENIZER)
  write_json(folder / INPUTS, read_stamps(parts[0]))
  dtype = read_index(parts[0] / INDEX)[0]
  ids = [
    np.memmap(part / TOKENS, dtype, mode="r") if len(each) else np.empty(0, dtype) for part, each in zip(parts, lengths)
  ]
  with open(folder / TOKENS, "wb") as file:
    for pieces in _chunks(_documents(ids, lengths)):
      file.write(np.concatenate(pieces).tobytes())
      progress(sum(map(len, pieces)))
    os.fsync(file.fileno())
  _interleaved([np.fromfile(part / KEYS, np.uint64) for part in parts]).tofile(folder / KEYS)
  manifest = dict(complete=False, **identity)
  return finish(folder, manifest, dtype, _interleaved(lengths), first["replaced"], first["skipped"])


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders of all parts, in order."""
  names = sorted(path.name for path in folder.glob("part-*-of-*"))
  counts = {int(name.rsplit("-", 1)[1]) for name in names if re.fullmatch(r"part-\d{5,}-of-\d{5,}", name)}
  if len(counts) != 1:
    raise ValueError(
      f"{folder} holds {'no parts' if not counts else f'parts of {sorted(counts)}'}: prepare all parts of one number "
      "with --part=1/n to --part=n/n, and remove others."
    )
  (count,) = counts
  parts = [part_folder(folder, number, count) for number in range(1, count + 1)]
  missing = [f"{number}/{count}" for number, part in enumerate(parts, 1) if not (part / MANIFEST).is_file()]
  if missing:
    raise ValueError(f"{folder} lacks the parts {', '.join(missing)}: prepare them with --part={missing[0]}.")
  return parts


def _part_manifest(part: pathlib.Path) -> dict:
  manifest = read_manifest(part)
  if not manifest["complete"] or "whole" not in manifest:
    raise ValueError(f"{part} is not finished: prepare it again with the same flags.")
  files = manifest["files"].items()
  changed = [name for name, stored in files if not (part / name).is_file() or hash_file(part / name) != stored]
  if name := next(iter(changed), "") or changed_file(part):
    raise ValueError(f"{part / name} has changed since it was prepared: remove {part} and prepare it again.")
  return manifest


def _lengths(part: pathlib.Path, manifest: dict) -> np.ndarray:
  """[documents] int64, the number of ids of each document of a part; a part may be empty."""
  return np.diff(read_index(part / INDEX)[1], prepend=0) if manifest["documents"] else np.empty(0, np.int64)


def _interleaved(arrays: Sequence[np.ndarray]) -> np.ndarray:
  """[documents] the values of the parts in the order of the source."""
  result = np.empty(sum(map(len, arrays)), arrays[0].dtype)
  for number, array in enumerate(arrays):
    result[number :: len(arrays)] = array
  return result


def _documents(ids: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
  """The ids of each document in the order of the source."""
  starts = [np.cumsum(each) - each for each in lengths]
  for document in range(sum(map(len, lengths))):
    index, part = divmod(document, len(ids))
    start = starts[part][index]
    yield ids[part][start : start + lengths[part][index]]


def _chunks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
  """Lists of documents with about CHUNK tokens in each."""
  pieces, size = [], 0
  for document in documents:
    pieces.append(document)
    size += len(document)
    if size >= CHUNK:
      yield pieces
      pieces, size = [], 0
  if pieces:
    yield pieces
