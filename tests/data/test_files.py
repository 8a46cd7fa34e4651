import bz2
import gzip
import io
import lzma
import os
import pathlib
import sys
import tarfile
import zipfile

import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.object_store import _Bucket, bucket  # noqa: F401
from tokenformer_jax.data.documents import BadText, text_files
from tokenformer_jax.data.files import (
  BrokenFile,
  _compression,
  _Decompressed,
  lines,
  matches,
  relative,
  text_size,
)

COMPRESSIONS = ("gzip", "bzip2", "xz", "zstd")
TEXT = b"".join(b"line %d\n" % (i * i) for i in range(2000))


def compress(compression, text):
  if compression == "zstd":
    return pytest.importorskip("zstandard").ZstdCompressor().compress(text)
  return {"none": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[compression](text)


@pytest.fixture
def file(tmp_path):
  """Writes bytes into a file and gives its path."""

  def write(raw, name="a.txt"):
    (tmp_path / name).write_bytes(raw)
    return matches(f"{tmp_path}/{name}", "text")[0]

  return write


def text_of(path):
  return b"".join(line for _, line in lines(path))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_streams_that_follow_each_other_are_one_text(compression, file):
  parts = [compress(compression, part) for part in (TEXT, b"", b"more\n")]
  assert text_of(file(b"".join(parts) + bytes(8) + parts[2] + bytes(4))) == TEXT + b"more\n" * 2


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_streams_that_break_off_or_are_damaged_are_errors(compression, file):
  raw = compress(compression, TEXT)
  damaged = raw[: len(raw) // 2] + b"\0" * 50 + raw[len(raw) // 2 + 50 :]
  for broken in (raw[:-1], raw[:-20], raw[:5], damaged, raw + b"\x55" * 20, raw + raw[:9]):
    with pytest.raises(BrokenFile, match=rf"a\.txt: the {compression} stream breaks off after \d+ bytes of text \("):
      text_of(file(broken))


def test_a_zstd_file_may_begin_with_a_skippable_frame_and_have_the_largest_window(file):
  zstandard = pytest.importorskip("zstandard")
  parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
  compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # No size, so the window counts.
  raw = compressor.compress(TEXT) + compressor.flush()
  assert text_of(file(b"\x53\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any" + raw)) == TEXT


def test_zstd_without_its_package_names_the_extra(file, monkeypatch):
  path = file(b"\x28\xb5\x2f\xfd" + bytes(20))
  monkeypatch.setitem(sys.modules, "zstandard", None)
  with pytest.raises(ValueError, match=r"pip install 'tokenformer_jax\[zstd\]'") as error:
    text_of(path)
  assert not isinstance(error.value, BrokenFile)  # Or bad_text=skip would leave out all files without an error.


@pytest.mark.parametrize("compression, most", [("bzip2", 2**20), ("xz", 2**20), ("zstd", 2**26)])
def test_text_that_was_compressed_a_thousandfold_is_decompressed_in_parts(compression, most, file):
  raw = compress(compression, b"\n" * 2**27)
  assert len(raw) < 2**17
  held = []

  class Watched(_Decompressed):
    def _read_more(self):
      more = super()._read_more()
      held.append(len(self._text))
      return more

  with open(file(raw), "rb") as opened:
    total = 0
    stream = io.BufferedReader(Watched(opened, _compression(raw[:10])))
    while part := stream.read(2**22):
      total += len(part)
  assert total == 2**27 and max(held) <= most


def zip_of(text):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    archive.writestr("a.txt", text)
  return out.getvalue()


def tar_of(text):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as archive:
    member = tarfile.TarInfo("a.txt")
    member.size = len(text)
    archive.addfile(member, io.BytesIO(text))
  return out.getvalue()


@pytest.mark.parametrize(
  "raw, what",
  [
    (zip_of(TEXT), "a zip archive"),
    (tar_of(TEXT), "a tar archive"),
    (gzip.compress(tar_of(TEXT)), "a tar archive"),
    (gzip.compress(bz2.compress(TEXT)), r"compressed twice \(gzip and bzip2\)"),
    (b"\x04\x22\x4d\x18" + TEXT, "lz4-compressed"),
    (b"PAR1\x15\x00" + TEXT, "a Parquet file"),
    (TEXT.decode().encode("utf-16"), "UTF-16 text"),
  ],
)
def test_what_is_not_text_is_never_read_as_text(raw, what, file):
  path = file(raw)
  for choice in ("error", "replace"):
    with pytest.raises(ValueError, match=rf"a\.txt is {what}, which is not read as text"):
      list(text_files(str(path)).read(BadText(choice)))
  skipping = BadText("skip")
  assert list(text_files(str(path)).read(skipping)) == [] and skipping.skipped == 1


@pytest.mark.parametrize("text", [b"BZh9 is how bzip2 files begin", b"PK and PAR1", b"]", b"(\xc2\xb5/"])
def test_text_that_begins_like_a_compressed_file_is_text(text, file):
  assert text_of(file(text)) == text


@pytest.mark.parametrize("compression", ["none", *COMPRESSIONS])
def test_the_size_of_the_text_is_known_or_estimated(compression, file):
  path = file(compress(compression, TEXT))
  if compression in ("none", "gzip"):
    assert text_size(path) == len(TEXT)
  else:
    assert 1 < text_size(path) / path.stat().length < 4


def test_patterns_know_the_home_folder_and_the_current_one(tmp_path, monkeypatch):
  (tmp_path / "books").mkdir()
  (tmp_path / "books" / "a.txt").write_text("a")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path / "books")
  for pattern in ("~/*/*.txt", "~/books/a.txt", "*.txt", "../**/**/a.txt", f"{tmp_path}/books/*"):
    (path,) = matches(pattern, "text")
    assert os.path.samefile(path, tmp_path / "books" / "a.txt")
    assert relative(path, pattern) in ("a.txt", "books/a.txt")
  assert relative(*matches("~/*/*.txt", "text"), "~/*/*.txt") == "books/a.txt"


def test_a_name_with_wildcards_that_exists_is_the_file_of_that_name(tmp_path):
  for name in ("a[1].txt", "a1.txt"):
    (tmp_path / name).write_text("a")
  (path,) = matches(f"{tmp_path}/a[1].txt", "text")
  assert relative(path, f"{tmp_path}/a[1].txt") == "a[1].txt"


def test_files_that_cannot_be_opened_are_named(file, tmp_path):
  path = file(TEXT)
  os.remove(path)
  for read in (text_size, text_of):
    with pytest.raises(ValueError, match=r"a\.txt cannot be opened: No such file or directory\.$"):
      read(path)
  os.symlink(tmp_path / "nowhere", tmp_path / "link.txt")
  with pytest.raises(ValueError, match=r"link\.txt is a link to a file that does not exist"):
    matches(f"{tmp_path}/*.txt", "text")


def test_files_in_a_bucket_are_found_and_read(bucket, monkeypatch):  # noqa: F811
  def glob(file_system, path):  # As in gcsfs: the names begin with the bucket's.
    return [name.removeprefix(f"{file_system.root}/") for name in LocalFileSystem.glob(file_system, path)]

  monkeypatch.setattr(_Bucket, "glob", glob, raising=False)
  for name in ("b.txt", "a.txt"):
    pathlib.Path(bucket.folder, name).write_bytes(gzip.compress(b"text of " + name.encode()))
  source = text_files("gs://bucket/*.txt")
  assert [tuple(document) for document in source.read(BadText())] == [(n, f"text of {n}") for n in ("a.txt", "b.txt")]
  assert source.size() == 2 * len("text of a.txt")
  assert len(matches("gs://bucket/a.txt", "text")) == 1
  with pytest.raises(ValueError, match="no file matches 'gs://bucket/"):
    matches("gs://bucket/c*", "text")
  with pytest.raises(ValueError, match=r"cannot be searched \(Recursive"):
    matches("gs://bucket/**/*.txt", "text")
