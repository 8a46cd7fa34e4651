"""Safetensors: files written here and by the reference package are read by both; no header costs time or memory."""

import json
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tokenformer_jax.interop.safetensors_file import read_safetensors, write_safetensors
from tokenformer_jax.interop.stored_array import ComputedArray

ARRAYS = {
  "second.w": np.arange(12, dtype=np.float32).reshape(3, 4),
  "first": np.array([-1.5, 3e38], np.float32),
  "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "w.safetensors"


def write(path, dtype="float32"):
  arrays = {name: ComputedArray(array.shape, lambda array=array: array) for name, array in ARRAYS.items()}
  write_safetensors(path, arrays, dtype, {"note": "ünï"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_safetensors_package_reads_what_is_written(path, dtype):
  write(path, dtype)
  theirs = safetensors.numpy.load_file(path)
  ours = read_safetensors(path)
  assert theirs.keys() == ours.arrays.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    array = array.astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])
    assert theirs[name].dtype == array.dtype
    np.testing.assert_array_equal(theirs[name], array)
    np.testing.assert_array_equal(ours.arrays[name].read(), array)
  assert ours.metadata == {"note": "ünï"}
  assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata() == {"note": "ünï"}
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_the_safetensors_package_writes_is_read(path):
  arrays = {
    dtype.__name__: np.arange(6).reshape(2, 3).astype(dtype)
    for dtype in (np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)
  }
  arrays["scalar"] = np.array(1.5, np.float32)
  safetensors.numpy.save_file(arrays, path)
  read = read_safetensors(path)
  for name, array in arrays.items():
    assert read.arrays[name].shape == array.shape
    if array.shape:
      np.testing.assert_array_equal(read.arrays[name].read(), array)
      np.testing.assert_array_equal(read.arrays[name].read(slice(1, 2)), array[1:2])
      assert read.arrays[name].read().dtype == array.dtype


def file_of(header, data=bytes(8)):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(raw)) + raw + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


PLAIN = file_of({"x": entry()})


def test_the_unchanged_file_of_the_next_table_is_read(path):
  path.write_bytes(PLAIN)
  assert read_safetensors(path).arrays["x"].read().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "the header claims 0 bytes"),
    (PLAIN[:5], "truncated"),
    (PLAIN[:30], "truncated"),
    (PLAIN[:-1], "truncated"),
    (PLAIN + b"\0", "the arrays end at byte"),
    (struct.pack("<Q", 2**63) + PLAIN[8:], "the header claims 9223372036854775808 bytes"),
    (file_of(b"{" + b" " * 90_000_000 + b"}", b""), "90000002 bytes; more than 1048576 are refused"),
    (file_of(b"{" + b'"a":' * 250_000), "broken header"),
    (file_of(b"[" * 1_000_000), "broken header"),
    (file_of(b'{"x":' + b"9" * 900_000 + b"}"), "broken header"),
    (file_of(b"[]", b""), "broken header .it is not a JSON object"),
    (file_of(b"\xff{}", b""), "broken header"),
    (file_of(b'{"x":1,"x":2}'), "'x' occurs twice"),
    (file_of(b"{" + b"".join(b'"%d":1,' % i for i in range(90_000)) + b'"89999":1}'), "'89999' occurs twice"),
    (file_of(b'{"x":{"dtype":"F32","dtype":"F32"}}'), "'dtype' occurs twice"),
    (file_of({"x": 5}), "is described by 5"),
    (file_of({"x": {**entry(), "more": 1}}), "is described by"),
    (file_of({"x": entry(dtype="F8")}), "of type 'F8'"),
    (file_of({"x": entry(dtype=[["F32"]])}), "of type"),
    (file_of({"x": entry(shape=(-2,))}), "not a valid array shape"),
    (file_of({"x": entry(shape=(2.0,))}), "not a valid array shape"),
    (file_of({"x": entry(shape=(True, 2))}), "not a valid array shape"),
    (file_of({"x": entry(shape=(2**40, 2**40))}), "not a valid array shape"),
    (file_of({"x": entry(shape=(1,) * 9)}), "not a valid array shape"),
    (file_of({"x": {**entry(), "shape": 2}}), "not a valid array shape"),
    (file_of({"x": entry(shape=(3,))}), r"at bytes \[0, 8\], but its shape \[3\] takes 12"),
    (file_of({"x": entry(offsets=(-8, 0))}), "at bytes"),
    (file_of({"x": entry(offsets=(0.0, 8.0))}), "at bytes"),
    (file_of({"x": entry(offsets=(8, 16))}), "begins at byte"),
    (file_of({"x": entry(offsets=(2**60, 2**60 + 8))}), "begins at byte"),
    (file_of({"x": entry(), "y": entry()}), "begins at byte"),
    (file_of({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20)), "begins at byte"),
    (file_of({"../../x": entry()}), "'../../x' is not a valid array name"),
    (file_of({"/x": entry()}), "is not a valid array name"),
    (file_of({"a..b": entry()}), "is not a valid array name"),
    (file_of({"": entry()}), "is not a valid array name"),
    (file_of({"x\n": entry()}), "is not a valid array name"),
    (file_of({"x" * 201: entry()}), "is not a valid array name"),
    (file_of({"x": entry(), "__metadata__": {"a": 1}}), "__metadata__ is .* must be strings"),
    (file_of({"x": entry(), "__metadata__": []}), "__metadata__ is"),
  ],
)
def test_hostile_and_damaged_files_are_refused_at_little_cost(path, content, message):
  path.write_bytes(content)
  tracemalloc.start()
  start = time.process_time()
  with pytest.raises(ValueError, match=message) as caught:
    read_safetensors(path)
  seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert seconds < 5.0 and peak < 40_000_000, (seconds, peak)
  assert len(str(caught.value)) < 500 + len(str(path)) and "\n" not in str(caught.value)


def test_many_names_cost_little(path):
  header = {f"n{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(14_000)}
  path.write_bytes(file_of(header, b""))
  start = time.process_time()
  assert len(read_safetensors(path).arrays) == 14_000
  # The limit leaves time for a busy machine, and none for a comparison of all pairs.
  assert time.process_time() - start < 10.0
