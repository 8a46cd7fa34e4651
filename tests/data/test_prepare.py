import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import corpus as corpus_module
from tokenformer_jax.data import open_data
from tokenformer_jax.data.corpus import split, tokenize
from tokenformer_jax.data.documents import text_files
from tokenformer_jax.data.prepare import prepare, train_or_load_bpe
from tokenformer_jax.data.token_files import open_tokens
from tokenformer_jax.data.tokenizer import ByteTokenizer
from tokenformer_jax.data.tokenizer_files import load_tokenizer


@pytest.fixture
def texts(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 300)
  folder = tmp_path / "texts"
  folder.mkdir()
  for i in range(80):
    (folder / f"{i:02}.txt").write_text(f"{i} is the number of this document. " * (1 + i % 5))
  return text_files(f"{folder}/*.txt")


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_tokens_are_those_of_the_text_and_split_alike(texts, tmp_path):
  shown = []
  manifest = prepare(texts, ByteTokenizer(), tmp_path / "out", progress=shown.append)
  live, prepared = tokenize(texts, ByteTokenizer()), open_tokens(f"{tmp_path}/out", ByteTokenizer())
  for name in ("tokens", "ends", "keys"):
    assert np.array_equal(getattr(prepared, name), getattr(live, name))
  assert np.array_equal(split(prepared, 0.2)[1].documents, split(live, 0.2)[1].documents)
  assert {key: prepared.identity[key] for key in live.identity} == live.identity
  assert sum(shown) == manifest["bytes"] == texts.size()
  assert load_tokenizer(tmp_path / "out" / "tokenizer.json").fingerprint == ByteTokenizer().fingerprint
  assert set(contents(tmp_path / "out")) == {"keys.bin", "manifest.json", "tokenizer.json", "tokens.bin", "tokens.idx"}


class Stopped(Exception):
  pass


@pytest.mark.parametrize("after", [0, 100, 900, 2000, 5000])
def test_stopped_anywhere_it_goes_on_to_the_same_files(after, texts, tmp_path):
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
  prepare(texts, ByteTokenizer(), tmp_path / "out", progress=lambda size: pytest.fail("tokenized again"))
  assert contents(tmp_path / "out") == before


def test_a_source_that_changed_under_an_unfinished_folder_is_refused(texts, tmp_path):
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


def test_folders_of_something_else_are_not_written_to(texts, tmp_path):
  prepare(texts, ByteTokenizer(), tmp_path / "out")
  other = text_files(f"{tmp_path}/texts/1*.txt")
  with pytest.raises(ValueError, match="holds source .* name another folder"):
    prepare(other, ByteTokenizer(), tmp_path / "out")
  bpe = train_or_load_bpe(texts, 280, tmp_path / "bpe")
  with pytest.raises(ValueError, match="holds tokenizer"):
    prepare(texts, bpe, tmp_path / "out")
  with pytest.raises(ValueError, match="texts holds other files"):
    prepare(texts, bpe, tmp_path / "texts")


def test_a_bpe_is_learnt_once_and_lies_with_its_tokens(texts, tmp_path):
  bpe = train_or_load_bpe(texts, 280, tmp_path / "out")
  manifest = prepare(texts, bpe, tmp_path / "out")
  assert bpe.vocab_size == 280 and manifest["tokens"] < manifest["bytes"] / 2
  text = text_files(f"{tmp_path}/texts/13.txt")
  assert train_or_load_bpe(text, 999, tmp_path / "out").fingerprint == bpe.fingerprint
  config = DataConfig(source=f"tokens:{tmp_path}/out", tokenizer=f"{tmp_path}/out", batch_size=2)
  data = open_data(config, seq_length=8)
  assert data.tokenizer.decode(data.train_tokens()[:8]) in (tmp_path / "texts" / "00.txt").read_text()
  with pytest.raises(ValueError, match="was made by tokenizer .* set data.tokenizer="):
    open_tokens(f"{tmp_path}/out", ByteTokenizer())


@pytest.mark.parametrize(
  "name, break_it, words",
  [
    ("tokens.bin", lambda raw: raw[:-2], r"tokens\.bin has \d+ bytes, .*manifest\.json says"),
    ("tokens.bin", lambda raw: b"x" + raw[1:], r"tokens\.bin has changed since it was prepared"),
    ("keys.bin", lambda raw: raw[:-8], r"keys\.bin has \d+ bytes"),
    ("tokens.idx", lambda raw: raw[:-8], r"tokens\.idx has \d+ bytes, its head says"),
    ("manifest.json", lambda raw: raw[:-9], "is no folder of prepared tokens"),
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


def run_door(*flags):
  return subprocess.run(
    [sys.executable, "-m", "tokenformer_jax.cli.prepare", *flags],
    check=False,
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def test_the_door(texts, tmp_path):
  flags = (f"--source=text:{tmp_path}/texts/*.txt", f"--out={tmp_path}/out", "--train_bpe=300")
  done = run_door(*flags)
  assert done.returncode == 0, done.stderr
  assert "80 documents" in done.stdout and "vocabulary 300 (padded 384)" in done.stdout
  assert "100%" in done.stderr
  missing = run_door(f"--source=text:{tmp_path}/nothing*", f"--out={tmp_path}/none")
  assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "no file matches" in missing.stderr
  assert not (tmp_path / "none").exists()
