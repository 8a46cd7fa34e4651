"""Reads every path that a user gives: `~` is expanded, and URIs such as gs://bucket/folder stay as they are."""

import os

import fsspec
from etils import epath

# The schemes that epath knows, and the extra or package that brings each one's file system.
_URI_PACKAGES = {"gs": "tokenformer_jax[gcs]", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def user_path(path: str | os.PathLike, name: str = "path") -> epath.Path:
  """Returns the absolute path that `path` means. Nothing is read or written.

  Args:
    path: a local path, relative or absolute, with or without `~`; or a URI with a scheme that epath knows.
    name: the flag or field that gave it, for messages.

  Raises:
    ValueError: an empty path, a URI of an unknown scheme, or one whose package is not installed.
  """
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(f"{name}={text!r}: the path is empty; name a file or a folder.")
  if not is_uri(text):
    return epath.Path(os.path.abspath(os.path.expanduser(text)))
  scheme = text.split("://", 1)[0]
  if scheme not in _URI_PACKAGES:
    raise ValueError(
      f"{name}={text!r}: the scheme {scheme}:// is unknown; give a local path, or a URI that begins with "
      f"{', '.join(f'{known}://' for known in _URI_PACKAGES)}."
    )
  try:
    # epath reads gs:// through the file system that fsspec calls gcs.
    fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)
  except ImportError:
    raise ValueError(
      f"{name}={text!r}: {scheme}:// needs a package that is not installed; pip install '{_URI_PACKAGES[scheme]}'."
    ) from None
  return epath.Path(text)


def is_uri(path: str | os.PathLike) -> bool:
  """Whether a path names an object store (gs://…) and not a local file."""
  return "://" in os.fspath(path)


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a UTF-8 file completely or not at all: after a kill in between, the old file is still there."""
  if is_uri(path):
    # An object appears only when its upload is complete, and renaming one is a copy and a deletion.
    path.write_bytes(text.encode())
    return
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_bytes(text.encode())  # The locale's encoding may be another than UTF-8.
  unfinished.replace(path)
