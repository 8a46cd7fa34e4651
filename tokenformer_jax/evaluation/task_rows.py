"""Reading the rows of a task's file, JSON lines alone or in a zip archive, with their file and line for errors."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath


class Row(NamedTuple):
  """One line of a file.

  Attributes:
    where: the file and the line number, for messages.
    text: the line, JSON.
  """

  where: str
  text: str

  def parse(self) -> dict:
    """The JSON object of the line.

    Raises:
      ValueError: a line that is no JSON, or JSON that is no object.
    """
    try:
      value = json.loads(self.text)
    except RecursionError:
      raise ValueError(f"{self.where}: the JSON is nested too deeply to be read.") from None
    except json.JSONDecodeError as error:
      raise ValueError(f"{self.where} is not JSON: {error.msg} at column {error.colno}.") from None
    except ValueError:  # Python converts integers of at most 4,300 digits.
      raise ValueError(f"{self.where}: the JSON holds an integer with too many digits to be read.") from None
    if not isinstance(value, dict):
      raise ValueError(f"{self.where}: expected a JSON object with named fields, got a {type(value).__name__}.")
    return value


def read_rows(path: str | os.PathLike, limit: int | None = None) -> list[Row]:
  """The rows of a file of JSON lines, or of all JSON-lines files in a zip archive, without blank lines.

  Args:
    path: the file; a name that ends in `.zip` is an archive.
    limit: the number of rows to read from each file; None reads all.

  Raises:
    ValueError: a damaged archive, or text that is not UTF-8.
  """
  path = epath.Path(path)
  return [row for file, raw in _files(path) for row in _rows(file, raw)[:limit]]


def _files(path: epath.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (name, content) of a file, or of the JSON-lines files in an archive."""
  if path.suffix != ".zip":
    yield str(path), path.read_bytes()
    return
  try:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
      # Archives made on macOS hold a second, binary file for each file.
      names = [name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX/")]
      for name in sorted(names):
        yield f"{path}/{name}", archive.read(name)
  except zipfile.BadZipFile as error:
    raise ValueError(f"{path} is a damaged archive ({error}); download it again.") from None


def _rows(file: str, raw: bytes) -> list[Row]:
  try:
    text = raw.decode("utf-8-sig")  # Some editors begin a file with a byte-order mark.
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{file}, line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file, or download it again."
    ) from None
  # Only "\n" separates lines: str.splitlines would also split at U+2028 and U+0085, which JSON allows in strings.
  return [Row(f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
