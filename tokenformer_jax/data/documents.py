"""Text sources in files: each yields documents in an order that depends on the names of the files alone."""

import json
import os
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from tokenformer_jax.data import files


class Document(NamedTuple):
  """One document; the hash of `key` decides whether the document is held out."""

  key: str
  text: str


class BadText:
  """What happens to text that cannot be read, and how often it happened.

  Args:
    choice: `error` raises; `replace` reads bytes that are not UTF-8 as U+FFFD and raises for everything else;
      `skip` leaves the document out.

  Attributes:
    replaced: the number of byte sequences that became U+FFFD so far.
    skipped: the number of documents that were left out so far.
  """

  def __init__(self, choice: str = "error"):
    self.choice = choice
    self.replaced = 0
    self.skipped = 0

  def report(self, name: str) -> None:
    """Logs a warning with both counts, unless both are zero."""
    if self.replaced or self.skipped:
      logging.warning(
        "%s: %d byte sequences that are not UTF-8 replaced, %d documents left out.", name, self.replaced, self.skipped
      )

  def refuse(self, message: str) -> None:
    """Counts one document as left out, or raises ValueError(message) unless the choice is `skip`."""
    if self.choice != "skip":
      raise ValueError(message)
    self.skipped += 1

  def unicode(self, text: str, where: str) -> str | None:
    """Replaces or refuses halves of surrogate pairs, which escapes such as \\ud800 make.

    Args:
      text: what JSON made of a string.
      where: names the text in the message.

    Returns:
      Text that UTF-8 can encode, or None if the document is to be left out.
    """
    try:
      text.encode("utf-8")
      return text
    except UnicodeEncodeError as error:
      if self.choice == "replace":
        replaced = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
        self.replaced += replaced.count("\ufffd") - text.count("\ufffd")
        return replaced
      self.refuse(
        f"{where} is not Unicode at character {error.start} (half a surrogate pair): correct it, or choose "
        "bad_text=replace or =skip."
      )
      return None

  def decode(self, raw: bytes, where: str, offset: int) -> str | None:
    """Decodes UTF-8.

    Args:
      raw: the bytes of a document.
      where: names the document in the message.
      offset: where `raw` starts in its file.

    Returns:
      The text, or None if the document is to be left out.
    """
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      if self.choice == "replace":
        text = raw.decode("utf-8", errors="replace")
        self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
        return text
      self.refuse(
        f"{where} is not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}): convert it, or choose "
        "bad_text=replace or =skip."
      )
      return None


class DocumentSource(NamedTuple):
  """Documents that can be read again and again.

  Attributes:
    name: the name of the source in errors and reports.
    read: starts a pass over the documents; the given `BadText` decides about text that cannot be read.
    size: the approximate number of bytes of text, for a progress bar; None if it is unknown.
    paths: the files that are read, in order; none for sources that are not files which the user named.
  """

  name: str
  read: Callable[[BadText], Iterator[Document]]
  size: Callable[[], int | None] = lambda: None
  paths: Sequence[epath.Path] = ()


def python_sources() -> DocumentSource:
  """The standard library of the running interpreter without its tests; every file is a document."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))

  def read(bad: BadText) -> Iterator[Document]:
    for folder, folders, names in os.walk(root):
      folders[:] = sorted(set(folders) - {"site-packages", "test", "tests", "idle_test", "__pycache__"})
      for file in sorted(names):
        path = pathlib.Path(folder, file)
        if path.suffix == ".py" and path.stat().st_size:
          text = path.read_text(encoding="utf-8", errors="replace")
          yield Document(path.relative_to(root).as_posix(), text)

  return DocumentSource("python-sources", read)


def text_files(rest: str) -> DocumentSource:
  """`GLOB[#MARKER]`: plain or compressed files of text.

  Without a marker every file is a document, and its key is its path below the first folder with a wildcard. With one,
  the text between two lines that are MARKER alone is a document, and its key is its text.

  Raises:
    ValueError: no file matches; reading raises it for text that cannot be read (see `BadText`).
  """
  pattern, _, marker = rest.partition("#")
  paths = files.matches(pattern, f"text:{rest}")

  def documents_of(path: epath.Path, bad: BadText) -> Iterator[Document]:
    is_empty = True
    for offset, raw in _parts(path, marker.encode()):
      is_empty = is_empty and not raw
      text = bad.decode(raw, str(path), offset)
      if text:
        yield Document(text if marker else files.relative(path, pattern), text)
    if is_empty:
      bad.refuse(f"{path} is empty: remove it, narrow the glob, or choose bad_text=skip.")

  def read(bad: BadText) -> Iterator[Document]:
    for path in paths:
      yield from _until_broken(documents_of(path, bad), bad)

  return DocumentSource(f"text:{rest}", read, lambda: sum(map(files.text_size, paths)), paths)


def jsonl_files(rest: str) -> DocumentSource:
  """`GLOB#FIELD`: plain or compressed files with one JSON object a line; the text in its FIELD is a document.

  Raises:
    ValueError: there is no field or no file matches; reading raises it for lines that cannot be read (see `BadText`).
  """
  pattern, _, field = rest.partition("#")
  if not field:
    raise ValueError(f"source jsonl:{rest}: name the field that holds the text, as in jsonl:{rest}#text.")
  paths = files.matches(pattern, f"jsonl:{rest}")

  def documents_of(path: epath.Path, bad: BadText) -> Iterator[Document]:
    for number, (offset, raw) in enumerate(files.lines(path), 1):
      text = _field(raw, field, f"{path} line {number} (byte {offset})", offset, bad)
      if text:
        yield Document(text, text)

  def read(bad: BadText) -> Iterator[Document]:
    for path in paths:
      yield from _until_broken(documents_of(path, bad), bad)

  return DocumentSource(f"jsonl:{rest}", read, lambda: sum(map(files.text_size, paths)), paths)


def _field(raw: bytes, field: str, where: str, offset: int, bad: BadText) -> str | None:
  """The text in a line's field; None for a blank line and for one to leave out."""
  if not raw.strip():
    return None
  line = bad.decode(raw, where, offset)
  if line is None:
    return None
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    bad.refuse(f"{where} is not JSON: {error.msg} at column {error.colno}; correct it, or choose bad_text=skip.")
    return None
  except ValueError:  # Python's limit for converting integers, which guards against quadratic time.
    limit = sys.get_int_max_str_digits()
    bad.refuse(f"{where} holds an integer of more than {limit} digits: shorten it, or choose bad_text=skip.")
    return None
  except RecursionError:
    bad.refuse(f"{where} is nested too deeply to be read: flatten it, or choose bad_text=skip.")
    return None
  if not isinstance(record, dict) or field not in record:
    has = ", ".join(map(repr, record)) if isinstance(record, dict) else f"only a {type(record).__name__}"
    bad.refuse(f"{where} has no field {field!r}; it has {has or 'none'}.")
    return None
  if not isinstance(record[field], str):
    bad.refuse(f"{where}: field {field!r} is a {type(record[field]).__name__}, not text.")
    return None
  return bad.unicode(record[field], f"{where}: field {field!r}")


def _until_broken(documents: Iterator[Document], bad: BadText) -> Iterator[Document]:
  """The documents of a file up to where it cannot be read any further; the rest counts as one document left out."""
  try:
    yield from documents
  except files.BrokenFile as error:
    bad.refuse(str(error))


def _parts(path: epath.Path, marker: bytes) -> Iterator[tuple[int, bytes]]:
  """(offset, bytes) of each stretch of lines between lines that are `marker` alone; of the whole file if it is empty."""
  start: int | None = None
  end, lines = 0, list[bytes]()
  for offset, line in files.lines(path):
    start, end = offset if start is None else start, offset + len(line)
    if marker and line.rstrip(b"\r\n") == marker:
      yield start, b"".join(lines)
      start, lines = end, []
    else:
      lines.append(line)
  yield start or 0, b"".join(lines)
