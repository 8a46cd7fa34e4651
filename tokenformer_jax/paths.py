"""The one reading of a path that a user gives: `~` is expanded, URIs such as gs://… stay what they are."""

import os

from etils import epath


def user_path(path: str | os.PathLike, name: str = "path") -> epath.Path:
  """The absolute path that `path` means.

  Args:
    path: a local path, relative or absolute, with or without `~`; or a URI with a scheme that epath knows.
    name: the flag or field that gave it, for messages.

  Raises:
    ValueError: an empty path, a URI of an unknown scheme or one whose package is not installed.
  """
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(f"{name}={text!r}: the path is empty; name a file or a folder.")
  if is_uri(text):
    return epath.Path(text)
  return epath.Path(os.path.abspath(os.path.expanduser(text)))


def is_uri(path: str | os.PathLike) -> bool:
  """Whether a path names an object store (gs://…) and not a local file."""
  return "://" in os.fspath(path)


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a text file completely or not at all: after a kill in between, the old file is still there."""
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(text)
  unfinished.replace(path)
