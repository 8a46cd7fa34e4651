"""Catalogues of data sets, and their texts: tensorflow-datasets (read without TensorFlow) and Hugging Face datasets."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from tokenformer_jax.config.validation import nearest
from tokenformer_jax.data.documents import BadText, Document, DocumentSource
from tokenformer_jax.data.files import first_line
from tokenformer_jax.paths import user_path


def tfds_documents(rest: str) -> DocumentSource:
  """`NAME[/CONFIG][:VERSION][@SPLIT][#FEATURE]`, read through tensorflow-datasets' `data_source`.

  The split is `train` by default and may be a slice such as `train[:10%]`. The feature may be left out if the data set
  has only one text feature. Data sets are in the folder TFDS_DATA_DIR, by default ~/tensorflow_datasets; a data set that
  is not there is downloaded and written as array_record files.

  Raises:
    ValueError: the package, the data set, the split or the feature is missing, or the data set cannot be made.
  """
  spec = f"tfds:{rest}"
  name, split, feature = _groups(r"([^@#]*)(?:@([^#]*))?(?:#(.*))?", rest)
  split = split or "train"
  tfds, builder = tfds_builder(name, spec)
  feature = _text_feature(tfds, builder.info.features, feature, spec)
  records = tfds_records(builder, split, spec)

  def read(bad: BadText) -> Iterator[Document]:
    for index in range(len(records)):
      value = records[index][feature]
      text = bad.decode(value, f"{spec} record {index}", 0) if isinstance(value, bytes) else value
      if text:
        yield Document(text, text)

  return DocumentSource(spec, read)


def tfds_records(builder: Any, split: str, spec: str, decoders: Any = None) -> Any:
  """The records of a split with random access; ValueError if there is no such split, or its files do not allow it."""
  try:
    return builder.as_data_source(split, decoders=decoders)
  except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
    raise ValueError(
      f"source {spec}: split {split!r} cannot be read ({first_line(error)}); it has {', '.join(builder.info.splits)}."
    ) from None


def tfds_builder(name: str, spec: str) -> tuple[Any, Any]:
  """(tensorflow-datasets, the builder of a data set whose files exist, if need be after downloading it).

  Raises:
    ValueError: the package or the data set is missing, or the data set cannot be made.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ValueError(
      f"source {spec}: {first_line(error)}; pip install tensorflow-datasets importlib_resources."
    ) from None
  return tfds, _builder(tfds, name, spec)


def _builder(tfds: Any, name: str, spec: str) -> Any:
  data_dir = user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    base = re.split("[/:]", name)[0]
    local = _names_in(data_dir)
    if base in local:
      raise ValueError(
        f"source {spec}: {data_dir} (TFDS_DATA_DIR) has other versions or configs of {base!r}: "
        f"{', '.join(_names_in(data_dir / base))}."
      ) from None
    known = tfds.list_builders(with_community_datasets=False) + local
    raise ValueError(
      f"source {spec}: neither tensorflow-datasets nor the folder {data_dir} (TFDS_DATA_DIR) has a data set "
      f"{base!r}.{nearest(base, known)}"
    ) from None
  except (ValueError, AssertionError) as error:
    raise ValueError(f"source {spec}: {first_line(error)}.") from None
  if builder.info.splits and builder.is_prepared():
    return builder
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder
  except ImportError as error:
    raise ValueError(
      f"source {spec}: making this data set takes a package that is not installed ({first_line(error)}): install it "
      "(tensorflow for most data sets) and make the data set once with file_format='array_record'; reading it does not "
      "take the package."
    ) from None
  except Exception as error:  # Every data set has its own ways to fail.
    raise ValueError(
      f"source {spec}: it is not in {builder.data_dir} and could not be made there ({type(error).__name__}: "
      f"{first_line(error)})."
    ) from None


def _names_in(folder: epath.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _text_feature(tfds: Any, features: Any, name: str | None, spec: str) -> str:
  """The name of the feature to read: the given one, or the only text feature."""
  texts = [key for key, value in sorted(features.items()) if isinstance(value, tfds.features.Text)]
  if not name and len(texts) == 1:
    return texts[0]
  if not name or name not in texts:
    problem = f"{name!r} is not one of its text features" if name else "name one of its text features"
    raise ValueError(
      f"source {spec}: {problem} after '#': {', '.join(texts) or 'it has none'} "
      f"(features: {', '.join(sorted(features))}).{nearest(name, texts) if name else ''}"
    )
  return name


def huggingface_documents(rest: str) -> DocumentSource:
  """`NAME[,CONFIG][@SPLIT][#FIELD]`, read through the package `datasets`.

  NAME is a name on the Hugging Face hub, or a folder of data files or of `save_to_disk`. The split is `train` and the
  field `text` by default.

  Raises:
    ValueError: the package is missing, or `datasets` finds no such data set, split or field.
  """
  spec = f"huggingface:{rest}"
  name, config, split, field = _groups(r"([^,@#]*)(?:,([^@#]*))?(?:@([^#]*))?(?:#(.*))?", rest)
  split, field = split or "train", field or "text"
  try:
    import datasets
  except ImportError:
    raise ValueError(f"source {spec}: pip install datasets.") from None
  try:
    folder = os.path.expanduser(name)
    name = folder if os.path.isdir(folder) else name
    if any(os.path.isfile(os.path.join(folder, file)) for file in ("dataset_dict.json", "state.json")):
      records = datasets.load_from_disk(folder)
      records = records[split] if isinstance(records, datasets.DatasetDict) else records
    else:
      records = datasets.load_dataset(name, config, split=split)
  except Exception as error:  # The package has many exceptions: no network, no such name, split or config.
    raise ValueError(
      f"source {spec}: {type(error).__name__}: {first_line(error)}; check its name, config and split {split!r}."
    ) from None
  if field not in records.column_names:
    raise ValueError(f"source {spec}: it has no field {field!r}; it has {', '.join(records.column_names)}.")

  def read(bad: BadText) -> Iterator[Document]:
    for index, text in enumerate(record[field] for record in records):
      if not isinstance(text, str):
        bad.refuse(f"{spec} record {index}: field {field!r} is a {type(text).__name__}, not text.")
      elif text:
        yield Document(text, text)  # Arrow's strings are UTF-8.

  return DocumentSource(spec, read)


def _groups(pattern: str, text: str) -> Sequence[Any]:
  match = re.fullmatch(pattern, text, re.DOTALL)
  assert match is not None  # Both patterns match every text.
  return match.groups()
