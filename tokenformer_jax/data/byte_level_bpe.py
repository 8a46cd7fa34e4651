"""Byte-level tokenizers as Hugging Face tokenizer.json: GPT-2's kind of BPE, and one id per byte.

The descriptions are written out here and are not what the installed `tokenizers` package would write, because
that changes with its version.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and the end of document.


def describe(vocab: Mapping[str, int], merges: Iterable[Sequence[str]], *, use_regex: bool = True) -> dict[str, Any]:
  """The parsed tokenizer.json of a byte-level BPE.

  Args:
    vocab: the id of every token, in GPT-2's alphabet of 256 printable characters for the bytes.
    merges: pairs of tokens, in the order in which they were learned.
    use_regex: whether GPT-2's regular expression cuts the text into words before the merges are applied.
  """
  special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
  byte_level = dict(type="ByteLevel", trim_offsets=True, use_regex=use_regex)
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": vocab[END_OF_DOCUMENT], "content": END_OF_DOCUMENT, **special}]
    if END_OF_DOCUMENT in vocab
    else [],
    "normalizer": None,
    "pre_tokenizer": {**byte_level, "add_prefix_space": False},
    "post_processor": None,
    "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": dict(vocab),
      "merges": [list(merge) for merge in merges],
    },
  }


def train(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
  """The parsed tokenizer.json of a byte-level BPE that is trained on texts.

  Args:
    texts: the documents.
    vocab_size: the largest number of ids; short texts give fewer.

  Raises:
    ValueError: `vocab_size` is too small for the 256 bytes and the end of document.
  """
  import tokenizers

  if vocab_size < SMALLEST:
    raise ValueError(
      f"a BPE of {vocab_size} ids cannot hold the 256 bytes and the end of document: ask for at least {SMALLEST}."
    )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_DOCUMENT],
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return describe(*_vocab_and_merges(tokenizer))


def describe_bytes() -> dict[str, Any]:
  """The parsed tokenizer.json whose ids are those of `ByteTokenizer`: id b is byte b, the end of document is 256."""
  vocab = {character: byte for byte, character in enumerate(_alphabet())}
  return describe({**vocab, END_OF_DOCUMENT: 256}, (), use_regex=False)


def _alphabet() -> list[str]:
  """[256] the printable characters that GPT-2 writes for the bytes 0 to 255."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = iter(range(256, 512))
  return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _vocab_and_merges(tokenizer) -> tuple[dict[str, int], list[Sequence[str]]]:
  model = json.loads(tokenizer.to_str())["model"]
  # Releases before 0.20 write a merge as one string.
  merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
  return model["vocab"], merges
