import struct

import numpy as np
import pytest

from tokenformer_jax.data.corpus import Part, split
from tokenformer_jax.data.token_files import open_tokens, read_index, write_index
from tokenformer_jax.data.tokenizer import ByteTokenizer

DOCUMENTS = [[5, 6, 7, 256], [8, 256], [9, 9, 9, 9, 9, 256], [1, 256]]


def write_pair(folder, documents=DOCUMENTS, dtype="<u2", code=8, sequences_per_document=1):
  """A Megatron pair written field by field, as GPT-NeoX's MMapIndexedDatasetBuilder lays it out."""
  ids = np.array([i for document in documents for i in document], dtype)
  (folder / "pile.bin").write_bytes(ids.tobytes())
  sizes = [len(document) for document in documents]
  pointers = [sum(sizes[:i]) * ids.itemsize for i in range(len(sizes))]
  bounds = [*range(0, len(sizes), sequences_per_document), len(sizes)]
  head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(bounds))
  (folder / "pile.idx").write_bytes(
    head + struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(bounds)}q", *sizes, *pointers, *bounds)
  )


@pytest.mark.parametrize("dtype, code", [("<u2", 8), ("<i4", 4), ("<i8", 5)])
@pytest.mark.parametrize("name", ["pile", "pile.bin", "pile.idx"])
def test_megatron_pairs(name, dtype, code, tmp_path):
  write_pair(tmp_path, dtype=dtype, code=code)
  corpus = open_tokens(f"{tmp_path}/{name}", ByteTokenizer())
  assert corpus.tokens.tolist() == [i for document in DOCUMENTS for i in document]
  assert corpus.ends.tolist() == [4, 6, 12, 14]
  assert len(set(corpus.keys.tolist())) == 4


def test_megatron_documents_of_several_sequences(tmp_path):
  write_pair(tmp_path, sequences_per_document=3)
  assert open_tokens(f"{tmp_path}/pile", ByteTokenizer()).ends.tolist() == [12, 14]


def test_empty_megatron_documents_are_none(tmp_path):
  write_pair(tmp_path, [[], [5, 256], [], [6, 256], []])
  assert open_tokens(f"{tmp_path}/pile", ByteTokenizer()).ends.tolist() == [2, 4]


def test_the_index_that_we_write_is_the_one_that_neox_writes(tmp_path):
  write_pair(tmp_path)
  write_index(tmp_path / "ours.idx", np.dtype(np.uint16), np.array([4, 2, 6, 2]))
  assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "pile.idx").read_bytes()


def test_bare_files_end_documents_at_the_end_of_document_id(tmp_path):
  np.array([1, 2, 256, 3, 256, 256, 4], np.uint16).tofile(tmp_path / "train.bin")
  corpus = open_tokens(f"{tmp_path}/train.bin", ByteTokenizer())
  assert corpus.ends.tolist() == [3, 5, 6, 7]
  assert Part(corpus).read(1, 3).tolist() == [2, 256, 3]
  np.array([1, 2, 3, 256], np.uint32).tofile(tmp_path / "train.bin")
  assert open_tokens(f"{tmp_path}/train#uint32", ByteTokenizer()).tokens.tolist() == [1, 2, 3, 256]


def test_splits_of_token_files_follow_the_documents_ids(tmp_path):
  rng = np.random.default_rng(0)
  documents = [[*rng.integers(0, 256, 5).tolist(), 256] for _ in range(200)]
  held_out = []
  for order in (documents, documents[::-1]):
    write_pair(tmp_path, order)
    part = split(open_tokens(f"{tmp_path}/pile", ByteTokenizer()), 0.2)[1]
    held_out.append({part.corpus.tokens[a:b].tobytes() for a, b in part.documents})
  assert held_out[0] == held_out[1] and 20 < len(held_out[0]) < 60


@pytest.mark.parametrize("bad, dtype, code", [(257, "<u2", 8), (-1, "<i4", 4), (2**31 - 1, "<i4", 4)])
def test_ids_outside_the_vocabulary_are_named_with_file_and_position(bad, dtype, code, tmp_path):
  write_pair(tmp_path, [[1, 2, 256], [3, bad, 256]], dtype, code)
  with pytest.raises(ValueError, match=rf"pile\.bin: token id {bad} at position 4 .* 257"):
    open_tokens(f"{tmp_path}/pile", ByteTokenizer())


def test_ids_beyond_the_first_look_are_found_when_they_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr("tokenformer_jax.data.token_files.WHOLE", 8)
  write_pair(tmp_path, [[1, 2, 256], [3, 4, 999, 256]])
  corpus = open_tokens(f"{tmp_path}/pile", ByteTokenizer())
  assert Part(corpus).read(0, 5).tolist() == [1, 2, 256, 3, 4]
  with pytest.raises(ValueError, match="token id 999 at position 5"):
    Part(corpus).read(3, 4)


@pytest.mark.parametrize(
  "break_it, words",
  [
    (lambda d: (d / "pile.bin").unlink(), r"no file .*pile\.bin"),
    (lambda d: (d / "pile.bin").write_bytes(b""), r"pile\.bin is empty"),
    (lambda d: cut(d / "pile.bin", 4), r"pile\.bin has 24 bytes, .*pile\.idx says 28"),
    (lambda d: (d / "pile.bin").write_bytes(bytes(30)), r"pile\.bin has 30 bytes, .*pile\.idx says 28"),
    (lambda d: cut(d / "pile.idx", 3), r"pile\.idx has \d+ bytes, its head says \d+: it is truncated"),
    (lambda d: cut(d / "pile.idx", 120), r"pile\.idx is no Megatron index"),
    (lambda d: flip(d / "pile.idx", 0, b"TNT"), r"pile\.idx is no Megatron index"),
    (lambda d: flip(d / "pile.idx", 9, b"\2"), r"version 2 .* cannot be read"),
    (lambda d: flip(d / "pile.idx", 17, b"\7"), r"type 7 cannot be read"),
    (lambda d: flip(d / "pile.idx", 34, b"\5"), r"do not lie end to end"),
    (lambda d: flip(d / "pile.idx", 34 + 16, b"\2"), r"do not lie end to end"),
    (lambda d: flip(d / "pile.idx", 34 + 48, b"\7"), r"document bounds do not rise"),
    (lambda d: flip(d / "pile.idx", 34 + 48 + 32, b"\3"), r"document bounds do not rise"),
  ],
)
def test_broken_pairs(break_it, words, tmp_path):
  write_pair(tmp_path)
  break_it(tmp_path)
  with pytest.raises(ValueError, match=words):
    open_tokens(f"{tmp_path}/pile", ByteTokenizer())


def cut(path, size):
  path.write_bytes(path.read_bytes()[:-size])


def flip(path, at, value):
  raw = path.read_bytes()
  path.write_bytes(raw[:at] + value + raw[at + len(value) :])


def test_broken_bare_files(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"abc")
  with pytest.raises(ValueError, match=r"a\.bin has 3 bytes, no whole number of uint16"):
    open_tokens(f"{tmp_path}/a.bin", ByteTokenizer())
  with pytest.raises(ValueError, match="'int7' are unknown"):
    open_tokens(f"{tmp_path}/a.bin#int7", ByteTokenizer())
  for manifest in (None, "{", "[]", "{}"):
    if manifest:
      (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="no folder of prepared tokens"):
      open_tokens(str(tmp_path), ByteTokenizer())


def test_the_index_of_a_large_vocabulary_is_int32(tmp_path):
  write_index(tmp_path / "a.idx", np.dtype(np.int32), np.array([3]))
  dtype, ends = read_index(tmp_path / "a.idx")
  assert dtype == np.int32 and ends.tolist() == [3]
