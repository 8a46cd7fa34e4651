"""Tokenizers: bytes, and anything that the `tokenizers` package reads; each one self-contained JSON text."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from tokenformer_jax.data import byte_level_bpe

LONG_TEXT = 500_000  # Characters.
PADDING_MULTIPLE = 128
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")


class Tokenizer:
  """Text to ids and back.

  Attributes:
    vocab_size: the ids that mean something are 0 … vocab_size − 1.
    end_of_document: the id that follows every document.
  """

  vocab_size: int
  end_of_document: int

  def encode(self, text: str) -> list[int]:
    """The ids of `text`; no begin or end token is added. ValueError if it is not Unicode."""
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(
        f"the text is not Unicode at character {error.start} (half a surrogate pair): give UTF-8."
      ) from None
    return self.encode_documents([text])[0].tolist()

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One array [n] of `dtype` a text, computed in parallel where the tokenizer can."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; end-of-document ids leave no trace, bytes that are no UTF-8 become U+FFFD.

    Raises ValueError for an id that is negative or not below `vocab_size`.
    """
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
      if not 0 <= i < self.vocab_size:
        raise ValueError(
          f"id {i} at position {position} has no text: this tokenizer's ids are 0 to {self.vocab_size - 1}."
        )
    return self._decode(ids)

  def decode_after(self, context_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to the text of the ids before them.

    Tokenizers that are not byte-level write no space before the first word of a text (Metaspace, WordPiece), so
    `decode(prompt) + decode(continuation)` loses the space in between, and a character whose bytes are shared by
    both is lost. `decode(prompt) + decode_after(prompt, continuation)` is `decode(prompt + continuation)`, up to
    replacement characters at the end of the prompt.

    Args:
      context_ids: the ids before; only those after the last end of document count, as a new document begins
        there. The last few dozen suffice: decoders look no further back than one character and one word.
      ids: the ids whose text is wanted.

    Returns:
      The text of `ids` as it reads after the context. While the ids end inside a character, the text ends in
      U+FFFD (or is empty, if the context ended inside the same character); a call with more ids gives the character.

    Raises:
      ValueError: an id without text, see `decode`.
    """
    context = list(context_ids)
    if self.end_of_document in context:
      context = context[len(context) - context[::-1].index(self.end_of_document) :]
    # The longest common prefix is all of the context's text, except for a character that its last id only began.
    before, together = self.decode(context), self.decode([*context, *ids])
    return together[len(os.path.commonprefix([before, together])) :]

  def _decode(self, ids: list[int]) -> str:
    raise NotImplementedError

  @property
  def padded_vocab_size(self) -> int:
    """The model's vocabulary: the next multiple of 128, as in the released models (50277 → 50304)."""
    return -(-self.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE

  @property
  def dtype(self) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

  def to_json(self) -> str:
    """Everything that is needed to make this tokenizer again with `tokenizer_from_json`."""
    return json.dumps(self._description(), ensure_ascii=False, sort_keys=True)

  def _description(self) -> dict:
    raise NotImplementedError

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of `to_json()`, hexadecimal."""
    return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes as ids 0–255; end of document is 256."""

  vocab_size = 257
  end_of_document = 256

  def encode_documents(self, texts):
    return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype) for text in texts]

  def _decode(self, ids):
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

  def _description(self):
    return {"kind": "bytes"}


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer of the `tokenizers` package, without its truncation and padding.

  Args:
    description: the parsed tokenizer.json.
    end_of_document: the name of the token that ends a document.
  """

  def __init__(self, description: dict, end_of_document: str):
    import tokenizers

    self._json = {**description, "truncation": None, "padding": None}
    self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._json))
    self._end_of_document = end_of_document
    end = self._tokenizer.token_to_id(end_of_document)
    if end is None:
      raise ValueError(
        f"end-of-document token {end_of_document!r} is not in this tokenizer's vocabulary: "
        "name another one after '#', as in PATH#TOKEN."
      )
    self.end_of_document = end
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

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
    """Pieces of a long text whose ids, end to end, are its ids; an encoding takes 100 times its memory."""
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
    """Whether the pre-tokenizer parts words at `cut`, and both sides have the ids that they have together."""
    words = self._tokenizer.pre_tokenizer
    left, right = text[cut - 100 : cut], text[cut : cut + 100]
    if words is None or all(end != len(left) for _, (_, end) in words.pre_tokenize_str(left + right)):
      return False
    both, first, second = (ids.tolist() for ids in self._encode_batch([left + right, left, right]))
    return both == first + second

  def _decode(self, ids):
    return self._tokenizer.decode([i for i in ids if i != self.end_of_document], skip_special_tokens=False)

  def _description(self):
    return {"kind": "huggingface", "end_of_document": self._end_of_document, "tokenizer": self._json}


def tokenizer_from_json(text: str, where: str = "tokenizer") -> Tokenizer:
  """The tokenizer of `Tokenizer.to_json()`; `where` names it in errors."""
  try:
    description = json.loads(text)
    kind = description["kind"]
    if kind == "bytes":
      return ByteTokenizer()
    if kind == "huggingface":
      return HuggingFaceTokenizer(description["tokenizer"], description["end_of_document"])
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f"{where}: not a tokenizer saved by tokenformer_jax ({error!r}).") from None
  raise ValueError(f"{where}: tokenizer kind {kind!r} is unknown; known: bytes, huggingface.")


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
  """Writes the tokenizer into one self-contained file; an existing file is replaced in one step."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(tokenizer.to_json(), encoding="utf-8")
  unfinished.replace(path)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in a file of `save_tokenizer`."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"tokenizer file {path} cannot be read: {error}.") from None
  return tokenizer_from_json(text, where=str(path))


def open_tokenizer(spec: str) -> Tokenizer:
  """The tokenizer that `spec` names.

  `bytes`; or `WHERE[#TOKEN]`, where WHERE is a file of `save_tokenizer`, a Hugging Face tokenizer JSON,
  a folder with one of these or with GPT-2 style `vocab.json` and `merges.txt`, or a name on the Hugging
  Face hub; TOKEN ends documents, `<|endoftext|>` and the like if not given.
  """
  if spec == "bytes":
    return ByteTokenizer()
  where, _, end_of_document = spec.partition("#")
  path = pathlib.Path(where).expanduser()
  if path.is_dir():
    path = _file_in(path)
  if path.is_file():
    description = _vocab_and_merges(path) if path.name == "merges.txt" else _read_json(path)
  elif where.startswith((".", "/", "~")) or where.endswith(".json") or where.count("/") > 1:
    raise ValueError(
      f"tokenizer {where!r} does not exist: give a tokenizer JSON, a folder with vocab.json "
      "and merges.txt, a name on the Hugging Face hub, or 'bytes'."
    )
  else:
    description = _from_hub(where)
  if description.get("kind") in ("bytes", "huggingface"):
    return tokenizer_from_json(json.dumps(description), where=where)
  try:
    return HuggingFaceTokenizer(description, end_of_document or _guess_end(description, where))
  except ValueError:
    raise
  except Exception as error:  # The tokenizers package raises bare Exception for a JSON it cannot use.
    raise ValueError(f"tokenizer {where!r} is not a Hugging Face tokenizer JSON: {error}.") from None


def _file_in(folder: pathlib.Path) -> pathlib.Path:
  if (folder / "tokenizer.json").is_file():
    return folder / "tokenizer.json"
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    return folder / "merges.txt"
  candidates = sorted(folder.glob("*tokenizer*.json"))
  if len(candidates) != 1:
    raise ValueError(
      f"tokenizer folder {folder} has neither tokenizer.json nor vocab.json with merges.txt: "
      f"name the file itself. It holds {', '.join(sorted(os.listdir(folder))) or 'nothing'}."
    )
  return candidates[0]


def _read_json(path: pathlib.Path) -> dict:
  try:
    description = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"tokenizer {path} is not JSON: {error}.") from None
  if not isinstance(description, dict):
    raise ValueError(f"tokenizer {path} holds a {type(description).__name__}, not a tokenizer's description.")
  return description


def _vocab_and_merges(merges: pathlib.Path) -> dict:
  """GPT-2's byte-level BPE with the vocabulary of two files in one folder."""
  import tokenizers

  try:
    model = tokenizers.models.BPE.from_file(str(merges.with_name("vocab.json")), str(merges))
  except Exception as error:  # The tokenizers package raises bare Exception for broken files.
    raise ValueError(f"tokenizer {merges.parent}: vocab.json and merges.txt do not fit: {error}.") from None
  return byte_level_bpe.describe(model)


def _from_hub(name: str) -> dict:
  import huggingface_hub

  try:
    return _read_json(pathlib.Path(huggingface_hub.hf_hub_download(name, "tokenizer.json")))
  except Exception as error:  # No network, no such repository, a gate: the hub has many exceptions.
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise ValueError(
      f"tokenizer {name!r} is no local file, and tokenizer.json could not be had from the "
      f"Hugging Face hub ({reason}): check the name, or give a local path."
    ) from None


def _guess_end(description: dict, where: str) -> str:
  model = description.get("model", {})
  vocab = model.get("vocab", ()) if isinstance(model, dict) else ()
  names = {token.get("content") for token in description.get("added_tokens", ())}
  for name in END_OF_DOCUMENT_NAMES:
    if name in names or (isinstance(vocab, dict) and name in vocab):
      return name
  raise ValueError(
    f"tokenizer {where!r} has none of {', '.join(END_OF_DOCUMENT_NAMES)}: name the token that "
    "ends a document after '#', as in PATH#TOKEN."
  )
