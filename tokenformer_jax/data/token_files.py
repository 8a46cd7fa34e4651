"""Token ids in files: Megatron/GPT-NeoX pairs (.bin, .idx), bare .bin as nanoGPT writes, prepared folders."""

import functools
import json
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from tokenformer_jax.data.corpus import Corpus, key_hash
from tokenformer_jax.data.fingerprint import WHOLE, hash_file
from tokenformer_jax.data.tokenizer import Tokenizer

TOKENS, INDEX, KEYS = "tokens.bin", "tokens.idx", "keys.bin"
TOKENIZER, MANIFEST = "tokenizer.json", "manifest.json"

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document bounds
INDEX_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
BARE_DTYPES = {"uint16": np.uint16, "uint32": np.uint32, "int32": np.int32}
SCAN = 2**24  # Tokens looked at in one go.


class TokenFile(Corpus):
  """A mapped file of token ids; where documents end and their keys are worked out only when asked for.

  Args:
    path: the .bin file.
    dtype: of its ids.
    tokenizer: that wrote them.
    identity: see `Corpus`.
    ends: [documents] where documents end; None looks for the tokenizer's end-of-document id.
    keys: [documents] their hashes; None hashes the ids of each.
  """

  def __init__(
    self,
    path: pathlib.Path,
    dtype,
    tokenizer: Tokenizer,
    identity: dict,
    ends: np.ndarray | None = None,
    keys: np.ndarray | None = None,
  ):
    dtype = np.dtype(dtype)
    self._dtype = dtype
    # Seen as unsigned, so that one comparison finds negative ids too.
    self.tokens = np.asarray(np.memmap(path, f"u{dtype.itemsize}", mode="r"))
    self.identity, self.name = identity, str(path)
    self._tokenizer, self._given_ends, self._given_keys = tokenizer, ends, keys
    for start, piece in self._scan(WHOLE // self.tokens.itemsize):
      self._check(piece, start)

  def read(self, start: int, end: int) -> np.ndarray:
    """`tokens[start:end]`; raises ValueError naming file and position for an id outside the vocabulary."""
    piece = self.tokens[start:end]
    self._check(piece, start)
    return piece

  def _check(self, piece: np.ndarray, start: int) -> None:
    if piece.max() >= self._tokenizer.vocab_size:
      at = int(np.argmax(piece >= self._tokenizer.vocab_size))
      raise ValueError(
        f"{self.name}: token id {piece[at].astype(self._dtype)} at position {start + at} is "
        f"not one of the tokenizer's {self._tokenizer.vocab_size}: set data.tokenizer to the "
        "one that wrote it."
      )

  def _scan(self, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, min(stop, len(self.tokens)), SCAN):
      yield start, self.tokens[start : min(start + SCAN, stop)]

  @functools.cached_property
  def ends(self) -> np.ndarray:
    if self._given_ends is not None:
      return self._given_ends
    end = self._tokenizer.end_of_document
    found = [start + 1 + np.flatnonzero(piece == end) for start, piece in self._scan(len(self.tokens))]
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == len(self.tokens) else np.append(ends, len(self.tokens))

  @functools.cached_property
  def keys(self) -> np.ndarray:
    if self._given_keys is not None:
      return self._given_keys
    starts = np.concatenate([[0], self.ends[:-1]])
    return np.array([key_hash(self.tokens[a:b].tobytes()) for a, b in zip(starts, self.ends)], np.uint64)


def open_tokens(rest: str, tokenizer: Tokenizer) -> TokenFile:
  """The corpus of `tokens:PATH[#DTYPE]`.

  PATH is a folder that the door `prepare` wrote, a `.bin` file (or its name without `.bin`) with its
  `.idx` beside it, or a bare `.bin` file of ids in DTYPE (uint16, or uint32 for vocabularies over 65536).
  """
  where, _, dtype = rest.partition("#")
  path = pathlib.Path(where).expanduser()
  if path.is_dir():
    return _open_prepared(path, tokenizer)
  if path.suffix in (".bin", ".idx"):
    path = path.with_suffix("")
  bin_path, index_path = path.with_name(path.name + ".bin"), path.with_name(path.name + ".idx")
  if not bin_path.is_file():
    raise ValueError(f"source tokens:{rest}: there is no file {bin_path}.")
  if not bin_path.stat().st_size:
    raise ValueError(f"{bin_path} is empty: write it again.")
  if index_path.is_file():
    dtype, ends = read_index(index_path)
    _require_size(bin_path, int(ends[-1]) * dtype.itemsize, f"{index_path} says")
    identity = dict(tokens=int(ends[-1]), documents=len(ends), sha256=hash_file(bin_path), index=hash_file(index_path))
    return TokenFile(bin_path, dtype, tokenizer, identity, ends)
  if dtype and dtype not in BARE_DTYPES:
    raise ValueError(f"source tokens:{rest}: ids of type {dtype!r} are unknown; known: {', '.join(BARE_DTYPES)}.")
  dtype = np.dtype(BARE_DTYPES[dtype] if dtype else tokenizer.dtype)
  size = bin_path.stat().st_size
  if size % dtype.itemsize:
    raise ValueError(
      f"{bin_path} has {size} bytes, no whole number of {dtype} ids: it is truncated, or of "
      "another type (tokens:PATH#uint32)."
    )
  identity = dict(tokens=size // dtype.itemsize, sha256=hash_file(bin_path))
  return TokenFile(bin_path, dtype, tokenizer, identity)


def _open_prepared(folder: pathlib.Path, tokenizer: Tokenizer) -> TokenFile:
  manifest = read_manifest(folder)
  if not manifest["complete"]:
    raise ValueError(f"{folder} is not finished: run tokenformer_jax.cli.prepare on it again.")
  if manifest["tokenizer"] != tokenizer.fingerprint:
    raise ValueError(
      f"{folder} was made by tokenizer {manifest['tokenizer'][:12]}…, not by "
      f"{tokenizer.fingerprint[:12]}…: set data.tokenizer={folder / TOKENIZER}."
    )
  dtype, ends = read_index(folder / INDEX)
  _require_size(folder / TOKENS, manifest["tokens"] * dtype.itemsize, f"{folder / MANIFEST} says")
  _require_size(folder / KEYS, manifest["documents"] * 8, f"{folder / MANIFEST} says")
  for file, stored in manifest["files"].items():
    if hash_file(folder / file) != stored:
      raise ValueError(f"{folder / file} has changed since it was prepared: prepare it again.")
  identity = {key: manifest[key] for key in ("documents", "tokens", "bytes", "sha256", "replaced", "skipped")}
  return TokenFile(folder / TOKENS, dtype, tokenizer, identity, ends, np.fromfile(folder / KEYS, np.uint64))


def read_manifest(folder: pathlib.Path) -> dict:
  """The manifest of a prepared folder; ValueError where there is none."""
  try:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {"complete": manifest["complete"], **manifest}
  except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
    raise ValueError(
      f"{folder} is no folder of prepared tokens ({error!r}): make one with python -m tokenformer_jax.cli.prepare."
    ) from None


def _require_size(path: pathlib.Path, expected: int, says: str) -> None:
  size = path.stat().st_size if path.is_file() else 0
  if size != expected:
    raise ValueError(f"{path} has {size} bytes, {says} {expected}: it is truncated, or another's.")


def read_index(path: pathlib.Path) -> tuple[np.dtype, np.ndarray]:
  """(dtype of the ids, [documents] int64 where documents end) of a Megatron .idx file."""
  raw = path.read_bytes()
  if len(raw) < INDEX_HEADER.size or not raw.startswith(INDEX_MAGIC):
    raise ValueError(f"{path} is no Megatron index (MMIDIDX): write it again with --dataset-impl mmap.")
  _, version, code, sequences, bounds = INDEX_HEADER.unpack_from(raw)
  if version != 1 or code not in INDEX_DTYPES:
    raise ValueError(
      f"{path}: version {version} with ids of type {code} cannot be read; version 1 with "
      f"types {', '.join(map(str, INDEX_DTYPES))} can."
    )
  expected = INDEX_HEADER.size + 12 * sequences + 8 * bounds
  if len(raw) < expected:
    raise ValueError(f"{path} has {len(raw)} bytes, its head says {expected}: it is truncated.")
  dtype = np.dtype(INDEX_DTYPES[code])
  sizes = np.frombuffer(raw, "<i4", sequences, INDEX_HEADER.size)
  pointers = np.frombuffer(raw, "<i8", sequences, INDEX_HEADER.size + 4 * sequences)
  documents = np.frombuffer(raw, "<i8", bounds, INDEX_HEADER.size + 12 * sequences)
  sequence_ends = np.cumsum(sizes, dtype=np.int64)
  if not sequences or np.any(pointers[1:] != sequence_ends[:-1] * dtype.itemsize) or pointers[0]:
    raise ValueError(f"{path}: its sequences do not lie end to end in the .bin file, as they must.")
  if bounds < 2 or documents[0] or documents[-1] != sequences or np.any(np.diff(documents) < 0):
    raise ValueError(f"{path}: its document bounds do not rise from 0 to its {sequences} sequences.")
  ends = np.concatenate([[0], sequence_ends])[documents[1:]]
  return dtype, ends[np.diff(ends, prepend=0) > 0]


def write_index(path: pathlib.Path, dtype: np.dtype, lengths: np.ndarray) -> None:
  """Writes the Megatron .idx for documents of these lengths [documents], one sequence each, end to end."""
  code = next(code for code, known in INDEX_DTYPES.items() if known == dtype)
  pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
  with open(path, "wb") as file:
    file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, code, len(lengths), len(lengths) + 1))
    for array, kind in ((lengths, "<i4"), (pointers, "<i8"), (np.arange(len(lengths) + 1), "<i8")):
      file.write(np.asarray(array).astype(kind).tobytes())
