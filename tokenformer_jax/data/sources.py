"""From a source spec to its documents, and to a corpus of token ids."""

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
  """The documents of a source of text; ValueError where there are none to be had."""
  if spec.kind not in TEXT_SOURCES:
    raise ValueError(f"source {spec} holds no text but tokens: name one of {', '.join(TEXT_SOURCES)}.")
  return TEXT_SOURCES[spec.kind](spec.rest)


def open_corpus(spec: SourceSpec, tokenizer: Tokenizer, bad_text: str = "error") -> Corpus:
  """The source's token ids: token files are mapped, text is tokenized into memory."""
  if spec.kind == "tokens":
    return open_tokens(spec.rest, tokenizer)
  return tokenize(open_documents(spec), tokenizer, bad_text)
