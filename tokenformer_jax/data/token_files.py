"""Corpora of token ids in files: prepared folders, Megatron/GPT-NeoX pairs, .npy, headed and bare .bin, shards."""

import atexit
import functools
import glob
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from tokenformer_jax.data import files
from tokenformer_jax.data.corpus import Corpus, key_hash
from tokenformer_jax.data.fingerprint import WHOLE, hash_file
from tokenformer_jax.data.megatron_index import read_index
from tokenformer_jax.data.stored_ids import FileIds, StoredIds, check_stated, open_ids
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.paths import is_uri, user_path

TOKENS, INDEX, KEYS = "tokens.bin", "tokens.idx", "keys.bin"
TOKENIZER, MANIFEST, SUMS = "tokenizer.json", "manifest.json", "SHA256SUMS"
SCAN = 2**24  # Tokens that are looked at together.


class TokenFile(Corpus):
  """Files of token ids, end to end; where documents end, and their keys, are computed when asked for.

  Every slice of `tokens` is checked, so that an id outside the vocabulary is a ValueError that names its file and
  position, whoever reads it.

  Args:
    shards: the files, at least one.
    tokenizer: the tokenizer that wrote them.
    identity: see `Corpus`.
    ends: [documents] where documents end; None looks for the tokenizer's end-of-document id.
    keys: [documents] their hashes; None hashes the ids of each document.

  Raises:
    ValueError: the first `WHOLE` bytes hold an id that the tokenizer does not have.
  """

  def __init__(
    self,
    shards: Sequence[StoredIds],
    tokenizer: Tokenizer,
    identity: dict,
    ends: np.ndarray | None = None,
    keys: np.ndarray | None = None,
  ):
    self.tokens = _Tokens(shards, tokenizer.vocab_size)  # type: ignore[assignment]
    self.identity = identity
    self.name = str(shards[0].path) if len(shards) == 1 else f"{shards[0].path} and {len(shards) - 1} more"
    self._end_of_document, self._given_ends, self._given_keys = tokenizer.end_of_document, ends, keys
    for _ in self._scan(WHOLE // self.tokens.dtype.itemsize):
      pass

  def _scan(self, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, min(stop, len(self.tokens)), SCAN):
      yield start, self.tokens[start : min(start + SCAN, stop)]

  @functools.cached_property
  def ends(self) -> np.ndarray:  # type: ignore[override]
    if self._given_ends is not None:
      return self._given_ends
    found = [
      start + 1 + np.flatnonzero(piece == self._end_of_document) for start, piece in self._scan(len(self.tokens))
    ]
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == len(self.tokens) else np.append(ends, len(self.tokens))

  @functools.cached_property
  def keys(self) -> np.ndarray:  # type: ignore[override]
    if self._given_keys is not None:
      return self._given_keys
    starts = np.concatenate([[0], self.ends[:-1]])
    return np.array([key_hash(self.tokens[a:b].tobytes()) for a, b in zip(starts, self.ends)], np.uint64)


class _Tokens:
  """The ids of files as one array that has a length, a dtype and slices; every slice is checked."""

  def __init__(self, shards: Sequence[StoredIds], vocab_size: int):
    self._shards, self._vocab_size = shards, vocab_size
    self._ends = np.cumsum([len(shard.ids) for shard in shards])
    self.dtype = max((shard.ids.dtype for shard in shards), key=lambda dtype: dtype.itemsize)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, where: slice) -> np.ndarray:
    start, stop, _ = where.indices(len(self))
    pieces = []
    while start < stop:
      number = int(np.searchsorted(self._ends, start, side="right"))
      shard, end = self._shards[number], int(self._ends[number])
      first = start - (end - len(shard.ids))
      pieces.append(self._checked(shard, first, first + min(stop, end) - start))
      start = end
    if len(pieces) == 1:
      return pieces[0].astype(self.dtype, copy=False)
    return np.concatenate(pieces).astype(self.dtype, copy=False) if pieces else np.empty(0, self.dtype)

  def _checked(self, shard: StoredIds, start: int, stop: int) -> np.ndarray:
    piece = shard.ids[start:stop]
    if piece.max() >= self._vocab_size:
      at = int(np.argmax(piece >= self._vocab_size))
      other_type = "" if shard.is_stated else f", or state another type than {shard.dtype}, as in {shard.path}#uint16"
      raise ValueError(
        f"{shard.path}: token id {piece[at].astype(shard.dtype)} at position {start + at} is not one of the "
        f"tokenizer's {self._vocab_size}: set data.tokenizer to the one that wrote the file{other_type}."
      )
    return piece


def open_tokens(rest: str, tokenizer: Tokenizer) -> TokenFile:
  """Opens the corpus of `tokens:PATH[#DTYPE]`.

  Args:
    rest: PATH[#DTYPE]. PATH is one of
      - a folder that `tokenformer_jax.cli.prepare` wrote;
      - a Megatron or GPT-NeoX `.bin` with its `.idx` beside it (or the name of either without its ending);
      - a `.npy` file with one dimension of integers;
      - a `.bin` with the header of llm.c and modded-nanogpt;
      - a bare `.bin` of ids, as nanoGPT writes; DTYPE is their type (uint16, uint32, int32, int64), and is needed
        only for files so short that it cannot be recognised;
      - a glob of such files, which are shards of one corpus in the order of their names.
      A URI (gs://…) is copied to a temporary folder first, as ids are read from local files.
    tokenizer: the tokenizer that wrote the ids.

  Raises:
    ValueError: there is no such file, it is damaged, its type is unknown, or another tokenizer wrote it.
  """
  where, _, dtype = rest.partition("#")
  path = user_path(where, "source tokens")
  if path.is_dir():
    return _open_prepared(_local(path), tokenizer)
  paths = [path]
  if glob.has_magic(where) and not path.exists():
    paths = files.matches(where, f"tokens:{rest}")
    names = set(map(str, paths))
    paths = [path for path in paths if path.suffix != ".idx" or str(path.with_suffix(".bin")) not in names]
  opened = [_open_file(path, dtype, rest, len(paths)) for path in paths]
  shards, identities, ends = zip(*opened)
  if len(shards) == 1:
    return TokenFile(shards, tokenizer, identities[0], ends[0])
  starts = np.cumsum([0, *(len(shard.ids) for shard in shards[:-1])])
  identity = dict(tokens=sum(identity["tokens"] for identity in identities), shards=list(identities))
  if all(end is not None for end in ends):
    return TokenFile(shards, tokenizer, identity, np.concatenate([start + end for start, end in zip(starts, ends)]))
  return TokenFile(shards, tokenizer, identity)


def _open_file(path: epath.Path, dtype: str, rest: str, num_shards: int) -> tuple[StoredIds, dict, np.ndarray | None]:
  """(ids, identity, [documents] where documents end or None) of one file."""
  index = path.with_suffix(".idx") if path.suffix in (".bin", ".idx") else path.with_name(path.name + ".idx")
  path = path.with_suffix(".bin") if path.suffix == ".idx" else path
  if not path.is_file() and path.suffix != ".bin":
    path = path.with_name(path.name + ".bin")
  if not path.is_file():
    raise ValueError(f"source tokens:{rest}: there is no file {path}.")
  if num_shards > 1 and path.suffix not in (".bin", ".npy"):
    raise ValueError(f"source tokens:{rest}: {path} is neither a .bin nor a .npy; write a pattern without it.")
  if not index.is_file():
    stored = open_ids(_local(path), dtype)
    return stored, dict(tokens=len(stored.ids), sha256=hash_file(stored.path, WHOLE // num_shards)), None
  path, index = _local(path), _local(index)
  if not path.stat().st_size:
    raise ValueError(f"{path} is empty: write it again.")
  index_dtype, ends = read_index(index)
  check_stated(path, dtype, index_dtype)
  _require_size(path, int(ends[-1]) * index_dtype.itemsize, index)
  sha256 = hash_file(path, WHOLE // num_shards)
  identity = dict(tokens=int(ends[-1]), documents=len(ends), sha256=sha256, index=hash_file(index))
  return StoredIds(path, FileIds(path, index_dtype), index_dtype), identity, ends


def _open_prepared(folder: pathlib.Path, tokenizer: Tokenizer) -> TokenFile:
  manifest = read_manifest(folder)
  if not manifest["complete"]:
    raise ValueError(f"{folder} is not finished: run tokenformer_jax.cli.prepare on it again.")
  if "part" in manifest:
    raise ValueError(f"{folder} is one part of a corpus: merge all of them with tokenformer_jax.cli.prepare --merge.")
  if not tokenizer.matches(manifest["tokenizer"]):
    raise ValueError(
      f"{folder} was made by tokenizer {manifest['tokenizer'][:12]}…, not by "
      f"{tokenizer.fingerprint[:12]}…: set data.tokenizer={folder / TOKENIZER}."
    )
  dtype, ends = read_index(folder / INDEX)
  _require_size(folder / TOKENS, manifest["tokens"] * dtype.itemsize, folder / MANIFEST)
  _require_size(folder / KEYS, manifest["documents"] * 8, folder / MANIFEST)
  for file, stored in manifest["files"].items():
    if hash_file(folder / file) != stored:
      raise ValueError(f"{folder / file} has changed since it was prepared: prepare it again.")
  identity = {key: manifest[key] for key in ("documents", "tokens", "bytes", "sha256", "replaced", "skipped")}
  shard = StoredIds(folder / TOKENS, FileIds(folder / TOKENS, dtype), dtype)
  return TokenFile([shard], tokenizer, identity, ends, np.fromfile(folder / KEYS, np.uint64))


def read_manifest(folder: pathlib.Path) -> dict:
  """The manifest of a prepared folder.

  Raises:
    ValueError: the folder has none, or it is not one that `prepare` wrote.
  """
  try:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8-sig"))
    return {"complete": manifest["complete"], **manifest}
  except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
    raise ValueError(
      f"{folder} is not a folder of prepared tokens ({error!r}): make one with python -m tokenformer_jax.cli.prepare."
    ) from None


def _require_size(path: pathlib.Path, expected: int, says: pathlib.Path) -> None:
  size = path.stat().st_size if path.is_file() else 0
  if size != expected:
    raise ValueError(f"{path} has {size} bytes and {says} says {expected}: it is truncated, or of another corpus.")


def _local(path: epath.Path) -> pathlib.Path:
  """The local file or folder itself; for a URI, a copy that lasts as long as this process."""
  if not is_uri(path):
    return pathlib.Path(path)
  copy = pathlib.Path(_temporary_folder(str(path.parent)), path.name)
  for source in path.iterdir() if path.is_dir() else [path]:
    target = copy / source.name if path.is_dir() else copy
    if not target.is_file() and source.is_file():
      logging.info("Copying %s to %s.", source, target)
      target.parent.mkdir(parents=True, exist_ok=True)
      source.copy(target)
  return copy


@functools.cache
def _temporary_folder(of: str) -> str:
  """A new folder for copies of the files in folder `of`, removed at the end of this process."""
  folder = tempfile.mkdtemp(prefix="tokenformer_jax_tokens_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder
