"""Tokenizers: bytes, and anything that the `tokenizers` package reads. `tokenizer_files` opens and saves them."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenformer_jax.config.data import SPECIAL_TOKENS
from tokenformer_jax.data import byte_level_bpe
from tokenformer_jax.data.canonical_tokenizer import canonical

LONG_TEXT = 500_000  # Characters; a longer text is encoded in pieces.
PADDING_MULTIPLE = 128


class Tokenizer:
  """Text to ids and back.

  Attributes:
    vocab_size: the ids that have a text are 0 … vocab_size − 1.
    end_of_document: the id that follows every document.
  """

  vocab_size: int
  end_of_document: int

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without a begin or end token.

    Raises:
      ValueError: the text holds half a surrogate pair and is therefore not Unicode.
    """
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(
        f"the text is not Unicode at character {error.start} (half a surrogate pair): give UTF-8."
      ) from None
    return self.encode_documents([text])[0].tolist()

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One array [n] of `dtype` for each text, computed in parallel where the tokenizer can."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; end-of-document ids have no text, and bytes that are not UTF-8 become U+FFFD.

    Raises:
      ValueError: an id is negative or not below `vocab_size`.
    """
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
      if not 0 <= i < self.vocab_size:
        raise ValueError(
          f"id {i} at position {position} has no text: this tokenizer's ids are 0 to {self.vocab_size - 1}."
        )
    return self._decode(ids)

  def _decode(self, ids: list[int]) -> str:
    raise NotImplementedError

  def token_id(self, name: str) -> int | None:
    """The id of the token with this name, such as `[MASK]`; None if there is none."""
    raise NotImplementedError

  @property
  def padded_vocab_size(self) -> int:
    """The vocabulary size of a model: the next multiple of 128, as in the released models (50277 → 50304)."""
    return -(-self.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE

  @property
  def dtype(self) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

  def huggingface(self) -> dict[str, Any]:
    """The parsed tokenizer.json in Hugging Face's format, which gives the same ids."""
    raise NotImplementedError

  def record(self) -> dict[str, Any]:
    """What Hugging Face's format does not say about this tokenizer: its kind, its end of document, its settings."""
    raise NotImplementedError

  @property
  def fingerprint(self) -> str:
    """SHA-256, hexadecimal, of everything that decides about ids; no version of a package changes it."""
    raise NotImplementedError

  def matches(self, fingerprint: str) -> bool:
    """Whether a stored fingerprint is this tokenizer's, including the form that earlier releases stored."""
    return fingerprint == self.fingerprint


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes as ids 0–255, called <0x00> to <0xFF>; the end of document is 256. No text is a special token."""

  vocab_size = 257
  end_of_document = 256

  def encode_documents(self, texts):
    return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype) for text in texts]

  def _decode(self, ids):
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

  def token_id(self, name):
    return int(name[3:5], 16) if re.fullmatch("<0x[0-9A-F]{2}>", name) else None

  def huggingface(self):
    return byte_level_bpe.describe_bytes()

  def record(self):
    return {"kind": "bytes"}

  @property
  def fingerprint(self):
    return _sha256(self.record())


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer of the `tokenizers` package, without its truncation and padding.

  Args:
    description: the parsed tokenizer.json.
    end_of_document: the name of the token that ends a document.
    special_tokens: what the name of a special token means where a text contains it. `recognise`: the special id,
      as in Hugging Face, so that the text `<|endoftext|>` inside a document ends it. `text`: ordinary characters,
      for corpora that write about such tokens or that others could have written them into. Padding, separators
      and the end of document itself are not concerned: ids are added, not text.

  Raises:
    ValueError: the description is not a tokenizer's, the end of document is not in its vocabulary, or its
      vocabulary makes the special id of the plain text, so that `text` is impossible.
  """

  def __init__(self, description: dict[str, Any], end_of_document: str, special_tokens: str = "recognise"):
    import tokenizers

    if special_tokens not in SPECIAL_TOKENS:
      raise ValueError(f"special_tokens={special_tokens!r} is unknown; choose from {', '.join(SPECIAL_TOKENS)}.")
    self._description = {**description, "truncation": None, "padding": None}
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._description))
    except Exception as error:  # The package raises bare Exception for a JSON that it cannot use.
      raise ValueError(f"it is not a Hugging Face tokenizer JSON: {error}.") from None
    self._end_of_document, self._special_tokens = end_of_document, special_tokens
    end = self._tokenizer.token_to_id(end_of_document)
    if end is None:
      raise ValueError(
        f"end-of-document token {end_of_document!r} is not in this tokenizer's vocabulary: "
        "name another one after '#', as in PATH#TOKEN."
      )
    self.end_of_document = end
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    self._byte_ids = self._find_byte_ids()
    self._tokenizer.encode_special_tokens = special_tokens == "text"
    if special_tokens == "text" and end in self.encode(end_of_document):
      raise ValueError(
        f"special_tokens='text': this tokenizer's vocabulary gives the text {end_of_document!r} the id {end} "
        "even where it is not read as a special token; choose special_tokens='recognise'."
      )

  def encode_documents(self, texts):
    short = {i: text for i, text in enumerate(texts) if len(text) <= LONG_TEXT}
    ids = dict(zip(short, self._encode_batch(list(short.values()))))
    for i, text in enumerate(texts):
      if i not in short:
        pieces = list(self._cut(text))
        groups = [pieces[k : k + 8] for k in range(0, len(pieces), 8)]
        ids[i] = np.concatenate([piece for group in groups for piece in self._encode_batch(group)])
    return [ids[i] for i in range(len(texts))]

  def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]

  def _cut(self, text: str) -> Iterator[str]:
    """Pieces of a long text whose ids, end to end, are its ids; encoding takes 100 times the memory of the text."""
    start = 0
    while len(text) - start > LONG_TEXT:
      cut = text.find("\n", start + LONG_TEXT)
      while cut >= 0 and not self._may_cut(text, cut):
        cut = text.find("\n", cut + 1)
      if cut < 0:
        break
      yield text[start:cut]
      start = cut
    yield text[start:]

  def _may_cut(self, text: str, cut: int) -> bool:
    """Whether the pre-tokenizer separates words at `cut`, and both sides have the ids that they have together."""
    words = self._tokenizer.pre_tokenizer
    left, right = text[cut - 100 : cut], text[cut : cut + 100]
    if words is None or all(end != len(left) for _, (_, end) in words.pre_tokenize_str(left + right)):
      return False
    both, first, second = (ids.tolist() for ids in self._encode_batch([left + right, left, right]))
    return both == first + second

  def _decode(self, ids):
    ids = self._with_valid_bytes([i for i in ids if i != self.end_of_document])
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _find_byte_ids(self) -> list[int]:
    """[256] the ids of the tokens <0x00> to <0xFF>, if the decoder joins them to characters; otherwise empty."""
    ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    joins = "ByteFallback" in json.dumps(self._description.get("decoder"))
    known = [i for i in ids if i is not None]
    return known if joins and len(known) == len(ids) else []

  def _with_valid_bytes(self, ids: list[int]) -> list[int]:
    """The ids with U+FFFD in the place of bytes that are not UTF-8.

    The package's decoder writes U+FFFD for every byte of a run of byte tokens if one of them is wrong, or if the last
    character is not complete yet; all characters before it would be lost.
    """
    if not self._byte_ids:
      return ids
    bytes_of = {i: byte for byte, i in enumerate(self._byte_ids)}
    result: list[int] = []
    for is_byte, run in itertools.groupby(ids, bytes_of.__contains__):
      if is_byte:
        text = bytes(bytes_of[i] for i in run).decode("utf-8", errors="replace")
        result += [self._byte_ids[byte] for byte in text.encode("utf-8")]
      else:
        result += run
    return result

  def token_id(self, name):
    return self._tokenizer.token_to_id(name)

  def huggingface(self):
    return self._description

  def record(self):
    settings = {} if self._special_tokens == "recognise" else {"special_tokens": self._special_tokens}
    return {"kind": "huggingface", "end_of_document": self._end_of_document, **settings}

  @functools.cached_property
  def fingerprint(self):
    return _sha256({**self.record(), "tokenizer": canonical(self._description)})

  def matches(self, fingerprint):
    # Earlier releases hashed the file as it was, so that the version of the package that wrote it counted.
    return fingerprint in (self.fingerprint, _sha256({**self.record(), "tokenizer": self._description}))


def _sha256(description: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(description, ensure_ascii=False, sort_keys=True).encode("utf-8")).hexdigest()
