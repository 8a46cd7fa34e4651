import contextlib
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.cli import prepare as command
from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import corpus as corpus_module
from tokenformer_jax.data import fingerprint, open_data
from tokenformer_jax.data.corpus import split, tokenize
from tokenformer_jax.data.documents import text_files
from tokenformer_jax.data.prepare import prepare
from tokenformer_jax.data.prepared_bpe import train_or_load_bpe
from tokenformer_jax.data.prepared_parts import merge_parts
from tokenformer_jax.data.token_files import open_tokens
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.data.tokenizer_files import load_tokenizer


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for i in range(80):
    (folder / f"{i:02}.txt").write_text(f"{i} is the number of this document. " * (1 + i % 5))
  return text_files(f"{folder}/*.txt")


@pytest.fixture
def small_batches(monkeypatch):
  """Makes about thirty batches of the texts, after each of which a run may be stopped."""
  monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 300)


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_tokens_are_those_of_the_text_and_split_alike(texts, tmp_path):
  shown = []
  manifest = prepare(texts, ByteTokenizer(), tmp_path / "out", progress=shown.append)
  live, prepared = tokenize(texts, ByteTokenizer()), open_tokens(f"{tmp_path}/out", ByteTokenizer())
  for name in ("tokens", "ends", "keys"):
    assert np.array_equal(getattr(prepared, name)[:], getattr(live, name))
  assert np.array_equal(split(prepared, 0.2)[1].documents, split(live, 0.2)[1].documents)
  assert {key: prepared.identity[key] for key in live.identity} == live.identity
  assert sum(shown) == manifest["bytes"] == texts.size()
  assert load_tokenizer(tmp_path / "out" / "tokenizer.json").fingerprint == ByteTokenizer().fingerprint
  assert set(contents(tmp_path / "out")) == {
    "SHA256SUMS",
    "inputs.json",
    "keys.bin",
    "manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokens.bin",
    "tokens.idx",
  }


def unexpected(size):
  pytest.fail("read again")


def test_what_a_killed_process_left_does_not_stop_the_next(texts, tmp_path):
  (tmp_path / "out").mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
    (tmp_path / "out" / f"{name}.unfinished").write_text("{")
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  prepare(texts, ByteTokenizer(), tmp_path / "undisturbed")
  assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


class Stopped(Exception):
  pass


def test_a_folder_that_lost_bytes_is_refused_and_not_filled_up(texts, small_batches, tmp_path):
  def stop(size):
    raise Stopped

  with pytest.raises(Stopped):
    prepare(texts, ByteTokenizer(), tmp_path / "lost", progress=lambda size: stop(size) if size else None)
  manifest = json.loads((tmp_path / "lost" / "manifest.json").read_text())
  assert manifest["tokens"]
  (tmp_path / "lost" / "tokens.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"tokens\.bin has 0 bytes where manifest\.json says .*: a part of it was lost"):
    prepare(texts, ByteTokenizer(), tmp_path / "lost")


@pytest.mark.parametrize("after", [0, 900, 5000])
def test_a_run_stopped_anywhere_is_resumed_to_the_same_files(after, texts, small_batches, tmp_path):
  done = 0

  def stop(size):
    nonlocal done
    done += size
    if done > after:
      raise Stopped

  with pytest.raises(Stopped):
    prepare(texts, ByteTokenizer(), tmp_path / "stopped", progress=stop)
  with pytest.raises(ValueError, match="is not finished"):
    open_tokens(f"{tmp_path}/stopped", ByteTokenizer())
  for name in ("tokens.bin", "keys.bin", "lengths.bin"):  # A process that is killed may have written more.
    with open(tmp_path / "stopped" / name, "ab") as file:
      file.write(b"more")
  encoded = []
  resumed_tokenizer = ByteTokenizer()
  encode = resumed_tokenizer.encode_documents
  resumed_tokenizer.encode_documents = lambda batch: (encoded.extend(batch), encode(batch))[1]
  shown = []
  prepare(texts, resumed_tokenizer, tmp_path / "stopped", progress=shown.append)
  assert sum(shown) == texts.size()
  prepare(texts, ByteTokenizer(), tmp_path / "straight")
  assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
  if after >= 2000:
    assert len(encoded) < 70  # What was written is not tokenized again.


def test_a_finished_folder_is_left_as_it_is(texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  before = contents(tmp_path / "out")
  prepare(texts, ByteTokenizer(), tmp_path / "out", progress=unexpected)
  assert contents(tmp_path / "out") == before


def test_a_source_that_changed_under_an_unfinished_folder_is_refused(texts, small_batches, tmp_path):
  with pytest.raises(Stopped):
    prepare(texts, ByteTokenizer(), tmp_path / "out", progress=raise_after(5000))
  (tmp_path / "texts" / "00.txt").write_text("changed")
  with pytest.raises(ValueError, match=r"has changed since its first \d+ documents .* remove"):
    prepare(texts, ByteTokenizer(), tmp_path / "out")


def raise_after(limit):
  sizes = []

  def progress(size):
    sizes.append(size)
    if sum(sizes) > limit:
      raise Stopped

  return progress


def test_folders_that_hold_something_else_are_not_written_to(texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  other = text_files(f"{tmp_path}/texts/1*.txt")
  with pytest.raises(ValueError, match="holds tokens of source .* name another one"):
    prepare(other, ByteTokenizer(), tmp_path / "out")
  bpe = train_or_load_bpe(texts, 280, tmp_path / "bpe")
  with pytest.raises(ValueError, match="holds tokens of tokenizer"):
    prepare(texts, bpe, tmp_path / "out")
  with pytest.raises(ValueError, match="texts holds other files"):
    prepare(texts, bpe, tmp_path / "texts")


def test_a_bpe_is_trained_once_and_kept_with_its_tokens(texts, tmp_path):
  bpe = train_or_load_bpe(texts, 280, tmp_path / "out")
  manifest = prepare(texts, bpe, tmp_path / "out")
  assert bpe.vocab_size == 280 and manifest["tokens"] < manifest["bytes"] / 2
  assert train_or_load_bpe(texts, 280, tmp_path / "out", progress=unexpected).fingerprint == bpe.fingerprint
  config = DataConfig(source=f"tokens:{tmp_path}/out", tokenizer=f"{tmp_path}/out", batch_size=2)
  data = open_data(config, seq_length=8)
  assert data.tokenizer.decode(data.train_tokens()[:8]) in (tmp_path / "texts" / "00.txt").read_text()
  with pytest.raises(ValueError, match="was made by tokenizer .* set data.tokenizer="):
    open_tokens(f"{tmp_path}/out", ByteTokenizer())


@pytest.mark.parametrize(
  "name, break_it, words",
  [
    ("tokens.bin", lambda raw: raw[:-2], r"tokens\.bin has \d+ bytes and .*manifest\.json says"),
    ("tokens.bin", lambda raw: b"x" + raw[1:], r"tokens\.bin has changed since it was prepared"),
    ("keys.bin", lambda raw: raw[:-8], r"keys\.bin has \d+ bytes"),
    ("tokens.idx", lambda raw: raw[:-8], r"tokens\.idx has \d+ bytes and its header says"),
    ("manifest.json", lambda raw: raw[:-9], "is not a folder of prepared tokens"),
  ],
)
def test_damage_to_a_prepared_folder_is_found(name, break_it, words, texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  path = tmp_path / "out" / name
  path.write_bytes(break_it(path.read_bytes()))
  with pytest.raises(ValueError, match=words):
    open_tokens(f"{tmp_path}/out", ByteTokenizer())


def test_a_source_without_text_leaves_no_finished_folder(texts, tmp_path):
  (tmp_path / "texts" / "00.txt").write_bytes(b"\xff")
  with pytest.raises(ValueError, match="holds no text"):
    prepare(text_files(f"{tmp_path}/texts/00.txt"), ByteTokenizer(), tmp_path / "out", bad_text="skip")
  assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]


def add_a_file(folder):
  (folder / "texts" / "99.txt").write_text("one more")


def remove_a_file(folder):
  (folder / "texts" / "05.txt").unlink()


def lengthen_a_file(folder):
  (folder / "texts" / "05.txt").write_text("another text" * 100)


def rewrite_a_file(folder):
  path = folder / "texts" / "05.txt"
  path.write_text(path.read_text().replace("number", "figure"))
  os.utime(path, (1, 1))


@pytest.mark.parametrize(
  "change, words",
  [
    (add_a_file, r"1 new \(.*99\.txt\): remove the folder"),
    (remove_a_file, r"1 missing \(.*05\.txt\)"),
    (lengthen_a_file, r"1 of another size \(.*05\.txt\)"),
    (rewrite_a_file, "has changed since its first 80 documents were prepared"),
  ],
)
def test_a_finished_folder_of_other_files_is_refused(change, words, texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  before = contents(tmp_path / "out")
  change(tmp_path)
  with pytest.raises(ValueError, match=words):
    prepare(text_files(f"{tmp_path}/texts/*.txt"), ByteTokenizer(), tmp_path / "out")
  assert contents(tmp_path / "out") == before


def test_files_that_were_copied_or_touched_are_compared_by_their_text(texts, tmp_path):
  manifest = prepare(texts, ByteTokenizer(), tmp_path / "out")
  for path in (tmp_path / "texts").iterdir():
    os.utime(path, (1, 1))
  shown = []
  assert prepare(texts, ByteTokenizer(), tmp_path / "out", progress=shown.append) == manifest
  assert sum(shown) == texts.size()
  assert prepare(texts, ByteTokenizer(), tmp_path / "out", progress=unexpected) == manifest


@pytest.mark.parametrize("finished", [True, False])
def test_another_choice_for_bad_text_is_refused(finished, texts, small_batches, tmp_path):
  (tmp_path / "texts" / "02.txt").write_bytes(b"\xff" * 900)
  prepare_stopped = pytest.raises(Stopped) if not finished else contextlib.nullcontext()
  with prepare_stopped:
    progress = raise_after(5000) if not finished else lambda size: None
    prepare(texts, ByteTokenizer(), tmp_path / "out", bad_text="replace", progress=progress)
  for choice in ("skip", "error"):
    with pytest.raises(ValueError, match=f"prepared with bad_text='replace', not '{choice}'"):
      prepare(texts, ByteTokenizer(), tmp_path / "out", bad_text=choice)


def test_a_run_that_bad_text_stopped_is_resumed_with_another_choice(texts, small_batches, tmp_path):
  (tmp_path / "texts" / "50.txt").write_bytes(b"\xff" * 900)
  with pytest.raises(ValueError, match=r"50\.txt is not UTF-8"):
    prepare(texts, ByteTokenizer(), tmp_path / "out")
  for folder in ("out", "straight"):
    assert prepare(texts, ByteTokenizer(), tmp_path / folder, bad_text="skip")["skipped"] == 1
  assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("prepared", [True, False])
def test_a_bpe_that_was_trained_otherwise_is_refused(prepared, texts, tmp_path):
  bpe = train_or_load_bpe(texts, 270, tmp_path / "out")
  if prepared:
    prepare(texts, bpe, tmp_path / "out")
  with pytest.raises(ValueError, match="holds a BPE with vocab_size=270, not 300: remove the folder"):
    train_or_load_bpe(texts, 300, tmp_path / "out")
  with pytest.raises(ValueError, match="special_tokens='recognise', not 'text'"):
    train_or_load_bpe(texts, 270, tmp_path / "out", special_tokens="text")
  add_a_file(tmp_path)
  with pytest.raises(ValueError, match=r"trained on other files .* 1 new"):
    train_or_load_bpe(text_files(f"{tmp_path}/texts/*.txt"), 270, tmp_path / "out")
  (tmp_path / "texts" / "99.txt").unlink()
  rewrite_a_file(tmp_path)
  with pytest.raises(ValueError, match="written again since" if not prepared else "has changed since"):
    prepare(texts, train_or_load_bpe(texts, 270, tmp_path / "out"), tmp_path / "out")


def test_a_bpe_of_an_earlier_release_is_recognised_by_its_size(texts, tmp_path):
  prepare(texts, train_or_load_bpe(texts, 270, tmp_path / "out"), tmp_path / "out")
  (tmp_path / "out" / "bpe.json").unlink()
  assert train_or_load_bpe(texts, 270, tmp_path / "out").vocab_size == 270
  with pytest.raises(ValueError, match="holds another tokenizer of 270 ids, not a BPE of 300"):
    train_or_load_bpe(texts, 300, tmp_path / "out")
  prepare(texts, ByteTokenizer(), tmp_path / "bytes")
  with pytest.raises(ValueError, match="holds another tokenizer of 257 ids, not a BPE of 257"):
    train_or_load_bpe(texts, 257, tmp_path / "bytes")


def test_a_tokenizer_of_someone_else_is_neither_used_nor_overwritten(texts, tmp_path):
  folder = tmp_path / "theirs"
  folder.mkdir()
  bpe = train_or_load_bpe(texts, 280, tmp_path / "bpe")
  foreign = json.dumps(bpe.huggingface())
  (folder / "tokenizer.json").write_text(foreign)
  with pytest.raises(ValueError, match=r"tokenizer\.json was not trained by this command"):
    train_or_load_bpe(texts, 280, folder)
  with pytest.raises(ValueError, match="holds another tokenizer and is not overwritten"):
    prepare(texts, ByteTokenizer(), folder)
  assert contents(folder) == {"tokenizer.json": foreign.encode()}


def test_a_folder_of_an_earlier_release_is_compared_by_its_text(texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  del manifest["bad_text"]
  (tmp_path / "out" / "manifest.json").write_text("\ufeff" + json.dumps(manifest))  # And a byte-order mark.
  (tmp_path / "out" / "inputs.json").unlink()
  assert prepare(texts, ByteTokenizer(), tmp_path / "out")["tokens"] == manifest["tokens"]
  (tmp_path / "out" / "inputs.json").unlink()
  add_a_file(tmp_path)
  with pytest.raises(ValueError, match="holds more documents than the 80 in"):
    prepare(text_files(f"{tmp_path}/texts/*.txt"), ByteTokenizer(), tmp_path / "out")


def test_a_prepared_folder_may_be_copied_to_a_bucket(texts, tmp_path, bucket):  # noqa: F811
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  shutil.copytree(tmp_path / "out", bucket.folder / "out")
  assert open_tokens("gs://bucket/out", ByteTokenizer()).keys.tolist() == tokenize(texts, ByteTokenizer()).keys.tolist()


def test_the_folder_may_begin_with_a_tilde_and_is_local(texts, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  prepare(texts, ByteTokenizer(), "~/out")
  assert (tmp_path / "out" / "manifest.json").is_file()
  for folder, words in (("", "the path is empty"), ("hf://bucket/out", "prepared in a local folder")):
    with pytest.raises(ValueError, match=words):
      prepare(texts, ByteTokenizer(), folder)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_merged_parts_are_the_folder_of_a_single_run(count, texts, tmp_path, monkeypatch):
  monkeypatch.setattr("tokenformer_jax.data.prepared_parts.CHUNK", 500)
  (tmp_path / "texts" / "05.txt").write_bytes(b"\xff")
  texts = text_files(f"{tmp_path}/texts/0*.txt")
  straight = prepare(texts, ByteTokenizer(), tmp_path / "straight", bad_text="skip")
  encoded = 0
  for number in range(1, count + 1):
    part = prepare(texts, ByteTokenizer(), tmp_path / "out", bad_text="skip", part=(number, count))
    encoded += part["documents"]
  assert encoded == straight["documents"] == 9
  written = []
  assert merge_parts(tmp_path / "out", progress=written.append) == straight
  assert sum(written) == straight["tokens"]
  merged = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
  assert merged == contents(tmp_path / "straight")
  assert merge_parts(tmp_path / "out", progress=unexpected) == straight


def test_a_stopped_part_is_resumed(texts, small_batches, tmp_path):
  with pytest.raises(Stopped):
    prepare(texts, ByteTokenizer(), tmp_path / "out", part=(2, 2), progress=raise_after(2000))
  with pytest.raises(ValueError, match="lacks the parts 1/2"):
    merge_parts(tmp_path / "out")
  prepare(texts, ByteTokenizer(), tmp_path / "out", part=(1, 2))
  with pytest.raises(ValueError, match=r"part-00002-of-00002 is not finished"):
    merge_parts(tmp_path / "out")
  prepare(texts, ByteTokenizer(), tmp_path / "out", part=(2, 2))
  assert merge_parts(tmp_path / "out") == prepare(texts, ByteTokenizer(), tmp_path / "straight")


def test_a_part_that_changed_between_the_blocks_of_its_fingerprint_is_not_merged(texts, tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprint, "WHOLE", 40)
  monkeypatch.setattr(fingerprint, "BLOCK", 10)
  for number in (1, 2):
    prepare(texts, ByteTokenizer(), tmp_path / "out", part=(number, 2))
  part = tmp_path / "out" / "part-00002-of-00002"
  raw = bytearray((part / "tokens.bin").read_bytes())
  # The form of sha256sum, which can check the folder as well.
  assert f"{hashlib.sha256(raw).hexdigest()}  tokens.bin" in (part / "SHA256SUMS").read_text().splitlines()
  raw[20] ^= 1
  (part / "tokens.bin").write_bytes(raw)
  with pytest.raises(ValueError, match="00002/tokens.bin has changed since it was prepared"):
    merge_parts(tmp_path / "out")


def test_parts_that_do_not_belong_together_are_not_merged(texts, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(ValueError, match="part=0/2: choose one of 1/2 to 2/2"):
    prepare(texts, ByteTokenizer(), out, part=(0, 2))
  with pytest.raises(ValueError, match="holds no parts"):
    merge_parts(tmp_path)
  prepare(texts, ByteTokenizer(), out, part=(1, 2))
  with pytest.raises(ValueError, match="is one part of a corpus: merge"):
    open_tokens(f"{out}/part-00001-of-00002", ByteTokenizer())
  with pytest.raises(ValueError, match="holds part 1/2, not all"):
    prepare(texts, ByteTokenizer(), out / "part-00001-of-00002")
  rewrite_a_file(tmp_path)  # Document 6, which is tokenized by the second part alone.
  prepare(texts, ByteTokenizer(), out, part=(2, 2))
  with pytest.raises(ValueError, match="00002 was prepared with a source that held .*, and .*00001-of-00002 with"):
    merge_parts(out)
  prepare(texts, ByteTokenizer(), out, part=(1, 3))
  with pytest.raises(ValueError, match=r"holds parts of \[2, 3\]"):
    merge_parts(out)


@pytest.fixture
def cli(monkeypatch, capsys):
  """A function that calls the command with flags and returns what it prints."""

  def call(*arguments):
    with flagsaver.flagsaver():
      flags.FLAGS(["prepare", *arguments])
      command.main([])
    return capsys.readouterr()

  return call


def test_the_command_prepares_parts_and_merges_them(cli, texts, tmp_path):
  source, out = f"--source=text:{tmp_path}/texts/*.txt", f"--out={tmp_path}/out"
  trained = cli(source, f"--out={tmp_path}/bpe", "--train_bpe=300")
  assert "80 documents" in trained.out and "Vocabulary 300 (padded 384)" in trained.out
  for number in (1, 2):
    cli(source, out, f"--tokenizer={tmp_path}/bpe", f"--part={number}/2")
  assert "80 documents" in cli(out, "--merge").out
  assert (tmp_path / "out" / "tokens.bin").read_bytes() == (tmp_path / "bpe" / "tokens.bin").read_bytes()


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--source: name one source"),
    (["--source=text:a + text:b"], "each source of a mixture in a folder of its own"),
    (["--source=text:nothing*"], "no file matches"),
    (["--source=python-sources", "--part=1"], "--part=1: write i/n"),
    (["--source=python-sources", "--part=1/2", "--train_bpe=300"], "train the BPE once"),
    (["--source=python-sources", "--merge"], "--merge: the parts say"),
    (["--source=python-sources", "--tokenizer="], "the path is empty"),
  ],
)
def test_flags_that_do_not_fit_together(arguments, words, cli, tmp_path):
  with pytest.raises(ValueError, match=words):
    cli(f"--out={tmp_path}/out", *arguments)
  assert not (tmp_path / "out").exists()
