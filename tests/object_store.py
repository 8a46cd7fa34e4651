"""A Google Cloud Storage bucket in a local folder, which behaves as object stores do.

Files are written through fsspec and epath, as with the real package; only the file system that fsspec calls `gcs`,
tensorstore's driver and the client that Orbax asks about the bucket are replaced.
"""

import io
import os
import types

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


class _Bucket(DirFileSystem):
  """gs://NAME/… is ROOT/NAME/…; an object is visible once it is closed, and cannot be appended to or renamed."""

  protocol = ("gs", "gcs")
  cachable = False
  root = ""

  def __init__(self, **options):
    super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True), **options)

  @classmethod
  def _strip_protocol(cls, path):
    return os.fspath(path).removeprefix("gs://").rstrip("/")

  def open(self, path, mode="rb", **kwargs):
    if set(mode) - set("rwbt"):
      raise NotImplementedError(f"{path}: objects cannot be opened with mode={mode!r}.")
    if "w" not in mode:
      return super().open(path, mode, **kwargs)
    upload = _Upload(self._join(path))
    return upload if "b" in mode else io.TextIOWrapper(upload, "utf-8", write_through=True)

  def mv(self, path1, path2, **kwargs):
    raise NotImplementedError(f"{path1} -> {path2}: objects cannot be renamed.")

  rename = mv


class _Upload(io.BytesIO):
  def __init__(self, path):
    super().__init__()
    self._path = path

  def close(self):
    if not self.closed:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      with open(self._path, "wb") as file:
        file.write(self.getvalue())
    super().close()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """`bucket.folder` is where gs://bucket lies; `bucket.drivers` are the tensorstore specs that were asked for."""
  root = tmp_path / "object_store"
  (root / "bucket").mkdir(parents=True)
  monkeypatch.setattr(_Bucket, "root", str(root))
  # fsspec's `register_implementation` cannot be undone.
  monkeypatch.setitem(_registry, "gcs", _Bucket)
  backend.fsspec_backend._get_filesystem.cache_clear()
  monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: types.SimpleNamespace(name=name))
  drivers = []
  real = gcs_utils.get_kvstore_for_gcs

  def local(path):
    drivers.append(real(path))
    # On a disk a prefix of keys is a folder and ends in a slash; the shardings' file is a key of its own.
    end = "" if path.endswith("/_sharding") else "/"
    return {"driver": "file", "path": os.path.join(root, drivers[-1]["bucket"], drivers[-1]["path"]) + end}

  monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", local)
  yield types.SimpleNamespace(folder=root / "bucket", drivers=drivers)
  backend.fsspec_backend._get_filesystem.cache_clear()
