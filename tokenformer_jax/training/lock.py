"""One run writes a work folder: two would delete each other's unfinished checkpoints.

On a disk the first process of a run holds a lock on WORKDIR/lock, which the system releases when the process ends,
however it ends. Object stores and some network file systems have no locks: there the file tells who owns the folder, and
its owner writes it anew every `RENEWED_SECONDS`.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time

from etils import epath

from tokenformer_jax.paths import is_uri, replace_text
from tokenformer_jax.progress import say

LOCK = "lock"
RENEWED_SECONDS = 30.0
# An owner that did not write for this long is gone.
_GONE_AFTER = 4 * RENEWED_SECONDS
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class WorkFolderLock:
  """The right to write a work folder. `release` it; a kill releases it, too.

  Attributes:
    lost: who took the folder from a process that was suspended for minutes, or "".
  """

  def __init__(self, folder: epath.Path):
    """Takes the lock, and makes the folder if need be.

    Raises:
      ValueError: another process has it.
    """
    self._path, self._descriptor, self._end = folder / LOCK, -1, threading.Event()
    self.lost, self._mine = "", b""
    self._made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if is_uri(folder) or not self._locked():
      self._become_owner()

  def release(self) -> None:
    """Gives the lock back and removes its file, and the folder if this made it and it is empty."""
    if self._end.is_set():
      return
    self._end.set()
    with contextlib.suppress(OSError):  # The folder may be gone.
      if self._descriptor < 0 and self._content() != self._mine:
        return  # Another run has taken the folder over, and this file is its own.
      self._path.unlink()
      if self._made and not is_uri(self._path):
        os.rmdir(self._path.parent)
    if self._descriptor >= 0:
      os.close(self._descriptor)

  def _locked(self) -> bool:
    """Locks the file; returns False where the file system has no locks."""
    while True:
      descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.exists(self._path) and os.path.samestat(os.fstat(descriptor), os.stat(self._path))
      except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
          raise ValueError(f"{_owner(self._path)} Stop it first, or use another --workdir.") from None
        if error.errno in _NO_LOCKS:
          return False
        raise
      if same:
        break
      os.close(descriptor)  # Its holder removed the file after this process had opened it.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _myself(), 0)
    self._descriptor = descriptor
    return True

  def _become_owner(self) -> None:
    """Writes who owns the folder, after an owner that does not renew its file is taken for gone."""
    before = self._content()
    if before:
      say(f"{_owner(self._path)} Waiting {_GONE_AFTER:.0f} s to see whether it still runs.")
    end = time.monotonic() + _GONE_AFTER
    while before and time.monotonic() < end:
      time.sleep(_GONE_AFTER / 20)
      if self._content() not in (before, b""):
        raise ValueError(
          f"{_owner(self._path)} Stop it first, or use another --workdir; if it is not running, delete {self._path}."
        )
      before = self._content()
    self._mine = _myself()
    replace_text(self._path, self._mine.decode())
    threading.Thread(target=self._renew, daemon=True).start()

  def _renew(self) -> None:
    while not self._end.wait(RENEWED_SECONDS):
      with contextlib.suppress(OSError):
        if self._content() not in (self._mine, b""):
          self.lost = f"{_owner(self._path)} It took the folder from this process, which did not renew {self._path}."
          return
        self._mine = _myself()
        replace_text(self._path, self._mine.decode())

  def _content(self) -> bytes:
    return self._path.read_bytes() if self._path.exists() else b""


def _myself() -> bytes:
  started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "time": started}).encode()


def _owner(path: epath.Path) -> str:
  try:
    who = json.loads(path.read_text())
    return f"{path.parent}: process {who['process']} on {who['host']} writes this work folder (since {who['time']})."
  except (OSError, ValueError, TypeError, KeyError):
    return f"{path.parent}: another process writes this work folder."
