"""Files that grow during a run and can be read meanwhile, on a disk or in an object store."""

import os
import time

from etils import epath

from tokenformer_jax.paths import is_uri

# An object is written anew each time, so uploads are rare.
UPLOAD_SECONDS = 30.0


class LogFile:
  """A file that is appended to.

  A local file has every write at once. An object store shows a file only when it is closed, and cannot append: there
  the whole file is kept in memory and uploaded when `UPLOAD_SECONDS` have passed since the last upload, at `flush`, and
  at `close`.
  """

  def __init__(self, path: epath.Path, content: bytes = b"", *, upload_seconds: float = UPLOAD_SECONDS):
    """Args: `content` is what an object has already; a local file keeps what it has."""
    self._path, self._seconds = path, upload_seconds
    self._file = None if is_uri(path) else path.open("ab")
    self._content, self._changed, self._uploaded_at = bytearray(content), False, time.monotonic()

  def write(self, data: bytes) -> None:
    if self._file:
      try:
        self._file.write(data)
        self._file.flush()
      except OSError as error:  # A full device, for instance; the system's own text names no file.
        raise OSError(error.errno, error.strerror, str(self._path)) from None
      return
    self._content += data
    self._changed = True
    if time.monotonic() - self._uploaded_at >= self._seconds:
      self.flush()

  def flush(self) -> None:
    """Makes all that was written visible, and keeps a local file through a loss of power.

    Raises:
      FileNotFoundError: the file was deleted or replaced, so that nobody would see what is written to it.
    """
    if self._file:
      os.fsync(self._file.fileno())
      if not self._path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
        raise FileNotFoundError(f"{self._path}: it was deleted or replaced while this run was writing it.")
    if self._changed:
      self._path.write_bytes(bytes(self._content))
      self._changed, self._uploaded_at = False, time.monotonic()

  def close(self) -> None:
    """Closes the file. Raises as `flush` does."""
    try:
      self.flush()
    finally:
      if self._file:
        self._file.close()
