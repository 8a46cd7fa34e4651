"""Trains the BPE of a prepared folder once, and refuses to return one that was trained otherwise."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator

from tokenformer_jax.data import byte_level_bpe
from tokenformer_jax.data.documents import BadText, DocumentSource
from tokenformer_jax.data.prepared_folder import (
  BPE,
  local_folder,
  require_no_other_files,
  require_same_bad_text,
  require_same_files,
  stamps,
  write_json,
)
from tokenformer_jax.data.token_files import MANIFEST, TOKENIZER, read_manifest
from tokenformer_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from tokenformer_jax.data.tokenizer_files import config_path, load_tokenizer, save_tokenizer


def train_or_load_bpe(
  source: DocumentSource,
  vocab_size: int,
  folder: str | os.PathLike,
  *,
  bad_text: str = "error",
  special_tokens: str = "recognise",
  progress: Callable[[int], None] = lambda size: None,
) -> Tokenizer:
  """The byte-level BPE in a folder, which is first trained on the whole source if the folder has none.

  Args:
    source: documents of text.
    vocab_size: the largest number of ids; short texts give fewer.
    folder: the local folder that `prepare` will fill.
    bad_text: see `BadText`.
    special_tokens: see `HuggingFaceTokenizer`.
    progress: called with the size in bytes of each document that was read.

  Raises:
    ValueError: the folder holds a BPE of another size, source, files or options, or a tokenizer that this
      function did not write.
  """
  folder = local_folder(folder)
  asked = dict(
    vocab_size=vocab_size, source=source.name, bad_text=bad_text, special_tokens=special_tokens, inputs=stamps(source)
  )
  path = folder / TOKENIZER
  if path.is_file():
    _require_same(folder, asked)
    return load_tokenizer(path)
  require_no_other_files(folder, {BPE, TOKENIZER, config_path(path).name})

  def texts() -> Iterator[str]:
    for document in source.read(BadText(bad_text)):
      progress(len(document.text.encode("utf-8")))
      yield document.text

  tokenizer = HuggingFaceTokenizer(
    byte_level_bpe.train(texts(), vocab_size), byte_level_bpe.END_OF_DOCUMENT, special_tokens
  )
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / BPE, asked)
  save_tokenizer(tokenizer, path)
  return tokenizer


def _require_same(folder: pathlib.Path, asked: dict) -> None:
  """Raises ValueError unless the BPE in a folder was trained as the caller asks for it."""
  way_out = "remove the folder to train it again, or name another one"
  is_prepared = (folder / MANIFEST).is_file()
  if not (folder / BPE).is_file():
    # Earlier releases did not store the request; the number of ids is the same, unless the text was short.
    present = load_tokenizer(folder / TOKENIZER)
    if not is_prepared:
      raise ValueError(
        f"{folder / TOKENIZER} was not trained by this command: move it away, or use it with --tokenizer."
      )
    if not isinstance(present, HuggingFaceTokenizer) or present.vocab_size != asked["vocab_size"]:
      raise ValueError(
        f"{folder} holds another tokenizer of {present.vocab_size} ids, not a BPE of {asked['vocab_size']}: {way_out}."
      )
    return
  try:
    stored = json.loads((folder / BPE).read_text(encoding="utf-8-sig"))
    for key in ("vocab_size", "source", "special_tokens"):
      if stored[key] != asked[key]:
        raise ValueError(f"{folder} holds a BPE with {key}={stored[key]!r}, not {asked[key]!r}: {way_out}.")
    inputs = [[name, size, time] for name, size, time in stored["inputs"]]
    bad_text = stored["bad_text"]
  except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
    raise ValueError(f"{folder / BPE} cannot be read ({error!r}): {way_out}.") from None
  require_same_bad_text(bad_text, asked["bad_text"], f"{folder} holds a BPE trained with", way_out)
  require_same_files(inputs, asked["inputs"], f"{folder} holds a BPE trained on", way_out)
  # `prepare` itself compares the text of a finished folder.
  if inputs != asked["inputs"] and not (is_prepared and read_manifest(folder)["complete"]):
    raise ValueError(f"{folder} holds a BPE trained on files that were written again since: {way_out}.")
