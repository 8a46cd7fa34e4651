"""Text sources on local disk: each yields documents in an order that depends on their names alone."""

import glob
import gzip
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from absl import logging


class Document(NamedTuple):
  """One document; `key` decides by its hash whether it is held out."""

  key: str
  text: str


class BadText:
  """What to do with text that cannot be read, and how often it was done.

  Args:
    choice: `error` raises; `replace` reads bytes that are not UTF-8 as U+FFFD and raises for the rest;
      `skip` leaves the document out.
  """

  def __init__(self, choice: str = "error"):
    self.choice = choice
    self.replaced = 0
    self.skipped = 0

  def report(self, name: str) -> None:
    """Warns of what was replaced or left out."""
    if self.replaced or self.skipped:
      logging.warning(
        "%s: %d byte sequences that are not UTF-8 replaced, %d documents left out.", name, self.replaced, self.skipped
      )

  def refuse(self, message: str) -> None:
    """Counts one document left out, or raises ValueError(message)."""
    if self.choice != "skip":
      raise ValueError(message)
    self.skipped += 1

  def unicode(self, text: str, where: str) -> str | None:
    """Text without halves of surrogate pairs, which escapes such as \\ud800 make; None to leave it out."""
    try:
      text.encode("utf-8")
      return text
    except UnicodeEncodeError as error:
      if self.choice == "replace":
        replaced = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
        self.replaced += replaced.count("\ufffd") - text.count("\ufffd")
        return replaced
      self.refuse(
        f"{where} is not Unicode at character {error.start} (half a surrogate pair): mend it, or "
        "choose bad_text=replace or =skip."
      )
      return None

  def decode(self, raw: bytes, where: str, offset: int) -> str | None:
    """UTF-8 text, or None for a document to leave out; `offset` is where `raw` starts in its file."""
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      if self.choice == "replace":
        text = raw.decode("utf-8", errors="replace")
        self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
        return text
      self.refuse(
        f"{where} is not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}): convert "
        "it, or choose bad_text=replace or =skip."
      )
      return None


class DocumentSource(NamedTuple):
  """Documents that can be read again and again.

  Attributes:
    name: what errors and reports call it.
    read: starts a pass over the documents; what cannot be read goes through the `BadText` given.
    size: about how many bytes of text there are, for a progress bar; None if that is not known.
  """

  name: str
  read: Callable[[BadText], Iterator[Document]]
  size: Callable[[], int | None] = lambda: None


def python_sources() -> DocumentSource:
  """The standard library of the running interpreter, one document a file, without its tests."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))

  def read(bad: BadText) -> Iterator[Document]:
    for folder, folders, files in os.walk(root):
      folders[:] = sorted(set(folders) - {"site-packages", "test", "tests", "idle_test", "__pycache__"})
      for file in sorted(files):
        path = pathlib.Path(folder, file)
        if path.suffix == ".py" and path.stat().st_size:
          text = path.read_text(encoding="utf-8", errors="replace")
          yield Document(path.relative_to(root).as_posix(), text)

  return DocumentSource("python-sources", read)


def text_files(rest: str) -> DocumentSource:
  """`GLOB[#MARKER]`: plain or gzip files; documents are files, or what lies between lines that are MARKER.

  A file's key is its path below the first folder that the glob leaves open; a part's key is its text.
  """
  pattern, _, marker = rest.partition("#")
  paths = _matches(pattern, f"text:{rest}")

  def documents_of(path: pathlib.Path, bad: BadText) -> Iterator[Document]:
    for offset, raw in _parts(path, marker.encode()):
      text = bad.decode(raw, str(path), offset)
      if text:
        yield Document(text if marker else _relative(path, pattern), text)

  def read(bad: BadText) -> Iterator[Document]:
    for path in paths:
      if not path.stat().st_size:
        bad.refuse(f"{path} is empty: remove it, narrow the glob, or choose bad_text=skip.")
      else:
        yield from _until_broken(documents_of(path, bad), bad)

  return DocumentSource(f"text:{rest}", read, lambda: sum(map(_text_size, paths)))


def jsonl_files(rest: str) -> DocumentSource:
  """`GLOB#FIELD`: one JSON object a line, the document being the text in its FIELD; plain or gzip."""
  pattern, _, field = rest.partition("#")
  if not field:
    raise ValueError(f"source jsonl:{rest}: name the field that holds the text, as in jsonl:{rest}#text.")
  paths = _matches(pattern, f"jsonl:{rest}")

  def documents_of(path: pathlib.Path, bad: BadText) -> Iterator[Document]:
    offset = 0
    for number, raw in enumerate(_lines(path), 1):
      text = _field(raw, field, f"{path} line {number} (byte {offset})", offset, bad)
      offset += len(raw)
      if text:
        yield Document(text, text)

  def read(bad: BadText) -> Iterator[Document]:
    for path in paths:
      yield from _until_broken(documents_of(path, bad), bad)

  return DocumentSource(f"jsonl:{rest}", read, lambda: sum(map(_text_size, paths)))


def _field(raw: bytes, field: str, where: str, offset: int, bad: BadText) -> str | None:
  if not raw.strip():
    return None
  line = bad.decode(raw, where, offset)
  if line is None:
    return None
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    bad.refuse(f"{where} is not JSON: {error.msg} at column {error.colno}; mend it, or choose bad_text=skip.")
    return None
  if not isinstance(record, dict) or field not in record:
    has = ", ".join(map(str, record)) if isinstance(record, dict) else f"only a {type(record).__name__}"
    bad.refuse(f"{where} has no field {field!r}; it has {has}.")
    return None
  if not isinstance(record[field], str):
    bad.refuse(f"{where}: field {field!r} is a {type(record[field]).__name__}, not text.")
    return None
  return bad.unicode(record[field], f"{where}: field {field!r}")


def _matches(pattern: str, spec: str) -> list[pathlib.Path]:
  paths = sorted(pathlib.Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise ValueError(f"source {spec}: no file matches {pattern!r} (from {os.getcwd()}).")
  return paths


def _relative(path: pathlib.Path, pattern: str) -> str:
  """The part of `path` that the glob left open, so that a corpus may move to another folder."""
  fixed = pathlib.Path(os.path.expanduser(pattern))
  while glob.has_magic(str(fixed)):
    fixed = fixed.parent
  return path.name if path == fixed else path.relative_to(fixed).as_posix()


class _BrokenFile(ValueError):
  """A file that breaks off; what was read before it is good."""


def _until_broken(documents: Iterator[Document], bad: BadText) -> Iterator[Document]:
  try:
    yield from documents
  except _BrokenFile as error:
    bad.refuse(str(error))


def _is_gzip(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    return file.read(2) == b"\x1f\x8b"


def _text_size(path: pathlib.Path) -> int:
  """Bytes of text: of a gzip file, what its last four bytes say (modulo 2³², one member)."""
  size = path.stat().st_size
  if not _is_gzip(path):
    return size
  with open(path, "rb") as file:
    file.seek(max(size - 4, 0))
    return int.from_bytes(file.read(), "little")


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """The lines of a plain or gzip file with their ends."""
  size = 0
  try:
    with (gzip.open if _is_gzip(path) else open)(path, "rb") as file:
      for line in file:
        size += len(line)
        yield line
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise _BrokenFile(
      f"{path}: the gzip stream breaks off after {size} bytes of text ({error}): fetch it "
      "again, or choose bad_text=skip."
    ) from None


def _parts(path: pathlib.Path, marker: bytes) -> Iterator[tuple[int, bytes]]:
  """(offset, bytes) of each stretch of lines between lines that are `marker` alone; all of it if empty."""
  start, end, lines = 0, 0, []
  for line in _lines(path):
    end += len(line)
    if marker and line.rstrip(b"\r\n") == marker:
      yield start, b"".join(lines)
      start, lines = end, []
    else:
      lines.append(line)
  yield start, b"".join(lines)
