"""The files of a text source: found by a pattern, decompressed, and read line by line."""

import functools
import glob
import io
import os
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from tokenformer_jax.paths import is_uri, user_path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK = 2**16  # Bytes that are read from a compressed file at once.
# Bytes of text that bzip2 and xz give at once, and compressed bytes that zstd gets at once. Without these limits a few
# hundred bytes could become gigabytes of text in memory.
_MOST_TEXT, _ZSTD_PIECE = 2**20, 2**10


class BrokenFile(ValueError):
  """A file whose rest cannot be read as text; the lines that came before the error are good."""


# A function that makes a decompressor for one stream, and the exceptions that it raises for bytes of another kind.
_Opened = tuple[Callable[[], Any], tuple[type[Exception], ...]]


class _Format(NamedTuple):
  """A compression format.

  Attributes:
    name: what messages call it.
    magic: the first bytes of a file in this format; any of them.
    open: imports the module that reads the format, and gives what opens a stream.
    ratio: bytes of text in a byte of the file; measured on six million bytes of English novels.
  """

  name: str
  magic: tuple[bytes, ...]
  open: Callable[[], _Opened]
  ratio: float


# The modules are imported where they are used: some builds of Python lack bz2 or lzma.
def _gzip() -> _Opened:
  import zlib

  return functools.partial(zlib.decompressobj, zlib.MAX_WBITS + 16), (zlib.error,)


def _bzip2() -> _Opened:
  import bz2

  return bz2.BZ2Decompressor, (OSError, ValueError)


def _xz() -> _Opened:
  import lzma

  return lzma.LZMADecompressor, (lzma.LZMAError,)


def _zstd() -> _Opened:
  try:
    import zstandard
  except ImportError:
    raise ValueError("reading zstd files takes the package zstandard: pip install 'tokenformer_jax[zstd]'.") from None
  # 2 GiB is the format's largest window; published corpora are written with it (`zstd --long=31`).
  return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, (zstandard.ZstdError,)


_FORMATS = (
  _Format("gzip", (b"\x1f\x8b",), _gzip, 2.6),
  _Format(
    "bzip2", tuple(b"BZh%d" % n + block for n in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")), _bzip2, 3.5
  ),
  _Format("xz", (b"\xfd7zXZ\0", b"\x5d\0\0"), _xz, 3.4),
  # The magic numbers after the first are those of skippable frames, with which a zstd file may begin.
  _Format("zstd", (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))), _zstd, 2.7),
)

_NOT_TEXT = {
  b"PK\x03\x04": "a zip archive",
  b"PK\x05\x06": "a zip archive",
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"Rar!\x1a\x07": "a rar archive",
  b"\x04\x22\x4d\x18": "lz4-compressed",
  b"\x02\x21\x4c\x18": "lz4-compressed",
  b"\x89LZO\0": "lzop-compressed",
  b"LZIP\x01": "lzip-compressed",
  b"\x1f\x9d": "compressed by Unix compress",
  b"\xff\x06\0\0sNaPpY": "snappy-compressed",
  b"PAR1\x15": "a Parquet file",
  b"ARROW1\0\0": "an Arrow file",
  b"\xff\xfe": "UTF-16 text",
  b"\xfe\xff": "UTF-16 text",
}


def matches(pattern: str, spec: str) -> list[epath.Path]:
  """The files that a glob pattern names, in the order of their names; `~` stands for the home folder.

  Args:
    pattern: a local pattern, in which `**` matches folders at any depth; or a URI (gs://…), without `**`.
    spec: the source, for messages.

  Raises:
    ValueError: no file matches, a link points nowhere, or the URI cannot be searched.
  """
  if is_uri(pattern):
    folder = _fixed_folder(pattern)
    try:
      rest = pattern.removeprefix(str(folder)).lstrip("/")
      paths = [path for path in (folder.glob(rest) if rest else [folder]) if path.is_file()]
    except (NotImplementedError, OSError) as error:
      raise ValueError(f"source {spec}: {pattern!r} cannot be searched ({first_line(error)}).") from None
  else:
    expanded = os.path.expanduser(pattern)
    # A name that exists is itself, even if its characters are wildcards, as in [1].txt.
    found = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
    dangling = next((path for path in found if not os.path.exists(path)), None)
    if dangling is not None:
      raise ValueError(f"source {spec}: {dangling} is a link to a file that does not exist: correct or remove it.")
    paths = [epath.Path(path) for path in found if os.path.isfile(path)]
  if not paths:
    raise ValueError(f"source {spec}: no file matches {pattern!r} (the current folder is {os.getcwd()}).")
  return sorted(set(paths))  # A pattern with several ** finds files more than once.


def relative(path: epath.Path, pattern: str) -> str:
  """The part of `path` that the pattern leaves open; it stays the same when a corpus moves to another folder."""
  fixed = _fixed_folder(pattern)
  return path.name if path == fixed else path.relative_to(fixed).as_posix()


def text_size(path: epath.Path) -> int:
  """The approximate number of bytes of text in a file, for a progress bar.

  The last four bytes of a gzip file hold it modulo 2³², and for the last member only. If they cannot be right, and for
  the other formats, it is estimated from the size of the file.
  """
  with _opened(path) as file:
    size = path.stat().length
    compression = _compression(file.read(10))
    if compression is None:
      return size
    stated = 0
    if compression.name == "gzip" and size >= 4:
      file.seek(size - 4)
      stated = int.from_bytes(file.read(4), "little")
  is_exact = compression.name == "gzip" and (stated > size or size < 2**20)
  return stated if is_exact else int(size * compression.ratio)


def lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
  """(offset in the text, line with its end) of a plain or compressed file; lines end with a newline byte only.

  The first bytes of a file say how it is compressed, its name does not matter. A byte-order mark at the start of the
  text is left out.

  Raises:
    BrokenFile: the file is compressed in a way that is not supported or is otherwise not text, or it breaks off.
    ValueError: the file cannot be opened, or a package that reads it is not installed.
  """
  size = 0
  with _opened(path) as file:
    compression = _compression(file.read(10))
    file.seek(0)
    stream = io.BufferedReader(_Decompressed(file, compression), 4 * CHUNK) if compression else file
    try:
      for line in stream:
        if not size:
          _require_text(path, line, compression)
          if line.startswith(BYTE_ORDER_MARK):
            size, line = len(BYTE_ORDER_MARK), line.removeprefix(BYTE_ORDER_MARK)
        yield size, line
        size += len(line)
    except _BrokenStream as error:
      raise BrokenFile(
        f"{path}: the {error.compression} stream breaks off after {size} bytes of text ({error}): fetch it again, or "
        "choose bad_text=skip."
      ) from None


class _BrokenStream(Exception):
  """A compressed stream that ends too early or holds bytes that do not belong to it."""

  def __init__(self, compression: str, reason: str):
    super().__init__(reason)
    self.compression = compression


class _Decompressed(io.RawIOBase):
  """The text of a compressed file, which may be several streams one after the other, with zero bytes between them.

  The standard library's readers of bzip2 and xz end at the first stream that is damaged, without an error.
  """

  def __init__(self, file: IO[bytes], compression: _Format):
    self._name = compression.name
    self._new, self._errors = compression.open()
    self._file, self._decompressor, self._text = file, self._new(), memoryview(b"")
    self._raw = b""  # Read and not yet decompressed.
    self._at_start = True  # At the start of a stream the file may end.

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._text:
      if not self._read_more():
        return 0
    count = min(len(buffer), len(self._text))
    buffer[:count] = self._text[:count]
    self._text = self._text[count:]
    return count

  def _read_more(self) -> bool:
    """Decompresses some more; False at the end of the file."""
    if self._decompressor.eof:
      self._raw = self._decompressor.unused_data + self._raw
      self._decompressor, self._at_start = self._new(), True
    limited = hasattr(self._decompressor, "needs_input")
    piece = b""
    if not limited or self._decompressor.needs_input:
      self._raw = self._raw or self._file.read(CHUNK)
      if not self._raw and self._at_start:
        return False
      if not self._raw:
        raise _BrokenStream(self._name, "the file ends inside the stream")
      if self._at_start:
        self._raw = self._raw.lstrip(b"\0")
        if not self._raw:
          return True
      size = _ZSTD_PIECE if self._name == "zstd" else CHUNK
      piece, self._raw = self._raw[:size], self._raw[size:]
    self._at_start = False
    try:
      self._text = memoryview(self._decompressor.decompress(piece, *([_MOST_TEXT] if limited else [])))
    except self._errors as error:
      raise _BrokenStream(self._name, first_line(error)) from None
    return True


def _opened(path: epath.Path) -> IO[bytes]:
  try:
    return path.open("rb")
  except OSError as error:
    raise ValueError(f"{path} cannot be opened: {error.strerror or first_line(error)}.") from None


def _compression(head: bytes) -> _Format | None:
  """The format that the first ten bytes of a file show, even if the file breaks off inside these bytes."""
  for compression in _FORMATS:
    for magic in compression.magic:
      if head.startswith(magic) or (len(head) >= 4 and magic.startswith(head)):
        return compression
  return None


def _require_text(path: epath.Path, head: bytes, compression: _Format | None) -> None:
  """Raises BrokenFile if the start of a file's content, after decompression, shows that it is not text."""
  what = next((name for magic, name in _NOT_TEXT.items() if head.startswith(magic)), None)
  inner = _compression(head[:10])
  if inner is not None:
    what = f"compressed twice ({compression.name if compression else 'plain'} and {inner.name})"
  elif head[257:262] == b"ustar":
    what = "a tar archive"
  if what:
    way_out = "convert it to UTF-8" if "UTF-16" in what else "unpack it into text files"
    raise BrokenFile(f"{path} is {what}, which is not read as text: {way_out}, or choose bad_text=skip.")


def _fixed_folder(pattern: str) -> epath.Path:
  """The longest leading part of a pattern that has no wildcards: a folder, or the file itself."""
  fixed = user_path(pattern, "source") if is_uri(pattern) else epath.Path(os.path.expanduser(pattern))
  while glob.has_magic(str(fixed)):
    fixed = fixed.parent
  return fixed


def first_line(error: BaseException) -> str:
  """The first line of an exception's message, or its class, for messages of one line."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
