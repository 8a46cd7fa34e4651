import json
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets as tfds

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data import open_data
from tokenformer_jax.data.catalogues import huggingface_documents, tfds_documents
from tokenformer_jax.data.documents import BadText

TEXTS = [f"{i} is the number of this tfds document. " * 3 for i in range(40)]


class LocalBooks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set that is found by its files alone, like one that another program made."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"text": tfds.features.Text(), "title": tfds.features.Text(), "length": np.int64}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:4])}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {"text": text, "title": f"Book {i}", "length": len(text)}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  LocalBooks(data_dir=folder, file_format="array_record").download_and_prepare()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", str(folder.parent))
    patch.setenv("TFDS_DATA_DIR", f"~/{folder.name}")
    yield folder


def read(source):
  return [document.text for document in source.read(BadText())]


@pytest.mark.parametrize(
  "rest, count",
  [
    ("local_books#text", 40),
    ("local_books:1.0.0#text", 40),
    ("local_books@test#text", 4),
    ("local_books:1.0.0@train[:25%]#text", 10),
  ],
)
def test_tfds_names_splits_and_features(rest, count, tfds_folder):
  texts = read(tfds_documents(rest))
  assert len(texts) == count and set(texts) <= set(TEXTS)
  assert texts == read(tfds_documents(rest))


def test_a_tfds_data_set_becomes_batches_without_tensorflow(tfds_folder):
  data = open_data(
    DataConfig(source="tfds:local_books#text", held_out_source="tfds:local_books@test#text", batch_size=2),
    seq_length=16,
  )
  assert "tensorflow" not in sys.modules
  assert next(data.train_batches()).inputs.shape == (2, 16)
  tokens = data.train_tokens()
  documents = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)).split(b"\0")
  assert sorted(documents)[1:] == sorted(text.encode() for text in TEXTS)
  assert len(data.held_out_tokens()) == sum(len(text) + 1 for text in TEXTS[:4])


@pytest.mark.parametrize(
  "rest, words",
  [
    ("local_boks#text", r"has a data set 'local_boks'\..*Did you mean 'local_books'\?"),
    ("local_books:2.0.0#text", "other versions or configs of 'local_books': 1.0.0"),
    ("local_books/large#text", "other versions or configs of 'local_books': 1.0.0"),
    ("local_books@valid#text", "split 'valid' cannot be read .* it has train, test"),
    ("local_books", r"name one of its text features after '#': text, title \(features: length, text, title\)"),
    ("local_books#length", r"'length' is not one of its text features.*text, title"),
    ("local_books#txet", "Did you mean 'text'"),
  ],
)
def test_tfds_errors_name_the_mistake_and_what_exists(rest, words, tfds_folder):
  with pytest.raises(ValueError, match=words) as error:
    tfds_documents(rest)
  assert "\n" not in str(error.value)


def test_the_reason_is_named_if_a_data_set_cannot_be_made(tfds_folder, monkeypatch):
  class Catalogue:
    def __init__(self, error):
      self._error = error

    def __getattr__(self, name):
      return getattr(tfds, name)

    def builder(self, name, **kwargs):
      builder = LocalBooks(data_dir=tfds_folder / "elsewhere")
      monkeypatch.setattr(builder, "download_and_prepare", self._fail)
      return builder

    def _fail(self):
      raise self._error

  for error, words in (
    (ImportError("No module named 'tensorflow'"), "'tensorflow'.*install it"),
    (OSError("no network"), r"could not be made there \(OSError: no network\)"),
  ):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", Catalogue(error))
    with pytest.raises(ValueError, match=words):
      tfds_documents("local_books#text")


@pytest.mark.filterwarnings("ignore")  # Warnings of the package itself, which change from version to version.
def test_huggingface_data_sets_in_folders(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("HOME", str(tmp_path))
  datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
  files = tmp_path / "files"
  files.mkdir()
  for split, texts in (("train", TEXTS), ("test", TEXTS[:4])):
    lines = [json.dumps({"text": text, "n": i}) for i, text in enumerate(texts)]
    (files / f"{split}.jsonl").write_text("\n".join(lines))
  datasets.load_dataset(str(files)).save_to_disk(str(tmp_path / "saved"))
  for folder in ("~/files", "~/saved"):
    assert read(huggingface_documents(folder)) == TEXTS
    assert read(huggingface_documents(f"{folder}@test#text")) == TEXTS[:4]
    with pytest.raises(ValueError, match="no field 'body'; it has text, n"):
      huggingface_documents(f"{folder}#body")
    with pytest.raises(ValueError, match="split 'valid'"):
      huggingface_documents(f"{folder}@valid")
    with pytest.raises(ValueError, match="record 0: field 'n' is a int"):
      read(huggingface_documents(f"{folder}#n"))


def test_the_missing_package_for_huggingface_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="huggingface:books: pip install datasets"):
    huggingface_documents("books")
