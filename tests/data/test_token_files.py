import struct

import numpy as np
import pytest

from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.data.corpus import Part, split
from tokenformer_jax.data.megatron_index import read_index, write_index
from tokenformer_jax.data.token_files import open_tokens
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
  assert corpus.tokens[:].tolist() == [i for document in DOCUMENTS for i in document]
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
  assert open_tokens(f"{tmp_path}/train#uint32", ByteTokenizer()).tokens[:].tolist() == [1, 2, 3, 256]


def ids_of(count=600, largest=256):
  """[count] ids up to `largest`, among them ends of document."""
  return np.random.default_rng(0).integers(0, largest + 1, count)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_type_of_a_bare_file_is_stated_or_recognised(dtype, stated, tmp_path):
  ids_of().astype(dtype).tofile(tmp_path / "train.bin")
  corpus = open_tokens(f"{tmp_path}/train.bin" + (f"#{dtype}" if stated else ""), ByteTokenizer())
  assert corpus.tokens[:].tolist() == ids_of().tolist()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_the_type_does_not_follow_the_size_of_the_vocabulary(dtype, tmp_path):
  tokenizer = ByteTokenizer()
  tokenizer.vocab_size = 128_256
  ids_of(largest=50_000).astype(dtype).tofile(tmp_path / "train.bin")
  assert open_tokens(f"{tmp_path}/train.bin", tokenizer).tokens[:].tolist() == ids_of(largest=50_000).tolist()


def test_a_wider_type_is_never_read_as_a_narrower_one(tmp_path):
  tokenizer = ByteTokenizer()
  tokenizer.vocab_size = 2**16  # Every 16 bits are an id of it.
  path = tmp_path / "train.bin"
  wide = ids_of(largest=128_000).astype(np.uint32)
  wide.tofile(path)
  with pytest.raises(ValueError, match=r"token id \d+ at position \d+ is not .* or state another type than int32"):
    open_tokens(str(path), tokenizer)
  path.write_bytes(ids_of().astype(np.uint32).tobytes()[:-2])
  with pytest.raises(ValueError, match="2398 bytes, which is not a whole number of int32 ids"):
    open_tokens(str(path), tokenizer)


@pytest.mark.parametrize("ids", [[1, 0, 2, 0], [0] * 1000])
def test_a_file_that_does_not_show_its_type_is_refused(ids, tmp_path):
  np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
  with pytest.raises(ValueError, match=r"uint16 or int32.*: state the type, as in .*train\.bin#uint16"):
    open_tokens(f"{tmp_path}/train.bin", ByteTokenizer())
  assert open_tokens(f"{tmp_path}/train.bin#uint16", ByteTokenizer()).tokens[:].tolist() == ids


def write_headed(path, ids, magic=20240520, version=1, dtype=np.uint16, count=None):
  """A shard written as by llm.c's `write_datafile`."""
  header = np.zeros(256, np.int32)
  header[:3] = magic, version, len(ids) if count is None else count
  path.write_bytes(header.tobytes() + np.array(ids).astype(dtype).tobytes())


@pytest.mark.parametrize("magic, version, dtype", [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_headed_files(magic, version, dtype, tmp_path):
  write_headed(tmp_path / "val.bin", [1, 256, 2, 256], magic, version, dtype)
  corpus = open_tokens(f"{tmp_path}/val.bin", ByteTokenizer())
  assert corpus.tokens[:].tolist() == [1, 256, 2, 256] and corpus.ends.tolist() == [2, 4]


@pytest.mark.parametrize(
  "stated, changes, words",
  [
    ("", dict(version=2), "magic number 20240520 and version 2; version 1 can be read"),
    ("", dict(count=5), r"1032 bytes and its header says 1024 \+ 5 ids"),
    ("", dict(count=-4), "truncated or damaged"),
    ("#uint32", {}, "the file itself says that its ids are uint16"),
    # The header says the type, so that only the tokenizer can be wrong.
    ("", dict(ids=[1, 999, 2, 3]), r"token id 999 at position 1 .* wrote the file\.$"),
  ],
)
def test_headed_files_that_are_damaged_or_contradicted(stated, changes, words, tmp_path):
  write_headed(tmp_path / "val.bin", **{"ids": [1, 256, 2, 256], **changes})
  with pytest.raises(ValueError, match=words):
    open_tokens(f"{tmp_path}/val.bin{stated}", ByteTokenizer())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_numpy_files(dtype, tmp_path):
  np.save(tmp_path / "train.npy", np.array([1, 2, 100, 3], dtype))
  assert open_tokens(f"{tmp_path}/train.npy", ByteTokenizer()).tokens[:].tolist() == [1, 2, 100, 3]


@pytest.mark.parametrize("array", [np.ones((2, 2), int), np.ones(3), np.array([1], ">u2"), np.array([], int), [None]])
def test_numpy_files_without_ids(array, tmp_path):
  np.save(tmp_path / "train.npy", array)
  with pytest.raises(ValueError, match=r"train\.npy (holds an array of|is not a NumPy file of ids)"):
    open_tokens(f"{tmp_path}/train.npy", ByteTokenizer())


def test_shards_are_one_corpus_in_the_order_of_their_names(tmp_path):
  # A document may begin in one shard and end in the next.
  for i, ids in enumerate([[1, 2], [3, 256, 4, 256], [5]]):
    write_headed(tmp_path / f"train_{i}.bin", ids)
  corpus = open_tokens(f"{tmp_path}/train_*.bin", ByteTokenizer())
  assert corpus.tokens[:].tolist() == [1, 2, 3, 256, 4, 256, 5] and corpus.ends.tolist() == [4, 6, 7]
  assert corpus.read(1, 7).tolist() == [2, 3, 256, 4, 256, 5] and corpus.read(3, 5).tolist() == [256, 4]
  np.array([1, 2, 3, 256, 4, 256, 5], np.uint16).tofile(tmp_path / "together.bin")
  together = open_tokens(f"{tmp_path}/together.bin#uint16", ByteTokenizer())
  assert corpus.keys.tolist() == together.keys.tolist()
  assert corpus.identity["tokens"] == 7 and len(corpus.identity["shards"]) == 3


def test_shards_of_megatron_pairs_keep_their_documents(tmp_path):
  for name in "ab":
    write_pair(tmp_path)
    for suffix in (".bin", ".idx"):
      (tmp_path / f"pile{suffix}").rename(tmp_path / f"{name}{suffix}")
  corpus = open_tokens(f"{tmp_path}/*", ByteTokenizer())
  assert corpus.ends.tolist() == [4, 6, 12, 14, 18, 20, 26, 28]


def test_a_fault_in_a_shard_is_named_with_its_file_and_position(tmp_path):
  write_headed(tmp_path / "a.bin", [1, 2, 3])
  write_headed(tmp_path / "b.bin", [4, 999])
  with pytest.raises(ValueError, match=r"b\.bin: token id 999 at position 1"):
    open_tokens(f"{tmp_path}/*.bin", ByteTokenizer())
  (tmp_path / "b.txt").write_text("notes")
  with pytest.raises(ValueError, match=r"b\.txt is neither a \.bin nor a \.npy"):
    open_tokens(f"{tmp_path}/*", ByteTokenizer())


def test_token_files_may_be_in_a_bucket(bucket):  # noqa: F811
  write_pair(bucket.folder)
  np.save(bucket.folder / "train.npy", np.array([1, 2, 256]))
  assert open_tokens("gs://bucket/pile", ByteTokenizer()).ends.tolist() == [4, 6, 12, 14]
  assert open_tokens("gs://bucket/*.npy", ByteTokenizer()).tokens[:].tolist() == [1, 2, 256]


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
  # A corpus of a single document is cut into a training part and a held-out part.
  write_pair(tmp_path, [[1, 2, 3, 4, 999, 5, 6, 7, 8, 256]])
  with pytest.raises(ValueError, match="token id 999 at position 4"):
    split(open_tokens(f"{tmp_path}/pile", ByteTokenizer()), 0.1)[0].read(0, 5)


@pytest.mark.parametrize(
  "break_it, words",
  [
    (lambda d: (d / "pile.bin").unlink(), r"no file .*pile\.bin"),
    (lambda d: (d / "pile.bin").write_bytes(b""), r"pile\.bin is empty"),
    (lambda d: cut(d / "pile.bin", 4), r"pile\.bin has 24 bytes and .*pile\.idx says 28"),
    (lambda d: (d / "pile.bin").write_bytes(bytes(30)), r"pile\.bin has 30 bytes and .*pile\.idx says 28"),
    (lambda d: cut(d / "pile.idx", 3), r"pile\.idx has \d+ bytes and its header says \d+: it is truncated"),
    (lambda d: cut(d / "pile.idx", 120), r"pile\.idx is not a Megatron index"),
    (lambda d: flip(d / "pile.idx", 0, b"TNT"), r"pile\.idx is not a Megatron index"),
    (lambda d: flip(d / "pile.idx", 9, b"\2"), r"version 2 .* cannot be read"),
    (lambda d: flip(d / "pile.idx", 17, b"\7"), r"type 7 cannot be read"),
    (lambda d: flip(d / "pile.idx", 34, b"\5"), r"do not lie end to end"),
    (lambda d: flip(d / "pile.idx", 34 + 16, b"\2"), r"do not lie end to end"),
    (lambda d: flip(d / "pile.idx", 34 + 48, b"\7"), r"document bounds do not increase"),
    (lambda d: flip(d / "pile.idx", 34 + 48 + 32, b"\3"), r"document bounds do not increase"),
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
  with pytest.raises(ValueError, match=r"a\.bin has 3 bytes, which is not a whole number of uint16"):
    open_tokens(f"{tmp_path}/a.bin", ByteTokenizer())
  with pytest.raises(ValueError, match="'int7' are unknown"):
    open_tokens(f"{tmp_path}/a.bin#int7", ByteTokenizer())
  for manifest in (None, "{", "[]", "{}"):
    if manifest:
      (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="not a folder of prepared tokens"):
      open_tokens(str(tmp_path), ByteTokenizer())


def test_the_index_of_a_large_vocabulary_is_int32(tmp_path):
  write_index(tmp_path / "a.idx", np.dtype(np.int32), np.array([3]))
  dtype, ends = read_index(tmp_path / "a.idx")
  assert dtype == np.int32 and ends.tolist() == [3]
