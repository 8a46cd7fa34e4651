"""Tokenizers in files: Hugging Face's tokenizer.json, with our record in the tokenizer_config.json beside it.

`save_tokenizer` writes two files in Hugging Face's own format, so that `tokenizers.Tokenizer.from_file` and
transformers read them. tokenizer_config.json names the token that ends documents (`eos_token`); its entry
`tokenformer_jax`, which others ignore, holds what the format cannot say.
"""

import json
import os
from typing import Any

from etils import epath

from tokenformer_jax.data import byte_level_bpe, word_piece
from tokenformer_jax.data.canonical_tokenizer import canonical
from tokenformer_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from tokenformer_jax.paths import replace_text, user_path

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")
RECORD = "tokenformer_jax"
# What transformers calls the special tokens of encoders.
_NAMES = {
  "unk_token": "[UNK]",
  "cls_token": "[CLS]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "mask_token": "[MASK]",
}


def config_path(path: epath.Path) -> epath.Path:
  """The file beside a tokenizer.json that holds its record: tokenizer_config.json."""
  return path.with_name(path.stem + "_config.json")


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
  """Writes PATH, such as tokenizer.json, in Hugging Face's format, and PATH's stem + `_config.json` beside it.

  An existing file is left alone if it holds this tokenizer; one that an earlier release wrote is rewritten in the
  present format.

  Raises:
    ValueError: PATH holds another tokenizer or something else, or the config beside it was not written by this
      package. Neither is ever overwritten.
  """
  file = user_path(path, "tokenizer file")
  config = config_path(file)
  if file.exists():
    try:
      present = load_tokenizer(file)
    except ValueError as error:
      raise ValueError(f"{file} is not overwritten: {error} Move it away, or choose another folder.") from None
    if present.fingerprint != tokenizer.fingerprint:
      raise ValueError(
        f"{file} holds another tokenizer and is not overwritten: move it away, or choose another folder."
      )
    if "kind" not in _read_json(file):
      return
  if config.exists() and RECORD not in _read_json(config):
    raise ValueError(
      f"{config} was not written by this package and is not overwritten: move it away, or choose another folder."
    )
  record = tokenizer.record()
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": record.get("end_of_document", byte_level_bpe.END_OF_DOCUMENT),
    **{name: token for name, token in _NAMES.items() if token in _added(tokenizer.huggingface())},
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": record["kind"] == "bytes" or record.get("special_tokens") == "text",
    RECORD: record,
  }
  # The tokenizer comes last: where it is complete, its record is there.
  replace_text(config, json.dumps(settings, indent=2) + "\n")
  replace_text(file, json.dumps(tokenizer.huggingface(), indent=2) + "\n")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in a file of `save_tokenizer`, with the settings that it was saved with.

  Raises:
    ValueError: the file cannot be read, or it is not a tokenizer.
  """
  file = user_path(path, "tokenizer file")
  return _from_file(file, _read_json(file))


def open_tokenizer(spec: str, special_tokens: str | None = None) -> Tokenizer:
  """The tokenizer that `spec` names.

  Args:
    spec: `bytes`; or `WHERE[#TOKEN]`. WHERE is a tokenizer.json (Hugging Face's or one of `save_tokenizer`), a
      folder with one, with GPT-2 style `vocab.json` and `merges.txt` or with BERT's `vocab.txt`, or a name on the Hugging
      Face hub; files and folders may be URIs (gs://…). TOKEN ends documents; if it is not given, the file's record names it, or
      it is the first of `<|endoftext|>` and the like that the vocabulary has, or the `eos_token` of the
      tokenizer_config.json.
    special_tokens: `recognise` or `text`, see `HuggingFaceTokenizer`; None takes what the file's record says.

  Raises:
    ValueError: nothing is there, it is not a tokenizer, the token that ends documents is unknown, or
      `special_tokens` is not what the tokenizer was saved with.
  """
  if spec == "bytes":
    return ByteTokenizer()
  where, _, end_of_document = spec.partition("#")
  path = user_path(where, "tokenizer")
  if path.is_dir():
    path = _file_in(path)
  if path.is_file():
    if path.name in ("vocab.json", "merges.txt"):
      description = _vocab_and_merges(path.parent)
    else:
      description = _word_piece(path) if path.suffix == ".txt" else _read_json(path)
    return _from_file(path, description, end_of_document, special_tokens)
  if where.startswith((".", "/", "~")) or where.endswith(".json") or where.count("/") > 1:
    raise ValueError(
      f"tokenizer {where!r} does not exist: give a tokenizer JSON, a folder with vocab.json "
      "and merges.txt, a name on the Hugging Face hub, or 'bytes'."
    )
  return _from_file(_from_hub(where), None, end_of_document, special_tokens, where)


def _from_file(
  path: epath.Path,
  description: dict[str, Any] | None,
  end_of_document: str = "",
  special_tokens: str | None = None,
  name: str = "",
) -> Tokenizer:
  """The tokenizer of a parsed file (None reads it) and of the record beside it; `name` is for messages."""
  name = name or str(path)
  description = _read_json(path) if description is None else description
  if "kind" in description:  # One file with everything in it, as earlier releases wrote it.
    record, description = description, description.get("tokenizer")
    eos_token = None
  else:
    config = _config(path)
    record, eos_token = config.get(RECORD, {}), config.get("eos_token")
  if record.get("kind", "huggingface") not in ("bytes", "huggingface"):
    raise ValueError(f"tokenizer {name}: its kind {record['kind']!r} is unknown; known: bytes, huggingface.")
  if record.get("kind") == "bytes" or (not record and _is_bytes(description)):
    if end_of_document:
      raise ValueError(f"tokenizer {name}#{end_of_document}: a tokenizer of bytes has its own end of document.")
    return ByteTokenizer()
  if not isinstance(description, dict):
    raise ValueError(f"tokenizer {name} is not a tokenizer saved by tokenformer_jax: it has no 'tokenizer'.")
  saved = record.get("special_tokens", "recognise")
  if special_tokens is not None and saved != "recognise" and special_tokens != saved:
    raise ValueError(
      f"tokenizer {name} was saved with special_tokens={saved!r}, not {special_tokens!r}: "
      f"set data.special_tokens={saved!r}, or give the tokenizer that it was made from."
    )
  end = end_of_document or record.get("end_of_document") or _guess_end(description, eos_token, name)
  try:
    return HuggingFaceTokenizer(description, end, special_tokens or saved)
  except ValueError as error:
    raise ValueError(f"tokenizer {name}: {error}") from None


def _is_bytes(description: Any) -> bool:
  """Whether a file is the one that `save_tokenizer` writes for bytes, so that its ids need no lookup."""
  model = description.get("model") if isinstance(description, dict) else None
  if not isinstance(model, dict) or len(model.get("vocab") or ()) != ByteTokenizer.vocab_size:
    return False
  return canonical(description) == canonical(byte_level_bpe.describe_bytes())


def _config(path: epath.Path) -> dict[str, Any]:
  config = config_path(path)
  return _read_json(config) if config.is_file() else {}


def _file_in(folder: epath.Path) -> epath.Path:
  if (folder / "tokenizer.json").is_file():
    return folder / "tokenizer.json"
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    return folder / "merges.txt"
  if (folder / "vocab.txt").is_file():
    return folder / "vocab.txt"
  names = sorted(path.name for path in folder.iterdir())
  candidates = [name for name in names if name.endswith(".json") and "tokenizer" in name and "_config" not in name]
  if len(candidates) != 1:
    raise ValueError(
      f"tokenizer folder {folder} has neither tokenizer.json nor vocab.json with merges.txt nor vocab.txt: "
      f"name the file itself. It holds {', '.join(names) or 'nothing'}."
    )
  return folder / candidates[0]


def _read_text(path: epath.Path) -> str:
  """A text file, without the byte-order mark that some editors write."""
  try:
    return path.read_bytes().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"tokenizer file {path} cannot be read: {error}.") from None


def _read_json(path: epath.Path) -> dict[str, Any]:
  text = _read_text(path)
  try:
    description = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"tokenizer file {path} is not JSON: {error}.") from None
  if not isinstance(description, dict):
    raise ValueError(f"tokenizer file {path} holds a {type(description).__name__}, not a tokenizer's description.")
  return description


def _vocab_and_merges(folder: epath.Path) -> dict[str, Any]:
  """GPT-2's byte-level BPE with the vocabulary of two files in one folder."""
  vocab = _read_json(folder / "vocab.json")
  lines = [
    line for line in _read_text(folder / "merges.txt").split("\n") if line.strip() and not line.startswith("#version")
  ]
  pairs = [line.rstrip("\r").split(" ") for line in lines]
  for pair, line in zip(pairs, lines):
    if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
      raise ValueError(
        f"tokenizer {folder}: vocab.json and merges.txt do not fit: the merge {line!r} is not two "
        "tokens of the vocabulary that make a third."
      )
  return byte_level_bpe.describe(vocab, pairs)


def _word_piece(path: epath.Path) -> dict[str, Any]:
  """BERT's WordPiece with the vocabulary of a file; the tokenizer_config.json beside it says whether it is cased."""
  beside = path.with_name("tokenizer_config.json")
  settings = _read_json(beside) if beside.is_file() else {}
  try:
    tokens = _read_text(path).removesuffix("\n").split("\n")
    return word_piece.describe([t.rstrip("\r") for t in tokens], lower_case=settings.get("do_lower_case") is not False)
  except ValueError as error:
    raise ValueError(f"tokenizer {path} is not a vocabulary of WordPiece: {error}.") from None


def _from_hub(name: str) -> epath.Path:
  import huggingface_hub

  try:
    return epath.Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
  except Exception as error:  # No network, no such repository, a gate: the hub has many exceptions.
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise ValueError(
      f"tokenizer {name!r} is no local file, and tokenizer.json could not be downloaded from the "
      f"Hugging Face hub ({reason}): check the name, or give a local path."
    ) from None


def _added(description: dict[str, Any]) -> set[Any]:
  """The names of the tokens that were added to the vocabulary."""
  return {token.get("content") for token in description.get("added_tokens") or () if isinstance(token, dict)}


def _guess_end(description: dict[str, Any], eos_token: Any, name: str) -> str:
  model = description.get("model", {})
  vocab = model.get("vocab", ()) if isinstance(model, dict) else ()
  names = _added(description)
  eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
  for end in (*END_OF_DOCUMENT_NAMES, eos_token):
    if end in names or (isinstance(vocab, dict) and end in vocab):
      return end
  raise ValueError(
    f"tokenizer {name!r} has none of {', '.join(END_OF_DOCUMENT_NAMES)}: name the token that "
    "ends a document after '#', as in PATH#TOKEN."
  )
