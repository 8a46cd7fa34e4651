"""Opens a source: its documents, or a corpus of its token ids."""

from tokenformer_jax.data import catalogues, documents
from tokenformer_jax.data.corpus import Corpus, tokenize
from tokenformer_jax.data.spec import SourceSpec
from tokenformer_jax.data.token_files import open_tokens
from tokenformer_jax.data.tokenizer import Tokenizer

TEXT_SOURCES = {
  "python-sources": lambda rest: documents.python_sources(),
  "text": documents.text_files,
  "jsonl": documents.jsonl_files,
  "tfds": catalogues.tfds_documents,
  "huggingface": catalogues.huggingface_documents,
}


def open_documents(spec: SourceSpec) -> documents.DocumentSource:
  """The documents of a source of text.

  Raises:
    ValueError: the source is one of token files, or it cannot be opened.
  """
  if spec.kind not in TEXT_SOURCES:
    what = "token ids" if spec.kind == "tokens" else "images"
    raise ValueError(f"source {spec} holds {what}, not text: give a source of {', '.join(TEXT_SOURCES)}.")
  return TEXT_SOURCES[spec.kind](spec.rest)


def open_corpus(spec: SourceSpec, tokenizer: Tokenizer, bad_text: str = "error") -> Corpus:
  """The token ids of a source: token files are read when asked for, text is tokenized into memory.

  Raises:
    ValueError: the source cannot be opened, or its text cannot be read (see `BadText`).
  """
  if spec.kind == "tokens":
    return open_tokens(spec.rest, tokenizer)
  return tokenize(open_documents(spec), tokenizer, bad_text)
