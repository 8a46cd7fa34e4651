"""Real corpora and the released models' tokenizer, from the folder that TOKENFORMER_DATA names."""

import gzip

import pytest

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import open_data, open_tokenizer
from tokenformer_jax.data.documents import text_files
from tokenformer_jax.data.prepare import prepare

MARKER = "<|endoftext|>"


@pytest.mark.parametrize(
  "split, tokens",
  [pytest.param("train", 13_054_574, marks=pytest.mark.every_combination), ("valid", 651_370), ("test", 943_563)],
)
def test_neox_counts_of_the_novels_are_those_of_their_readme(split, tokens, data_folder):
  """The README counts pieces of 100,000 characters of the text between markers, without the markers."""
  tokenizer = open_tokenizer(str(data_folder / "tokenizers" / "gpt_neox_20b"))
  text = gzip.decompress((data_folder / "english_novels" / f"{split}.txt.gz").read_bytes()).decode()
  pieces = [book[i : i + 100_000] for book in text.split(MARKER) for i in range(0, len(book), 100_000)]
  batches = (tokenizer.encode_documents(pieces[i : i + 40]) for i in range(0, len(pieces), 40))
  assert sum(len(ids) for batch in batches for ids in batch) == tokens
  assert (tokenizer.vocab_size, tokenizer.padded_vocab_size, tokenizer.end_of_document) == (50277, 50304, 0)


def test_prepared_novels_are_whole_books_with_an_end_id_after_each(data_folder, tmp_path):
  """Four books have 651,347 ids if they are not cut and the line ends after markers are left out."""
  tokenizer = open_tokenizer(str(data_folder / "tokenizers" / "gpt_neox_20b"))
  source = text_files(f"{data_folder}/english_novels/valid.txt.gz#{MARKER}")
  manifest = prepare(source, tokenizer, tmp_path / "novels")
  assert (manifest["documents"], manifest["tokens"]) == (4, 651_347 + 4)
  config = DataConfig(source=f"tokens:{tmp_path}/novels", tokenizer=str(tmp_path / "novels"), batch_size=2)
  data = open_data(config, seq_length=512)
  books = [data.tokenizer.decode(part) for part in (data.train_tokens(), data.held_out_tokens())]
  original = gzip.decompress((data_folder / "english_novels" / "valid.txt.gz").read_bytes()).decode()
  assert sum(map(len, books)) == len(original.replace(MARKER + "\n", ""))


@pytest.mark.parametrize("name", ["gpt2", "gpt2_tiny_5k"])
def test_vocab_and_merges_give_the_text_back(name, data_folder):
  tokenizer = open_tokenizer(str(data_folder / "tokenizers" / name))
  text = (data_folder / "tinyshakespeare" / "input.txt").read_text()
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  if name == "gpt2":
    assert abs(len(ids) - 338_032) <= 15  # The README's count was made in pieces.


def test_one_real_file_trains_and_its_tail_is_held_out(data_folder):
  config = DataConfig(source=f"text:{data_folder}/tinyshakespeare/input.txt", held_out_fraction=0.1)
  data = open_data(config, seq_length=128)
  assert (len(data.train_tokens()), len(data.held_out_tokens())) == (1_003_855, 111_540)
  assert data.tokenizer.decode(data.train_tokens()[:14]) == "First Citizen:"
